"""Where weights come from, the published tags, and what a load leaves said and unsaid. Everything that speaks to a Hub
is in test_hub_*.py."""
import json
import logging

import foreign
import pytest
import timm
import torch
from safetensors.torch import save_file
from timm.models import PretrainedCfg
from tiny import TINY, make

from timm_rope import list_ropes
from timm_rope._timm import create_without_memory, save_for_hf
from timm_rope.models.rope_vit import MODEL_ARGS, PUBLISHED
from timm_rope.weights.pretrained import PLACEHOLDER
from timm_rope.weights.source import open_folder

NAME = 'vit_tiny_rope_mixed'


def cfg_of(**kwargs):
    return dict(num_classes=5, input_size=(3, 32, 32), **kwargs)


def same(model, other):
    x = torch.randn(1, 3, 32, 32)
    return torch.equal(model.eval()(x), other(x))


# -- tags

def published(pattern):
    """Names with tag of ours, as timm lists them."""
    return {name for name in timm.list_pretrained(pattern) if name.partition('.')[0] in MODEL_ARGS}


def test_the_published_tags():
    rotary = published('*rope*')
    expected = {f'vit_{size}_rope_{kind}.naver_in1k' for size in ('small', 'base', 'large')
                for kind in ('axial', 'axial_ape', 'mixed', 'mixed_ape')}
    for kind in ('spiral', 'vit5'):
        expected |= {f'vit_{size}_rope_{kind}.{kind}_in1k' for size in ('small', 'base', 'large')}
    assert rotary == expected | {f'vit_{size}_rope_vit5.vit5_in1k_384' for size in ('base', 'large')}
    assert published('vit_*_ape*') - rotary == {
        f'vit_{size}_ape.naver_in1k' for size in ('small', 'base', 'large')}


@pytest.mark.parametrize('name', sorted(PUBLISHED))
def test_a_tag_reproduces_the_published_protocol(name):
    cfg = timm.get_pretrained_cfg(name)
    size = (3, 384, 384) if name.endswith('_384') else (3, 224, 224)
    assert (cfg.crop_pct, cfg.interpolation, cfg.input_size, cfg.num_classes) == (1.0, 'bicubic', size, 1000)
    assert cfg.mean == timm.data.IMAGENET_DEFAULT_MEAN and cfg.std == timm.data.IMAGENET_DEFAULT_STD
    assert cfg.license and cfg.origin_url.startswith('https://github.com/') and cfg.paper_ids.startswith('arXiv:')
    organisation, _, repository = cfg.hf_hub_id.partition('/')
    if organisation == 'timm':  # the in-tree model of the same size, with or without mixed and APE
        arch, _, tag = repository.partition('.')
        twin = timm.get_pretrained_cfg(repository)
        assert twin.hf_hub_id == cfg.hf_hub_id and tag == 'naver_in1k'
        assert ('mixed' in name, '_ape' in name) == ('mixed' in arch, '_ape' in arch)
        ours = sum(p.numel() for p in timm.create_model(name.partition('.')[0], device='meta').parameters())
        assert ours == sum(p.numel() for p in create_without_memory(arch).parameters())
    if organisation == 'FengWang3211':  # one repository of all sizes
        assert cfg.hf_hub_filename == f'vit5_{name.split("_")[1]}_patch16_{size[1]}.pth'
    model = timm.create_model(name, device='meta')
    data = timm.data.resolve_data_config(model=model)
    assert data['crop_pct'] == 1.0 and data['input_size'] == size and model.patch_embed.img_size == size[1:]


def test_every_model_has_a_cfg_and_a_default_tag():
    for name in MODEL_ARGS:
        default = timm.get_pretrained_cfg(name)
        published = [tagged.partition('.')[2] for tagged in PUBLISHED if tagged.startswith(f'{name}.')]
        assert default.tag == (published or ['untrained'])[0]
        assert bool(default.has_weights) == bool(published)


# -- sources

def test_every_source_gives_the_same_model(tmp_path, monkeypatch):
    for reader in ('load_state_dict', 'load_state_dict_from_path', 'load_state_dict_from_hf'):
        monkeypatch.setattr(f'timm.models._builder.{reader}', None)  # nothing is read twice
    source = make(NAME)
    save_for_hf(source, tmp_path / 'dir', safe_serialization=True)
    torch.save(source.state_dict(), tmp_path / 'a.pth')
    save_file(source.state_dict(), tmp_path / 'a.safetensors')
    x = torch.randn(1, 3, 32, 32)
    for ours in (
            dict(pretrained_cfg_overlay=cfg_of(file=str(tmp_path / 'a.pth'))),
            dict(pretrained_cfg_overlay=cfg_of(file=str(tmp_path / 'a.safetensors'))),
            dict(pretrained_cfg_overlay=cfg_of(state_dict=source.state_dict())),
            dict(pretrained_cfg=cfg_of(state_dict=source.state_dict(), architecture=NAME)),
            dict(pretrained_cfg=PretrainedCfg(**cfg_of(file=str(tmp_path / 'a.pth'), architecture=NAME))),
            dict(pretrained_cfg=PretrainedCfg(**cfg_of(state_dict=source.state_dict(), architecture=NAME))),
    ):
        model = timm.create_model(NAME, pretrained=True, **ours, **TINY).eval()
        assert torch.equal(model(x), source(x)), ours.keys()
        assert model.pretrained_cfg.get('state_dict') is None
        assert model.pretrained_cfg is model.default_cfg and model.pretrained_cfg['num_classes'] == 5
    model = timm.create_model(f'local-dir:{tmp_path / "dir"}', pretrained=True)
    assert same(model, source) and model.pretrained_cfg['source'] == 'local-dir'
    features = timm.create_model(f'local-dir:{tmp_path / "dir"}', pretrained=True, features_only=True)
    assert features.pretrained_cfg['source'] == 'local-dir' and 'state_dict' not in features.pretrained_cfg


