"""No route from a weight file or a Hub config to code: planted pickles, names that leave their folder."""
import argparse
import io
import json
import os
import pickle
import zipfile

import pytest
import timm
import torch
from hub_server import HubServer
from safetensors.torch import save, save_file
from tiny import TINY, make

from timm_rope.weight_files import read_weights

NAME = 'vit_tiny_rope_mixed'
REPO = 'org/vit'


class Planted:
    """What an attacker would pickle: unpickling it creates a file."""

    def __init__(self, marker):
        self.marker = marker

    def __reduce__(self):
        return os.mkdir, (str(self.marker),)


@pytest.fixture
def marker(tmp_path):
    path = tmp_path / 'code-was-run'
    pickle.loads(pickle.dumps(Planted(path)))
    assert path.is_dir(), 'the trap works'
    path.rmdir()
    yield path
    assert not path.exists(), 'code from the weight file was run'


@pytest.fixture
def hub(monkeypatch, tmp_path):
    with HubServer() as server:
        yield server.serve(monkeypatch, tmp_path / 'cache')


@pytest.fixture(scope='module')
def weights():
    return make(NAME).state_dict()


def trap(kind, where, weights, marker):
    """Bytes of a checkpoint with a planted object, as torch.save and pickle write them."""
    planted = Planted(marker)
    content = {'alone': planted, 'hidden': {**weights, 'zz': planted}, 'beside': {'model': weights, 'args': planted}}
    out = io.BytesIO()
    if kind == 'pickle':
        pickle.dump(content[where], out)
    else:
        torch.save(content[where], out, _use_new_zipfile_serialization=kind == 'zip')
    return out.getvalue()


KINDS = ['zip', 'legacy', 'pickle']
PLACES = ['alone', 'hidden', 'beside']


# -- files

@pytest.mark.parametrize('where', PLACES)
@pytest.mark.parametrize('kind', KINDS)
@pytest.mark.parametrize('name', ['pytorch_model.bin', 'model.safetensors'])
def test_read_weights_refuses(tmp_path, marker, weights, name, kind, where):
    path = tmp_path / name
    path.write_bytes(trap(kind, where, weights, marker))
    with pytest.raises(RuntimeError, match='refused') as caught:
        read_weights(path)
    message = str(caught.value)
    assert str(path) in message and 'posix.mkdir' in message and 'Nothing in it was run' in message
    assert 'safetensors' in message and 'weights_only' not in message
    shown = caught.value.__cause__ or (not caught.value.__suppress_context__ and caught.value.__context__)
    assert not shown, "torch's advice is not shown"


def test_environment_is_no_escape(tmp_path, marker, weights, monkeypatch):
    monkeypatch.setenv('TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD', '1')
    (tmp_path / 'x.pth').write_bytes(trap('zip', 'hidden', weights, marker))
    with pytest.raises(RuntimeError, match='refused'):
        read_weights(tmp_path / 'x.pth')


class Subclass(argparse.Namespace):
    pass


@pytest.mark.parametrize('zipped', [True, False])
def test_only_namespace_is_allowed(tmp_path, zipped):
    path = tmp_path / 'checkpoint.pth'
    args = argparse.Namespace(lr=.1, model=NAME)
    torch.save({'model': {'w': torch.ones(2)}, 'args': args}, path, _use_new_zipfile_serialization=zipped)
    read = read_weights(path)
    assert read['args'] == args and torch.equal(read['model']['w'], torch.ones(2))
    torch.save({'args': Subclass(lr=.1)}, path, _use_new_zipfile_serialization=zipped)
    with pytest.raises(RuntimeError, match=r'test_security\.Subclass'):
        read_weights(path)
    with pytest.raises(pickle.UnpicklingError, match='Namespace'):
        torch.save(args, path)
        torch.load(path, weights_only=True)  # what is allowed here is allowed nowhere else


