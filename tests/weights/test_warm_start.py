"""Starting from the weights of another encoding: asked for, complete but for the rotation, and said."""
import logging

import foreign
import pytest
import timm
import torch
from tiny import TINY, make

from timm_rope._timm import save_for_hf

SIZES = dict(embed_dim=128, depth=2, num_heads=2, patch_size=8, img_size=32, num_classes=5)


def start(name, source, warm=True, **kwargs):
    state = source.state_dict() if isinstance(source, torch.nn.Module) else source
    overlay = dict(state_dict=state, num_classes=5, input_size=(3, 32, 32))
    if warm is not None:
        kwargs['rope_warm_start'] = warm
    return timm.create_model(name, pretrained=True, pretrained_cfg_overlay=overlay, **kwargs).eval()


def without_rotation(model):
    """The model with all its frequencies at zero: what it computes from the weights that were taken over."""
    with torch.no_grad():
        model.rope.freqs.zero_()
    model.rope._cache.__init__()
    return model


def freed_of_positions(source, sizes):
    """A model of ours without any position that holds `source`'s other weights."""
    keep = {k: v for k, v in source.items() if not k.startswith(('rope.', 'pos_embed'))}
    model = timm.create_model('vit_tiny_ape', pos_embed='none', **sizes).eval()
    model.load_state_dict(keep)
    return model


@pytest.mark.parametrize('source', ['vit_tiny_rope_mixed', 'vit_tiny_rope_uniform', 'vit_tiny_rope_axial_ape'])
@pytest.mark.parametrize('target', ['vit_tiny_rope_spherical', 'vit_tiny_rope_liere'])
def test_everything_but_the_rotation(source, target, caplog):
    saved = make(source)
    fresh = make(target)
    with caplog.at_level(logging.WARNING, 'timm_rope'):
        model = start(target, saved, **TINY)
    taken = dict(model.named_parameters())
    for name, value in saved.named_parameters():
        if not name.startswith(('rope.', 'pos_embed')):
            assert torch.equal(taken[name], value), name
    if not model.rope.learned:
        assert torch.equal(model.rope.freqs, fresh.rope.freqs)
    assert 'rope.reference_grid' in caplog.text and f'encoding {saved.rope.name}' in caplog.text
    assert ('pos_embed' in caplog.text) == source.endswith('ape')
    x = torch.randn(2, 3, 32, 32)
    expected = freed_of_positions(saved.state_dict(), TINY)(x)
    assert torch.allclose(without_rotation(model)(x), expected, atol=1e-5)
    with pytest.raises(RuntimeError, match=f"holds the rotary encoding '{saved.rope.name}'.*'{model.rope.name}'.*"
                                           f"rope_warm_start=True"):
        start(target, saved, warm=None, **TINY)
    with pytest.raises(RuntimeError, match='rope_warm_start=True'):
        start(target, saved, warm=False, **TINY)


def test_from_naver_and_from_deit3(tmp_path):
    naver = foreign.naver_vit(ape=True)
    x = torch.randn(1, 3, 32, 32)
    unrotated = {'model': {k: v for k, v in naver['model'].items() if 'freqs' not in k and k != 'pos_embed'}}
    model = start('vit_small_rope_spherical', naver, **SIZES)
    got, expected = without_rotation(model)(x), foreign.forward_naver(unrotated, x)
    assert (got - expected).abs().max() < 2e-5 * expected.abs().max()
    deit = timm.create_model('deit3_small_patch16_224', **SIZES).eval()
    torch.nn.init.normal_(deit.pos_embed)
    torch.save(deit.state_dict(), tmp_path / 'deit.pth')
    model = timm.create_model(
        'vit_small_rope_spherical_ape', pretrained=True, rope_warm_start=True,
        pretrained_cfg_overlay=dict(file=str(tmp_path / 'deit.pth'), num_classes=5, input_size=(3, 32, 32)), **SIZES)
    assert torch.equal(model.pos_embed, deit.pos_embed)
    assert torch.allclose(without_rotation(model.eval())(x), deit(x), atol=1e-5)


@pytest.mark.parametrize('source,kwargs', [
    ('vit_small_patch16_224', {}),  # no LayerScale, position embedding of the class token
    ('vit_small_patch16_224', dict(qkv_bias=False)),
    ('deit3_small_patch16_224', {}),
    ('vit_small_patch16_224', dict(class_token=True, patch_size=16, img_size=64)),
])
@pytest.mark.parametrize('target', [dict(), dict(init_values=0)])
def test_what_the_other_model_lacks_does_not_change_the_function(source, kwargs, target, caplog):
    torch.manual_seed(0)
    plain = timm.create_model(source, **{**SIZES, **kwargs}).eval()
    with torch.no_grad():
        for name, p in plain.named_parameters():
            if name.endswith(('gamma', 'bias')):
                p.uniform_(0.5, 1.5)
        torch.nn.init.normal_(plain.pos_embed)
        if source.startswith('vit'):
            plain.pos_embed[:, 1:] = 0  # what a model without the patches' part can take over
        else:
            plain.pos_embed.zero_()
    with caplog.at_level(logging.WARNING, 'timm_rope'):
        model = start('vit_small_rope_mixed', plain, **{**SIZES, **kwargs, 'qkv_bias': True, **target})
    x = torch.randn(2, 3, *model.patch_embed.img_size)
    assert torch.allclose(without_rotation(model)(x), plain(x), rtol=1e-4, atol=1e-4)
    assert ('blocks.*.ls1.gamma' in caplog.text) == (source.startswith('deit3') == bool(target))
    assert ('blocks.*.attn.qkv.bias' in caplog.text) == ('qkv_bias' in kwargs)


