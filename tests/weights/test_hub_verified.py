"""Downloads from the Hub: nothing that is not what the Hub announced reaches a model."""
import os
import shutil
import warnings
from pathlib import Path

import pytest
from downloads import FLIPPED, OTHER, REPO, SAFE, leftovers
from huggingface_hub import constants

from timm_rope.weights import hub_cache
from timm_rope.weights.hub import HubError, fetch
from timm_rope.weights.hub_cache import CorruptWeightsError, verify

NAMES = ['model.safetensors', 'small.txt']  # SHA-256, and git's object id


@pytest.mark.parametrize('name', NAMES)
def test_wrong_bytes_of_the_right_length(hub, cache, name):
    commit = hub.add(REPO, {name: SAFE})
    hub.fault('GET', body=lambda data: FLIPPED, times=1)
    path = fetch(REPO, name)
    assert path.read_bytes() == FLIPPED, 'the client does not notice'
    linked = path.readlink().name
    with pytest.raises(CorruptWeightsError, match=f'{REPO}.*{commit}') as caught:
        verify(path)
    assert linked in str(caught.value) and name in str(caught.value) and 'removed' in str(caught.value)
    assert not leftovers(cache)
    path = fetch(REPO, name)
    assert path.read_bytes() == SAFE
    verify(path)


def test_what_is_damaged_later_is_found_too(hub):
    hub.add(REPO, {'sub/model.safetensors': SAFE})
    path = fetch(REPO, 'sub/model.safetensors')
    verify(path)
    path.resolve().write_bytes(SAFE[:-100])  # a damaged disk
    with pytest.raises(CorruptWeightsError, match='sub/model.safetensors'):
        verify(path)
    assert fetch(REPO, 'sub/model.safetensors').read_bytes() == SAFE


@pytest.mark.parametrize('name', NAMES)
def test_cache_without_links(hub, cache, monkeypatch, name):
    """As on Windows: the hash is not kept, the Hub is asked for it."""
    monkeypatch.setattr(constants, 'HF_HUB_DISABLE_SYMLINKS', True)
    hub.add(REPO, {name: SAFE})
    hub.fault('GET', body=lambda data: FLIPPED, times=1)
    path = fetch(REPO, name)
    assert not path.is_symlink()
    with pytest.raises(CorruptWeightsError):
        verify(path)
    assert not leftovers(cache)
    path = fetch(REPO, name)
    hub.add(REPO, {name: OTHER})
    verify(path)  # against its own commit
    asked = len(hub.requests)
    monkeypatch.setattr(constants, 'HF_HUB_OFFLINE', True)
    verify(path)
    path.write_bytes(FLIPPED)
    with pytest.raises(CorruptWeightsError):
        verify(path)
    assert len(hub.requests) == asked, 'the hash was noted'


def test_cache_without_links_and_without_a_note(hub, cache, monkeypatch):
    monkeypatch.setattr(constants, 'HF_HUB_DISABLE_SYMLINKS', True)
    hub.add(REPO, {'model.safetensors': SAFE})
    path = fetch(REPO)
    hub.fault('', status=500)
    with pytest.warns(RuntimeWarning, match='could not be verified'):
        verify(path)
    assert path.read_bytes() == SAFE
    hub.faults.clear()
    verify(path)
    [note] = (p for p in cache.rglob('*') if p.is_file() and '.timm_rope' in p.parts)
    for text in ('', note.read_text()[:39], '\0'):  # no hash; the Hub is asked
        note.write_text(text)
        asked = len(hub.requests)
        verify(path)
        assert len(hub.requests) == asked + 1
    note.write_text('0' * 64)
    with pytest.raises(CorruptWeightsError):
        verify(path)
    path = fetch(REPO)
    verify(path)  # a wrong note is not kept


def test_a_cache_that_cannot_be_written_is_verified(hub, monkeypatch):
    monkeypatch.setattr(constants, 'HF_HUB_DISABLE_SYMLINKS', True)
    hub.add(REPO, {'model.safetensors': SAFE})
    path = fetch(REPO)
    (path.parents[2] / '.timm_rope').write_text('')  # in the way
    verify(path)
    path.write_bytes(FLIPPED)
    with pytest.raises(CorruptWeightsError):
        verify(path)


