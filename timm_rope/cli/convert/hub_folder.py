"""The folder that `convert` writes, which appears whole or not at all.

In come the model with its weights and the place of the folder. Files are written to a temporary folder beside that
place and read back there; when they are right, the folder is renamed.
"""
import json
import os
import secrets
import shutil
import signal
import sys
import threading
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Dict, Iterator, Union

import timm
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from ..._timm import save_for_hf

CONFIG = 'config.json'  # what tells a model's folder from another one


class CheckFailed(Exception):
    """What was written is not what was read, or computes something else."""


def check_target(out: Union[str, Path], force: bool = False) -> Path:
    """The absolute path of a folder that may be written.

    Args:
        out: Folder that does not exist or is empty.
        force: Allow the folder of another model, which will be replaced.

    Raises:
        ValueError: It may not; says why and what would be right.
    """
    path = Path(out).resolve()
    if not path.parent.is_dir():
        raise ValueError(f'out must be in an existing folder, {path.parent} is none.')
    if path.exists() and not path.is_dir():
        raise ValueError(f'out must be a folder, {path} is a file.')
    if path.is_dir() and any(path.iterdir()):
        if not force:
            raise ValueError(f'out must not exist or be empty, {path} has files in it; --force replaces it.')
        if not (path / CONFIG).is_file():
            raise ValueError(f'{path} is not replaced: without a {CONFIG} it is not the folder of a model.')
    return path


@contextmanager
def new_folder(out: Path, force: bool = False) -> Iterator[Path]:
    """A temporary folder beside `out`, on the same file system, that takes its place when the block ends.

    Until then `out` is as it was; if the block fails, it stays so and the temporary folder is removed. A killed process
    (SIGKILL, power) leaves a hidden folder that ends in .partial, which no later run looks at; in the instant between
    two renames it may leave the old `out` as .NAME.*.old.

    Args:
        out: What `check_target` returned.
        force: Whether files in `out` may be replaced.
    """
    stem = out.parent / f'.{out.name}.{secrets.token_hex(4)}'
    partial, old = stem.with_name(f'{stem.name}.partial'), stem.with_name(f'{stem.name}.old')
    partial.mkdir()
    try:
        yield partial
        for file in partial.iterdir():
            file.chmod(partial.stat().st_mode & 0o666)  # safetensors lets nobody else read its files
            _flush(file)
        check_target(out, force)  # it may have been filled in the meantime
        if not out.exists():
            partial.rename(out)
            return
        out.rename(old)
        try:
            partial.rename(out)
        except BaseException:
            old.rename(out)
            raise
        shutil.rmtree(old)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _flush(file: Path) -> None:
    """Wait until a file is on the disk: what it replaces is about to be deleted."""
    with file.open('rb+') as opened:
        os.fsync(opened.fileno())


def write_model(model: Any, folder: Path, labels: Dict[str, Any]) -> None:
    """Write weights and config.json by timm, so that timm and transformers load them.

    Raises:
        OSError: The files could not be written.
    """
    try:
        save_for_hf(model, str(folder), safe_serialization=True, model_config=labels)
    except SafetensorError as e:  # what safetensors raises where the disk is full
        raise OSError(f'{folder} could not be written: {e}') from e
    path = folder / CONFIG
    config = json.loads(path.read_text(encoding='utf-8'))
    # timm writes it twice, here and beside the arguments, and transformers would pass on both
    config.get('model_args', {}).pop('num_classes', None)
    path.write_text(json.dumps(config, indent=2), encoding='utf-8')


def verify(folder: Path, expected: Dict[str, Tensor]) -> None:
    """Compare the files with what was to be written, bit by bit, and with the model that config.json builds.

    Raises:
        CheckFailed: They differ; names the first tensor.
    """
    path = folder / 'model.safetensors'
    with safe_open(path, 'pt') as file:
        keys = set(file.keys())
    if keys != set(expected):
        raise CheckFailed(f'{path.name} was written with other keys: {sorted(keys ^ set(expected))[:3]}.')
    for key, value in expected.items():
        with safe_open(path, 'pt') as file:  # opened anew for each, so that one tensor at a time is in memory
            if not same_bits(file.get_tensor(key), value):
                raise CheckFailed(f'{key} was not read back as it was written: is the disk damaged?')
    shapes = {key: value.shape for key, value in expected.items()}
    model = timm.create_model(f'local-dir:{folder}', device='meta')
    rebuilt = {key: value.shape for key, value in model.state_dict().items()}
    differ = [key for key in {**rebuilt, **shapes} if rebuilt.get(key) != shapes.get(key)]
    if differ:
        raise CheckFailed(f'{CONFIG} builds another model than that of the weights: {", ".join(differ[:3])} differ.')


def same_bits(a: Tensor, b: Tensor) -> bool:
    """Whether dtype, shape and every bit are equal; NaN equals itself."""
    if a.dtype != b.dtype or a.shape != b.shape:
        return False
    return torch.equal(a.contiguous().flatten().view(torch.uint8), b.contiguous().flatten().view(torch.uint8))


@contextmanager
def clean_exit() -> Iterator[None]:
    """Turn the signals that end a process politely into SystemExit, so that `new_folder` can clean up."""
    def leave(number: int, frame: Any) -> None:
        sys.exit(128 + number)

    names = [name for name in ('SIGTERM', 'SIGHUP') if hasattr(signal, name)]
    if threading.current_thread() is not threading.main_thread():
        names = []  # where Python allows no handlers
    before = {name: signal.signal(getattr(signal, name), leave) for name in names}
    try:
        yield
    finally:
        for name, handler in before.items():
            signal.signal(getattr(signal, name), handler)
