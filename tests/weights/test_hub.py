"""Weights from the Hub: the real client against a server on the loopback interface that does what a network does."""
import io
import json
import os
import resource
import shutil
import signal
import subprocess
import sys
import threading
import warnings
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import timm
import torch
from fresh_python import clean_env
from hub_server import TOKEN, HubServer
from huggingface_hub import constants
from safetensors.torch import save
from tiny import TINY, make

import timm_rope
from timm_rope.models import rope_swin, rope_vit
from timm_rope.weights import hub_cache
from timm_rope.weights import pretrained as pretrained_module
from timm_rope.weights.files import read_weights
from timm_rope.weights.hub import HubError, fetch
from timm_rope.weights.hub_cache import CorruptWeightsError, verify

REPO = 'org/vit'
SAFE = save({'w': torch.arange(5000.)})
OTHER = save({'w': torch.arange(5000.) + 1})
FLIPPED = SAFE[:-1] + bytes([SAFE[-1] ^ 1])


@pytest.fixture
def cache(tmp_path):
    return tmp_path / 'cache'


@pytest.fixture
def hub(monkeypatch, cache):
    with HubServer() as server:
        yield server.serve(monkeypatch, cache)


def leftovers(cache):
    """Files of weights in a cache, whole or not."""
    return [p for p in cache.rglob('*') if p.is_file() and ('blobs' in p.parts or 'snapshots' in p.parts)]


def fails(*args, error=HubError, **kwargs):
    """Message of a fetch that must fail, with the names every message must have."""
    with pytest.raises(error) as caught:
        fetch(*args, **kwargs)
    message = str(caught.value)
    assert args[0].partition('@')[0] in message and caught.value.__cause__ is not None
    return message


# -- what is downloaded

def test_download_and_cache_hit(hub, cache):
    hub.add(REPO, {'model.safetensors': SAFE})
    path = fetch(REPO)
    assert path.read_bytes() == SAFE and cache in path.parents
    assert [r.split()[0] for r in hub.requests] == ['HEAD', 'GET']
    assert f'timm_rope/{timm_rope.__version__}' in hub.headers[0]['user-agent']
    verify(path)
    assert torch.equal(read_weights(path)['w'], torch.arange(5000.))
    assert fetch(REPO) == path and len(hub.requests) == 3, 'a second call only asks whether the file has changed'


def test_cache_dir(hub, cache, tmp_path):
    hub.add(REPO, {'model.safetensors': SAFE})
    path = fetch(REPO, cache_dir=tmp_path / 'elsewhere')
    assert path.is_relative_to(tmp_path / 'elsewhere') and not cache.exists()
    verify(path)


def test_revisions(hub):
    first = hub.add(REPO, {'model.safetensors': SAFE})
    hub.add(REPO, {'model.safetensors': OTHER}, revision='v2.0')
    hub.add(REPO, {'model.safetensors': FLIPPED}, revision='refs/pr/1')
    for revision, data in {'': SAFE, '@main': SAFE, '@v2.0': OTHER, '@refs/pr/1': FLIPPED, f'@{first}': SAFE}.items():
        assert fetch(REPO + revision).read_bytes() == data
    asked = len(hub.requests)
    fetch(f'{REPO}@{first}')
    assert len(hub.requests) == asked, 'a commit cannot change'
    hub.add(REPO, {'model.safetensors': OTHER})
    assert fetch(REPO).read_bytes() == OTHER, 'a branch can'


PICKLES = {
    None: ('model.safetensors', 'pytorch_model.bin'),
    'pytorch_model.bin': ('model.safetensors', 'pytorch_model.bin'),
    'sub/pytorch_model.bin': ('sub/model.safetensors', 'sub/pytorch_model.bin'),
    'best.pth.tar': ('best.safetensors', 'best.pth.tar'),
    'v1.5.pth': ('v1.5.safetensors', 'v1.5.pth'),
    'x.pt': ('x.safetensors', 'x.pt'),
    'x.pkl': ('x.safetensors', 'x.pkl'),
    'a/b/last.ckpt': ('a/b/last.safetensors', 'a/b/last.ckpt'),
}