def test_a_server_without_hashes(hub):
    hub.etag = 'version-7'
    hub.add(REPO, {'model.safetensors': SAFE})
    path = fetch(REPO)
    with pytest.warns(RuntimeWarning, match='could not be verified'):
        verify(path)
    assert path.exists()


def test_verify_only_looks_into_caches(tmp_path):
    for path in (tmp_path / 'model.safetensors', tmp_path / 'snapshots' / 'abc' / 'model.safetensors'):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(SAFE)
        with pytest.raises(ValueError, match='model.safetensors'):
            verify(path)
        assert path.exists()


def test_verify_is_silent_about_good_files(hub, monkeypatch):
    hub.add(REPO, {'model.safetensors': SAFE})
    path = fetch(REPO)
    monkeypatch.chdir(path.parent)
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        verify('model.safetensors')
    assert len(hub.requests) == 2, 'the hash is in the cache'


def test_a_store_shared_by_repositories(hub, cache):
    """Blobs may be links into one store for the whole cache; the bad bytes must not be linked again."""
    hub.add(REPO, {'model.safetensors': SAFE})
    path = fetch(REPO)
    blob, shared = path.resolve(), cache / 'blobs' / 'ab' / ('ab' * 32)
    shared.parent.mkdir(parents=True)
    shared.write_bytes(FLIPPED)
    blob.unlink()
    blob.symlink_to(os.path.relpath(shared, blob.parent))
    with pytest.raises(CorruptWeightsError):
        verify(path)
    assert not shared.exists() and not blob.is_symlink() and not path.is_symlink()


def test_files_outside_the_cache_are_not_deleted(hub, tmp_path):
    hub.add(REPO, {'model.safetensors': SAFE})
    path = fetch(REPO)
    blob, mine = path.resolve(), tmp_path / 'mine'
    mine.write_bytes(FLIPPED)
    blob.unlink()
    blob.symlink_to(mine)
    with pytest.raises(CorruptWeightsError):
        verify(path)
    assert mine.exists() and not blob.is_symlink() and not path.is_symlink()
    assert fetch(REPO).read_bytes() == SAFE


def test_a_file_replaced_meanwhile_is_kept(hub, monkeypatch):
    """Another process may have found the damage first, and downloaded the file again."""
    hub.add(REPO, {'model.safetensors': SAFE})
    path = fetch(REPO)
    blob = path.resolve()
    blob.write_bytes(FLIPPED)
    real = hub_cache._remove

    def replaced_first(*args):
        (blob.parent / 'new').write_bytes(SAFE)
        (blob.parent / 'new').replace(blob)
        return real(*args)

    monkeypatch.setattr(hub_cache, '_remove', replaced_first)
    with pytest.raises(CorruptWeightsError):
        verify(path)
    assert path.read_bytes() == SAFE
    verify(path)


def test_a_file_removed_meanwhile(hub, monkeypatch):
    """Of several processes that find the same damage, one is the first; the others say what it says."""
    hub.add(REPO, {'model.safetensors': SAFE})
    path = fetch(REPO)
    path.resolve().write_bytes(FLIPPED)
    real = hub_cache._remove

    def removed_first(*args):
        real(*args)
        return real(*args)

    monkeypatch.setattr(hub_cache, '_remove', removed_first)
    with pytest.raises(CorruptWeightsError, match='It was removed from the cache; try again'):
        verify(path)
    with pytest.raises(HubError, match='gone from the cache.*Try again'):
        verify(path)
    verify(fetch(REPO))


def test_a_file_that_cannot_be_removed(hub, monkeypatch):
    hub.add(REPO, {'model.safetensors': SAFE})
    path = fetch(REPO)
    path.resolve().write_bytes(FLIPPED)

    def refuse(self, missing_ok=False):
        raise PermissionError(13, 'Permission denied')

    monkeypatch.setattr(Path, 'unlink', refuse)
    with pytest.raises(CorruptWeightsError, match='could not be removed'):
        verify(path)
    monkeypatch.undo()
    shutil.rmtree(path.parents[3])
