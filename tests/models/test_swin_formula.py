"""Swin models against window attention written out token by token in float64, their sizes and arguments."""
from functools import partial

import oracle
import pytest
import timm
import torch
import torch.nn.functional as F
from timm.layers import set_fused_attn
from timm.models.swin_transformer import SwinTransformer, SwinTransformerBlock
from tiny_swin import SMALL, blocks, double, forward_block, make, ropes, same, windows

import timm_rope
from timm_rope.models.swin import RopeSwinTransformer

# -- the oracle: NumPy's matrices of tests/oracle.py and plain loops, nothing of ours or timm's

def matrices_of(rope, window):
    return torch.stack([torch.from_numpy(oracle.rotations(rope, window, 0, head)) for head in range(rope.num_heads)])


def check_blocks(model, window, shift):
    """Both blocks of the first stage against the oracle, the second shifted."""
    height, width = model.patch_embed.grid_size
    for block, by in zip(model.layers[0].blocks, ((0, 0), shift)):
        torch.manual_seed(2)
        x = torch.randn(2, height, width, block.dim)
        weights = double(block.state_dict())
        matrices = torch.eye(block.dim).double().expand(1, window[0] * window[1], -1, -1)
        if block.attn.rope is not None:
            matrices = matrices_of(block.attn.rope, window)
        table = weights.get('attn.relative_position_bias_table')
        expected = forward_block(x.double(), weights, len(matrices), window, by, matrices, table)
        with torch.no_grad():
            assert (block(x) - expected).abs().max() < 1e-5
        still = forward_block(
            x.double(), weights, len(matrices), window, by, torch.eye(matrices.shape[-1]).double().expand_as(matrices),
            table)
        assert block.attn.rope is None or (still - expected).abs().max() > 1e-2, 'the rotation matters'


@pytest.mark.parametrize('bias', [False, True])
@pytest.mark.parametrize('encoding', [*timm_rope.list_ropes(), 'none'])
def test_blocks_are_the_formula(encoding, bias):
    model = make(encoding, rel_pos_bias=bias, embed_dim=64, depths=(2,), num_heads=(1 if encoding == 'none' else 2,))
    check_blocks(model, (4, 4), (2, 2))


@pytest.mark.parametrize('fused', [False, True])
@pytest.mark.parametrize('bias', [False, True])
@pytest.mark.parametrize('size,window,rule,used,shift', [
    ((32, 48), 4, 'timm', (4, 4), (2, 2)),
    ((32, 48), (2, 6), 'timm', (2, 6), (1, 3)),  # rows are not columns
    ((24, 64), (3, 4), 'naver', (3, 4), (1, 2)),
    ((16, 48), 4, 'timm', (4, 4), (0, 2)),
    ((16, 48), 4, 'naver', (4, 4), (0, 0)),
    ((48, 16), 6, 'timm', (6, 4), (3, 0)),
    ((48, 16), 6, 'naver', (4, 4), (0, 0)),
    ((16, 32), 9, 'timm', (4, 8), (0, 0)),
    ((16, 32), 9, 'naver', (4, 4), (0, 0)),
])
def test_windows_of_images_that_are_not_square(size, window, rule, used, shift, bias, fused):
    set_fused_attn(fused, experimental=fused)
    try:
        model = make(
            img_size=size, window_size=window, window_rule=rule, depths=(2,), num_heads=(2,), rel_pos_bias=bias)
    finally:
        set_fused_attn(True)
    assert [block.attn.fused_attn for block in blocks(model)] == [fused] * 2
    check_blocks(model, used, shift)


@pytest.mark.parametrize('encoding,kwargs', [
    ('spherical', {}), ('mixed', dict(coords='cells')), ('uniform', dict(coords='ends')), ('liere', dict(block=4)),
    ('axial', dict(temperature=20.)), ('axial_learned', dict(share_heads=True)), ('spiral', dict(directions=4))])
def test_a_larger_window_extrapolates_from_that_of_training(encoding, kwargs):
    model = make(encoding, depths=(2,), num_heads=(2,), **{f'rope_{k}': v for k, v in kwargs.items()})
    model.set_input_size(img_size=(48, 72))
    assert [rope.reference_grid.tolist() for rope in ropes(model)] == [[4, 4]] * 2
    check_blocks(model, (6, 9), (3, 4))


# -- sizes

