"""Where a checkpoint comes from, and what was written down about it.

In comes what a user names, a file, a folder, a repository of the Hub or a model of timm; out comes an `Origin`: the
opened file, and the `Config` that a config.json or timm's train.py left about the model.
"""
import argparse
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Dict, Optional, Tuple

import timm

from .hub import HubError
from .hub_cache import CorruptWeightsError
from .source import WeightFile, open_path, open_repository

HUB, TIMM = 'hf-hub:', 'timm:'
# what a config.json tells about the preparation of images. Its licence is not read, since timm writes there that of
# the architecture, whoever trained the weights
DATA_KEYS = ('input_size', 'mean', 'std', 'crop_pct', 'crop_mode', 'interpolation')
# types that these arguments of timm's train.py have; a checkpoint may come from anywhere, so they are checked
TRAINING_KINDS: Dict[str, Tuple[type, ...]] = dict(
    model_kwargs=(dict,), mean=(list, tuple), std=(list, tuple), input_size=(list, tuple))


@dataclass
class Config:
    """What timm wrote down about weights, in a config.json or in a checkpoint of its train.py.

    Attributes:
        architecture: Name of the model, '' if there is nothing of the kind.
        model_args: Constructor arguments.
        data: How images are prepared, keys of DATA_KEYS.
        labels: `label_names`, `label_descriptions`.
    """
    architecture: str = ''
    model_args: Dict[str, Any] = field(default_factory=dict)
    data: Dict[str, Any] = field(default_factory=dict)
    labels: Dict[str, Any] = field(default_factory=dict)


@dataclass
class Origin:
    """A weight file, and what is known of it.

    Attributes:
        file: The file.
        name: What a reader can find it by: 'hf-hub:org/name@revision, file' or the name of a local file.
        repo_id: Of the Hub, without the revision; '' for local files.
        config: Of the config.json beside it.
        license: As timm notes it for weights of its own; None if it is not known.
    """
    file: WeightFile
    name: str
    repo_id: str = ''
    config: Config = field(default_factory=Config)
    license: Optional[str] = None


def find_origin(source: str, filename: Optional[str] = None) -> Origin:
    """Find the weight file that is meant; from the Hub it is downloaded.

    Args:
        source: A weight file, a folder with one, 'hf-hub:org/name[@revision]', or 'timm:NAME[.TAG]' for weights that
            timm publishes for one of its models.
        filename: File in the folder or repository; default: model.safetensors first.

    Raises:
        ValueError: Nothing of the kind, a folder where several files could be meant, a malformed name or config.json.
        RuntimeError: It cannot be had from the Hub, or is corrupt.
    """
    if source.startswith(TIMM):
        return _published_by_timm(source[len(TIMM):], filename)
    if source.startswith(HUB):
        repo_id = source[len(HUB):]
        file = open_repository(repo_id, filename)
        folder = (filename or '').rpartition('/')[0]
        try:
            beside = open_repository(repo_id, f'{folder}/config.json' if folder else 'config.json')
        except CorruptWeightsError:
            raise
        except HubError:  # not there, or not to be had: then the user says what it would have said
            config = Config()
        else:
            beside.wait()
            config = read_config(beside.path)
        return Origin(file, f'{source}, {file.path.name}', repo_id.partition('@')[0], config)
    try:
        file = open_path(source, filename)
    except ValueError as error:
        if source.count('/') != 1 or Path(source).exists():
            raise
        raise ValueError(f"{error} For a repository of the Hub write '{HUB}{source}'.") from None
    return Origin(file, file.path.name, config=read_config(file.path.parent / 'config.json'))


def _published_by_timm(name: str, filename: Optional[str]) -> Origin:
    try:
        cfg = timm.get_pretrained_cfg(name)
    except RuntimeError as error:
        raise ValueError(f'{TIMM}{name}: {error}') from None
    if cfg is None or not cfg.hf_hub_id:
        raise ValueError(f'timm publishes no weights of {name!r} on the Hub.')
    origin = find_origin(f'{HUB}{cfg.hf_hub_id}', filename or cfg.hf_hub_filename)
    if not origin.config.architecture:
        data = {key: value for key, value in cfg.to_dict().items() if key in DATA_KEYS and value is not None}
        origin.config = Config(name.partition('.')[0], data=data)
    origin.license = cfg.license
    return origin


def read_config(path: Path) -> Config:
    """Read a config.json; one that is not timm's says nothing.

    Raises:
        ValueError: The file is no JSON.
    """
    if not path.is_file():
        return Config()
    try:
        content = json.loads(path.read_text(encoding='utf-8'))
    except ValueError as e:
        raise ValueError(f'{path} is no JSON ({e}): correct it, or move it away from the weights.') from None
    if not isinstance(content, dict) or not isinstance(content.get('architecture'), str):
        return Config()
    cfg, args = content.get('pretrained_cfg', content), content.get('model_args', {})
    if not isinstance(cfg, dict) or not isinstance(args, dict):
        raise ValueError(f'{path}: pretrained_cfg and model_args must be objects.')
    return Config(
        content['architecture'], args, {key: cfg[key] for key in DATA_KEYS if cfg.get(key) is not None},
        {key: content[key] for key in ('label_names', 'label_descriptions') if content.get(key)})


def training_config(checkpoint: Dict[str, Any]) -> Config:
    """What a checkpoint of timm's train.py says: the arguments it was started with.

    Raises:
        ValueError: Arguments of other types than train.py has.
    """
    args = checkpoint.get('args')
    if not isinstance(args, argparse.Namespace) or checkpoint.get('arch') is None:
        return Config()
    given = {key: value for key, value in vars(args).items() if value is not None}
    for key, kind in TRAINING_KINDS.items():
        if key in given and not isinstance(given[key], kind):
            raise ValueError(f'args.{key} of the checkpoint is {given[key]!r}, which train.py never writes.')
    kwargs = {**(given.get('model_kwargs') or {}), **{key: given[key] for key in ('img_size',) if key in given}}
    data: Dict[str, Any] = {key: list(given[key]) for key in ('mean', 'std') if key in given}
    data.update({key: given[key] for key in ('crop_pct', 'interpolation') if given.get(key)})
    return Config(str(checkpoint['arch']).partition('.')[0], kwargs, data)
