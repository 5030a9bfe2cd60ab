"""Encodings of sequences and videos: what differs from images besides the formulas, which are in test_points.py."""
import math

import oracle
import pytest
import timm
import torch
from test_points import EVERY, GRIDS, make, points

import timm_rope
from timm_rope.encodings import ENCODINGS
from timm_rope.encodings._signature import read_signature_grid

OTHERS = [(name, dims) for name, dims in EVERY if dims != 2]
LEARNED = [(name, dims) for name, dims in OTHERS if ENCODINGS[name].learned]


@pytest.mark.parametrize('name,dims', OTHERS)
@torch.no_grad()
def test_a_grid_turns_as_the_formula(name, dims):
    rope, grid = make(name, dims=dims), (2, 3, 9)[-dims:]
    x = torch.randn(1, 2, math.prod(grid) + 1, 32)
    for layer, payload in enumerate(rope(grid, 1)):
        got = rope.rotate(x, payload)
        for head in range(2):
            expected = oracle.rotate(x[0, head, 1:].double().numpy(), oracle.rotations(rope, grid, layer, head))
            assert abs(got[0, head, 1:].double().numpy() - expected).max() < 3e-6
    assert rope(grid, 1)[0] is rope(list(grid), 1)[0], 'cached'
    assert rope.at(points(5, dims=dims).long())[0].shape[-2] == 5


@pytest.mark.parametrize('name,dims', OTHERS)
def test_weights_know_their_dimensions(name, dims):
    rope = make(name, dims=dims)
    state = rope.state_dict()
    assert state['reference_grid'].tolist() == list(GRIDS[dims]) == list(read_signature_grid(state['signature']))
    other = make(name, reference_grid=(9,) * dims)
    other.load_state_dict(state)
    for a, b in zip(rope(GRIDS[dims], 1), other(GRIDS[dims], 1)):
        assert torch.equal(a, b)
    image = make(name)
    kept = {key: value.clone() for key, value in image.state_dict().items()}
    for target, weights, has in ((image, state, dims), (rope, image.state_dict(), 2)):
        # a spherical one differs in the order of its axes as well
        words = f'(build the encoding with such a reference_grid|order is )|weights are of positions in {has}'
        with pytest.raises((ValueError, RuntimeError), match=words):
            target.load_state_dict(weights)
    assert all(torch.equal(kept[key], value) for key, value in image.state_dict().items()), 'nothing was copied'
    grids = [make(name, reference_grid=(side,) * dims).state_dict() for side in (4, 6)]
    with pytest.raises(ValueError, match='average'):
        rope.load_state_dict({key: (value + grids[1][key]) / 2 for key, value in grids[0].items()})


@pytest.mark.parametrize('name,dims', LEARNED)
def test_gradients_of_a_grid(name, dims):
    rope = make(name, 12, dims, dtype=torch.float64)
    grid = (2, 1, 3)[-dims:]

    def payloads(freqs):
        return torch.cat([p.flatten() for p in torch.func.functional_call(rope, {'freqs': freqs}, (grid, 1))])

    freqs = rope.freqs.detach().clone().requires_grad_()
    assert torch.autograd.gradcheck(payloads, freqs, fast_mode=True)


@pytest.mark.parametrize('dims', [1, 3])
def test_a_training_step_settles_the_reference_grid(dims):
    rope, grid = make('mixed', dims=dims), (3, 4, 6)[-dims:]
    rope.set_initial_grid(GRIDS[dims])
    with pytest.raises(ValueError, match='grid_size must be'):
        rope((3, 4))
    rope.train()(grid)
    assert not rope.undecided and rope.reference_grid.tolist() == list(grid)
    assert read_signature_grid(rope.state_dict()['signature']) == grid
    with pytest.raises(ValueError, match='grid must be'):
        rope.set_reference_grid((3, 4))
    assert f'reference_grid={grid}' in repr(rope)


@pytest.mark.parametrize('dims,words', [(1, r'the place of every point, got \(3, 2\)'), (3, r'frame, row and column')])
def test_bad_points(dims, words):
    with pytest.raises(ValueError, match=words):
        make('axial', dims=dims).at(torch.zeros(3, 2))
    with pytest.raises(ValueError, match='extent must be (one|three) positive'):
        make('axial', dims=dims).at(torch.zeros(3, dims), extent=(3, 4))


def test_models_are_of_images():
    for name in ('vit_tiny_rope_mixed', 'swin_tiny_rope_mixed'):
        for grid in ((14,), (2, 14, 14)):
            with pytest.raises(ValueError, match='rope_reference_grid must be two positive integers'):
                timm.create_model(name, rope_reference_grid=grid)


# -- where they begin

def test_axes_share_the_channels_equally():
    for dims in (1, 3):
        freqs = make('axial', 64, dims).freqs[:, 0, 0]
        each = 32 // dims
        for axis in range(dims):
            own = freqs[:, axis * each:(axis + 1) * each]
            assert (own[axis] > 0).all() and not own[torch.arange(dims) != axis].any(), 'x first'
        assert make('axial', 64, dims).rotation.rotated == 2 * dims * each


def test_mixed_starts_as_a_turned_axial_basis():
    line = make('mixed', 64, 1).freqs
    assert torch.allclose(line, make('axial', 64, 1, temperature=10.).freqs.expand_as(line)), 'which is RoPE'
    freqs = timm_rope.create_rope('mixed', 64, 5, 40, (4, 4, 4)).freqs.detach()
    first = freqs[..., [0, 11, 22]].permute(1, 2, 0, 3)  # the longest wave of each axis
    assert torch.allclose(first.mT @ first, torch.eye(3).expand_as(first), atol=1e-5)
    assert (torch.linalg.det(first) > 0).all()
    assert torch.allclose(freqs.norm(dim=0)[0, 0], make('mixed', 64, 3).freqs.norm(dim=0)[0, 0], atol=1e-5)
    assert first.mean((0, 1)).abs().max() < 0.2, 'no direction is preferred'


def test_fixed_directions_of_space_are_spread_evenly():
    golden = make('golden', 64, 3).frequencies().flatten(1)
    golden = golden / golden.norm(dim=0)
    assert torch.allclose(golden @ golden.T / 64, torch.eye(3).double() / 3, atol=0.05)
    corners = make('nd', 64, 3).frequencies()[:, 0].unflatten(-1, (8, 4))  # (3, heads, scales, corners)
    assert corners.sum(-1).abs().max() < 1e-7
    products = torch.einsum('ahsc,ahsd->hscd', corners, corners)[:, 0]
    assert torch.allclose(products, (4 * torch.eye(4).double() - 1) / 3, atol=1e-7), 'a regular simplex'
    line = make('nd', 64, 1).frequencies()[0, 0]
    assert torch.equal(line[:, ::2], -line[:, 1::2])


@pytest.mark.slow
@pytest.mark.parametrize('name,dims', [(name, dims) for name in ('axial', 'spherical', 'string') for dims in (1, 3)])
def test_compiled_grids(name, dims):
    torch._dynamo.reset()
    rope = make(name, dims=dims)
    compiled = torch.compile(rope, backend='aot_eager', fullgraph=True, dynamic=True)
    for grid in ((2, 3, 4)[-dims:], (3, 4, 6)[-dims:]):
        for a, b in zip(compiled(grid, 1), rope(grid, 1)):
            assert torch.allclose(a, b, atol=5e-6)
