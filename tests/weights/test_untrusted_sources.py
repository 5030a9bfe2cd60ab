"""No route from a checkpoint or a Hub config to code: planted pickles, names that leave their folder."""
import contextlib
import hashlib
import inspect
import json
import pickle

import pytest
import timm
import torch
from planted import KINDS, NAME, saved, trap
from safetensors.torch import save, save_file
from tiny import TINY

from timm_rope.cli._models import load, parse_source
from timm_rope.cli.convert.command import convert

REPO = 'org/vit'


# -- routes of ours and of timm

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


def features(hub, folder, file):
    hub.add(REPO, {file.name: file.read_bytes()})
    create(pretrained=True, features_only=True, pretrained_cfg_overlay=dict(
        hf_hub_id=REPO, hf_hub_filename=file.name, num_classes=5))


def convert_file(hub, folder, file):
    convert(str(file), folder.parent / f'out-{len(list(folder.parent.iterdir()))}', model=NAME, img_size=32,
            model_args=dict(num_heads=2))


def convert_from_hub(hub, folder, file):
    hub.add(REPO, {file.name: file.read_bytes()})
    convert(f'hf-hub:{REPO}', folder.parent / f'out-{len(list(folder.parent.iterdir()))}', filename=file.name,
            model=NAME, img_size=32, model_args=dict(num_heads=2))


def swept(hub, folder, file):
    load(parse_source(f'{NAME}={file}'), TINY, use_ema=False)


OURS = [hub_tag, hub_name, local_dir, file_overlay, features, convert_file, convert_from_hub, swept]


# -- read by timm

def url(hub, folder, file):
    data = file.read_bytes()
    sha = hashlib.sha256(data).hexdigest()
    hub.blobs[sha] = data
    create(pretrained=True, cache_dir=folder.parent / 'urls', pretrained_cfg_overlay=dict(
        url=f'{hub.files_url}/{sha}', hf_hub_id='', num_classes=5))


def timm_load_pretrained(hub, folder, file):
    model = create()
    hub.add(REPO, {file.name: file.read_bytes()})
    timm.models.load_pretrained(model, {**model.pretrained_cfg, 'hf_hub_id': REPO, 'hf_hub_filename': file.name,
                                        'num_classes': 5}, num_classes=5)


def resumed(hub, folder, file):
    timm.models.resume_checkpoint(create(), str(file))


UNSAFE = inspect.signature(timm.models.load_state_dict).parameters['weights_only'].default is False
TIMMS = [url, *(pytest.param(route, marks=pytest.mark.skipif(UNSAFE, reason='before 1.0.26, timm runs any pickle'))
                for route in (checkpoint_path, load_checkpoint, timm_load_pretrained, resumed))]


# -- planted pickles

@pytest.mark.parametrize('name', ['pytorch_model.bin', 'model.pth', 'x.ckpt'])
@pytest.mark.parametrize('route', OURS + TIMMS)
def test_every_route_refuses(tmp_path, marker, hub, weights, route, name):
    folder = tmp_path / 'folder'
    folder.mkdir()
    for kind in ('zip', 'legacy'):
        (folder / name).write_bytes(trap(kind, 'hidden', weights, marker))
        # torch itself, where timm asks nothing else: WeightsUnpickler
        with pytest.raises((RuntimeError, pickle.UnpicklingError), match='refused|blocked|Weights only load failed'):
            route(hub, folder, folder / name)
        assert not marker.exists()
    (folder / name).write_bytes(saved(weights))
    route(hub, folder, folder / name)  # the same route takes honest weights


@pytest.mark.parametrize('kind', KINDS)
@pytest.mark.parametrize('route', OURS + TIMMS)
def test_a_pickle_called_safetensors(tmp_path, marker, hub, weights, route, kind):
    folder = tmp_path / 'folder'
    folder.mkdir()
    file = folder / 'model.safetensors'
    file.write_bytes(trap(kind, 'hidden', weights, marker))
    with pytest.raises(Exception, match='refused' if route in OURS else None):
        route(hub, folder, file)
    if route in OURS:  # they go by what is in the file
        file.write_bytes(saved(weights))
        route(hub, folder, file)
        file = file.rename(folder / 'pytorch_model.bin')
        file.write_bytes(save(weights))
        route(hub, folder, file)


@pytest.mark.parametrize('route', [hub_tag, hub_name, local_dir])
def test_safetensors_beside_a_planted_pickle_is_the_one_used(tmp_path, marker, hub, weights, route):
    pickled = tmp_path / 'folder' / 'pytorch_model.bin'
    pickled.parent.mkdir()
    pickled.write_bytes(trap('zip', 'hidden', weights, marker))
    save_file(weights, pickled.parent / 'model.safetensors')
    hub.add(REPO, {'model.safetensors': save(weights)})
    route(hub, pickled.parent, pickled)
    assert not hub.asked('pytorch_model.bin')


