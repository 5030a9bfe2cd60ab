"""Weights from the Hub: the real client against a server on the loopback interface that does what a network does."""
import io
import json
import os
import resource
import shutil
import signal
import subprocess
import sys
import warnings
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
from timm_rope import hub as hub_module
from timm_rope.hub import CorruptWeightsError, HubError, fetch, verify
from timm_rope.weight_files import read_weights

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

FETCH = f'from timm_rope.hub import fetch\nprint(fetch({REPO!r}))'


def in_process(hub, cache, script, **kwargs):
    env = clean_env(HF_ENDPOINT=hub.url, HF_HUB_CACHE=cache, HF_HUB_DISABLE_XET=1, HF_HUB_DISABLE_PROGRESS_BARS=1)
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


def test_full_disk(hub, cache):
    """A limit on the size of files stands for the disk: the write fails half way in the same manner."""
    hub.add(REPO, {'model.safetensors': SAFE})

    def limit():
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)  # the write then returns an error
        resource.setrlimit(resource.RLIMIT_FSIZE, (len(SAFE) // 2, len(SAFE) // 2))

    process = in_process(hub, cache, FETCH, preexec_fn=limit)
    out, err = process.communicate(timeout=120)
    last = err.strip().splitlines()[-1]
    assert process.returncode == 1 and last.startswith('timm_rope.hub.HubError') and REPO in last
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
    hub.fault('', status=500)
    with pytest.warns(RuntimeWarning, match='could not be verified'):
        verify(path)
    assert path.read_bytes() == SAFE


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
    real = hub_module._remove

    def replaced_first(*args):
        (blob.parent / 'new').write_bytes(SAFE)
        (blob.parent / 'new').replace(blob)
        return real(*args)

    monkeypatch.setattr(hub_module, '_remove', replaced_first)
    with pytest.raises(CorruptWeightsError):
        verify(path)
    assert path.read_bytes() == SAFE
    verify(path)


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
