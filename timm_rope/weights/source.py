"""One weight file, wherever it is: found on this machine or downloaded, read, and compared with its hash.

`pretrained=True`, `convert` and `sweep` differ in how their users name weights. What the names mean is opened here: in
comes a file, a folder or a repository of the Hub, out comes a `WeightFile`.
"""
import os
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, Dict, List, Optional, Union

from .files import is_safetensors, read_weights, sha256_of
from .hub import HubError, fetch
from .hub_cache import verify
from .layouts import first

SUFFIXES = ('.safetensors', '.bin', '.pth', '.pt', '.pth.tar', '.ckpt')


class WeightFile:
    """A weight file on this machine.

    Args:
        path: The file; it is opened by `read`, not before.
        hashed: Running comparison with the hash that the Hub announced for it; None for a file of the user's own.
    """

    def __init__(self, path: Path, hashed: Optional['Future[os.stat_result]'] = None) -> None:
        self.path = path
        self._hashed = hashed
        self._opened: List[os.stat_result] = []

    def __str__(self) -> str:
        return str(self.path)

    def read(self) -> Dict[str, Any]:
        """What the file holds, see `read_weights`. The bytes of a safetensors file may be compared later, see `wait`.

        Raises:
            HubError: The file of the Hub is corrupt.
            Others: As `read_weights`.
        """
        try:
            before = self.path.stat() if self.path.is_file() else None
            content = read_weights(self.path)
            self._opened = [status for status in (before, self.path.stat()) if status is not None]
        except Exception:
            self.wait()  # if the hash is wrong, that error is the cause of this one
            raise
        return content

    def wait(self) -> None:
        """Wait until the bytes are known to be those that the Hub announced; to be called before they are used.

        Raises:
            HubError: They are others, or the file that was compared is not the one that was read.
        """
        if self._hashed is None:
            return
        hashed = self._hashed.result()
        if not all(os.path.samestat(hashed, status) for status in self._opened):
            raise HubError(f'{self.path} was replaced by another process while it was read: try again.')

    def sha256(self) -> str:
        """Hash of the file, 64 hexadecimal digits."""
        return sha256_of(self.path)


def open_path(path: Union[str, Path], filename: Optional[str] = None) -> WeightFile:
    """A weight file, or the one of a folder: safetensors first.

    Args:
        path: File or folder.
        filename: File in the folder.

    Raises:
        ValueError: No weight file, or several of the same kind, which are listed; `filename` without a folder.
    """
    path = Path(path)
    if path.is_dir():
        path = path / filename if filename else _only_one(path)
    elif filename:
        raise ValueError(f'filename {filename!r} names a file in a folder or on the Hub, and {path} is neither.')
    if not path.is_file():
        raise ValueError(f'There is no weight file {path}.')
    return WeightFile(path)


def open_folder(folder: Union[str, Path]) -> WeightFile:
    """The weight file of a folder that timm's save_for_hf wrote, or one like it.

    Raises:
        ValueError: No folder; otherwise as `open_path`.
    """
    if not Path(folder).is_dir():
        raise ValueError(f'{folder} is no folder: expected one with config.json and model.safetensors.')
    return open_path(folder)


def open_repository(
        repo_id: str, filename: Optional[str] = None, cache_dir: Optional[Union[str, Path]] = None) -> WeightFile:
    """A file of the Hub, downloaded or from the cache; hashing goes on beside what the caller does next.

    Args:
        repo_id: As for `fetch`.
        filename: As for `fetch`.
        cache_dir: As for `fetch`.

    Raises:
        ValueError: A malformed name.
        HubError: The file cannot be had; a pickle is corrupt.
    """
    path = fetch(repo_id, filename, cache_dir)
    try:
        safe = is_safetensors(path)
    except FileNotFoundError:  # another process found it damaged and removed it; `verify` will say so
        safe = False
    # tensors of safetensors stay in the file until they are copied into the model, which waits for the result
    pool = ThreadPoolExecutor(1)
    hashed = pool.submit(verify, path)
    pool.shutdown(wait=False)
    if not safe:
        hashed.result()  # a pickle is opened only when its hash is right, whatever its name
    return WeightFile(path, hashed)


def _only_one(folder: Path) -> Path:
    files = {path.name: path for path in sorted(folder.iterdir()) if path.is_file() and path.name.endswith(SUFFIXES)}
    safe = [name for name in files if name.endswith('.safetensors')]
    for name in ('model.safetensors', *safe[:len(safe) == 1], *([] if safe else ['pytorch_model.bin'])):
        if name in files:
            return files[name]
    if len(files) != 1:
        found = f'several: {first(list(files))}' if files else 'none'
        raise ValueError(f'{folder} must hold one weight file, preferably model.safetensors; it holds {found}.')
    return files.popitem()[1]