# -- names and arguments of a config

@pytest.mark.parametrize('filename', ['../../planted.bin', '/etc/planted.bin', 'a/../planted.bin', '..\\planted.bin'])
def test_file_names_of_a_hub_config_stay_in_the_repository(hub, weights, filename):
    config = dict(architecture=NAME, model_args=TINY, pretrained_cfg=dict(num_classes=5, hf_hub_filename=filename))
    hub.add(REPO, {'config.json': json.dumps(config).encode(), 'planted.bin': saved(weights)})
    with pytest.raises(ValueError, match='filename'):
        timm.create_model(f'hf-hub:{REPO}', pretrained=True)
    assert not hub.asked('planted')


HOSTILE = {
    'overlay': dict(model_args=dict(pretrained_cfg_overlay=dict(file='EVIL'))),
    'cfg': dict(model_args=dict(pretrained_cfg=dict(file='EVIL'))),
    'checkpoint': dict(model_args=dict(checkpoint_path='EVIL')),
    'cache': dict(model_args=dict(cache_dir='EVIL')),
    'warm start': dict(model_args=dict(rope_warm_start=True)),
    'nested': dict(model_args=dict(pretrained_model_args=dict(rope_warm_start=True))),
    'not strict': dict(model_args=dict(pretrained_strict=False)),
    'filter': dict(model_args=dict(pretrained_filter_fn='os.system')),
    'arguments': dict(model_args=dict(kwargs_filter=['rope_encoding'])),
    'class': dict(model_args=dict(model_cls='os.system')),
    'norm': dict(model_args=dict(norm_layer='os.system')),
    'layer': dict(model_args=dict(mlp_layer='os.system')),
    'activation': dict(model_args=dict(act_layer='os.system')),
    'pruned': dict(model_args=dict(pruned=True)),
    'state dict': dict(pretrained_cfg=dict(state_dict=dict(EVIL=0))),
    'source': dict(pretrained_cfg=dict(source='', file='EVIL')),
    'url': dict(pretrained_cfg=dict(url='http://127.0.0.1:9/EVIL', hf_hub_id='evil/evil')),
    'format': dict(pretrained_cfg=dict(custom_load=True, file='EVIL')),
    'hub format': dict(pretrained_cfg=dict(custom_load='hf', file='EVIL')),
    'class names': dict(pretrained_cfg=dict(classifier=5, first_conv='nowhere')),
    'architecture': dict(architecture='os.system'),
    'path': dict(architecture='../EVIL'),
    'source name': dict(architecture='hf-hub:evil/evil'),
    'another model': dict(architecture='vit_tiny_rope_axial'),
    'a model of timm': dict(architecture='resnet10t'),
}


@pytest.mark.parametrize('where', ['folder', 'hub'])
@pytest.mark.parametrize('what', HOSTILE)
def test_a_hostile_config_gets_its_own_weights_or_none(tmp_path, marker, hub, weights, where, what):
    evil = tmp_path / 'evil.pth'
    evil.write_bytes(saved({**weights, 'head.weight': torch.zeros_like(weights['head.weight'])}))
    assert create(checkpoint_path=str(evil)).head.weight.abs().max() == 0, 'the trap works'
    config = dict(architecture=NAME, model_args=dict(TINY), pretrained_cfg=dict(num_classes=5))
    for key, value in json.loads(json.dumps(HOSTILE[what]).replace('EVIL', str(evil))).items():
        config[key] = {**config[key], **value} if isinstance(value, dict) else value
    files = {'config.json': json.dumps(config).encode(), 'model.safetensors': save(weights)}
    (tmp_path / 'folder').mkdir()
    for name, data in files.items():
        (tmp_path / 'folder' / name).write_bytes(data)
    hub.add(REPO, files)
    source = f'hf-hub:{REPO}' if where == 'hub' else f'local-dir:{tmp_path / "folder"}'
    with contextlib.suppress(TypeError, ValueError, RuntimeError, KeyError, FileNotFoundError):
        model = timm.create_model(source, pretrained=True)
        state = model.state_dict()
        assert state.keys() == weights.keys() and all(torch.equal(state[k], v) for k, v in weights.items())
    assert not hub.asked('evil')


@pytest.mark.parametrize('repo_id', ['../org/vit', 'org/../vit', '/etc/passwd', 'org/vit@../..', 'org\\vit'])
def test_repository_names_stay_on_the_hub(hub, tmp_path, repo_id):
    with pytest.raises(ValueError, match='repo_id'):
        create(pretrained=True, pretrained_cfg_overlay=dict(hf_hub_id=repo_id))
    assert not hub.requests and not (tmp_path / 'cache').exists()