def test_all_formats_agree_and_stay_as_they_are(tmp_path, weights):
    save_file(weights, tmp_path / 'a')
    torch.save(weights, tmp_path / 'b')
    torch.save(weights, tmp_path / 'c', _use_new_zipfile_serialization=False)
    torch.save(weights, tmp_path / 'd.safetensors')  # a wrong name is no harm
    for name in ('a', 'b', 'c', 'd.safetensors'):
        before = (tmp_path / name).read_bytes()
        read = read_weights(tmp_path / name)
        assert read.keys() == weights.keys()
        for key, value in read.items():
            assert value.device.type == 'cpu' and torch.equal(value, weights[key])
            value.zero_()
        assert (tmp_path / name).read_bytes() == before, 'writing to a mapped tensor leaves the file alone'


def rss_of(kind):
    with open('/proc/self/smaps_rollup') as file:
        return next(int(line.split()[1]) for line in file if line.startswith(kind)) * 1024


@pytest.mark.skipif(not os.path.exists('/proc/self/smaps_rollup'), reason='reads memory from /proc')
@pytest.mark.parametrize('kind', ['safetensors', 'zip'])
def test_tensors_are_mapped(tmp_path, kind):
    size = 64 << 20
    tensors = {'w': torch.zeros(size // 4)}
    (save_file if kind == 'safetensors' else torch.save)(tensors, tmp_path / 'x')
    del tensors
    before = rss_of('Rss')
    read = read_weights(tmp_path / 'x')
    assert rss_of('Rss') - before < size / 4
    assert read['w'].shape == (size // 4,)


def broken_files(weights):
    out = io.BytesIO()
    torch.save(weights, out)
    zipped, out = out.getvalue(), io.BytesIO()
    torch.save(weights, out, _use_new_zipfile_serialization=False)
    legacy, safe, archive, script = out.getvalue(), save(weights), io.BytesIO(), io.BytesIO()
    with zipfile.ZipFile(archive, 'w') as file:
        file.writestr('numpy.npy', b'')
    torch.jit.save(torch.jit.script(torch.nn.Linear(2, 2)), script)
    return {
        'empty': b'', 'one byte': b'\x80', 'zip, half': zipped[:len(zipped) // 2], 'zip, head': zipped[:40],
        'legacy, half': legacy[:len(legacy) // 2], 'legacy, head': legacy[:60], 'legacy, 300': legacy[:300],
        'safetensors, half': safe[:len(safe) // 2], 'safetensors, head': safe[:20],
        'safetensors, tail': safe + b'\0', 'text': b'epoch,loss\n' * 20, 'page': b'<!doctype html><p>404',
        'pointer': b'version https://git-lfs.github.com/spec/v1\noid sha256:00\n', 'other zip': archive.getvalue(),
        'script': script.getvalue(), 'not a dict': bytes(io.BytesIO(_saved([torch.ones(2)])).getvalue()),
    }


def _saved(what):
    out = io.BytesIO()
    torch.save(what, out)
    return out.getvalue()


@pytest.mark.filterwarnings('ignore:.torch.jit:FutureWarning')
def test_broken_files(tmp_path, weights):
    path = tmp_path / 'model.bin'
    for what, data in broken_files(weights).items():
        path.write_bytes(data)
        error = RuntimeError if what == 'one byte' else ValueError
        with pytest.raises(error) as caught:
            read_weights(path)
        assert str(path) in str(caught.value), what
        assert 'weights_only' not in str(caught.value), what
        assert path.read_bytes() == data, what


def test_no_file(tmp_path):
    with pytest.raises(FileNotFoundError, match='model.bin'):
        read_weights(tmp_path / 'model.bin')
    with pytest.raises(ValueError, match='directory'):
        read_weights(tmp_path)


# -- timm's routes

def create(**kwargs):
    return timm.create_model(NAME, **TINY, **kwargs)


def hub_tag(hub, folder, file):
    hub.add(REPO, {file.name: file.read_bytes()})
    create(pretrained=True, pretrained_cfg_overlay=dict(hf_hub_id=REPO, hf_hub_filename=file.name))


def hub_name(hub, folder, file):
    config = dict(architecture=NAME, model_args=TINY, pretrained_cfg=dict(num_classes=5, hf_hub_filename=file.name))
    hub.add(REPO, {file.name: file.read_bytes(), 'config.json': json.dumps(config).encode()})
    timm.create_model(f'hf-hub:{REPO}', pretrained=True)


def local_dir(hub, folder, file):
    config = dict(architecture=NAME, model_args=TINY, pretrained_cfg=dict(num_classes=5))
    (folder / 'config.json').write_text(json.dumps(config))
    timm.create_model(f'local-dir:{folder}', pretrained=True)


def file_overlay(hub, folder, file):
    create(pretrained=True, pretrained_cfg_overlay=dict(file=str(file)))


def checkpoint_path(hub, folder, file):
    create(checkpoint_path=str(file))


def load_checkpoint(hub, folder, file):
    timm.models.load_checkpoint(create(), str(file))


ROUTES = [hub_tag, hub_name, local_dir, file_overlay, checkpoint_path, load_checkpoint]


@pytest.mark.parametrize('name', ['pytorch_model.bin', 'model.pth', 'x.ckpt'])
@pytest.mark.parametrize('route', ROUTES)
def test_every_route_refuses(tmp_path, marker, hub, weights, route, name):
    folder = tmp_path / 'folder'
    folder.mkdir()
    for kind in ('zip', 'legacy'):
        (folder / name).write_bytes(trap(kind, 'hidden', weights, marker))
        with pytest.raises(RuntimeError, match='refused|blocked'):
            route(hub, folder, folder / name)
        assert not marker.exists()
    (folder / name).write_bytes(_saved(weights))
    if name != 'x.ckpt' or route is not local_dir:
        route(hub, folder, folder / name)  # the same route takes honest weights


@pytest.mark.parametrize('route', [hub_tag, hub_name, local_dir])
def test_safetensors_beside_a_planted_pickle_is_the_one_used(tmp_path, marker, hub, weights, route):
    pickled = tmp_path / 'folder' / 'pytorch_model.bin'
    pickled.parent.mkdir()
    pickled.write_bytes(trap('zip', 'hidden', weights, marker))
    save_file(weights, pickled.parent / 'model.safetensors')
    hub.add(REPO, {'model.safetensors': save(weights)})
    route(hub, pickled.parent, pickled)
    assert not hub.asked('pytorch_model.bin')


@pytest.mark.parametrize('filename', ['../../planted.bin', '/etc/planted.bin', 'a/../planted.bin', '..\\planted.bin'])
def test_file_names_of_a_hub_config_stay_in_the_repository(hub, weights, filename):
    config = dict(architecture=NAME, model_args=TINY, pretrained_cfg=dict(num_classes=5, hf_hub_filename=filename))
    hub.add(REPO, {'config.json': json.dumps(config).encode(), 'planted.bin': _saved(weights)})
    with pytest.raises(ValueError, match='filename'):
        timm.create_model(f'hf-hub:{REPO}', pretrained=True)
    assert not hub.asked('planted')


@pytest.mark.parametrize('repo_id', ['../org/vit', 'org/../vit', '/etc/passwd', 'org/vit@../..', 'org\\vit'])
def test_repository_names_stay_on_the_hub(hub, tmp_path, repo_id):
    with pytest.raises(ValueError, match='repo_id'):
        create(pretrained=True, pretrained_cfg_overlay=dict(hf_hub_id=repo_id))
    assert not hub.requests and not (tmp_path / 'cache').exists()


def test_a_safetensors_file_that_begins_like_a_pickle_is_none(tmp_path):
    path, tensor = tmp_path / 'model.safetensors', torch.arange(3.)
    for padding in range(300):
        save_file({'weight': tensor}, path, metadata={'note': 'x' * padding})
        if path.read_bytes()[:1] == b'\x80':  # a header of 128, 384, ... bytes
            assert torch.equal(read_weights(path)['weight'], tensor)
            return
    raise AssertionError('no padding gave such a header')