def test_structure_of_spiral_and_liere_weights_comes_along():
    checkpoint = foreign.spiral_deit()
    sizes = {key: SIZES[key] for key in ('embed_dim', 'depth', 'num_heads', 'patch_size', 'num_classes', 'img_size')}
    model = start('vit_small_rope_spherical', checkpoint, **sizes)
    assert type(model.norm).__name__ == 'SpiralRmsNorm' and model.pos_embed is None
    liere = foreign.liere_lightning(8)
    model = start('vit_small_rope_axial', liere, depth=2, embed_dim=128, num_classes=5)
    assert model.norm.eps == 1e-5 and model.rope.name == 'axial' and model.blocks[0].attn.qkv.bias is None
    assert model.patch_embed.patch_size == (4, 4)


def test_the_same_encoding_is_taken_over_whole(caplog):
    saved = make('vit_tiny_rope_mixed')
    with caplog.at_level(logging.WARNING, 'timm_rope'):
        model = start('vit_tiny_rope_mixed', saved, **TINY)
    assert torch.equal(model.rope.freqs, saved.rope.freqs) and not caplog.records
    other = start('vit_tiny_rope_spherical', make('vit_tiny_rope_spherical', rope_order='xy'), **TINY)
    assert other.rope.options['order'] == 'yx'


@pytest.mark.parametrize('kwargs,words', [
    (dict(embed_dim=48), 'is 24 wide, the model 48'), (dict(depth=2), 'has 3 blocks, the model 2'),
    (dict(mlp_ratio=2), r'fc1.weight is \(96, 24\)'), (dict(norm_layer='rmsnorm'), 'unexpected norm.bias'),
    (dict(class_token=False, global_pool='avg'), 'unexpected cls_token'),
])
def test_what_cannot_be_taken_over_is_refused(kwargs, words):
    with pytest.raises(RuntimeError, match=words):
        start('vit_tiny_rope_spherical', make('vit_tiny_rope_mixed'), **{**TINY, **kwargs})


def test_another_head_channels_patch_and_size():
    saved = make('vit_tiny_rope_mixed_ape')
    model = start('vit_tiny_rope_spherical_ape', saved, **{
        **TINY, 'num_classes': 3, 'in_chans': 1, 'patch_size': 16, 'img_size': 96})
    assert model.patch_embed.proj.weight.shape == (24, 1, 16, 16) and model.rope.reference_grid.tolist() == [6, 6]
    assert torch.equal(model.blocks[1].mlp.fc1.weight, saved.blocks[1].mlp.fc1.weight)
    assert model.pos_embed.shape == (1, 36, 24)


def test_it_is_asked_for_and_not_remembered(tmp_path):
    saved = make('vit_tiny_rope_mixed')
    model = start('vit_tiny_rope_spherical', saved, **TINY)
    save_for_hf(model, tmp_path / 'model', safe_serialization=True)
    assert 'warm_start' not in (tmp_path / 'model' / 'config.json').read_text()
    again = timm.create_model(f'local-dir:{tmp_path / "model"}', pretrained=True).eval()
    x = torch.randn(1, 3, 32, 32)
    assert torch.equal(again(x), model(x))

    save_for_hf(saved, tmp_path / 'sly', safe_serialization=True, model_args=dict(rope_warm_start=True))
    with pytest.raises(ValueError, match='config.json.*only the caller'):
        timm.create_model(f'local-dir:{tmp_path / "sly"}', pretrained=True)
    with pytest.raises(ValueError, match='rope_warm_start=True needs pretrained=True'):
        timm.create_model('vit_tiny_rope_spherical', rope_warm_start=True, **TINY)
    with pytest.raises(ValueError, match="rope_warm_start must be True or False, got 'yes'"):
        start('vit_tiny_rope_spherical', saved, warm='yes', **TINY)


def test_a_feature_extractor_starts_warm():
    saved = make('vit_tiny_rope_mixed')
    features = start('vit_tiny_rope_spherical', saved, features_only=True, **TINY)
    assert len(features(torch.randn(1, 3, 32, 32))) == 3
    assert torch.equal(features.model.blocks[0].attn.qkv.weight, saved.blocks[0].attn.qkv.weight)
    assert 'state_dict' not in features.pretrained_cfg and 'state_dict' not in features.model.pretrained_cfg


@pytest.mark.parametrize('source,head', [
    ('naver', True), ('deit3_small_patch16_224', True), ('vit_small_patch14_dinov2', False)])
def test_as_train_py_asks_for_it(source, head, tmp_path, caplog):
    """--pretrained-path FILE --num-classes 3 --img-size 48 --model-kwargs rope_warm_start=True"""
    sizes = {**SIZES, 'depth': 2, 'num_classes': 5 if head else 0}
    state = foreign.naver_vit() if source == 'naver' else timm.create_model(source, **sizes).state_dict()
    torch.save(state, tmp_path / 'weights.pth')
    overlay = dict(file=str(tmp_path / 'weights.pth'), num_classes=-1)  # -1 is what train.py writes there

    def create(**kwargs):
        return timm.create_model(
            'vit_small_rope_spherical', pretrained=True, pretrained_cfg_overlay=overlay,
            **{**SIZES, 'num_classes': 3, 'img_size': 48}, **kwargs)

    with pytest.raises(RuntimeError, match='rope_warm_start=True'):
        create()
    with caplog.at_level(logging.INFO, 'timm_rope'):
        model = create(rope_warm_start=True)
    taken = state['model'] if source == 'naver' else state
    assert torch.equal(model.blocks[1].mlp.fc2.weight, taken['blocks.1.mlp.fc2.weight'])
    assert model.head.weight.shape == (3, 128) and model.rope.reference_grid.tolist() == [6, 6]
    assert 'Left as they were: head.weight, head.bias' in caplog.text and 'Warm start' in caplog.text
