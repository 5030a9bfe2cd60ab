"""Weights from the Hugging Face Hub: downloaded, explained when that fails, and compared with their hash.

huggingface_hub checks the length of a download, never its bytes. It does name a cached file by the hash the server
announced for it, so the bytes can be checked here, while the model is being built.
"""
import errno
import hashlib
import os
import re
import shutil
import warnings
from pathlib import Path, PureWindowsPath
from typing import List, Optional, Tuple, Union

from huggingface_hub import (
    constants,
    errors,
    get_hf_file_metadata,
    hf_hub_download,
    hf_hub_url,
    try_to_load_from_cache,
)
from huggingface_hub.utils import validate_repo_id

from ._version import __version__

PICKLE_SUFFIXES = ('.pth.tar', '.bin', '.pth', '.pt', '.ckpt')
NO_SPACE = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
CHUNK = 1 << 20


class HubError(RuntimeError):
    """Weights could not be had from the Hub; says which, why and what to do."""


class CorruptWeightsError(HubError):
    """A downloaded file is not the one the Hub announced."""


def fetch(
        repo_id: str,
        filename: Optional[str] = None,
        cache_dir: Optional[Union[str, Path]] = None,
) -> Path:
    """Download a weight file, or find it in the cache.

    Safetensors come first: without `filename` model.safetensors, then pytorch_model.bin; for the name of a pickle its
    safetensors sibling, then the pickle itself. Only the Hub's answer that a file is not there leads to the next one.
    When the Hub cannot be reached, a cached file of this list is used.

    Args:
        repo_id: 'org/name' or 'org/name@revision'; a revision is a branch, tag or commit.
        filename: File in the repository, folders separated by '/'.
        cache_dir: Cache folder, default: that of huggingface_hub.

    Returns:
        Path in the cache. Its bytes are not checked yet, see `verify`.

    Raises:
        ValueError: A malformed name, before anything is asked or written.
        HubError: The file cannot be had; the cache is as it was.
    """
    repo, revision = _split(repo_id)
    names = _candidates(filename)
    missing: Optional[Exception] = None
    for i, name in enumerate(names):
        try:
            return Path(hf_hub_download(
                repo, name, revision=revision, cache_dir=cache_dir, library_name='timm_rope',
                library_version=__version__))
        except errors.LocalEntryNotFoundError as e:
            for other in names[i + 1:]:
                cached = try_to_load_from_cache(repo, other, cache_dir, revision)
                if isinstance(cached, str):
                    return Path(cached)
            raise _explained(e, repo, revision, name, cache_dir) from e
        except errors.EntryNotFoundError as e:
            missing = e
        except Exception as e:  # of the HTTP library, which differs between versions, and of the disk
            raise _explained(e, repo, revision, name, cache_dir) from e
    raise HubError(
        f'{_label(repo, revision)} on the Hub has no file {" or ".join(names)}. Its files are listed at '
        f'{constants.ENDPOINT}/{repo}/tree/{revision or "main"}.') from missing


def verify(path: Union[str, Path]) -> None:
    """Compare a cached file with the hash the Hub announced for it.

    Reads the file once and holds no lock of Python while it hashes, so it can run beside other work in a thread.

    Args:
        path: What `fetch` returned.

    Raises:
        ValueError: `path` is not in a cache of huggingface_hub.
        CorruptWeightsError: The bytes are others. They are removed from the cache, so that the next call of `fetch`
            downloads them anew.
    """
    path = Path(os.path.abspath(path))
    repo_folder, commit, filename = _cache_parts(path)
    # a cache without symbolic links (Windows) does not keep the hash
    linked = Path(os.readlink(path)).name if path.is_symlink() else ''
    expected = linked if _is_hash(linked) else _announced_hash(repo_folder, commit, filename)
    if not expected:
        warnings.warn(
            f'timm_rope: the bytes of {path} could not be verified: the cache holds no hash of them and the Hub gave '
            f'none.', RuntimeWarning, stacklevel=2)
        return
    with path.open('rb') as file:
        before = os.fstat(file.fileno())
        # large files are named by their SHA-256, small ones by the object id that git gives them
        digest = hashlib.sha256() if len(expected) == 64 else hashlib.sha1(
            b'blob %d\0' % before.st_size, usedforsecurity=False)
        buffer = memoryview(bytearray(CHUNK))
        while size := file.readinto(buffer):
            digest.update(buffer[:size])
    if digest.hexdigest() != expected:
        fate = _remove(path, repo_folder, before)
        raise CorruptWeightsError(
            f'{filename} of {_repo_id(repo_folder)} at {commit} is corrupt: expected {digest.name} {expected}, found '
            f'{digest.hexdigest()} ({before.st_size} bytes). {fate}')


# -- names

