"""`python -m timm_rope sweep`: models over image sizes, each loaded once, resumable."""
import argparse
import hashlib
import os
import re
import sys
from importlib import metadata
from pathlib import Path
from typing import Any, Dict, List, Optional, Tuple

import torch
from timm.utils import ParseKwargs

from .._version import __version__
from .evaluate import Evaluation, Size, open_images
from .models import Source, Subject, load, parse_source
from .results import Results
from .views import check_csv, check_plot, format_table, write_csv, write_plot

SIZES = ((144, 144), (192, 192), (224, 224), (256, 256), (320, 320), (384, 384), (512, 512))  # of arXiv 2403.13298
SUFFIXES = dict(results='.json', csv='.csv', plot='.png')
Task = Tuple[Source, Size]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument('data', type=Path, metavar='DATA', help='folder with a folder of images for each class, '
                        'or one that holds it as val or validation')
    parser.add_argument('models', nargs='+', metavar='MODEL',
                        help='NAME[.TAG] of published weights, NAME=CHECKPOINT, as train.py writes them, '
                             'local-dir:FOLDER or hf-hub:ORG/NAME; any model of timm')
    parser.add_argument('--sizes', nargs='+', type=parse_size, default=list(SIZES), metavar='SIZE',
                        help='image sizes in pixels, N or HEIGHTxWIDTH (default: 144 192 224 256 320 384 512)')
    parser.add_argument('--results', type=Path, metavar='FILE.json',
                        help='write results to this file after each evaluation; a rerun skips what is in it')
    parser.add_argument('--csv', type=Path, metavar='FILE.csv', help='write a table at the end')
    parser.add_argument('--plot', type=Path, metavar='FILE.png',
                        help='draw accuracy against image size at the end; needs matplotlib')
    parser.add_argument('--crop-pct', type=float, metavar='X',
                        help="share of the image that is used, above 0 and at most 1; the same at every size (default: "
                             "the model's own)")
    parser.add_argument('--use-ema', action='store_true', help='averaged weights of the checkpoints')
    parser.add_argument('--model-kwargs', nargs='*', default={}, action=ParseKwargs, metavar='KEY=VALUE',
                        help='constructor arguments of all models, before those that a checkpoint tells')
    parser.add_argument('--device', default='cuda' if torch.cuda.is_available() else 'cpu', metavar='NAME',
                        help='where to compute (default: %(default)s)')
    parser.add_argument('--amp', action='store_true', help='mixed precision')
    parser.add_argument('--amp-dtype', default='float16', choices=('float16', 'bfloat16'),
                        help='lower precision of --amp (default: float16)')
    parser.add_argument('--channels-last', action='store_true', help='channels_last memory layout')
    parser.add_argument('-b', '--batch-size', type=integer_from(1), default=256, metavar='N', help='(default: 256)')
    parser.add_argument('-j', '--workers', type=integer_from(0), default=4, metavar='N',
                        help='processes that read images (default: 4)')
    parser.epilog = (
        'Images are prepared as by validate.py --img-size. A ViT extrapolates from the grid that it was trained on; '
        'the windows of a Swin grow with the image. Exit status: 0; 1 if an evaluation failed, 2 if it could not '
        'begin, 130 if it was interrupted. What was done until then is kept.')


def parse_size(text: str) -> Size:
    match = re.fullmatch(r'(\d+)(?:x(\d+))?', text)
    size = (int(match[1]), int(match[2] or match[1])) if match else (0, 0)
    if min(size) < 1:
        raise argparse.ArgumentTypeError(f'must be N or HEIGHTxWIDTH in pixels, got {text!r}')
    return size


def integer_from(minimum: int) -> Any:
    def parse(text: str) -> int:
        if not text.isdecimal() or int(text) < minimum:
            raise argparse.ArgumentTypeError(f'must be an integer of at least {minimum}, got {text!r}')
        return int(text)

    return parse


