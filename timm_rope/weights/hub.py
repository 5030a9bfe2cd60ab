"""Downloads from the Hugging Face Hub.

In come the name of a repository and of a file, out comes a path in the cache of huggingface_hub. If that fails, the
error says what went wrong and what to do about it.
"""
import errno
import os
import shutil
from pathlib import Path, PureWindowsPath
from typing import List, Optional, Tuple, Union

from huggingface_hub import constants, errors, hf_hub_download, try_to_load_from_cache
from huggingface_hub.utils import validate_repo_id

from .._version import __version__

PICKLE_SUFFIXES = ('.pth.tar', '.bin', '.pth', '.pt', '.ckpt', '.pkl')
NO_SPACE = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


class HubError(RuntimeError):
    """Weights could not be had from the Hub; says which, why and what to do."""


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
        Path in the cache. Its bytes are not checked yet, see `hub_cache.verify`.

    Raises:
        ValueError: A malformed name, before anything is asked or written.
        HubError: The file cannot be had; the cache is as it was.
    """
    repo, revision = split(repo_id)
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


# -- names

def split(repo_id: str) -> Tuple[str, Optional[str]]:
    """'org/name@revision' -> its two parts; a ValueError if it is malformed."""
    if not isinstance(repo_id, str) or repo_id.count('@') > 1:
        raise ValueError(f"repo_id must be 'org/name' or 'org/name@revision', got {repo_id!r}.")
    repo, at, revision = repo_id.partition('@')
    try:
        validate_repo_id(repo)
    except errors.HFValidationError as e:
        raise ValueError(f"repo_id must be 'org/name' or 'org/name@revision', got {repo_id!r}: {e}") from None
    return repo, relative(revision, f'revision of repo_id {repo_id!r}') if at else None


def relative(name: str, what: str) -> str:
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
    name = 'pytorch_model.bin' if filename is None else relative(filename, 'filename')
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
