"""Attention maps are what the block computes, in every kind of attention; their measures have closed forms."""
import math

import pytest
import timm
import tiny
import tiny_swin
import torch
from timm.layers import set_fused_attn

from timm_rope import analysis
from timm_rope.encodings import ENCODINGS


def check_blocks(model, images, attentions, **kwargs):
    """Weights times values, through the rest of the attention, are its output."""
    outputs = []
    hooks = [attn.register_forward_hook(lambda module, args, out: outputs.append(out)) for attn in attentions]
    maps = analysis.attention_maps(model, images, **kwargs)
    for hook in hooks:
        hook.remove()
    assert len(maps) == len(outputs) == len(attentions)
    for each, attn, output in zip(maps, attentions, outputs):
        torch.testing.assert_close(each.weights.sum(-1), torch.ones(each.weights.shape[:-1]))
        out = (each.weights @ each.values).transpose(1, 2).flatten(2)
        assert getattr(attn, 'gate', None) is None
        out = getattr(attn, 'norm', torch.nn.Identity())(out)
        with torch.no_grad():
            assert (attn.proj(out) - output.flatten(1, -2)).abs().max() < 1e-5 * max(1, output.abs().max())
        uniform = torch.full_like(each.weights, 1 / each.weights.shape[-1])
        assert (each.weights - uniform).abs().max() > 0.05, 'loud enough to be seen'
    return maps


@pytest.mark.parametrize('fused', [True, False])
@pytest.mark.parametrize('encoding', sorted(ENCODINGS))
def test_maps_reproduce_the_attention(encoding, fused):
    before = timm.layers.use_fused_attn()
    set_fused_attn(fused)
    try:
        model = tiny.make(rope_encoding=encoding, reg_tokens=2, qk_norm=encoding == 'mixed')
    finally:
        set_fused_attn(bool(before))
    if encoding == 'mixed':
        for block in model.blocks:
            torch.nn.init.constant_(block.attn.q_norm.weight, 4.)
    model.train()
    maps = check_blocks(model, torch.randn(2, 3, 32, 48), [block.attn for block in model.blocks])
    assert model.training and all(part.training for part in model.modules())
    assert {(each.grid, each.prefix, each.patch) for each in maps} == {((4, 6), 3, (8, 8))}
    assert [each.name for each in maps] == ['blocks.0', 'blocks.1', 'blocks.2']


@pytest.mark.parametrize('bias', [False, True])
def test_maps_of_windows(bias):
    model = tiny_swin.make('spherical', rel_pos_bias=bias)
    maps = check_blocks(model, torch.randn(2, 3, 32, 32), [block.attn for block in tiny_swin.blocks(model)])
    assert [(each.weights.shape[0], each.grid, each.patch) for each in maps] == [
        (8, (4, 4), (4, 4)), (8, (4, 4), (4, 4)), (2, (4, 4), (8, 8)), (2, (4, 4), (8, 8))]


@pytest.mark.parametrize('name,kwargs', [
    ('vit_tiny_patch16_224', dict(num_heads=2)),
    ('vit_small_patch16_rope_mixed_224', dict(num_heads=2)),
    ('eva02_tiny_patch14_224', dict(patch_size=16, num_heads=2)),
])
def test_maps_of_models_of_timm(name, kwargs):
    torch.manual_seed(0)
    model = timm.create_model(name, img_size=64, embed_dim=32, depth=2, **kwargs).eval()
    with torch.no_grad():
        for key, value in model.named_parameters():
            if 'qkv' in key or 'q_proj' in key or 'k_proj' in key:
                value.mul_(20)
    check_blocks(model, torch.randn(1, 3, 64, 64), [block.attn for block in model.blocks])


def test_some_layers_only():
    model = tiny.make()
    images = torch.randn(1, 3, 32, 32)
    every, last = analysis.attention_maps(model, images), analysis.attention_maps(model, images, layers=[-1])
    assert [each.name for each in last] == ['blocks.2']
    torch.testing.assert_close(last[0].weights, every[2].weights)
    compiled = analysis.attention_maps(torch.compile(model, backend='eager'), images)
    torch.testing.assert_close(compiled[1].weights, every[1].weights)
    for layers in ([3], [-4], [1.0]):
        with pytest.raises(ValueError, match='layers must be from -3 to 2, got'):
            analysis.attention_maps(model, images, layers=layers)
    with pytest.raises(ValueError, match='ResNet has no attention'):
        analysis.attention_maps(timm.create_model('test_resnet'), images)


def made_up(weights, grid, prefix=0, patch=(16, 16)):
    return analysis.AttentionMap('blocks.0', weights, weights, prefix, grid, patch)


@pytest.mark.parametrize('prefix', [0, 5])
def test_distance_and_entropy_of_uniform_attention(prefix):
    tokens = 196 + prefix
    each = made_up(torch.full((2, 3, tokens, tokens), 1 / tokens), (14, 14), prefix)
    # the mean over pairs of lattice points, counted by their offsets
    expected = sum(
        (14 - abs(a)) * (14 - abs(b)) * math.hypot(a, b) for a in range(-13, 14) for b in range(-13, 14)) / 196 ** 2
    distance = torch.full((3,), 16 * expected).double()
    torch.testing.assert_close(analysis.mean_distance(each), distance, rtol=1e-6, atol=0)
    torch.testing.assert_close(
        analysis.mean_entropy(each), torch.full((3,), math.log(tokens)).double(), rtol=1e-6, atol=0)


def test_distance_of_a_step():
    """Each patch looks one patch to the right, around the edge in the last column, of patches that are no squares."""
    weights = torch.zeros(1, 1, 12, 12)
    for n in range(12):
        weights[0, 0, n, n // 4 * 4 + (n % 4 + 1) % 4] = 1.
    each = made_up(weights, (3, 4), patch=(8, 16))
    assert analysis.mean_distance(each).item() == pytest.approx(16 * (3 + 3) / 4)
    assert analysis.mean_entropy(each).item() == 0
    assert analysis.query_map(each, 1, 0).nonzero().tolist() == [[0, 1, 1]]
    with pytest.raises(ValueError, match=r'in a grid of \(3, 4\), got 3 and 0'):
        analysis.query_map(each, 3, 0)
    with pytest.raises(ValueError, match='blocks.0 has no class token'):
        analysis.cls_map(each)


def test_map_of_the_class_token():
    weights = torch.rand(2, 3, 13, 13)
    shown = analysis.cls_map(made_up(weights, (3, 4), prefix=1))
    torch.testing.assert_close(shown[1, 2, 3], weights[1, :, 0, 12].mean())
