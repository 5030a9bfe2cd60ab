"""`python -m timm_rope convert`: weights of timm's own rotary models, equal to them at any size, or refused."""
import json
from pathlib import Path

import pytest
import timm
import torch
from converting import load, refused

from timm_rope._timm import save_for_hf
from timm_rope.weights import source

SMALL = dict(embed_dim=64, depth=2, num_heads=2, num_classes=5)
# model of timm -> arguments beside those above, image size, another size
MODELS = {
    'vit_small_patch16_dinov3_qkvb': ({}, (256, 256), (160, 256)),
    'vit_small_patch16_dinov3': (dict(global_pool='token'), (256, 256), (96, 320)),
    'vit_small_plus_patch16_dinov3_qkvb': ({}, (256, 256), (96, 320)),  # SwiGLU
    'vit_7b_patch16_dinov3': (dict(embed_dim=256, num_heads=2), (256, 256), (64, 96)),
    'vit_base_patch16_lingbot': ({}, (512, 512), (160, 256)),
    'vit_medium_patch16_rope_reg1_gap_256': (dict(dynamic_img_size=True), (256, 256), (160, 320)),
    'vit_betwixt_patch16_rope_reg4_gap_256': (dict(dynamic_img_size=True), (256, 256), (512, 96)),
    'vit_pe_spatial_tiny_patch16_512': (dict(img_size=512, dynamic_img_size=True), (512, 512), (160, 256)),
    'vit_pe_lang_large_patch14_448': (dict(img_size=448, dynamic_img_size=True), (448, 448), (140, 280)),
    'eva02_tiny_patch14_224': (dict(dynamic_img_size=True), (224, 224), (140, 280)),
    'eva02_base_patch14_448': (dict(dynamic_img_size=True), (448, 448), (154, 280)),  # a norm in the MLP
    'eva02_base_patch16_clip_224': (dict(dynamic_img_size=True), (224, 224), (96, 320)),  # and in the attention
}


def make(name, loud=3., **kwargs):
    """A small model with loud weights: LayerScale near 1, biases, large queries and keys (in 12 blocks chaos)."""
    torch.manual_seed(0)
    model = timm.create_model(name, **{**SMALL, **kwargs})
    with torch.no_grad():
        for key, p in model.named_parameters():
            if 'gamma' in key or ('norm' in key and key.endswith('weight')):
                p.copy_(1 + .2 * torch.randn_like(p))
            elif key.endswith(('bias', 'pos_embed', 'cls_token', 'reg_token')):
                p.copy_(.3 * torch.randn_like(p))
            elif p.ndim == 2:
                scale = loud if key.endswith(('qkv.weight', 'q_proj.weight')) else 1.
                p.copy_(torch.randn_like(p) * scale / p.shape[1] ** .5)
    return model.eval()


def saved(name, folder='theirs', loud=3., **kwargs):
    model = make(name, loud, **kwargs)
    save_for_hf(model, folder, safe_serialization=True, model_args={**SMALL, **kwargs})
    return model


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


@pytest.mark.parametrize('name', MODELS)
@torch.no_grad()
def test_logits_are_those_of_timm(name, convert):
    if not timm.is_model(name):
        pytest.skip(f'this timm has no {name}')
    kwargs, size, other = MODELS[name]
    theirs = saved(name, **kwargs)
    code, out, err = convert('theirs', 'out', '--check')
    assert code == 0 and out.count(f"logits differ from timm's {name}") == 2, out + err
    model = load()
    assert model.rope.name == 'axial' and model.patch_embed.img_size == size
    for each in filter(None, (size, other)):
        x = torch.randn(2, 3, *each)
        expected, got = theirs(x), model(x)
        assert expected.std() > .1 and (got - expected).abs().max() < 1e-5 * max(1., expected.abs().max()), each
    model.rope.set_scaling('extrapolate')
    if other:
        assert (model(x) - expected).abs().max() > 1e-3, 'a rule has an effect'
        model.set_rope_scaling('ntk', log_n=True)
        model(x)