def test_a_given_state_dict_is_neither_copied_nor_changed():
    state = make(NAME).state_dict()
    keys, storage = list(state), {key: value.data_ptr() for key, value in state.items()}
    seen = []
    original = torch.Tensor.__deepcopy__
    torch.Tensor.__deepcopy__ = lambda self, memo: seen.append(self.shape) or original(self, memo)
    try:
        timm.create_model(NAME, pretrained=True, pretrained_cfg_overlay=cfg_of(state_dict=state), **TINY)
    finally:
        torch.Tensor.__deepcopy__ = original
    assert not seen and list(state) == keys and storage == {key: value.data_ptr() for key, value in state.items()}


def test_a_source_prefix_wins_over_a_state_dict(tmp_path):
    source = make(NAME)
    save_for_hf(source, tmp_path / 'dir', safe_serialization=True)
    other = {key: torch.zeros_like(value) for key, value in source.state_dict().items()}
    model = timm.create_model(
        f'local-dir:{tmp_path / "dir"}', pretrained=True, pretrained_cfg_overlay=dict(state_dict=other))
    assert same(model, source)


def test_without_any_weights_timm_says_so():
    with pytest.raises(RuntimeError, match='No pretrained weights exist for vit_tiny_rope_mixed'):
        timm.create_model(NAME, pretrained=True)


def test_a_url_is_left_to_timm(tmp_path, monkeypatch):
    source = make(NAME)
    asked = []
    monkeypatch.setattr(
        'timm.models._builder.load_state_dict_from_url',
        lambda url, **kwargs: asked.append((url, kwargs['weights_only'])) or {'model': source.state_dict()})
    overlay = cfg_of(url='https://example.org/weights.pth', hf_hub_id='')
    assert same(timm.create_model(NAME, pretrained=True, pretrained_cfg_overlay=overlay, **TINY), source)
    assert asked == [('https://example.org/weights.pth', True)]


def test_a_format_of_its_own_is_left_to_the_model(tmp_path, monkeypatch):
    asked = []
    model = 'timm_rope.models.vit.RopeVisionTransformer'
    monkeypatch.setattr(f'{model}.load_pretrained', lambda self, path: asked.append(path))
    timm.create_model(NAME, pretrained=True, pretrained_cfg_overlay=cfg_of(file='a.npz', custom_load=True), **TINY)
    assert asked == ['a.npz']


def test_the_file_of_a_folder(tmp_path):
    def folder(*names):
        path = tmp_path / '_'.join(names or ['empty'])
        path.mkdir()
        for name in names:
            (path / name).touch()
        return path

    assert open_folder(folder('a.bin', 'model.safetensors', 'pytorch_model.bin')).path.name == 'model.safetensors'
    assert open_folder(folder('b.safetensors', 'pytorch_model.bin')).path.name == 'b.safetensors'
    assert open_folder(folder('config.json', 'last.pth.tar')).path.name == 'last.pth.tar'
    assert open_folder(folder('a.pth', 'pytorch_model.bin')).path.name == 'pytorch_model.bin'
    for names, words in (
            (('a.safetensors', 'b.safetensors', 'pytorch_model.bin'), 'several: a.safetensors, b.safetensors'),
            (('a.pth', 'b.bin'), 'several: a.pth, b.bin'), ((), 'it holds none'), (('config.json',), 'it holds none')):
        with pytest.raises(ValueError, match=words):
            open_folder(folder(*names))
    with pytest.raises(ValueError, match='is no folder'):
        open_folder(tmp_path / 'absent')


def test_no_random_weights_are_made_for_weights_that_replace_them(monkeypatch):
    state = make(NAME).state_dict()
    made = []
    original = torch.nn.init.trunc_normal_

    def noticed(tensor, **kwargs):
        made.append(tensor.shape)
        return original(tensor, **kwargs)

    for module in ('timm.models.vision_transformer', 'timm_rope.weights.pretrained'):
        monkeypatch.setattr(f'{module}.trunc_normal_', noticed)
    kwargs = dict(pretrained=True, pretrained_cfg_overlay=cfg_of(state_dict=state))
    model = timm.create_model(NAME, **kwargs, **TINY)
    assert not made and model.weight_init_mode == ''
    torch.manual_seed(0)
    other = timm.create_model(NAME, **kwargs, **{**TINY, 'num_classes': 300})
    assert made == [(300, 24)], 'the new head alone'
    assert not other.head.bias.any() and 0.018 < other.head.weight.std() < 0.022
    for bad in (dict(rope_warm_start=True), dict(weight_init='naver')):
        made.clear()
        timm.create_model(NAME, **kwargs, **TINY, **bad)
        assert len(made) > 5, bad
    headless = timm.create_model(NAME, **kwargs, **{**TINY, 'num_classes': 0})
    assert torch.equal(headless.norm.weight, model.norm.weight)