def _split(repo_id: str) -> Tuple[str, Optional[str]]:
    if not isinstance(repo_id, str) or repo_id.count('@') > 1:
        raise ValueError(f"repo_id must be 'org/name' or 'org/name@revision', got {repo_id!r}.")
    repo, at, revision = repo_id.partition('@')
    try:
        validate_repo_id(repo)
    except errors.HFValidationError as e:
        raise ValueError(f"repo_id must be 'org/name' or 'org/name@revision', got {repo_id!r}: {e}") from None
    return repo, _relative(revision, f'revision of repo_id {repo_id!r}') if at else None


def _relative(name: str, what: str) -> str:
    """A name that stays below the folder it is joined to, on any system."""
    parts = name.split('/') if isinstance(name, str) else ['']
    if (
            any(part.strip() in ('', '.', '..') for part in parts)
            or '\\' in name
            or PureWindowsPath(name).drive
            or not name.isprintable()):
        raise ValueError(f"{what} must be a relative name with '/' between folders and without '..', got {name!r}.")
    return name


def _candidates(filename: Optional[str]) -> List[str]:
    """File names in the order in which they are tried."""
    name = 'pytorch_model.bin' if filename is None else _relative(filename, 'filename')
    suffix = next((s for s in PICKLE_SUFFIXES if name.lower().endswith(s)), None)
    if suffix is None:
        return [name]
    folder, slash, last = name.rpartition('/')
    stem = 'model' if last == 'pytorch_model.bin' else last[:-len(suffix)]
    return [f'{folder}{slash}{stem}.safetensors', name]


def _label(repo: str, revision: Optional[str]) -> str:
    return repo if revision is None else f'{repo} (revision {revision})'


# -- failures

def _explained(
        error: Exception,
        repo: str,
        revision: Optional[str],
        name: str,
        cache_dir: Optional[Union[str, Path]],
) -> HubError:
    cache = Path(cache_dir or constants.HF_HUB_CACHE)
    url = f'{constants.ENDPOINT}/{repo}'
    # the client wraps what went wrong in "not in the cache either"
    cause = error.__cause__ if isinstance(error, errors.LocalEntryNotFoundError) and error.__cause__ else error
    status = getattr(getattr(cause, 'response', None), 'status_code', None)
    code = cause.errno if isinstance(cause, OSError) else None
    if isinstance(cause, errors.OfflineModeIsEnabled):
        reason = f'it is not in the cache {cache} and HF_HUB_OFFLINE is set. Unset it, or download the file first.'
    elif isinstance(cause, errors.GatedRepoError):
        reason = f'the repository is gated. Accept its terms at {url}, then set HF_TOKEN or run `hf auth login`.'
    elif isinstance(cause, errors.RepositoryNotFoundError):
        reason = (
            f'there is no repository {url}, or it is private. Check the name; if it is private, set HF_TOKEN to a '
            f'token that may read it or run `hf auth login`.')
    elif isinstance(cause, errors.RevisionNotFoundError):
        reason = f'the repository has no such revision. Its branches and tags are listed at {url}/tree/main.'
    elif isinstance(cause, errors.FileMetadataError):
        reason = f'the answer is not one of a Hub ({cause}). Check HF_ENDPOINT ({constants.ENDPOINT}) and the proxy.'
    elif status in (401, 403):
        reason = f'access is refused (HTTP {status}). Check HF_TOKEN, or log in anew with `hf auth login`.'
    elif status is not None:
        reason = f'the Hub answers HTTP {status}. Try again later; what is in the cache {cache} still loads.'
    elif code in NO_SPACE:
        reason = (
            f'the disk or quota is full ({os.strerror(code)}): {_free(cache)} free in the cache {cache}. Make room, or '
            f'move the cache with HF_HOME or cache_dir.')
    elif code is not None and not isinstance(cause, (ConnectionError, TimeoutError)):
        reason = f'the cache {cache} cannot be used ({cause}). Set HF_HOME or cache_dir to a writable folder.'
    elif 'Consistency check' in str(cause):
        reason = 'it arrived with another length than announced. It was not kept; try again.'
    else:
        reason = (
            f'the connection to {constants.ENDPOINT} failed ({type(cause).__name__}: {cause}). Nothing incomplete was '
            f'kept; check the network and try again. What is in the cache {cache} still loads.')
    return HubError(f'{name} of {_label(repo, revision)} could not be had from the Hub: {reason}')


def _free(folder: Path) -> str:
    for existing in (folder, *folder.absolute().parents):
        try:
            return f'{shutil.disk_usage(existing).free / 1e9:.1f} GB'
        except OSError:
            continue
    return 'an unknown amount'


# -- cache

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


def _announced_hash(repo_folder: Path, commit: str, filename: str) -> str:
    """Hash the Hub announces for a file, '' if it cannot be reached or announces none."""
    try:
        etag = get_hf_file_metadata(hf_hub_url(_repo_id(repo_folder), filename, revision=commit)).etag
    except Exception:
        return ''
    return etag if etag is not None and _is_hash(etag) else ''


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
    except OSError as e:
        return f'It could not be removed from the cache ({e}): delete it, then try again.'
    return 'It was removed from the cache; try again to download it anew.'