@pytest.mark.parametrize('bias', [False, True])
@pytest.mark.parametrize('size,given,built', [
    ((48, 64), {}, dict(window_size=(6, 8))),  # grows with the image, the paper's protocol
    ((48, 64), dict(window_size=4), dict(window_size=4)),
    ((48, 64), dict(window_ratio=4), dict(window_ratio=4)),
    (40, dict(window_size=(3, 5)), dict(window_size=(3, 5))),  # with padding
    (64, dict(window_size=(4, 2), always_partition=True), dict(window_size=(4, 2), always_partition=True)),
])
def test_resized_is_built_at_that_size(size, given, built, bias):
    model = make('spherical', rel_pos_bias=bias)
    model.set_input_size(img_size=size, **given)
    other = make('spherical', rel_pos_bias=bias, img_size=size, **{**dict(window_size=None), **built})
    assert windows(model) == windows(other)
    assert other.rope.reference_grid.tolist() == list(blocks(other)[0].window_size)
    other.load_state_dict(model.state_dict())
    assert other.rope.reference_grid.tolist() == [4, 4]
    assert same(model, other, model.patch_embed.img_size)
    model.set_input_size(img_size=32, window_size=4, always_partition=False)
    if not bias:
        assert same(model, make('spherical'))


def test_windows_by_ratio():
    model = timm.create_model('swin_tiny_rope_mixed', device='meta', img_size=384, window_ratio=8)
    assert {b.window_size for b in blocks(model)} == {(12, 12)}
    kept = timm.create_model('swin_tiny_rope_mixed', device='meta', img_size=384)
    assert {b.window_size for b in blocks(kept)} == {(7, 7)}
    both = timm.create_model('swin_tiny_rope_mixed', device='meta', img_size=384, window_ratio=8, window_size=6)
    assert {b.window_size for b in blocks(both)} == {(6, 6)}


def test_images_of_any_size():
    torch.manual_seed(5)
    x = torch.randn(1, 3, 40, 56)
    strict, free, padded = make(strict_img_size=True), make(), make(dynamic_img_pad=True)
    for fixed in (strict, make(dynamic_img_size=False)):
        with pytest.raises(ValueError, match=r'40x56 does not match the model, built .* for 32x32'):
            fixed(x)
    built = make(img_size=(40, 56))
    assert [b.shift_size for b in blocks(free)] != [b.shift_size for b in blocks(built)], 'those of the nominal size'
    wide = make(img_size=64)
    with torch.no_grad():
        torch.testing.assert_close(wide(x), built(x))
        torch.testing.assert_close(free(x[..., :32, :32]), strict(x[..., :32, :32]), rtol=0, atol=0)
        with pytest.raises(ValueError, match='40x54 must be a positive multiple of the patch 4x4'):
            free(x[..., :54])
        torch.testing.assert_close(padded(x[..., :54]), free(F.pad(x[..., :54], (0, 2))))


