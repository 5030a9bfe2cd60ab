"""The models that a command is given by name, and how each is loaded: with the settings of its training.

In comes text such as NAME=CHECKPOINT, out comes a `Source`, which nothing has been loaded for yet; `load` makes a
`Subject` of it, the model with its weights and how its images are to be prepared.
"""
from dataclasses import dataclass, field
from difflib import get_close_matches
from pathlib import Path
from typing import Any, Dict, List, Optional, Tuple

import timm
from timm.models import parse_model_name
from torch import Tensor, nn

from .._timm import resolve_model_input_args
from ..positions.coordinates import read_grid
from ..weights.files import sha256_of
from ..weights.layouts import unwrap
from ..weights.origin import training_config
from ..weights.source import WeightFile, open_folder, open_path

# arguments of training that say where weights were to come from, or that only the weights can answer
NOT_OF_THE_MODEL = ('rope_warm_start', 'pretrained', 'pretrained_cfg', 'pretrained_cfg_overlay', 'checkpoint_path',
                    'cache_dir', 'num_classes')


@dataclass(frozen=True)
class Source:
    """A model as it was named.

    Attributes:
        text: As given.
        name: For timm.create_model.
        checkpoint: Weight file, None if the weights belong to the name.
        untrained: Take no weights, but those that a model begins with.
    """
    text: str
    name: str
    checkpoint: Optional[WeightFile] = None
    untrained: bool = False

    def sha256(self) -> Optional[str]:
        """Hash of the local files that decide what is evaluated; None for published weights."""
        files: List[Path] = [] if self.checkpoint is None else [self.checkpoint.path]
        if self.name.startswith('local-dir:'):
            folder = Path(self.name.partition(':')[2])
            files = [folder / 'config.json', open_folder(folder).path]
        return sha256_of(*files) if files else None


@dataclass
class Subject:
    """A model in evaluation mode on the CPU, at its own size.

    Attributes:
        source: What it was loaded from.
        model: The model.
        data: How its images are prepared where that is not in its pretrained_cfg: mean, std, crop_pct, interpolation.
    """
    source: Source
    model: nn.Module
    data: Dict[str, Any] = field(default_factory=dict)


def parse_source(text: str, untrained: bool = False) -> Source:
    """Understand NAME, NAME=CHECKPOINT, local-dir:FOLDER or hf-hub:ORG/NAME; nothing is loaded.

    With `untrained`, a NAME means the model as it begins, and need not have published weights.

    Raises:
        ValueError: No such model, weights or file; says what would be right.
    """
    if untrained and ('=' in text or ':' in text):
        raise ValueError(f'--untrained takes names of models alone, got {text!r}.')
    if text.startswith(('hf-hub:', 'hf_hub:', 'local-dir:')):
        source, model_id = parse_model_name(text)
        if source == 'local-dir':
            open_folder(model_id)
            if not (Path(model_id) / 'config.json').is_file():
                raise ValueError(f'{model_id} holds no config.json, which says what model the weights are of.')
        return Source(text, text)
    name, given, checkpoint = text.partition('=')
    if not given and ('/' in name or Path(name).exists()):
        raise ValueError(
            f'{name!r} is no model of timm. A checkpoint is named with its model, NAME={name}, a folder of '
            f'save_for_hf as local-dir:{name}, a repository of the Hub as hf-hub:{name}.')
    if not timm.is_model(name):
        nearest = get_close_matches(name.partition('.')[0], timm.list_models(), n=1, cutoff=0)
        raise ValueError(f'timm knows no model {name!r}, the nearest name is {nearest[0]!r}.')
    try:
        cfg = timm.get_pretrained_cfg(name)
    except RuntimeError as error:
        raise ValueError(f'{name}: {error}') from None
    if given:
        if not checkpoint:
            raise ValueError(f'{text!r}: the checkpoint after = is empty.')
        if Path(checkpoint).is_dir():
            raise ValueError(f'{text!r}: {checkpoint} is a folder; one of save_for_hf is named local-dir:{checkpoint}.')
        return Source(text, name, open_path(checkpoint))
    if untrained:
        return Source(text, name, untrained=True)
    if cfg is None or not cfg.has_weights:
        # timm would only warn, and evaluate random weights
        raise ValueError(f'no weights of {name!r} are published: name yours as {name}=CHECKPOINT.')
    return Source(text, name)


def load(source: Source, model_kwargs: Dict[str, Any], use_ema: bool) -> Subject:
    """Build a model and load its weights, once.

    A checkpoint of timm's train.py says how its model was built and its images were prepared; `model_kwargs` go before
    that. The number of classes is that of the weights.

    Raises:
        ValueError: The weights are of another model, hold no averaged ones, or are no weights.
        RuntimeError: They do not fit the model.
    """
    if source.checkpoint is None:
        pretrained = not source.untrained
        return Subject(source, timm.create_model(source.name, pretrained=pretrained, **model_kwargs).eval())
    weights, average, extra = unwrap(source.checkpoint.read())
    if use_ema:
        if not average:
            raise ValueError(f'{source.checkpoint} holds no averaged (EMA) weights: leave out --use-ema.')
        weights = average
    kwargs, data = _as_trained(source, weights, extra)
    model = timm.create_model(**resolve_model_input_args(source.name, {}, **{**kwargs, **model_kwargs}))
    model.load_state_dict(weights)
    return Subject(source, model.eval(), data)


def _as_trained(
        source: Source, weights: Dict[str, Tensor], extra: Dict[str, Any]) -> Tuple[Dict[str, Any], Dict[str, Any]]:
    """Constructor arguments and preparation of images, as far as the checkpoint tells."""
    config = training_config(extra)
    if config.architecture and config.architecture != source.name.partition('.')[0]:
        raise ValueError(f'{source.checkpoint} holds weights of {config.architecture!r}, not of {source.name!r}.')
    kwargs = {key: value for key, value in config.model_args.items() if key not in NOT_OF_THE_MODEL}
    cfg = timm.get_pretrained_cfg(source.name)
    if config.architecture:
        args = vars(extra['args'])
        if args.get('input_size') is not None:
            kwargs['in_chans'], *kwargs['img_size'] = args['input_size']
        for key, name in (('in_chans', 'in_chans'), ('gp', 'global_pool')):
            if args.get(key) is not None:
                kwargs.setdefault(name, args[key])
        if cfg is not None and not cfg.fixed_input_size and 'img_size' not in (args.get('model_kwargs') or {}):
            kwargs.pop('img_size', None)  # train.py tells the size only to models that are built for one
    head = cfg.classifier if cfg is not None else None
    weight = weights.get(f'{head[0] if isinstance(head, (tuple, list)) else head}.weight')
    if weight is not None:
        kwargs['num_classes'] = weight.shape[0]
    # a position embedding must be loaded at its own size, or it would be resized twice
    grid, stem = weights.get('pos_embed_grid'), weights.get('patch_embed.proj.weight')
    if grid is not None and stem is not None:
        kwargs['img_size'] = tuple(n * patch for n, patch in zip(read_grid(grid, 'pos_embed_grid'), stem.shape[-2:]))
    return kwargs, config.data
