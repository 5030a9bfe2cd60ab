"""Cached files of the Hub, compared with their hash.

huggingface_hub checks the length of a download, never its bytes. It does name a cached file by the hash the server
announced for it, so the bytes can be checked here, while the model is being built.
"""
import hashlib
import os
import re
import secrets
import warnings
from contextlib import suppress
from pathlib import Path
from typing import Optional, Tuple, Union

from huggingface_hub import get_hf_file_metadata, hf_hub_url, try_to_load_from_cache

from .hub import HubError, relative, split

CHUNK = 1 << 20


class CorruptWeightsError(HubError):
    """A downloaded file is not the one the Hub announced."""


def verify(path: Union[str, Path]) -> os.stat_result:
    """Compare a cached file with the hash the Hub announced for it.

    Reads the file once and holds no lock of Python while it hashes, so it can run beside other work in a thread.

    Args:
        path: What `fetch` returned.

    Returns:
        Status of the file that was hashed. A reader that opened another one, which took its place meanwhile, can tell
        by it (os.path.samestat).

    Raises:
        ValueError: `path` is not in a cache of huggingface_hub.
        CorruptWeightsError: The bytes are others. They are removed from the cache, so that the next call of `fetch`
            downloads them anew.
        HubError: The file is gone.
    """
    path = Path(os.path.abspath(path))
    repo_folder, commit, filename = _cache_parts(path)
    linked = Path(os.readlink(path)).name if path.is_symlink() else ''
    expected = linked if _is_hash(linked) else _hash_of_unlinked(repo_folder, commit, filename)
    try:
        opened = path.open('rb')
    except FileNotFoundError:
        raise HubError(
            f'{path} is gone from the cache; another process may have found it damaged. Try again to download it '
            f'anew.') from None
    with opened as file:
        before = os.fstat(file.fileno())
        if not expected:
            warnings.warn(
                f'timm_rope: the bytes of {path} could not be verified: the cache holds no hash of them and the Hub '
                f'gave none.', RuntimeWarning, stacklevel=2)
            return before
        # large files are named by their SHA-256, small ones by the object id that git gives them
        digest = hashlib.sha256() if len(expected) == 64 else hashlib.sha1(
            b'blob %d\0' % before.st_size, usedforsecurity=False)
        buffer = memoryview(bytearray(CHUNK))
        while size := file.readinto(buffer):
            digest.update(buffer[:size])
    if digest.hexdigest() != expected:
        fate = _remove(path, repo_folder, before)
        with suppress(OSError):
            _note(repo_folder, commit, filename).unlink()  # if the hash was what is wrong
        raise CorruptWeightsError(
            f'{filename} of {_repo_id(repo_folder)} at {commit} is corrupt: expected {digest.name} {expected}, found '
            f'{digest.hexdigest()} ({before.st_size} bytes). {fate}')
    return before


def verify_cached(repo_id: str, filename: str, cache_dir: Optional[Union[str, Path]] = None) -> None:
    """`verify` a file that something else downloaded, if it is in the cache.

    Args:
        repo_id: As for `fetch`.
        filename: As for `fetch`.
        cache_dir: As for `fetch`.

    Raises:
        ValueError: A malformed name.
        CorruptWeightsError: As `verify`.
    """
    repo, revision = split(repo_id)
    path = try_to_load_from_cache(repo, relative(filename, 'filename'), cache_dir, revision)
    if isinstance(path, str):
        verify(path)


def _cache_parts(path: Path) -> Tuple[Path, str, str]:
    """models--org--name folder, commit and file name of .../models--org--name/snapshots/COMMIT/FILE."""
    parts = path.parts
    for i in range(len(parts) - 3, 0, -1):
        if parts[i] == 'snapshots' and parts[i - 1].startswith('models--'):
            return Path(*parts[:i]), parts[i + 1], '/'.join(parts[i + 2:])
    raise ValueError(f'path must be a file that `fetch` downloaded, got {path}, which is not in a cache of the Hub.')


def _repo_id(repo_folder: Path) -> str:
    return '/'.join(repo_folder.name.split('--')[1:])


def _is_hash(name: Optional[str]) -> bool:
    return re.fullmatch('[0-9a-f]{40}|[0-9a-f]{64}', name or '') is not None


def _note(repo_folder: Path, commit: str, filename: str) -> Path:
    """Where the hash of a file is noted in a cache without symbolic links (Windows), which does not keep it."""
    return repo_folder / '.timm_rope' / commit / filename


def _hash_of_unlinked(repo_folder: Path, commit: str, filename: str) -> str:
    """Hash that was noted for a file, else the one the Hub announces, else ''. A commit never changes."""
    note = _note(repo_folder, commit, filename)
    with suppress(OSError, ValueError):
        if _is_hash(noted := note.read_text()):
            return noted
    try:
        etag = get_hf_file_metadata(hf_hub_url(_repo_id(repo_folder), filename, revision=commit)).etag
    except Exception:
        return ''
    if etag is None or not _is_hash(etag):
        return ''
    with suppress(OSError):  # a cache that cannot be written: the Hub is asked again next time
        note.parent.mkdir(parents=True, exist_ok=True)
        part = note.with_name(f'{note.name}.{secrets.token_hex(4)}')
        # written aside and renamed, since a note that was cut off after 40 digits would pass for a hash of git
        part.write_text(etag)
        part.replace(note)
    return etag


def _remove(path: Path, repo_folder: Path, hashed: os.stat_result) -> str:
    """Take a file out of the cache, unless another process has replaced it since it was hashed; says what was done."""
    blob = path.resolve()
    # the blob may itself be a link into a store that all repositories of the cache share; a file that somebody
    # linked in from outside the cache is not ours to delete
    inside = blob.is_relative_to(repo_folder.parent.resolve())
    links = [Path(os.path.join(path.parent, os.readlink(path)))] if path.is_symlink() else []
    try:
        if os.path.samestat(path.stat(), hashed):
            for file in (path, *links, *([blob] if inside else [])):
                file.unlink(missing_ok=True)
    except FileNotFoundError:
        pass  # another process was faster
    except OSError as e:
        return f'It could not be removed from the cache ({e}): delete it, then try again.'
    return 'It was removed from the cache; try again to download it anew.'