@pytest.mark.parametrize('feature_cls', ['getter', 'fx', 'hook'])
def test_every_kind_of_features_has_the_weights(feature_cls):
    source, x = make(NAME), torch.randn(1, 3, 32, 32)
    overlay = cfg_of(state_dict=source.state_dict())
    torch.manual_seed(1)
    wrapped = timm.create_model(
        NAME, pretrained=True, pretrained_cfg_overlay=overlay, features_only=True, feature_cls=feature_cls,
        out_indices=(0, 2), **TINY).eval()
    expected = source.forward_intermediates(x, indices=(0, 2), output_fmt='NLC', intermediates_only=True)
    for feature, intermediate in zip(wrapped(x), expected):
        tokens = feature.flatten(2).transpose(1, 2) if feature.ndim == 4 else feature[:, 1:]
        torch.testing.assert_close(tokens, intermediate)


# -- structure that weights bring

def test_structure_is_saved_with_the_model_and_can_be_overruled(tmp_path):
    checkpoint = foreign.spiral_deit()
    sizes = dict(embed_dim=128, depth=2, num_heads=2, patch_size=8, num_classes=5)
    overlay = cfg_of(state_dict=checkpoint)
    model = timm.create_model('vit_small_rope_spiral', pretrained=True, pretrained_cfg_overlay=overlay, **sizes).eval()
    save_for_hf(model, tmp_path / 'saved', safe_serialization=True)
    args = json.loads((tmp_path / 'saved' / 'config.json').read_text())['model_args']
    assert args['norm_layer'] == 'spiral_rms' and args['rope_clamp'] and args['rope_directions'] == 4
    x = torch.randn(1, 3, 32, 32)
    again = timm.create_model(f'local-dir:{tmp_path / "saved"}', pretrained=True).eval()
    assert torch.equal(again(x), model(x))
    with pytest.raises(RuntimeError, match='clamp is True there and False here'):
        timm.create_model(
            'vit_small_rope_spiral', pretrained=True, pretrained_cfg_overlay=overlay, rope_clamp=False, **sizes)
    plain = timm.create_model('vit_small_rope_spiral', **sizes)
    assert plain.pos_embed is None and not plain.rope.options['clamp'], 'only these weights need them'


# -- what is said

def test_strict_false_names_the_keys(caplog):
    model, state = make(NAME), make(NAME).state_dict()
    del state['blocks.1.norm1.weight'], state['head.bias']
    state['extra'] = torch.zeros(1)
    with caplog.at_level(logging.INFO, 'timm_rope'):
        model.load_state_dict(state, strict=False)
    record = caplog.records[-1]
    assert record.levelname == 'WARNING'
    assert 'blocks.1.norm1.weight, head.bias' in record.message and 'Not used: extra' in record.message
    caplog.clear()
    with caplog.at_level(logging.INFO, 'timm_rope'):
        timm.create_model(NAME, pretrained=True, pretrained_cfg_overlay=cfg_of(state_dict=make(NAME).state_dict()),
                          **{**TINY, 'num_classes': 3})
    assert [(r.levelname, 'head.weight, head.bias' in r.message) for r in caplog.records] == [('INFO', True)]


def test_another_head_hides_no_other_missing_key():
    state = make(NAME).state_dict()
    del state['blocks.1.norm1.weight']
    with pytest.raises(RuntimeError, match=r'missing blocks.1.norm1.weight \(24,\)'):
        timm.create_model(
            NAME, pretrained=True, pretrained_cfg_overlay=cfg_of(state_dict=state), **{**TINY, 'num_classes': 3})


def test_encoding_options_are_compared_for_weights_without_a_trace(tmp_path):
    checkpoint = foreign.naver_vit(False)
    sizes = dict(embed_dim=128, depth=2, num_heads=2, patch_size=8, img_size=32, num_classes=5)
    kwargs = dict(pretrained=True, pretrained_cfg_overlay=cfg_of(state_dict=checkpoint), **sizes)
    timm.create_model('vit_small_rope_axial', **kwargs)
    with pytest.raises(RuntimeError, match='temperature is 100 there and 50 here'):
        timm.create_model('vit_small_rope_axial', rope_temperature=50., **kwargs)
    for name in (name for name in list_ropes() if name != 'axial'):
        with pytest.raises(RuntimeError, match=f"holds no rotary encoding, the model has the rotary encoding '{name}'"):
            timm.create_model(f'vit_small_rope_{name}', **kwargs)
    assert PLACEHOLDER, 'timm takes an empty state dict for none'