@torch.no_grad()
def test_other_orders_of_channels(convert):
    # 'ij' with interleaved pairs, 'xy' with halves: NAVER's model in timm, changed
    changes = [dict(rope_grid_indexing='ij'), dict(rope_rotate_half=True), dict(rope_temperature=50.)]
    for i, kwargs in enumerate(changes):
        theirs = saved('vit_small_patch16_rope_224', f'theirs{i}', dynamic_img_size=True, **kwargs)
        if 'rope_rotate_half' in kwargs and not hasattr(theirs.rope, 'rotate_half'):  # an older timm contradicts itself
            refused(convert, ['pairs of channels in the attention'], f'theirs{i}', f'out{i}')
            continue
        assert convert(f'theirs{i}', f'out{i}', '--check')[0] == 0
        x = torch.randn(1, 3, 160, 256)
        assert (load(f'out{i}')(x) - theirs(x)).abs().max() < 1e-5


def test_the_model_of_a_file_is_named(convert):
    model = make('vit_small_patch16_dinov3', 1., embed_dim=384, num_heads=6, depth=12)
    torch.save(model.state_dict(), 'weights.pth')
    refused(convert, ['none of the known layouts', "Keys of timm's DINOv3", '--model NAME'], 'weights.pth', 'out')
    refused(convert, ['768 wide', 'weights are 384 wide'], 'weights.pth', 'out', '--model', 'vit_base_patch16_dinov3')
    code, out, err = convert('weights.pth', 'out', '--model', 'vit_small_patch16_dinov3')
    assert code == 0, err
    x = torch.randn(1, 3, 96, 64)
    with torch.no_grad():
        assert (load()(x) - model(x)).abs().max() < 1e-5
    built = timm.create_model('vit_small_rope_axial', num_classes=5, reg_tokens=4, rope_coords='dinov3')
    with pytest.raises(RuntimeError, match='holds no rotary encoding'):
        built.load_state_dict(model.state_dict())


def test_published_weights_by_the_name_of_timm(convert, monkeypatch):
    name = 'vit_small_patch16_dinov3_qkvb.lvd1689m'
    theirs = saved(name.partition('.')[0], loud=1., embed_dim=384, num_heads=6, depth=12, num_classes=0)
    Path('theirs/config.json').unlink()  # what it says, timm knows
    asked = []

    def fetch(repo_id, filename, cache_dir=None):
        asked.append(repo_id)
        if filename == 'config.json':
            raise source.HubError('there is none')
        return Path('theirs/model.safetensors')

    monkeypatch.setattr(source, 'fetch', fetch)
    monkeypatch.setattr(source, 'verify', Path.stat)
    code, out, err = convert(f'timm:{name}', 'out')
    assert code == 0 and set(asked) == {timm.get_pretrained_cfg(name).hf_hub_id}, err
    config = json.loads(Path('out/config.json').read_text())
    assert config['architecture'] == 'vit_small_rope_axial'
    assert config['pretrained_cfg']['license'] == timm.get_pretrained_cfg(name).license
    assert config['pretrained_cfg']['input_size'] == [3, 256, 256]
    x = torch.randn(1, 3, 64, 96)
    with torch.no_grad():
        assert (load()(x) - theirs(x)).abs().max() < 1e-5
    refused(convert, ['no weights', 'vit_nothing'], 'timm:vit_nothing', 'other')
    refused(convert, ['no weights'], 'timm:test_vit4', 'other')


@pytest.mark.parametrize('name,kwargs,words', [
    ('vit_pe_core_tiny_patch16_384', dict(img_size=384, num_heads=2), ['attention pooling']),
    ('vit_small_patch16_dinov3', dict(use_post_norm=True), ['post-norm']),
    ('vit_small_patch16_dinov3', dict(use_fc_norm=True, use_post_transformer_norm=True), ['before and a norm after']),
    ('vit_base_patch16_sapiens2', dict(num_heads=4, num_kv_heads=2), ['LayerScale of the attention alone'])])
def test_what_our_blocks_do_not_have_is_refused(name, kwargs, words, convert):
    if not timm.is_model(name):
        pytest.skip(f'this timm has no {name}')
    try:
        saved(name, **kwargs)
    except TypeError as error:
        pytest.skip(f'this timm cannot build it: {error}')
    refused(convert, [name, *words, 'no model here computes it'], 'theirs', 'out')


def test_mlps_by_name():
    for name in ('gelu', ''):
        with pytest.raises(ValueError, match="mlp_layer must be 'swiglu'"):
            timm.create_model('vit_tiny_rope_axial', mlp_layer=name)
    model = timm.create_model('vit_tiny_rope_axial', mlp_layer='swiglu', depth=1)
    assert type(model.blocks[0].mlp.act) is torch.nn.SiLU
    torch.jit.script(model)