@pytest.mark.parametrize('filename', PICKLES)
def test_safetensors_come_first(hub, filename):
    safe, unsafe = PICKLES[filename]
    hub.add('org/pickle', {unsafe: b'pickle'})
    hub.add('org/both', {unsafe: b'pickle', safe: SAFE})
    assert fetch('org/both', filename).read_bytes() == SAFE
    assert not hub.asked(unsafe), 'the pickle was not even looked at'
    path = fetch('org/pickle', filename)
    assert path.read_bytes() == b'pickle' and path.match(unsafe)
    verify(path)


def test_a_named_safetensors_file_has_no_substitute(hub):
    hub.add(REPO, {'pytorch_model.bin': b'pickle'})
    assert 'model.safetensors' in fails(REPO, 'model.safetensors')
    assert not hub.asked('pytorch_model.bin')


# -- names

@pytest.mark.parametrize('repo_id', [
    '', '/', '../up', 'org/..', 'org/../../etc', '/org/name', 'org/name/more', 'org\\name', 'org/na me', 'org/na\nme',
    'org/name\0', 'org--x/name', None, 7, 'org/name@', 'org/name@..', 'org/name@a/../b', 'org/name@/abs',
    'org/name@a\\b', 'org/name@a\tb', 'org/name@a@b', 'org/name@C:x', '@main'])
def test_malformed_repository(hub, cache, repo_id):
    with pytest.raises(ValueError, match='repo_id') as caught:
        fetch(repo_id)
    assert repr(repo_id)[1:-1] in str(caught.value)
    assert not hub.requests and not cache.exists()


@pytest.mark.parametrize('filename', [
    '', '.', '..', '../model.bin', 'a/../../model.bin', 'a/..', '/etc/passwd', 'a//b', 'a/', '\\a', '..\\a', 'C:a',
    'C:\\a', 'a\0b', 'a\nb', 'a/ .. /b', 7, b'model.bin'])
def test_malformed_file_name(hub, cache, filename):
    with pytest.raises(ValueError, match='filename must be') as caught:
        fetch(REPO, filename)
    assert repr(filename) in str(caught.value)
    assert not hub.requests and not cache.exists()


# -- what the Hub refuses

def test_gated_repository(hub, monkeypatch):
    hub.add(REPO, {'model.safetensors': SAFE}, gated=True)
    message = fails(REPO)
    for part in ('gated', f'{hub.url}/{REPO}', 'HF_TOKEN', 'hf auth login'):
        assert part in message
    monkeypatch.setenv('HF_TOKEN', TOKEN)
    assert fetch(REPO).read_bytes() == SAFE
    for request, headers in zip(hub.requests[-2:], hub.headers[-2:]):
        assert ('authorization' in headers) == ('resolve' in request), 'the token is for the Hub, not for its storage'


def test_no_such_repository_or_private(hub, monkeypatch):
    assert 'private' in fails(REPO) and 'HF_TOKEN' in fails(REPO)
    hub.add(REPO, {'model.safetensors': SAFE}, private=True)
    assert 'private' in fails(REPO)
    monkeypatch.setenv('HF_TOKEN', TOKEN)
    assert fetch(REPO).read_bytes() == SAFE


def test_no_such_revision(hub):
    hub.add(REPO, {'model.safetensors': SAFE})
    message = fails(f'{REPO}@v9')
    assert 'v9' in message and 'no such revision' in message


def test_no_such_file(hub):
    hub.add(REPO, {'readme.md': b''})
    message = fails(REPO)
    assert 'no file model.safetensors or pytorch_model.bin' in message and f'{hub.url}/{REPO}/tree/main' in message
    assert 'no file x.safetensors or x.ckpt' in fails(REPO, 'x.ckpt')


@pytest.mark.parametrize('status', [401, 403, 404, 410])
def test_other_refusals(hub, status):
    hub.add(REPO, {'model.safetensors': SAFE})
    hub.fault('/files/', status=status)  # as expired links of a content delivery network
    assert str(status) in fails(REPO)


