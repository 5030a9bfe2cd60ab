"""Models from the Hub through timm, and back."""
import io
import json
import resource
import signal
import sys
import threading

import pytest
import timm
import torch
from downloads import REPO, in_process, leftovers
from huggingface_hub import constants
from safetensors.torch import save
from tiny import TINY, make

from timm_rope._timm import push_to_hf_hub, save_for_hf
from timm_rope.models import rope_swin, rope_vit
from timm_rope.weights import source as source_module
from timm_rope.weights.files import read_weights
from timm_rope.weights.hub import HubError
from timm_rope.weights.hub_cache import CorruptWeightsError, verify

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
    monkeypatch.setattr(source_module, 'verify', lambda path: [
        threading.Event().wait(.2), verify(path), done.append(path)][1])
    monkeypatch.setattr(source_module, 'read_weights', lambda path: [
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

    monkeypatch.setattr(source_module, 'verify', replaced_first)
    monkeypatch.setattr(source_module, 'read_weights', reads)
    with pytest.raises(HubError, match='model.safetensors was replaced .*try again'):
        create()
    monkeypatch.undo()


def test_create_model_finds_pickled_weights(hub, model, create):
    out = io.BytesIO()
    torch.save(model.state_dict(), out)
    hub.add(REPO, {'pytorch_model.bin': out.getvalue()})
    assert same_weights(create(), model)


def test_naflex_models_take_the_same_weights(hub, model, create):
    hub.add(REPO, {'model.safetensors': save(model.state_dict())})
    created = create(use_naflex=True)
    assert hasattr(created, 'get_patch_size') and same_weights(created, model)


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
    push_to_hf_hub(model, MINE, safe_serialization=True)


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
    save_for_hf(model, tmp_path / 'saved', safe_serialization=True)
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
