"""Coordinates of published models: DINOv3, EVA-02, PE, ViT-5 and ComRoPE as cases of what is here, on any grid."""
import math

import numpy as np
import oracle
import pytest
import timm
import torch
from timm.layers.pos_embed_sincos import RotaryEmbeddingCat, RotaryEmbeddingDinoV3
from tiny import make

import timm_rope
from timm_rope.encodings import ENCODINGS

DIM = 32
GRIDS = [(16, 12), (7, 10), (20, 9), (1, 3), (40, 33)]  # larger and smaller than (16, 12), also along one axis alone
FOLLOWING = ['dinov3', 'dinov3_min', 'dinov3_max', 'eva']


def axial(name='axial', **options):
    torch.manual_seed(0)
    return timm_rope.create_rope(name, DIM, 2, 2, options.pop('reference', (16, 12)), **options)


def of_timm(embed, half):
    """Sines and cosines of timm (N, 2 D), y first -> a payload (N, D), x first."""
    sin, cos = (part[:, :DIM // 2] if half else part[:, ::2] for part in embed.chunk(2, -1))
    return torch.stack((cos, sin), -1).roll(DIM // 4, 1).flatten(1)


# -- exact cases

@pytest.mark.parametrize('grid', GRIDS)
@pytest.mark.parametrize('kind', ['separate', 'min', 'max'])
@pytest.mark.parametrize('temperature', [100., 20.])
def test_axial_is_dinov3(grid, kind, temperature):
    coords = 'dinov3' if kind == 'separate' else f'dinov3_{kind}'
    payload = axial(coords=coords, scale=2., temperature=temperature)(grid)[0][0]
    theirs = RotaryEmbeddingDinoV3(DIM, normalize_coords=kind, temperature=temperature).get_embed(list(grid))
    assert (payload - of_timm(theirs, half=True)).abs().max() < 3e-6
    other = axial(coords=coords, scale=2., temperature=temperature, reference=(3, 50))(grid)[0][0]
    assert (payload - other).abs().max() < 3e-7, 'whatever the reference grid'


@pytest.mark.parametrize('grid', GRIDS)
@pytest.mark.parametrize('offset', [0, 1])  # EVA-02 and PE
def test_axial_is_eva(grid, offset):
    payload = axial(coords='eva', temperature=1e4, offset=offset)(grid)[0][0]
    theirs = RotaryEmbeddingCat(DIM, in_pixels=False, ref_feat_shape=[16, 12], grid_offset=offset).get_embed(list(grid))
    assert (payload - of_timm(theirs, half=False)).abs().max() < 3e-6


@pytest.mark.parametrize('grid', [(5, 7), (13, 3), (16, 12)])
def test_the_class_token_of_comrope_is_a_patch_in_the_middle(grid):
    rope = axial('comrope', coords='dinov3', offset=-.5, block=4)
    payload = rope(grid, 1)[1].unflatten(-1, (-1, 4, 4))
    middle = rope.at(torch.tensor([[(grid[0] - 1) / 2, (grid[1] - 1) / 2]]), 1, grid)[1].unflatten(-1, (-1, 4, 4))
    assert torch.allclose(middle[:, 1], torch.eye(4), atol=1e-6) and torch.allclose(payload[:, 0], torch.eye(4))
    other = axial('comrope', coords='dinov3', block=4)(grid)[1].unflatten(-1, (-1, 4, 4))
    assert torch.allclose(payload[:, 1].mT @ payload[:, 5], other[:, 0].mT @ other[:, 4], atol=1e-5), 'scores are kept'


# -- rules

@pytest.mark.parametrize('coords', FOLLOWING)
@pytest.mark.parametrize('name', ['axial', 'mixed', 'spherical', 'liere'])
@pytest.mark.parametrize('grid', [(16, 12), (7, 20)])
@torch.no_grad()
def test_extrapolation_has_the_steps_of_the_reference_grid(coords, name, grid):
    own, interpolated, extrapolated = (axial(name, coords=coords, **rule)(grid)[0] for rule in (
        {}, dict(scaling='interpolate'), dict(scaling='extrapolate')))
    assert torch.equal(own, interpolated) and torch.equal(own, extrapolated) == (grid == (16, 12))
    plain = dict(eva='index', dinov3='cells').get(coords)
    if plain:
        assert torch.equal(extrapolated, axial(name, coords=plain)(grid)[0])
    reference = axial(name, coords=coords, scaling='extrapolate')((16, 12))[0].unflatten(1, (16, 12))
    if coords == 'eva' and name != 'spherical':  # an origin that does not move with the grid
        assert torch.equal(extrapolated.unflatten(1, grid)[:, :7, :12], reference[:, :7, :12])


@pytest.mark.parametrize('name', sorted(ENCODINGS))
@pytest.mark.parametrize('coords', FOLLOWING)
def test_a_rule_is_a_usage(name, coords):
    if coords not in ENCODINGS[name].coords_choices:
        pytest.skip(f'{name} has no {coords} coordinates')
    rope = axial(name, coords=coords)
    assert rope.scaling == 'interpolate' and rope.usage['scaling'] is None and 'scaling' not in repr(rope)
    rope.set_scaling('extrapolate')
    assert rope.usage['scaling'] == 'extrapolate' and 'scaling=extrapolate' in repr(rope)
    assert torch.equal(rope((9, 30))[0], axial(name, coords=coords, **rope.usage)((9, 30))[0])


@pytest.mark.parametrize('grid', [(4, 5), (40, 30), (8, 24)])
def test_rules_hold_below_the_reference_grid(grid):
    # ntk is a change of base for each axis, arXiv 2309.00071, with s < 1 too; yarn keeps fast waves
    by_ntk, by_yarn, plain, own = (
        axial(coords='dinov3', scale=2., scaling=rule, dtype=torch.float64)(grid)[0]
        for rule in ('ntk', 'yarn', 'extrapolate', 'interpolate'))
    quarter = DIM // 4
    for s, columns in ((grid[1] / 12, slice(DIM // 2)), (grid[0] / 16, slice(DIM // 2, None))):
        changed = axial(coords='cells', scale=2., temperature=100 * s ** (quarter / (quarter - 1)), dtype=torch.float64)
        assert torch.allclose(by_ntk[..., columns], changed(grid)[0][..., columns], atol=1e-10)
        # 2 turns over the reference grid, and less than a half
        for waves, expected in ((slice(0, 2), plain), (slice(-2, None), own)):
            assert torch.allclose(by_yarn[..., columns][..., waves], expected[..., columns][..., waves], atol=1e-12)


@pytest.mark.parametrize('offset', [0., 1., -2.])
def test_interpolated_patches_keep_their_distance_from_prefix_tokens(offset):
    rope = axial(offset=offset, scaling='interpolate', dtype=torch.float64)
    expected = axial(dtype=torch.float64).at((torch.arange(32) + .5).double()[:, None].expand(-1, 2) / 2 - .5 + offset)
    assert torch.allclose(rope((32, 24))[0].unflatten(1, (32, 24))[0].diagonal(), expected[0][0, :24].T, atol=1e-12)


# -- prefix tokens

@pytest.mark.parametrize('prefix', [4, 5, 7])
@pytest.mark.parametrize('options', [{}, dict(register_temperature=30., temperature=1e4, offset=2.), dict(scale=.5)])
@pytest.mark.parametrize('grid', [(16, 12), (5, 20)])
def test_registers_have_a_grid_of_their_own(prefix, options, grid):
    rope = axial(registers=4, scaling='yarn', **options)
    payloads, of_patches = rope(grid, prefix), axial(scaling='yarn', **options | (
        dict(register_temperature=100.) if options else {}))(grid)
    assert len(payloads) == 2 and torch.equal(payloads[1][:, prefix:], of_patches[1])
    eye = torch.eye(DIM)[:, None, None].expand(-1, 2, prefix, -1)
    got = rope.rotate(eye, payloads[0][:, :prefix])[:, 0].permute(1, 2, 0).double().numpy()
    series = [options.get('scale', 1.) * options.get('register_temperature', 100.) ** (-g / 8) for g in range(8)]
    places = [(None, None)] * (prefix - 4) + [(0, 0), (0, 1), (1, 0), (1, 1)]
    for matrix, (row, column) in zip(got, places, strict=True):
        angles = [0.] * 16 if row is None else [column * w for w in series] + [row * w for w in series]
        assert np.abs(matrix - oracle.pairs(DIM, angles)).max() < 1e-6
    at = rope.at(torch.cartesian_prod(torch.arange(grid[0]), torch.arange(grid[1])), prefix, grid)
    assert torch.equal(at[0], payloads[0])
    each = rope.at(torch.rand(3, 2, 2), prefix)[0]
    assert torch.equal(each[2, :, :prefix], payloads[0][:, :prefix]) and each.shape[2] == prefix + 2


def test_registers_in_scripts_and_graphs():
    rope = axial(registers=4, coords='dinov3').eval()
    expected = rope((6, 5), 5)[0]
    assert torch.equal(torch.jit.script(rope)((6, 5), 5)[0], expected)
    assert torch.equal(torch.compile(rope, backend='eager', fullgraph=True)((6, 5), 5)[0], expected)


@pytest.mark.parametrize('coords', ['dinov3', 'dinov3_min', 'eva'])
def test_a_graph_takes_any_size(coords):
    model = make('vit_tiny_rope_axial', reg_tokens=4, rope_registers=4, rope_coords=coords, rope_offset=.5)
    sides = [8 * torch.export.Dim(name, min=2, max=9) for name in ('rows', 'columns')]
    graph = torch.export.export(
        model, (torch.randn(1, 3, 32, 48),), dynamic_shapes=({2: sides[0], 3: sides[1]},)).module()
    for size in ((32, 48), (64, 24), (16, 16)):
        x = torch.randn(1, 3, *size)
        assert torch.allclose(graph(x), model(x), atol=1e-5)


def test_a_model_turns_its_registers():
    model = make('vit_tiny_rope_axial', reg_tokens=4, rope_registers=4, rope_register_temperature=10.)
    images = torch.randn(1, 3, 32, 48)
    torch.nn.init.normal_(model.reg_token)
    logits = model(images)
    with torch.no_grad():
        model.reg_token.copy_(model.reg_token[:, [3, 0, 1, 2]])
    assert (model(images) - logits).abs().max() > 1e-4, 'which register is which matters'


# -- weights and conversions

def test_older_weights_count_as_of_the_defaults():
    weights = make('vit_tiny_rope_axial').state_dict()
    older = {**weights, 'rope.signature': timm_rope.weights.layouts.signature(
        'axial', ('scale', 'offset', 'registers', 'register_temperature'))}
    make('vit_tiny_rope_axial').load_state_dict(older)
    for option, value in (('scale', 2.), ('offset', 1.)):
        for saved in (older, weights):
            with pytest.raises(RuntimeError, match=f'{option} is [01] there and {value:g} here'):
                make('vit_tiny_rope_axial', **{f'rope_{option}': value}).load_state_dict(saved)
    with pytest.raises(RuntimeError, match='coords is index there and eva here'):
        make('vit_tiny_rope_axial', rope_coords='eva').load_state_dict(weights)
    with pytest.raises(RuntimeError, match='registers is 0 there and 4 here'):
        make('vit_tiny_rope_axial', reg_tokens=4, rope_registers=4).load_state_dict(
            {**make('vit_tiny_rope_axial', reg_tokens=4).state_dict(), 'rope.signature': older['rope.signature']})


@pytest.mark.parametrize('options', [
    dict(coords='dinov3', scale=2.), dict(coords='dinov3_min'), dict(coords='eva', offset=1.)])
@pytest.mark.parametrize('grid', [(16, 12), (20, 5)])
@torch.no_grad()
def test_conversions_keep_coordinates(options, grid):
    rope = axial(**options)
    mixed = timm_rope.convert_encoding(timm_rope.convert_encoding(rope, 'axial_learned'), 'mixed')
    assert mixed.coords == rope.coords and mixed.scaling == 'interpolate'
    assert torch.allclose(mixed(grid, 1)[0], rope(grid, 1)[0].expand(2, -1, -1), atol=3e-6)


@pytest.mark.parametrize('options,target,changed,reason', [
    (dict(registers=4), 'mixed', {}, 'registers lie on a grid of their own'),
    (dict(offset=1.), 'string', {}, 'offset of its patches from the prefix tokens is 1 here and 0 there'),
    (dict(offset=1.), 'mixed', dict(offset=0.), 'offset of its patches'),
    (dict(coords='dinov3'), 'mixed', dict(coords='cells'), "coordinates 'dinov3' and 'cells' differ"),
    (dict(coords='index'), 'mixed', dict(coords='eva'), "coordinates 'index' and 'eva' differ")])
def test_conversions_that_change_positions_are_refused(options, target, changed, reason):
    with pytest.raises(ValueError, match=reason):
        timm_rope.convert_encoding(axial(**options), target, **changed)


# -- bad input

@pytest.mark.parametrize('name,options,words', [
    ('axial', dict(scale=0), 'scale must be a positive finite number, got 0'),
    ('axial', dict(offset=math.inf), 'offset must be a finite number, got inf'),
    ('mixed', dict(offset=True), 'offset must be a finite number, got True'),
    ('axial', dict(registers=3), 'registers must be a square number.*got 3'),
    ('axial', dict(registers=-4), 'registers must be an integer of at least 0, got -4'),
    ('axial', dict(register_temperature=10.), 'register_temperature=10 needs registers'),
    ('axial', dict(registers=4, register_temperature=-1.), 'register_temperature must be a positive finite number'),
    ('mixed', dict(registers=4), "'mixed' takes no option 'registers'"),
    ('spherical', dict(scale=2.), "'spherical' takes no option 'scale'"),
    ('uniform', dict(coords='eva'), "coords of 'uniform' must be one of 'cells', 'ends', 'dinov3'"),
    ('axial', dict(coords='dino'), "coords of 'axial' must be one of.*'eva'"),
    ('spiral', dict(coords='eva', clamp=True), "coords must be 'index' with clamp=True")])
def test_bad_options(name, options, words):
    with pytest.raises(ValueError, match=words):
        axial(name, **options)


def test_registers_that_are_not_there():
    with pytest.raises(ValueError, match='num_prefix_tokens must be 0 or at least 4, the registers.*got 1'):
        axial(registers=4)((3, 3), 1)
    assert axial(registers=4)((3, 3))[0].shape[1] == 9, 'the patches alone'
    for name, options in (('vit_tiny_rope_axial', dict(reg_tokens=1)), ('swin_tiny_rope_axial', {})):
        with pytest.raises(ValueError, match='rope_registers must be 0 or reg_tokens.*got 4'):
            timm.create_model(name, rope_registers=4, **options)