# -- what the network does

@pytest.mark.parametrize('status', [429, 500, 503])
def test_a_busy_hub_is_asked_again(hub, status):
    hub.add(REPO, {'model.safetensors': SAFE})
    hub.fault('HEAD', status=status, times=3)
    assert fetch(REPO).read_bytes() == SAFE
    assert len(hub.asked('HEAD')) == 4


@pytest.mark.parametrize('status', [429, 500, 503])
def test_a_hub_that_stays_busy(hub, cache, status):
    hub.add(REPO, {'pytorch_model.bin': b'pickle'})
    hub.fault('HEAD', status=status)
    message = fails(REPO)
    assert str(status) in message and 'later' in message and str(cache) in message
    assert len(hub.asked('HEAD')) > 3 and not hub.asked('pytorch_model.bin'), 'only a missing file has a substitute'
    assert not leftovers(cache)


@pytest.mark.parametrize('status', [429, 503])
def test_a_warm_cache_needs_no_hub(hub, status):
    hub.add(REPO, {'model.safetensors': SAFE})
    path = fetch(REPO)
    asked = len(hub.requests)
    hub.fault('', status=status)
    assert fetch(REPO) == path and len(hub.requests) == asked + 1, 'it is not asked twice'
    verify(path)


def test_a_cached_pickle_needs_no_hub(hub, monkeypatch):
    hub.add(REPO, {'x.pth': b'pickle'})
    path = fetch(REPO, 'x.pth')
    hub.fault('', status=503)
    assert fetch(REPO, 'x.pth') == path
    monkeypatch.setattr(constants, 'HF_HUB_OFFLINE', True)
    assert fetch(REPO, 'x.pth') == path


def test_offline(hub, cache, monkeypatch):
    hub.add(REPO, {'model.safetensors': SAFE})
    monkeypatch.setattr(constants, 'HF_HUB_OFFLINE', True)
    message = fails(REPO)
    assert 'HF_HUB_OFFLINE is set. Unset it' in message and str(cache) in message
    monkeypatch.setattr(constants, 'HF_HUB_OFFLINE', False)
    path = fetch(REPO)
    asked = len(hub.requests)
    monkeypatch.setattr(constants, 'HF_HUB_OFFLINE', True)
    assert fetch(REPO) == path and len(hub.requests) == asked
    verify(path)
    assert 'HF_HUB_OFFLINE' in fails(f'{REPO}@v2')


def test_no_network(monkeypatch, cache):
    with HubServer() as hub:
        hub.serve(monkeypatch, cache).add(REPO, {'model.safetensors': SAFE})
        path = fetch(REPO)
    assert fetch(REPO) == path
    message = fails('org/other')
    assert 'connection' in message and hub.url in message
    assert 'offline' not in message.lower()


def test_not_a_hub(hub):
    hub.fault('HEAD', status=200)  # a captive portal answers everything
    assert 'not one of a Hub' in fails(REPO)


def test_body_cut_once(hub, cache):
    hub.add(REPO, {'model.safetensors': SAFE})
    hub.fault('/files/', keep=.5, times=1)
    path = fetch(REPO)
    assert path.read_bytes() == SAFE and len(hub.asked('/files/')) == 2
    verify(path)


def test_body_cut_always(hub, cache):
    hub.add(REPO, {'model.safetensors': SAFE})
    hub.fault('/files/', keep=.5)
    message = fails(REPO)
    assert 'connection' in message and 'try again' in message
    assert not leftovers(cache)
    hub.faults.clear()
    assert fetch(REPO).read_bytes() == SAFE


def test_wrong_length(hub, cache):
    hub.add(REPO, {'model.safetensors': SAFE})
    hub.fault('/files/', body=lambda data: data[:-8])
    assert 'another length than announced' in fails(REPO)
    assert not leftovers(cache)
    hub.faults.clear()
    assert fetch(REPO).read_bytes() == SAFE


# -- what the disk does

FETCH = f'from timm_rope.weights.hub import fetch\nprint(fetch({REPO!r}))'


