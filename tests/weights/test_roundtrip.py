"""What timm saves of our models, an untouched timm reads back bit for bit, from a folder and from the Hub."""
import json

import pytest
import timm
import torch
from fresh_python import run_python
from hub_server import HubServer
from tiny import make

from timm_rope import list_ropes
from timm_rope._timm import push_to_hf_hub, save_for_hf

# of the Hub's client
pytestmark = pytest.mark.filterwarnings('ignore:.*upload raw bytes:DeprecationWarning')

# name -> model, arguments, what is done to it before it is saved
CASES = {
    **{f'plain {name}': (f'vit_tiny_rope_{name}', {}, None) for name in list_ropes()},
    'reference grid': ('vit_tiny_rope_spherical', dict(rope_reference_grid=(3, 5)), None),
    'reference grid, learned': ('vit_tiny_rope_axial_learned', dict(rope_reference_grid=(7, 2)), None),
    'order': ('vit_tiny_rope_spherical_learned', dict(rope_order='xy', rope_coords='ends'), None),
    'block': ('vit_tiny_rope_liere', dict(rope_block=4), None),
    'shared heads': ('vit_tiny_rope_mixed', dict(rope_share_heads=True, rope_temperature=50.), None),
    'shared layers': ('vit_tiny_rope_mixed_ape', dict(rope_share_layers=True), None),
    'other encoding': ('vit_tiny_rope_axial', dict(rope_encoding='uniform', rope_coords='ends'), None),
    'not square': ('vit_tiny_rope_axial', dict(img_size=(32, 48)), None),
    'not square, ape': ('vit_tiny_rope_mixed_ape', dict(img_size=(64, 16)), None),
    'baseline': ('vit_tiny_ape', dict(img_size=(24, 40)), None),
    'registers': ('vit_tiny_rope_mixed', dict(reg_tokens=3, class_token=False, global_pool='avg'), None),
    'channels': ('vit_tiny_rope_mixed', dict(in_chans=2), None),
    'uniform drop path': ('vit_tiny_rope_mixed', dict(drop_path_rate=.1, drop_path_uniform=True), None),
    'new head': ('vit_tiny_rope_mixed', {}, lambda m: m.reset_classifier(9)),
    'new pooling': ('vit_tiny_rope_axial_ape', {}, lambda m: m.reset_classifier(3, 'avg')),
    'no head': ('vit_tiny_rope_spherical', {}, lambda m: m.reset_classifier(0)),
    'image size': ('vit_tiny_rope_spherical', {}, lambda m: m.set_input_size((48, 24))),
    'image size, ape': ('vit_tiny_rope_mixed_ape', {}, lambda m: m.set_input_size((48, 24))),
    'patch size': ('vit_tiny_rope_mixed', {}, lambda m: m.set_input_size(patch_size=4)),
    'image and patch size, ape': ('vit_tiny_rope_axial_ape', {}, lambda m: m.set_input_size((48, 16), 4)),
    'all of it': (
        'vit_tiny_rope_spherical_learned_ape', dict(rope_order='xy', rope_reference_grid=(3, 5), img_size=(24, 32)),
        lambda m: (m.set_input_size((32, 48), 4), m.reset_classifier(2))),
}
# Only timm is imported here; the models, their options and their grids must come with the files.
READ = '''
import json, sys
import torch, timm
results = {}
for name, (source, images) in torch.load(sys.argv[1]).items():
    model = timm.create_model(source, pretrained=True).eval()
    with torch.no_grad():
        results[name] = [model(image) for image in images], model.state_dict(), tuple(model.patch_embed.img_size)
torch.save(results, sys.argv[2])
print(json.dumps([name for name in sys.modules if name in ('tiny', 'conftest', 'hub_server')]))
'''


@pytest.fixture(scope='module')
def models():
    """The models as a user has them before saving, trained away from any initial value."""
    out = {}
    for name, (arch, kwargs, change) in CASES.items():
        model = make(arch, **kwargs)
        if change is not None:
            change(model)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(torch.randn_like(parameter) * .05)
        out[name] = model.eval()
    return out


@pytest.fixture(scope='module')
def images(models):
    """Of the size of each model, and twice as large."""
    torch.manual_seed(1)
    return {
        name: [
            torch.randn(2, model.patch_embed.proj.in_channels, *(scale * side for side in model.patch_embed.img_size))
            for scale in (1, 2)]
        for name, model in models.items()}


@pytest.fixture(scope='module')
def read_back(models, images, tmp_path_factory):
    """Case -> what an untouched timm made of the saved model, in one process for all of them."""
    folder = tmp_path_factory.mktemp('saved')
    sources = {}
    with pytest.MonkeyPatch.context() as patch, HubServer() as hub:
        hub.serve(patch, folder / 'cache')
        for i, (name, model) in enumerate(models.items()):
            save_for_hf(model, folder / str(i), safe_serialization=True)
            push_to_hf_hub(model, f'org/case-{i}', safe_serialization=True)
            sources[f'folder: {name}'] = f'local-dir:{folder / str(i)}', images[name]
            sources[f'hub: {name}'] = f'hf-hub:org/case-{i}', images[name]
        torch.save(sources, folder / 'sources.pt')
        ours, _ = run_python(
            folder, '-c', READ, folder / 'sources.pt', folder / 'results.pt', HF_ENDPOINT=hub.url,
            HF_HUB_CACHE=folder / 'other', HF_HUB_DISABLE_PROGRESS_BARS=1)
    assert ours == [], 'nothing of the tests is there'
    return torch.load(folder / 'results.pt', weights_only=True)


@pytest.mark.parametrize('source', ['folder', 'hub'])
@pytest.mark.parametrize('name', CASES)
def test_round_trip(models, images, read_back, source, name):
    outputs, state_dict, img_size = read_back[f'{source}: {name}']
    model = models[name]
    saved = model.state_dict()
    assert state_dict.keys() == saved.keys()
    for key, value in saved.items():
        assert state_dict[key].dtype == value.dtype and torch.equal(state_dict[key], value), key
    with torch.no_grad():
        for image, output in zip(images[name], outputs):
            expected = model(image)
            assert torch.isfinite(expected).all() and torch.equal(output, expected)
    assert img_size == tuple(model.patch_embed.img_size)


def test_uploaded_files_are_the_saved_ones(models, tmp_path, monkeypatch):
    with HubServer() as hub:
        hub.serve(monkeypatch, tmp_path / 'cache')
        model = models['plain mixed']
        save_for_hf(model, tmp_path / 'saved', safe_serialization='both')
        push_to_hf_hub(model, 'org/x', safe_serialization='both')
        [files] = hub.repos['org/x'].commits.values()
        assert set(files) == {'README.md', 'config.json', 'model.safetensors', 'pytorch_model.bin'}
        for name in ('config.json', 'model.safetensors'):
            assert files[name] == (tmp_path / 'saved' / name).read_bytes()
        config = json.loads(files['config.json'])
        assert config['architecture'] == 'vit_tiny_rope_mixed' and 'hf_hub_id' not in config['pretrained_cfg']
        timm.create_model('hf-hub:org/x', pretrained=True)
        assert not hub.asked('GET /org/x/resolve/main/pytorch_model.bin')