@pytest.mark.parametrize('rule', ['timm', 'naver'])
def test_masks_are_those_of_timm(rule):
    """Of the nominal size and of others, also where only one axis is shifted."""
    seen = 0
    for block in blocks(make(img_size=(32, 64), window_rule=rule)):
        for rows, columns in ((8, 16), (16, 12), (4, 20)):
            x = torch.zeros(2, rows, columns, 1)
            expected, mask = SwinTransformerBlock.get_attn_mask(block, x), block.get_attn_mask(x)
            assert (mask is None) == (expected is None)
            if mask is not None:
                seen += 1
                torch.testing.assert_close(mask, expected, rtol=0, atol=0)
        if block.attn_mask is not None:
            nominal = torch.zeros(1, *(-(-n // w) * w for n, w in zip(block.input_resolution, block.window_size)), 1)
            expected = SwinTransformerBlock.get_attn_mask(block, nominal)
            torch.testing.assert_close(block.attn_mask, expected, rtol=0, atol=0)
    assert seen >= 3


def test_graphs_take_any_size():
    model, images = make(), [torch.randn(1, 3, *size) for size in ((32, 32), (40, 56), (64, 32))]
    graphs = [
        torch.fx.symbolic_trace(model), torch.jit.script(model),
        torch.jit.trace(model, images[0], check_trace=False), torch.compile(model, backend='eager')]
    with torch.no_grad():
        for graph in graphs:
            for x in images:
                torch.testing.assert_close(graph(x), model(x))
    height = torch.export.Dim('height', min=8, max=16)
    error, said = ValueError, 'Windows cannot be exported for a height and width that vary'
    if not hasattr(torch.compiler, 'is_exporting'):  # torch 2.5 has words of its own
        error, said = torch._dynamo.exc.UserError, 'Constraints violated'
    with pytest.raises(error, match=said):
        torch.export.export(model, (images[0],), dynamic_shapes={'x': {2: 4 * height}})


def test_backbone_of_any_size():
    """What a U-Net or a feature pyramid asks for."""
    backbone = timm.create_model(
        'swin_tiny_rope_mixed', features_only=True, embed_dim=8, depths=(1, 2, 1, 1), num_heads=(1, 1, 2, 2))
    maps = backbone(torch.randn(1, 3, 96, 160))
    assert [tuple(each.shape) for each in maps] == [
        (1, 24, 40, 8), (1, 12, 20, 16), (1, 6, 10, 32), (1, 3, 5, 64)]
    with pytest.raises(TypeError, match='output_stride'):  # as timm's own, from 1.0.31 on
        timm.create_model('swin_tiny_rope_mixed', features_only=True, output_stride=16)


@pytest.mark.parametrize('head_dim', [8, (8, 24)])
def test_heads_of_any_size(head_dim):
    model = make('mixed', head_dim=head_dim)
    first, second = (8, 8) if head_dim == 8 else head_dim
    assert [rope.freqs.shape for rope in ropes(model)] == [(2, 1, 1, first // 2)] * 2 + [(2, 1, 2, second // 2)] * 2
    assert model(torch.randn(1, 3, 32, 32)).shape == (1, 5)


def test_patch_size_can_be_changed():
    model = make()
    model.set_input_size(img_size=64, patch_size=8)
    assert model.patch_embed.grid_size == (8, 8) and blocks(model)[0].window_size == (4, 4)
    assert model(torch.randn(1, 3, 64, 64)).shape == (1, 5)


@pytest.mark.parametrize('kwargs,error,words', [
    (dict(img_size=33), ValueError, 'img_size must be a multiple of the patch 4x4.*33x33'),
    (dict(img_size=0), ValueError, 'img_size must be an integer of at least 1, got 0'),
    (dict(patch_size=0), ValueError, 'patch_size must be an integer of at least 1, got 0'),
    (dict(embed_dim=0), ValueError, 'embed_dim must be an integer of at least 1, got 0'),
    (dict(embed_dim=30, num_heads=(4, 8)), ValueError, 'num_heads of stage 0 must divide its width 30, got 4'),
    (dict(num_heads=(1,)), ValueError, r'depths and num_heads must be as many, got \(2, 2\) and \(1,\)'),
    (dict(depths=2), ValueError, 'depths must be a list with one integer for each stage, got 2'),
    (dict(depths=(2, 0)), ValueError, 'depths must be an integer of at least 1, got 0'),
    (dict(window_rule='swin'), ValueError, "window_rule must be one of 'timm', 'naver', got 'swin'"),
    (dict(weight_init='naver'), ValueError, "weight_init must be one of .*got 'naver'"),
    (dict(rel_pos_bias=1), ValueError, 'rel_pos_bias must be True or False, got 1'),
    (dict(strict_img_size='false'), ValueError, "strict_img_size must be True or False, got 'false'"),
    (dict(coords='cells'), TypeError, 'takes as rope_coords'),
    (dict(rope_encoding='polar'), ValueError, "Unknown rotary encoding 'polar'"),
    (dict(rope_encoding='none', rope_coords='cells'), ValueError, 'takes no rope_coords'),
    (dict(rope_share_layers=True), ValueError, 'rope_share_layers is not for Swin'),
    (dict(rope_reference_grid=(0, 4)), ValueError, 'reference_grid must be two positive integers'),
    (dict(rope_block=4), ValueError, "takes no option 'block'"),
    (dict(rope_encoding='liere', rope_block=33), ValueError, 'head_dim must be at least 33'),
    (dict(rope_speed=1), TypeError, "takes no option 'speed'"),
    (dict(no_such=1), TypeError, 'no_such'),
    (dict(window_size=0), ValueError, r'window_size.*must be positive'),
    (dict(window_size=(4, 4, 4)), ValueError, r'window_size.*2 stage'),
    (dict(window_size=(4, 3.5)), ValueError, 'window_size must be an integer of at least 1, got 3.5'),
    (dict(window_size=None, window_ratio=(2, 2, 2)), ValueError, 'window_ratio.*2 stage'),
    (dict(window_size=None, window_ratio='8'), ValueError, "window_ratio: .*'str'"),
    (dict(head_dim=(16,)), ValueError, r'depths and head_dim must be as many, got \(2, 2\) and \(16,\)'),
    (dict(head_dim=0), ValueError, 'head_dim must be an integer of at least 1, got 0'),
])
def test_bad_arguments(kwargs, error, words, monkeypatch):
    if 'no_such' not in kwargs:
        monkeypatch.setattr(SwinTransformer, '__init__', lambda *_, **__: pytest.fail('built before it was refused'))
    for create in (RopeSwinTransformer, partial(timm.create_model, 'swin_tiny_rope_mixed')):
        with pytest.raises(error, match=words):
            create(**{**SMALL, 'rope_encoding': 'mixed', **kwargs})


@pytest.mark.parametrize('kwargs', [
    dict(img_size=(48, 50)), dict(img_size=48, patch_size=5), dict(img_size=-4), dict(img_size=48, window_size=2.5),
    dict(img_size=48, window_ratio=(2, '2'))])
def test_bad_sizes_change_nothing(kwargs):
    model = make()
    before = windows(model)
    with pytest.raises(ValueError, match='(img_size|window_size) must be|window_ratio: '):
        model.set_input_size(**kwargs)
    assert model.patch_embed.img_size == (32, 32)
    assert windows(model) == before
    assert same(model, make())
