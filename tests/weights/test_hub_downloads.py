"""Downloads from the Hub: what is fetched, by which name, and what the Hub, the network and the disk may do."""
import resource
import signal
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from downloads import FLIPPED, OTHER, REPO, SAFE, in_process, leftovers
from hub_server import TOKEN, HubServer
from huggingface_hub import constants

import timm_rope
from timm_rope.weights.files import read_weights
from timm_rope.weights.hub import HubError, fetch
from timm_rope.weights.hub_cache import verify

# --

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
