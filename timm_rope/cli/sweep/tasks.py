"""All evaluations of a sweep, one for each model, rule and size.

They are listed from the arguments of the command and each is tried on a blank image, so that a mistake shows before
hours of work. Then those that the results file does not have yet are run one by one.
"""
import argparse
import hashlib
from importlib import metadata
from typing import Any, Dict, List, Optional, Tuple

import torch

from ..._version import __version__
from .._models import Source, Subject, load, parse_source
from .evaluate import Evaluation, Size, open_images
from .results import Results
from .rules import label_of, takes_rules

Task = Tuple[Source, Optional[str], Size]


def title_of(task: Task) -> str:
    source, rule, (height, width) = task
    return f'{label_of(source.text, rule)} at {height}x{width}'


class Sweep:
    """All that is to be evaluated, loaded and tried; what the results file holds already is left out.

    Args:
        args: Of the command.

    Raises:
        ValueError: Anything that would make an evaluation fail or senseless. Nothing has been evaluated or written.
    """

    def __init__(self, args: argparse.Namespace) -> None:
        self.args = args
        sources = [parse_source(text) for text in dict.fromkeys(args.models)]
        dataset = open_images(args.data)
        self.classes = len(dataset.reader.class_to_idx)
        self.results = Results(args.results, self._arguments(dataset))
        self.hashes: Dict[Source, Optional[str]] = {source: source.sha256() for source in sources}
        device = torch.device(args.device)
        if device.type == 'cuda' and torch.cuda.is_available():
            torch.backends.cuda.matmul.allow_tf32 = True  # as validate.py
        self.evaluation = Evaluation(
            dataset, device, args.batch_size, args.workers, args.crop_pct,
            getattr(torch, args.amp_dtype) if args.amp else None, args.channels_last)
        self.subjects: Dict[Source, Subject] = {}
        self.tasks: List[Task] = [
            (source, rule, size) for source in sources for rule in self._rules(source)
            for size in dict.fromkeys(args.sizes)]
        self.pending = [task for task in self.tasks if self._row(task) is None]
        for task in self.pending:
            source, rule, size = task
            subject = self._subject(source)
            try:
                self.evaluation.check(subject, size, rule)
            except Exception as error:  # of any model of timm
                raise ValueError(f'{title_of(task)}: {error or type(error).__name__}') from error

    def _rules(self, source: Source) -> List[Optional[str]]:
        """Those asked for, or None alone: nothing was asked for, or the model takes no rules."""
        if not self.args.rope_scaling:
            return [None]
        takes = self.results.takes_rules(source.text, self.hashes[source])
        if takes is None:
            takes = takes_rules(self._subject(source).model)
        return list(dict.fromkeys(self.args.rope_scaling)) if takes else [None]

    def _arguments(self, dataset: Any) -> Dict[str, Any]:
        """What changes an accuracy, beside model, size and rule."""
        names = '\n'.join(f'{name} {target}' for name, (_, target) in zip(dataset.filenames(), dataset.reader.samples))
        return dict(
            data=str(self.args.data.resolve()), images=len(dataset), classes=self.classes,
            names_sha256=hashlib.sha256(names.encode()).hexdigest(), crop_pct=self.args.crop_pct,
            amp=self.args.amp_dtype if self.args.amp else None, use_ema=self.args.use_ema,
            model_kwargs=self.args.model_kwargs)

    def _subject(self, source: Source) -> Subject:
        if source not in self.subjects:
            self.subjects[source] = self._load(source)
        return self.subjects[source]

    def _load(self, source: Source) -> Subject:
        try:
            subject = load(source, self.args.model_kwargs, self.args.use_ema)
        except Exception as error:  # of any model of timm
            raise ValueError(f'{source.text}: {error or type(error).__name__}') from error
        if subject.model.num_classes != self.classes:
            raise ValueError(
                f'{source.text} has {subject.model.num_classes} classes, {self.args.data} has {self.classes}: they '
                f'must be the same, in the same order.')
        return subject

    def _row(self, task: Task) -> Optional[Dict[str, Any]]:
        source, rule, size = task
        return self.results.find(source.text, rule, size, self.hashes[source])

    def rows(self) -> List[Dict[str, Any]]:
        """Results so far, in the order asked for."""
        return [row for row in map(self._row, self.tasks) if row is not None]

    def progress(self) -> str:
        done = f'{len(self.rows())} of {len(self.tasks)} evaluations are done'
        return done if self.results.path is None else f'{done} and in {self.results.path}, a rerun continues'

    def run(self) -> None:
        """Evaluate what is pending; every result is recorded at once."""
        versions = {'timm_rope': __version__, **{name: metadata.version(name) for name in ('timm', 'torch')}}
        for number, task in enumerate(self.pending, 1):
            source, rule, (height, width) = task
            subject = self.subjects[source]
            title = f'[{number}/{len(self.pending)}] {title_of(task)}'
            row = self.evaluation.run(subject, (height, width), rule, title)
            self.results.add(dict(
                model=source.text, rope_scaling=rule, sha256=self.hashes[source], height=height, width=width, **row,
                takes_rules=takes_rules(subject.model), batch_size=self.args.batch_size, device=self.args.device,
                versions=versions))
            if all(later is not source for later, _, _ in self.pending[number:]):
                del self.subjects[source]