def run(args: argparse.Namespace) -> int:
    try:
        check_arguments(args)
        sweep = Sweep(args)
    except (ValueError, TypeError, RuntimeError, OSError, AssertionError) as error:
        print(f'sweep: {error}', file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130
    status = 0
    try:
        sweep.run()
    except KeyboardInterrupt:
        print(f'sweep: interrupted, {sweep.progress()}.', file=sys.stderr)
        status = 130
    except (RuntimeError, ValueError, OSError) as error:
        print(f'sweep: {error}\nsweep: {sweep.progress()}.', file=sys.stderr)
        status = 1
    rows = sweep.rows()
    if rows:
        print(format_table(rows))
        try:
            show(args, rows)
        except OSError as error:
            print(f'sweep: {error}', file=sys.stderr)
            status = status or 1
    return status


def show(args: argparse.Namespace, rows: List[Dict[str, Any]]) -> None:
    """Write the files that are made of the results."""
    if args.csv is not None:
        write_csv(args.csv, rows)
    if args.plot is not None:
        write_plot(args.plot, rows)


def check_arguments(args: argparse.Namespace) -> None:
    """Refuse what can be told from the arguments alone."""
    if args.crop_pct is not None and not 0 < args.crop_pct <= 1:
        raise ValueError(f'--crop-pct must be above 0 and at most 1, got {args.crop_pct}.')
    if 'num_classes' in args.model_kwargs:
        raise ValueError('--model-kwargs must not hold num_classes: it is that of the weights.')
    for option in ('results', 'csv', 'plot'):
        path, suffix = getattr(args, option), SUFFIXES[option]
        if path is not None and (
                path.suffix != suffix or path.is_dir() or not os.access(path.absolute().parent, os.W_OK)):
            raise ValueError(f'--{option} must be a file *{suffix} in a folder that can be written to, got {path}.')
    if args.csv is not None:
        check_csv(args.csv)
    if args.plot is not None:
        check_plot(args.plot)


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
        self.tasks: List[Task] = [(source, size) for source in sources for size in dict.fromkeys(args.sizes)]
        dataset = open_images(args.data)
        self.results = Results(args.results, self._arguments(dataset))
        self.hashes: Dict[Source, Optional[str]] = {source: source.sha256() for source in sources}
        self.pending = [task for task in self.tasks if self._row(task) is None]
        device = torch.device(args.device)
        if device.type == 'cuda' and torch.cuda.is_available():
            torch.backends.cuda.matmul.allow_tf32 = True  # as validate.py
        self.evaluation = Evaluation(
            dataset, device, args.batch_size, args.workers, args.crop_pct,
            getattr(torch, args.amp_dtype) if args.amp else None, args.channels_last)
        self.subjects: Dict[Source, Subject] = {}
        for source, size in self.pending:
            if source not in self.subjects:
                self.subjects[source] = self._load(source, len(dataset.reader.class_to_idx))
            try:
                self.evaluation.check(self.subjects[source], size)
            except Exception as error:  # of any model of timm
                raise ValueError(f'{source.text} at {size[0]}x{size[1]}: {error or type(error).__name__}') from error

    def _arguments(self, dataset: Any) -> Dict[str, Any]:
        """What changes an accuracy, beside model and size."""
        names = '\n'.join(f'{name} {target}' for name, (_, target) in zip(dataset.filenames(), dataset.reader.samples))
        return dict(
            data=str(self.args.data.resolve()), images=len(dataset), classes=len(dataset.reader.class_to_idx),
            names_sha256=hashlib.sha256(names.encode()).hexdigest(), crop_pct=self.args.crop_pct,
            amp=self.args.amp_dtype if self.args.amp else None, use_ema=self.args.use_ema,
            model_kwargs=self.args.model_kwargs)

    def _load(self, source: Source, classes: int) -> Subject:
        try:
            subject = load(source, self.args.model_kwargs, self.args.use_ema)
        except Exception as error:  # of any model of timm
            raise ValueError(f'{source.text}: {error or type(error).__name__}') from error
        if subject.model.num_classes != classes:
            raise ValueError(
                f'{source.text} has {subject.model.num_classes} classes, {self.args.data} has {classes}: they must be '
                f'the same, in the same order.')
        return subject

    def _row(self, task: Task) -> Optional[Dict[str, Any]]:
        return self.results.find(task[0].text, task[1], self.hashes[task[0]])

    def rows(self) -> List[Dict[str, Any]]:
        """Results so far, in the order asked for."""
        return [row for row in map(self._row, self.tasks) if row is not None]

    def progress(self) -> str:
        done = f'{len(self.rows())} of {len(self.tasks)} evaluations are done'
        return done if self.results.path is None else f'{done} and in {self.results.path}, a rerun continues'

    def run(self) -> None:
        """Evaluate what is pending; every result is recorded at once."""
        versions = {'timm_rope': __version__, **{name: metadata.version(name) for name in ('timm', 'torch')}}
        for number, (source, (height, width)) in enumerate(self.pending, 1):
            title = f'[{number}/{len(self.pending)}] {source.text} {height}x{width}'
            row = self.evaluation.run(self.subjects[source], (height, width), title)
            self.results.add(dict(
                model=source.text, sha256=self.hashes[source], height=height, width=width, **row,
                batch_size=self.args.batch_size, device=self.args.device, versions=versions))
            if all(later is not source for later, _ in self.pending[number:]):
                del self.subjects[source]