def in_process(hub, cache, script, **kwargs):
    env = clean_env(
        HF_ENDPOINT=hub.url, HF_HUB_CACHE=cache, HF_HUB_DISABLE_XET=1, HF_HUB_DISABLE_PROGRESS_BARS=1,
        PYTHONDONTWRITEBYTECODE=1)  # where files are limited, half a .pyc would stay
    return subprocess.Popen(
        [sys.executable, '-c', script], env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, **kwargs)


def test_killed_half_way(hub, cache):
    hub.add(REPO, {'model.safetensors': SAFE})
    hub.fault('/files/', times=1, pause=60., chunk=len(SAFE) // 2)
    process = in_process(hub, cache, FETCH)
    assert hub.sent.wait(60)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert process.returncode == -signal.SIGKILL
    assert not [p for p in cache.rglob('snapshots/**/*') if p.is_file()], 'half a file is not offered'
    path = fetch(REPO)
    assert path.read_bytes() == SAFE
    verify(path)


def test_two_processes_download_at_once(hub, cache):
    hub.add(REPO, {'model.safetensors': SAFE})
    hub.fault('/files/', pause=.02, chunk=len(SAFE) // 8)
    script = f'{FETCH}\nfrom timm_rope.weights.hub_cache import verify\nverify(fetch({REPO!r}))'
    processes = [in_process(hub, cache, script) for _ in range(2)]
    printed = [process.communicate(timeout=120) for process in processes]
    assert [process.returncode for process in processes] == [0, 0], printed
    assert printed[0][0] == printed[1][0]
    path = fetch(REPO)
    assert path.read_bytes() == SAFE and str(path) == printed[0][0].strip()


def test_threads_download_at_once(hub, cache):
    hub.add(REPO, {'model.safetensors': SAFE})
    hub.fault('/files/', pause=.01, chunk=len(SAFE) // 8)
    start = threading.Barrier(4)

    def load(_):
        start.wait()
        path = fetch(REPO)
        verify(path)
        return path.read_bytes()

    with ThreadPoolExecutor(4) as pool:
        assert list(pool.map(load, range(4))) == [SAFE] * 4
    assert not list(cache.rglob('*.incomplete'))


def test_full_disk(hub, cache):
    """A limit on the size of files stands for the disk: the write fails half way in the same manner."""
    hub.add(REPO, {'model.safetensors': SAFE})

    def limit():
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)  # the write then returns an error
        resource.setrlimit(resource.RLIMIT_FSIZE, (len(SAFE) // 2, len(SAFE) // 2))

    process = in_process(hub, cache, FETCH, preexec_fn=limit)
    out, err = process.communicate(timeout=120)
    last = err.strip().splitlines()[-1]
    assert process.returncode == 1 and last.startswith('timm_rope.weights.hub.HubError') and REPO in last
    for part in ('full', str(cache), 'GB free', 'HF_HOME', 'cache_dir'):
        assert part in last
    assert not leftovers(cache)
    assert fetch(REPO).read_bytes() == SAFE


def test_a_cache_that_cannot_be_used(hub, tmp_path):
    hub.add(REPO, {'model.safetensors': SAFE})
    (tmp_path / 'file').write_text('')
    message = fails(REPO, cache_dir=tmp_path / 'file' / 'cache')
    assert str(tmp_path / 'file') in message and 'cache_dir' in message


# -- what arrives

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


# -- through timm

NAME = 'vit_tiny_rope_mixed'


@pytest.fixture(scope='module')
def model():
    return make(NAME)


@pytest.fixture(params=['tag', 'hf-hub'])
def create(request, hub):
    """Creates the model from the Hub as a user does, by an overlay of its tag and by the name of the repository."""
    def by_tag(**kwargs):
        return timm.create_model(
            NAME, pretrained=True, pretrained_cfg_overlay=dict(hf_hub_id=REPO, num_classes=5), **TINY, **kwargs)

    def by_name(**kwargs):
        config = dict(architecture=NAME, model_args=TINY, pretrained_cfg=dict(num_classes=5))
        files = {'config.json': json.dumps(config).encode()}
        main = hub.repos.get(REPO)
        if main is None or 'config.json' not in main.commits[main.refs['main']]:
            hub.add(REPO, files)
        return timm.create_model(f'hf-hub:{REPO}', pretrained=True, **kwargs)

    return by_tag if request.param == 'tag' else by_name


def same_weights(a, b):
    a, b = a.state_dict(), b.state_dict()
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


TAGS = sorted({**rope_vit.PUBLISHED, **rope_swin.PUBLISHED})
SWIN = dict(img_size=32, embed_dim=32, depths=(2, 2), num_heads=(1, 2), window_size=4)


@pytest.mark.parametrize('linked', [True, False])
@pytest.mark.parametrize('tag', TAGS)
def test_every_tag_is_verified(hub, cache, monkeypatch, tag, linked):
    """Wrong bytes of the right length, on the way and later on the disk, in the file of this tag."""
    monkeypatch.setattr(constants, 'HF_HUB_DISABLE_SYMLINKS', not linked)
    sizes = SWIN if tag.startswith('swin') else {**TINY, 'num_classes': 1000}
    source = timm.create_model(tag.partition('.')[0], **sizes)
    cfg = timm.get_pretrained_cfg(tag)
    out = io.BytesIO(save(source.state_dict()))
    name = 'model.safetensors'
    if not cfg.hf_hub_id.startswith('timm/'):
        name = cfg.hf_hub_filename or 'pytorch_model.bin'
        torch.save({'model': source.state_dict()}, out)
    data = out.getvalue()
    # in the middle of each format are tensors
    wrong = data[:len(data) // 2] + bytes([data[len(data) // 2] ^ 1]) + data[len(data) // 2 + 1:]
    hub.add(cfg.hf_hub_id, {name: data})
    hub.fault('/files/', body=lambda _: wrong, times=1)
    with pytest.raises(CorruptWeightsError, match=f'{name} of {cfg.hf_hub_id} .*sha256'):
        timm.create_model(tag, pretrained=True, **sizes)
    assert not leftovers(cache)
    assert same_weights(timm.create_model(tag, pretrained=True, **sizes), source)
    [blob] = {path.resolve() for path in leftovers(cache)}
    blob.write_bytes(wrong)
    monkeypatch.setattr(constants, 'HF_HUB_OFFLINE', True)
    with pytest.raises(CorruptWeightsError, match=f'{name} of {cfg.hf_hub_id} .*sha256'):
        timm.create_model(tag, pretrained=True, **sizes)
    monkeypatch.setattr(constants, 'HF_HUB_OFFLINE', False)
    assert same_weights(timm.create_model(tag, pretrained=True, **sizes), source)


@pytest.mark.parametrize('where', ['first tensor', 'last tensor', 'header', 'length of the header'])
def test_corrupt_weights_reach_no_model(hub, cache, model, create, where):
    data = save(model.state_dict())
    begin = 8 + int.from_bytes(data[:8], 'little')
    place = {'first tensor': begin, 'last tensor': len(data) - 1, 'header': 8, 'length of the header': 6}[where]
    bad = data[:place] + bytes([data[place] ^ 1]) + data[place + 1:]
    hub.add(REPO, {'model.safetensors': data})
    hub.fault('/files/', body=lambda _: bad, times=1)
    with pytest.raises(CorruptWeightsError, match='sha256'):
        create()
    assert not [p for p in leftovers(cache) if p.stat().st_size == len(data)]
    assert same_weights(create(), model)


@pytest.mark.parametrize('what', [b'"depth": 3', b'"in1k"'])
def test_a_corrupt_config_reaches_no_model(hub, cache, model, what):
    """timm reads it; a digit or a letter of it is enough for another model."""
    config = dict(architecture=NAME, model_args=TINY, pretrained_cfg=dict(num_classes=5, tag='in1k'))
    data = json.dumps(config).encode()
    assert what in data
    bad = data.replace(what, what.replace(b'3', b'2').replace(b'in1k', b'in2k'))
    hub.add(REPO, {'config.json': data, 'model.safetensors': save(model.state_dict())})
    hub.fault('GET', body=lambda _: bad, times=1)
    with pytest.raises(CorruptWeightsError, match=f'config.json of {REPO} .*sha1'):
        timm.create_model(f'hf-hub:{REPO}@main', pretrained=True)
    assert not leftovers(cache)
    assert same_weights(timm.create_model(f'hf-hub:{REPO}@main', pretrained=True), model)


@pytest.mark.parametrize('custom_load', [True, 'hf'])
def test_no_config_avoids_the_hash(hub, model, custom_load):
    config = dict(architecture=NAME, model_args=TINY, pretrained_cfg=dict(
        num_classes=5, custom_load=custom_load, hf_hub_filename='w.bin'))
    out = io.BytesIO()
    torch.save(model.state_dict(), out)
    data = out.getvalue()
    hub.add(REPO, {'config.json': json.dumps(config).encode(), 'w.bin': data})
    hub.fault('/files/', body=lambda _: data[:-5000] + bytes(5000), times=1)
    with pytest.raises(CorruptWeightsError):
        timm.create_model(f'hf-hub:{REPO}', pretrained=True)
    assert same_weights(timm.create_model(f'hf-hub:{REPO}', pretrained=True), model)


@pytest.mark.parametrize('name', ['model.safetensors', 'pytorch_model.bin'])
def test_no_pickle_is_opened_before_it_is_verified(hub, model, monkeypatch, name):
    """Whatever it is called."""
    out = io.BytesIO()
    torch.save(model.state_dict(), out)
    hub.add(REPO, {name: out.getvalue()})
    done, opened = [], []
    monkeypatch.setattr(pretrained_module, 'verify', lambda path: [
        threading.Event().wait(.2), verify(path), done.append(path)][1])
    monkeypatch.setattr(pretrained_module, 'read_weights', lambda path: [
        opened.append(list(done)), read_weights(path)][1])
    created = timm.create_model(
        NAME, pretrained=True, pretrained_cfg_overlay=dict(hf_hub_id=REPO, num_classes=5), **TINY)
    assert same_weights(created, model) and len(opened) == 1 and opened[0] == done


def test_what_was_hashed_is_what_was_read(hub, model, create, monkeypatch):
    """Another process may put the good file in the place of the bad one, after that was opened here."""
    data = save(model.state_dict())
    hub.add(REPO, {'model.safetensors': data})
    hub.fault('/files/', body=lambda _: data[:-1] + bytes([data[-1] ^ 1]), times=1)
    read = threading.Event()

    def replaced_first(path):
        assert read.wait(60)
        new = path.resolve().with_name('new')
        new.write_bytes(data)
        new.replace(path.resolve())
        return verify(path)

    def reads(path):
        content = read_weights(path)
        read.set()
        return content

    monkeypatch.setattr(pretrained_module, 'verify', replaced_first)
    monkeypatch.setattr(pretrained_module, 'read_weights', reads)
    with pytest.raises(HubError, match='model.safetensors was replaced .*try again'):
        create()
    monkeypatch.undo()


def test_create_model_finds_pickled_weights(hub, model, create):
    out = io.BytesIO()
    torch.save(model.state_dict(), out)
    hub.add(REPO, {'pytorch_model.bin': out.getvalue()})
    assert same_weights(create(), model)


def test_create_model_from_a_warm_cache(hub, model, create, monkeypatch):
    hub.add(REPO, {'model.safetensors': save(model.state_dict())})
    create()
    hub.fault('', status=503)
    assert same_weights(create(), model)
    monkeypatch.setattr(constants, 'HF_HUB_OFFLINE', True)
    asked = len(hub.requests)
    assert same_weights(create(), model) and len(hub.requests) == asked


def test_create_model_explains(hub, model):
    def create(repo=REPO, **kwargs):
        with pytest.raises(HubError) as caught:
            timm.create_model(NAME, pretrained=True, pretrained_cfg_overlay=dict(hf_hub_id=repo), **TINY, **kwargs)
        return str(caught.value)

    assert REPO in create() and 'private' in create()
    hub.add(REPO, {'model.safetensors': save(model.state_dict())}, gated=True)
    assert 'gated' in create()
    hub.fault('HEAD', status=503)
    assert '503' in create()


def test_create_model_with_cache_dir_and_revision(hub, cache, tmp_path, model):
    hub.add(REPO, {'model.safetensors': save(model.state_dict())}, revision='v1')
    hub.add(REPO, {'model.safetensors': save(make(NAME, num_classes=7).state_dict())})
    created = timm.create_model(
        NAME, pretrained=True, pretrained_cfg_overlay=dict(hf_hub_id=f'{REPO}@v1', num_classes=5),
        cache_dir=tmp_path / 'mine', **TINY)
    assert same_weights(created, model)
    assert leftovers(tmp_path / 'mine') and not cache.exists()


# -- uploads

uploading = pytest.mark.filterwarnings('ignore:.*upload raw bytes:DeprecationWarning')  # of the client
MINE = 'me/mine'


def push(model):
    timm.models.push_to_hf_hub(model, MINE, safe_serialization=True)


def commits(hub):
    return hub.repos[MINE].commits if MINE in hub.repos else {}


@uploading
@pytest.mark.parametrize('status', [429, 503])
def test_an_upload_to_a_busy_hub_is_tried_again(hub, model, status):
    hub.fault('PUT', status=status, times=2)
    push(model)
    assert len(hub.asked('PUT')) == 3 and len(commits(hub)) == 1
    assert same_weights(timm.create_model(f'hf-hub:{MINE}', pretrained=True), model)


@uploading
@pytest.mark.parametrize('part, status', [
    ('create', 401), ('preupload', 403), ('batch', 503), ('PUT', 500), ('commit', 403), ('commit', 503)])
def test_an_upload_that_fails_shows_nothing(hub, cache, model, part, status):
    """A commit appears whole or not at all; the one before it stays."""
    push(model)
    before = dict(commits(hub))
    other = make(NAME, num_classes=7)
    hub.fault(part, status=status)
    with pytest.raises(Exception) as caught:
        push(other)
    assert str(status) in f'{caught.value} {caught.value.__cause__}'
    assert commits(hub) == before
    assert same_weights(timm.create_model(f'hf-hub:{MINE}', pretrained=True), model)
    hub.faults.clear()
    push(other)
    assert same_weights(timm.create_model(f'hf-hub:{MINE}', pretrained=True), other)


@uploading
def test_no_upload_while_offline(hub, model, monkeypatch):
    monkeypatch.setattr(constants, 'HF_HUB_OFFLINE', True)
    with pytest.raises(Exception, match='HF_HUB_OFFLINE'):
        push(model)
    monkeypatch.setattr(constants, 'HF_HUB_OFFLINE', False)
    push(model)
    assert len(commits(hub)) == 1


@uploading
def test_an_upload_killed_half_way(hub, cache, model, tmp_path):
    timm.models.save_for_hf(model, tmp_path / 'saved', safe_serialization=True)
    script = f'''
from huggingface_hub import create_repo, upload_folder
create_repo({MINE!r})
upload_folder(folder_path={str(tmp_path / 'saved')!r}, repo_id={MINE!r})
'''
    hub.fault('PUT', times=1, pause=60.)
    process = in_process(hub, cache, script)
    assert hub.sent.wait(120)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert process.returncode == -signal.SIGKILL and not commits(hub)
    push(model)
    assert same_weights(timm.create_model(f'hf-hub:{MINE}', pretrained=True), model)


@uploading
def test_an_upload_from_a_full_disk(hub, model, monkeypatch):
    """The folder of the saved files is full: what was written of them is not sent."""
    monkeypatch.setattr(sys, 'dont_write_bytecode', True)  # half a .pyc would stay
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, before[1]))
    try:
        with pytest.raises(Exception, match='File too large'):
            push(model)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert not commits(hub) and not hub.asked('PUT')
    push(model)
    assert same_weights(timm.create_model(f'hf-hub:{MINE}', pretrained=True), model)
