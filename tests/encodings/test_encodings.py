"""Theorems about the encodings: the formulas, orthogonality, relativity, gradients, options and bad input."""
import math

import numpy as np
import oracle
import pytest
import torch

import timm_rope
from timm_rope.encodings import ENCODINGS
from timm_rope.encodings._frequencies import geometric
from timm_rope.rotations.exponential import skew

NAMES = timm_rope.list_ropes()
LEARNED = [name for name, encoding in ENCODINGS.items() if encoding.learned]
VARIANTS = [(name, {}) for name in NAMES] + [
    ('axial', {'temperature': 50.}), ('axial', {'coords': 'cells'}), ('axial', {'coords': 'ends'}),
    ('axial_learned', {'share_heads': True}), ('mixed', {'share_layers': True, 'coords': 'cells'}),
    ('uniform', {'coords': 'ends'}), ('uniform', {'coords': 'dinov3'}), ('golden', {'coords': 'dinov3'}),
    ('axial', {'coords': 'dinov3', 'scale': 2.}), ('axial', {'coords': 'dinov3_min', 'scale': 2., 'offset': .25}),
    ('axial', {'coords': 'eva', 'temperature': 1e4, 'offset': 1}), ('mixed', {'coords': 'dinov3_max', 'scale': 2.}),
    ('axial_learned', {'coords': 'index', 'offset': -2.5}), ('spiral', {'coords': 'eva', 'directions': 4}),
    ('comrope', {'coords': 'dinov3', 'offset': -.5}), ('nd', {'coords': 'dinov3', 'scale': 2.}),
    ('liere', {'coords': 'eva'}), ('spherical', {'coords': 'dinov3_min'}), ('mixed', {'coords': 'cells', 'offset': .5}),
    ('spherical', {'order': 'xy'}), ('spherical', {'temperature': 1e4, 'coords': 'ends'}),
    ('spherical_learned', {'order': 'xy', 'share_heads': True, 'share_layers': True}),
    ('golden', {'coords': 'ends', 'max_freq': 5.}), ('golden', {'p_zero_freqs': 0.25, 'min_freq': 1.}),
    ('nd', {'seed': 7, 'temperature': 20.}), ('nd', {'coords': 'cells'}),
    ('string', {'basis': 'circulant'}), ('string', {'basis': 'circulant', 'block': 5, 'share_layers': True}),
    ('string', {'block': 4, 'share_heads': True}), ('string', {'block': 5, 'coords': 'cells'}),
    ('string', {'block': 64}),
    ('spiral', {'directions': 4, 'scale': 1., 'temperature': 100.}),
    ('liere', {'block': 2}), ('liere', {'block': 3}), ('liere', {'block': 4}), ('liere', {'block': 5}),
    ('liere', {'block': 64}), ('liere', {'share_heads': True, 'coords': 'ends'}),
    ('comrope', {'block': 2}), ('comrope', {'variant': 'ap', 'block': 4}), ('comrope', {'block': 5, 'coords': 'index'}),
    ('comrope', {'variant': 'ap', 'block': 3, 'share_layers': True, 'coords': 'ends'}),
    ('geope', {'temperature': 1e4, 'coords': 'ends'}), ('geope', {'coords': 'index'}),
    ('quatro', {'order': 'xy', 'coords': 'index'}), ('quatro', {'share_heads': True, 'share_layers': True}),
]
IDS = ['-'.join([name, *map(str, options.values())]) for name, options in VARIANTS]


def matrices(rope, grid, layer=0):
    """(H, N, D, D) rotation matrices, by rotating the unit vectors."""
    payload = rope(grid)[layer]
    n, d = grid[0] * grid[1], rope.head_dim
    columns = torch.eye(d, dtype=payload.dtype).reshape(d, 1, 1, d).expand(d, rope.num_heads, n, d)
    return rope.rotate(columns, payload).permute(1, 2, 3, 0)


def make(name, options=None, head_dim=64, num_heads=2, depth=2, reference_grid=(14, 14), **kwargs):
    torch.manual_seed(0)
    return timm_rope.create_rope(name, head_dim, num_heads, depth, reference_grid, **kwargs, **(options or {}))


@pytest.mark.parametrize('name,options', VARIANTS, ids=IDS)
@pytest.mark.parametrize('grid,reference', [((2, 5), (14, 14)), ((6, 3), (4, 7)), ((1, 1), (14, 14))])
@torch.no_grad()  # generators that learn are squared in float32, see test_exponential.py
def test_formula(name, options, grid, reference):
    rope = make(name, options, reference_grid=reference)
    payloads = rope(grid)
    x = torch.randn(2, 2, grid[0] * grid[1], 64)
    for layer in range(2):
        got = rope.rotate(x, payloads[layer])
        for head in range(2):
            expected = oracle.rotate(x[1, head].double().numpy(), oracle.rotations(rope, grid, layer, head))
            assert np.abs(got[1, head].double().detach().numpy() - expected).max() < 3e-6


@pytest.mark.parametrize('name', NAMES)
@pytest.mark.parametrize('reference', [(14, 14), (64, 64)])
@torch.no_grad()  # generators that learn are squared in float32, see test_exponential.py
def test_formula_on_a_large_grid(name, reference):
    # the oracle visits a sample of the rows of a 64x64 grid, the far corner included
    rope = make(name, head_dim=32, num_heads=1, depth=1, reference_grid=reference)
    got = rope.rotate(torch.ones(1, 1, 4096, 32), rope((64, 64))[0]).detach()[0, 0].double().numpy()
    exact = make(name, head_dim=32, num_heads=1, depth=1, reference_grid=reference, dtype=torch.float64)
    if rope.learned:
        exact.freqs.data.copy_(rope.freqs.data)
    whole = exact.rotate(torch.ones(1, 1, 4096, 32, dtype=torch.float64), exact((64, 64))[0]).detach()[0, 0].numpy()
    assert np.abs(got - whole).max() < 3e-6
    corner = oracle.rotations_at(rope, [(63, 61), (63, 62), (63, 63)], (64, 64), 0, 0)
    assert np.abs(got[-3:] - corner.sum(-1)).max() < 3e-6


@pytest.mark.parametrize('name,options', VARIANTS, ids=IDS)
@torch.no_grad()  # generators that learn are squared in float32, see test_exponential.py
def test_rotations_are_orthogonal_and_start_at_the_identity(name, options):
    rope = make(name, options)
    r = matrices(rope, (9, 17)).detach()
    eye = torch.eye(64)
    assert (r.mT @ r - eye).abs().max() < 1e-5
    assert (torch.linalg.det(r[:, ::37]) - 1).abs().max() < 1e-4
    payload = rope((2, 2), 3)[1]
    x = torch.randn(1, 2, 7, 64)
    assert torch.equal(rope.rotate(x, payload)[:, :, :3], x[:, :, :3]), 'prefix tokens must not turn'


def shift_errors(rope, grid=(5, 6)):
    """Largest change of R_i^T R_j over all pairs when both positions move by one along y, and along x."""
    r = matrices(rope, grid)[0].detach().reshape(*grid, rope.head_dim, rope.head_dim)

    def scores(part):
        flat = part.reshape(-1, rope.head_dim, rope.head_dim)
        return torch.einsum('iab,jac->ijbc', flat, flat)

    return (
        (scores(r[:-1]) - scores(r[1:])).abs().max().item(),
        (scores(r[:, :-1]) - scores(r[:, 1:])).abs().max().item(),
    )


@pytest.mark.parametrize('name,options', VARIANTS, ids=IDS)
def test_relativity_is_as_declared(name, options):
    rope = make(name, options, head_dim=64 if options.get('block', 0) == 64 else 24, dtype=torch.float64)
    along_y, along_x = shift_errors(rope)
    if rope.relative == 'xy' or options.get('block') == 2:
        assert max(along_y, along_x) < 1e-10
    elif rope.relative == 'last':
        last, first = (along_x, along_y) if rope.options['order'] == 'yx' else (along_y, along_x)
        assert last < 1e-10, 'the score must depend on the offset along the axis that acts last'
        assert first > 1e-2, 'and not along the axis that acts first'
    else:
        assert min(along_y, along_x) > 1e-2


def test_commuting_generators_make_liere_relative():
    rope = make('liere', head_dim=24, dtype=torch.float64)
    with torch.no_grad():
        rope.freqs[1] = 0.3 * rope.freqs[0]
    assert max(shift_errors(rope)) < 1e-10


def test_axial_channels_see_one_axis():
    for name in ('axial', 'axial_learned', 'uniform'):
        r = matrices(make(name), (3, 4))[0].detach().reshape(3, 4, 64, 64)
        assert torch.equal(r[0, :, :32, :32], r[2, :, :32, :32]), 'the first half turns with x only'
        assert torch.equal(r[:, 0, 32:, 32:], r[:, 3, 32:, 32:]), 'the second half turns with y only'
        assert not torch.equal(r[0, 0, :32, :32], r[0, 1, :32, :32])


@pytest.mark.parametrize('name,options', VARIANTS, ids=IDS)
def test_oblique_encodings_turn_a_group_with_both_axes(name, options):
    rope = make(name, options)
    size, groups = rope.rotation.size, rope.rotation.groups
    r = matrices(rope, (3, 3))[0].detach().reshape(3, 3, 64, 64)
    both = []
    for g in range(groups):
        block = r[:, :, g * size:(g + 1) * size, g * size:(g + 1) * size]
        with_y = (block[1, 1] - block[2, 1]).abs().max() > 1e-6
        with_x = (block[1, 1] - block[1, 2]).abs().max() > 1e-6
        both.append(bool(with_x and with_y))
    # in every direction but that of an axis itself, which may be one of many
    assert any(both) == (rope.oblique and options.get('variant') != 'ap')


def test_mixed_starts_as_a_turned_axial_basis():
    freqs = make('mixed', num_heads=3, depth=4).freqs.detach()
    assert freqs.shape == (2, 4, 3, 32)
    length = freqs.square().sum(0).sqrt()
    expected = torch.tensor([10 ** (-4 * j / 64) for j in range(16)]).repeat(2)
    assert torch.allclose(length, expected.expand_as(length), atol=1e-6)
    angle = torch.atan2(freqs[1], freqs[0])
    turned = torch.remainder(angle[..., 16:] - angle[..., :16], 2 * math.pi)
    assert torch.allclose(turned, torch.full_like(turned, math.pi / 2), atol=1e-5)
    assert angle[..., 0].unique().numel() == 12, 'every layer and head has its own turn'


def test_axial_learned_starts_as_axial_and_spherical_learned_as_spherical():
    for fixed, learned in (('axial', 'axial_learned'), ('spherical', 'spherical_learned')):
        assert torch.allclose(make(fixed)((4, 5))[1].expand(2, -1, -1), make(learned)((4, 5))[1], atol=1e-7)


def test_golden_never_repeats_a_direction_and_leaves_the_share_of_zeros_alone():
    rope = make('golden', {'p_zero_freqs': 0.25}, num_heads=6)
    x, y = rope.frequencies()[:, 0]
    assert rope.freqs.shape == (4, 1, 6, 32) and x.shape == (6, 32) and rope([2, 3])[0].shape == (6, 6, 64)
    length = torch.hypot(x, y)
    assert not length[:, :8].any() and torch.allclose(length[:, [8, 31]], torch.tensor([[0.2, 20.]]).double())
    ratio = length[:, 9:] / length[:, 8:-1]
    assert torch.allclose(ratio, ratio[0, 0].expand_as(ratio)), 'a geometric series'
    direction = torch.remainder(torch.atan2(y, x)[:, 8:].flatten() / math.pi, 1).sort().values
    gaps = torch.cat((direction, direction[:1] + 1)).diff()
    assert gaps.min() > 0.2 / len(gaps) and gaps.max() < 4 / len(gaps), 'spread over the half circle'


def test_nd_prefers_no_direction_and_is_the_same_everywhere():
    rope = make('nd', num_heads=6)
    waves = rope.frequencies()[:, 0].unflatten(-1, (10, 3))  # (2, heads, scales, corners)
    assert waves.sum(-1).abs().max() < 1e-14, 'a triangle about the origin'
    angle = torch.arange(36).double()
    along = torch.einsum('ahsc,ad->hscd', waves, torch.stack((angle.cos(), angle.sin())))
    scale = torch.tensor([100 ** (-s / 10) for s in range(10)]).double()[:, None]
    for order, mean in ((2, 1 / 2), (4, 3 / 8)):  # of cos^2 and cos^4
        assert torch.allclose(along.pow(order).mean(2), (mean * scale ** order).expand(6, -1, 36), rtol=1e-7)
    turns = torch.atan2(waves[1, :, 0, 0], waves[0, :, 0, 0])
    assert turns.unique().numel() == 6
    torch.manual_seed(5)
    again = timm_rope.create_rope('nd', 64, 6, 2)
    assert torch.equal(again.freqs, rope.freqs), 'not drawn by the generator of torch'
    assert [round(t, 6) for t in (turns % (2 * math.pi)).tolist()] == [  # of every Python on every machine
        5.305659, 4.762368, 2.642529, 1.626822, 3.212434, 2.544276]
    other = make('nd', {'seed': 1}, num_heads=6)
    assert not torch.equal(other.freqs, rope.freqs)
    with pytest.raises(RuntimeError, match='seed is 0 there and 1 here'):
        other.load_state_dict(rope.state_dict())


@pytest.mark.parametrize('head_dim,block', [(64, 16), (80, 16), (24, 12), (60, 12), (72, 12), (31, 16), (6, 6)])
def test_string_takes_blocks_that_leave_no_rest(head_dim, block):
    assert make('string', head_dim=head_dim).rotation.size == block
    assert make('string', {'block': 4}, head_dim=head_dim).options['block'] == 4


@pytest.mark.parametrize('options', [{}, {'basis': 'circulant'}, {'block': 7}, {'basis': 'circulant', 'block': 7}])
def test_generators_of_string_commute_whatever_is_learned(options):
    rope = make('string', options, head_dim=32, dtype=torch.float64)
    with torch.no_grad():
        rope.freqs.normal_()
    a, b = torch.stack([skew(each, rope.rotation.size) for each in rope.frequencies().detach()])
    assert (a @ b - b @ a).abs().max() < 1e-12 and a.abs().max() > 0.1
    assert (matrices(rope, (3, 4)) - torch.eye(32)).abs().max() > 0.1
    assert max(shift_errors(rope)) < 1e-10


def test_string_starts_as_mixed():
    string, mixed = make('string', dtype=torch.float64), make('mixed', dtype=torch.float64)
    with torch.no_grad():
        assert 0.005 < string.freqs[..., 16:].std() < 0.02
        string.freqs[..., 16:] = 0
    assert torch.allclose(matrices(string, (4, 3)), matrices(mixed, (4, 3)), atol=1e-12)
    circulant = make('string', {'basis': 'circulant', 'block': 64}, dtype=torch.float64)
    fourier = torch.fft.fft(torch.eye(64).double(), norm='ortho')
    waves = torch.stack([
        (fourier @ skew(each[0, 0, 0], 64).to(fourier.dtype) @ fourier.mH).diagonal().imag[1:32]
        for each in circulant.frequencies().detach()])
    expected = torch.tensor(geometric(16, 10.) + geometric(16, 10.)[:15]).double()
    assert torch.allclose(waves.norm(dim=0), expected, atol=1e-10), 'all planes of the Fourier transform but two'


def test_block_2_is_mixed():
    liere = make('liere', {'block': 2, 'coords': 'index'}, dtype=torch.float64)
    mixed = make('mixed', dtype=torch.float64)
    with torch.no_grad():
        # the generator [[0, a], [-a, 0]] turns clockwise
        mixed.freqs.copy_(-liere.freqs.reshape(2, 2, 2, 32))
    assert torch.allclose(matrices(liere, (4, 3)), matrices(mixed, (4, 3)), atol=1e-12)


def test_comrope_of_block_2_is_mixed():
    comrope = make('comrope', {'block': 2, 'coords': 'index'}, dtype=torch.float64)
    mixed = make('mixed', dtype=torch.float64)
    a, t_x, t_y = comrope.freqs.detach()[0].reshape(2, 2, 32, 3).unbind(-1)
    with torch.no_grad():
        mixed.freqs.copy_(-a * torch.stack((t_x, t_y)))
    assert torch.allclose(matrices(comrope, (4, 3)), matrices(mixed, (4, 3)), atol=1e-12)


@torch.no_grad()
def test_products_of_comrope_are_not_rounded():
    rope, exact = (make('comrope', {'coords': 'index'}, 32, 1, 1, dtype=d) for d in (torch.float32, torch.float64))
    exact.freqs.copy_(rope.freqs)
    payload = rope((64, 64))[0]
    assert payload.dtype == torch.float32 and (payload - exact((64, 64))[0]).abs().max() < 1e-6


@pytest.mark.parametrize('variant', ['ld', 'ap'])
def test_comrope_is_mixed_in_another_basis(variant):
    comrope = make('comrope', {'coords': 'index', 'variant': variant}, num_heads=1, depth=1, dtype=torch.float64)
    mixed = make('mixed', num_heads=1, depth=1, dtype=torch.float64)
    basis, vectors = torch.zeros(64, 64, dtype=torch.float64), []
    for g, (x, y) in enumerate(zip(*comrope.frequencies().detach()[:, 0, 0])):
        larger = x if variant == 'ld' or g % 2 else y
        block = torch.zeros(8, 8, dtype=torch.float64)
        block[tuple(torch.triu_indices(8, 8, 1))] = larger
        values, pairs = torch.linalg.eigh(1j * (block - block.T))
        planes = 2 ** 0.5 * torch.view_as_real(pairs[:, 4:]).flatten(1)  # the plane of each positive eigenvalue
        basis[8 * g:8 * g + 8, 8 * g:8 * g + 8] = planes
        vectors.append(values[4:, None] * torch.stack((x[0], y[0])) / larger[0])
    with torch.no_grad():
        mixed.freqs[:, 0, 0] = torch.cat(vectors).T
    assert torch.allclose(basis @ basis.T, torch.eye(64, dtype=torch.float64), atol=1e-12)
    assert torch.allclose(matrices(comrope, (4, 3)), basis @ matrices(mixed, (4, 3)) @ basis.T, atol=1e-11)


def test_geope_is_liere_and_takes_both_axes_alike():
    geope = make('geope', {'coords': 'index'}, dtype=torch.float64)
    liere = make('liere', {'block': 3, 'coords': 'index'}, dtype=torch.float64)
    with torch.no_grad():  # (0, 1), (0, 2), (1, 2) of the generators
        liere.freqs.zero_()
        w = torch.tensor([100 ** (-g / 21) for g in range(21)], dtype=torch.float64).repeat(2)
        liere.freqs[0, ..., 1], liere.freqs[1, ..., 2] = w / 2, -w / 2
    r = matrices(geope, (4, 4))
    assert torch.allclose(r.expand(2, -1, -1, -1), matrices(liere, (4, 4)), atol=1e-12)
    swap = torch.tensor([[0., 1., 0.], [1., 0., 0.], [0., 0., -1.]], dtype=torch.float64)
    swap = torch.block_diag(*[swap] * 21, torch.ones(1, 1))
    r = r.unflatten(1, (4, 4))
    assert torch.allclose(r.transpose(1, 2), swap @ r @ swap.T, atol=1e-12), 'the transposed image'


def quatro_about(directions, like, order='yx'):
    """QuatRo with the frequencies of an encoding and axes in directions (2, 3), of the columns and of the rows."""
    quatro = make('quatro', {'order': order, 'coords': like.coords}, head_dim=24, dtype=torch.float64)
    with torch.no_grad():
        w = like.freqs.expand(-1, 2, 2, -1)[..., :8].flatten(2).unsqueeze(-1)
        quatro.freqs.copy_(w * torch.tensor(directions, dtype=torch.float64)[:, None, None])
    return quatro


@pytest.mark.parametrize('order', ['yx', 'xy'])
def test_quatro_about_orthogonal_axes_is_spherical(order):
    spherical = make('spherical_learned', {'order': order}, head_dim=24, dtype=torch.float64)
    with torch.no_grad():
        spherical.freqs.mul_(1 + torch.rand_like(spherical.freqs))
    expected = matrices(spherical, (4, 5), 1)
    quatro = quatro_about([[0., 0., 1.], [1., 0., 0.]], spherical, order)
    assert torch.allclose(matrices(quatro, (4, 5), 1), expected, atol=1e-12)
    turned = torch.linalg.qr(torch.randn(3, 3, dtype=torch.float64))[0]
    turned = turned * torch.linalg.det(turned)  # of other orthogonal axes, in another basis of the channels
    quatro = quatro_about([turned[:, 2].tolist(), turned[:, 0].tolist()], spherical, order)
    basis = torch.block_diag(*[turned] * 8)
    assert torch.allclose(matrices(quatro, (4, 5), 1), basis @ expected @ basis.T, atol=1e-12)


def test_quatro_about_parallel_axes_is_mixed():
    mixed = make('mixed', head_dim=16, dtype=torch.float64)
    quatro = quatro_about([[0., 0., 1.], [0., 0., 1.]], mixed)
    pairs = [c for c in range(24) if c % 3 < 2]
    r = matrices(quatro, (4, 5), 1)
    assert torch.allclose(r[:, :, pairs][..., pairs], matrices(mixed, (4, 5), 1), atol=1e-12)
    assert torch.equal(r[:, :, 2::3, 2::3], torch.eye(8).double().expand(2, 20, -1, -1)), 'the third does not turn'
    assert max(shift_errors(quatro_about([[.6, 0., .8], [.6, 0., .8]], mixed))) < 1e-10
    assert max(shift_errors(quatro_about([[.6, 0., .8], [.8, 0., .6]], mixed))) > 1e-2


def test_axes_of_length_zero_learn():
    rope = make('quatro', head_dim=24, dtype=torch.float64)
    with torch.no_grad():
        rope.freqs.zero_()
    sum((p * torch.randn_like(p)).sum() for p in rope((3, 4))).backward()
    assert torch.isfinite(rope.freqs.grad).all() and (rope.freqs.grad != 0).all()


def test_uniform_makes_one_turn_over_the_reference_grid():
    rope = make('uniform', reference_grid=(6, 10), dtype=torch.float64)
    payload = rope((12, 20))[0][0].reshape(12, 20, 64)
    assert torch.allclose(payload[:6], payload[6:], atol=1e-12)
    assert torch.allclose(payload[:, :10], payload[:, 10:], atol=1e-12)
    assert not torch.allclose(payload[:3, :, 32:], payload[3:6, :, 32:], atol=0.1)


@pytest.mark.parametrize('name', NAMES)
def test_larger_grids_extrapolate_with_an_unchanged_step(name):
    rope = make(name, num_heads=1, depth=1, head_dim=24, dtype=torch.float64)
    small = matrices(rope, (14, 14))[0].detach().reshape(14, 14, 24, 24)
    large = matrices(rope, (28, 21))[0].detach().reshape(28, 21, 24, 24)
    if rope.centered and rope.coords != 'index':  # the origin stays in the middle
        large = large[7:21]
    if rope.relative == 'xy':  # scores between neighbours are the same wherever the origin is
        for a, b in (((0, 0), (0, 1)), ((0, 0), (1, 0))):
            assert torch.allclose(small[a].mT @ small[b], large[a].mT @ large[b], atol=1e-10)
    elif rope.relative == '':
        start = 7 if rope.centered else 0
        large = matrices(rope, (28, 28))[0].detach().reshape(28, 28, 24, 24)
        assert torch.allclose(small, large[start:start + 14, start:start + 14], atol=1e-10)
    else:
        small_x, large_x = small[3, :2], large[3, :2]  # relative along x, at the same y
        assert torch.allclose(small_x[0].mT @ small_x[1], large_x[0].mT @ large_x[1], atol=1e-10)


@pytest.mark.parametrize('name', ['spherical', 'uniform', 'liere'])
def test_ends_shrink_the_step_as_the_papers_do(name):
    from timm_rope.positions.coordinates import grid_axes
    reference = torch.tensor([14, 14])
    for size in (14, 28):
        _, x = grid_axes([3, size], reference, torch.zeros(1, dtype=torch.float64), 'ends', 2 * math.pi, True)
        assert torch.allclose(x, torch.linspace(-math.pi, math.pi, size, dtype=torch.float64) * size / 14)


@pytest.mark.parametrize('name,options', [v for v in VARIANTS if v[0] in LEARNED and v[1].get('block') != 64])
def test_gradients_in_float64(name, options):
    rope = make(name, options, head_dim=10 if name == 'liere' else 8, num_heads=1, depth=1, dtype=torch.float64)
    x = torch.randn(1, 1, 3, rope.head_dim, dtype=torch.float64, requires_grad=True)

    def rotated(freqs, x):
        out = torch.func.functional_call(rope, {'freqs': freqs}, ((2, 1), 1))
        return torch.stack([rope.rotate(x, payload) for payload in out])

    freqs = rope.freqs.detach().clone().requires_grad_()
    assert torch.autograd.gradcheck(rotated, (freqs, x), fast_mode=True)


@pytest.mark.parametrize('name', LEARNED)
def test_every_frequency_gets_a_gradient(name):
    rope = make(name, head_dim=16)
    total = sum((rope.rotate(torch.randn(1, 2, 6, 16), p) * torch.randn(1, 2, 6, 16)).sum() for p in rope((2, 3)))
    total.backward()
    assert rope.freqs.grad is not None and torch.isfinite(rope.freqs.grad).all()
    assert (rope.freqs.grad != 0).all()


@pytest.mark.parametrize('name', NAMES)
@pytest.mark.parametrize('dtype', [torch.bfloat16, torch.float16])
def test_low_precision(name, dtype):
    rope = make(name)
    expected = rope.rotate(torch.ones(1, 2, 144, 64), rope((12, 12))[1])
    half = make(name).to(dtype)
    assert half.freqs.dtype == torch.float32
    payload = half((12, 12))[1]
    assert payload.dtype == torch.float32, 'angles keep their precision'
    got = half.rotate(torch.ones(1, 2, 144, 64, dtype=dtype), payload)
    assert got.dtype == dtype
    assert (got.float() - expected).abs().max() < 2 * torch.finfo(dtype).eps
    with torch.autocast('cpu', torch.bfloat16):
        assert torch.equal(rope((12, 12))[1], rope((12, 12))[1].float())
        cast = rope.rotate(torch.ones(1, 2, 144, 64), rope((12, 12))[1])
    assert cast.dtype == torch.float32 and torch.allclose(cast, expected, atol=1e-6)


@pytest.mark.parametrize('name', NAMES)
def test_float64_module_is_exact(name):
    rope = make(name).double()
    if not rope.learned:
        assert torch.equal(rope.freqs, make(name, dtype=torch.float64).freqs), 'recomputed, not cast from float32'
    expected = oracle.rotations(rope, (3, 3), 1, 1)
    assert np.abs(matrices(rope, (3, 3), 1)[1].detach().numpy() - expected).max() < 1e-13


@pytest.mark.parametrize('name', [name for name in NAMES if name != 'spiral'])  # which refuses such a head_dim
def test_remainder_passes_unrotated(name):
    rope = make(name, head_dim=31)
    rotated = rope.rotation.rotated
    assert 0 < rotated < 31
    x = torch.randn(2, 2, 6, 31)
    y = rope.rotate(x, rope((2, 3))[0])
    assert torch.equal(y[..., rotated:], x[..., rotated:])
    assert (y[..., :rotated] != x[..., :rotated]).any(0).any(0).any(0).all()


def test_nothing_is_mutated():
    for name in NAMES:
        rope = make(name)
        x, payload = torch.randn(1, 2, 4, 64), rope((2, 2))[0]
        before, table = x.clone(), payload.clone()
        rope.rotate(x, payload)
        assert torch.equal(x, before) and torch.equal(payload, table)


@pytest.mark.parametrize('name', NAMES)
def test_module_contract(name):
    rope = make(name, depth=3)
    assert len(rope((2, 3))) == 3
    assert rope.no_weight_decay() == ({'freqs'} if rope.learned else set())
    assert set(rope.state_dict()) == {'reference_grid', 'signature'} | ({'freqs'} if rope.learned else set())
    assert all(t.ndim <= 4 for t in [*rope.parameters(), *rope.buffers()]), 'channels_last refuses 5 dimensions'
    text = repr(rope)
    assert name in text and 'reference_grid=(14, 14)' in text and f'coords={rope.coords}' in text
    meta = make(name, depth=3, device='meta')
    assert all(t.is_meta for t in [*meta.parameters(), *meta.buffers()])
    empty = meta.to_empty(device='cpu')
    for t in [*empty.parameters(), *empty.buffers()]:
        t.data.fill_(float('nan') if t.is_floating_point() else 0)
    torch.manual_seed(0)
    empty.reset_parameters()
    assert all(torch.equal(a, b) for a, b in zip(empty.state_dict().values(), rope.state_dict().values()))
    assert torch.equal(empty((2, 3))[2], rope((2, 3))[2])


@pytest.mark.parametrize('name', NAMES)
def test_meta_load_then_non_persistent_buffers(name):
    # what transformers does: build on meta, materialise, load, fill what the checkpoint does not bring
    rope, other = make(name), make(name, device='meta').to_empty(device='cpu')
    other.load_state_dict(rope.state_dict())
    other.init_non_persistent_buffers()
    assert torch.equal(other((3, 2))[1], rope((3, 2))[1])


@pytest.mark.parametrize('call,error,words', [
    (lambda: make('spherica'), ValueError, "'spherica'.*axial"),
    (lambda: make('axial', {'order': 'xy'}), ValueError, "'axial' takes no option 'order'.*temperature"),
    (lambda: make('axial', {'colour': 1}), TypeError, "'colour'"),
    (lambda: make('spherical', {'order': 'zx'}), ValueError, "order must be one of 'yx', 'xy', got 'zx'"),
    (lambda: make('liere', {'block': 1}), ValueError, 'block must be an integer of at least 2, got 1'),
    (lambda: make('liere', {'block': 8.}), ValueError, 'block must be an integer'),
    (lambda: make('comrope', {'variant': 'xy'}), ValueError, "variant must be one of 'ld', 'ap', got 'xy'"),
    (lambda: make('comrope', {'block': 1}), ValueError, 'block must be an integer of at least 2, got 1'),
    (lambda: make('comrope', {'variant': 'ap'}, head_dim=15), ValueError, 'head_dim must be at least 16 for'),
    (lambda: make('geope', head_dim=2), ValueError, "head_dim must be at least 3 for 'geope', got 2"),
    (lambda: make('quatro', head_dim=2), ValueError, "head_dim must be at least 3 for 'quatro', got 2"),
    (lambda: make('quatro', {'order': 'zx'}), ValueError, "order must be one of 'yx', 'xy', got 'zx'"),
    (lambda: make('liere', {'block': 65}), ValueError, 'head_dim must be at least 65'),
    (lambda: make('spherical', head_dim=2), ValueError, "head_dim must be at least 3 for 'spherical', got 2"),
    (lambda: make('axial', head_dim=3), ValueError, 'head_dim must be at least 4'),
    (lambda: make('mixed', head_dim=0), ValueError, 'head_dim must be an integer of at least 1, got 0'),
    (lambda: make('axial', {'temperature': 0}), ValueError, 'temperature must be a positive finite number, got 0'),
    (lambda: make('axial', {'temperature': math.nan}), ValueError, 'temperature.*nan'),
    (lambda: make('axial', {'coords': 'pixels'}), ValueError, "coords of 'axial' must be one of.*'pixels'"),
    (lambda: make('uniform', {'coords': 'index'}), ValueError, "coords of 'uniform'"),
    (lambda: make('nd', head_dim=5), ValueError, "head_dim must be at least 6 for 'nd', got 5"),
    (lambda: make('nd', {'seed': -1}), ValueError, 'seed must be an integer of at least 0, got -1'),
    (lambda: make('nd', {'seed': 2 ** 31}), ValueError, 'seed must be at most 2147483647, got 2147483648'),
    (lambda: make('string', {'basis': 'fourier'}), ValueError, "basis must be .*'cayley', 'circulant', got 'f"),
    (lambda: make('string', {'block': 1}), ValueError, 'block must be an integer of at least 2, got 1'),
    (lambda: make('string', {'block': 2, 'basis': 'circulant'}), ValueError, 'block must be .* at least 3, got 2'),
    (lambda: make('string', {'block': 65}), ValueError, "head_dim must be at least 65 for 'string', got 64"),
    (lambda: make('golden', {'coords': 'index'}), ValueError, "coords of 'golden'"),
    (lambda: make('golden', {'max_freq': 0.1}), ValueError, 'max_freq must be at least min_freq, got 0.1 and 0.2'),
    (lambda: make('golden', {'min_freq': -1}), ValueError, 'min_freq must be a positive finite number, got -1'),
    (lambda: make('golden', {'p_zero_freqs': 1.5}), ValueError, 'p_zero_freqs must be a number from 0 to 1, got 1.5'),
    (lambda: make('golden', {'p_zero_freqs': True}), ValueError, 'p_zero_freqs must be a number from 0 to 1'),
    (lambda: make('mixed', {'share_heads': 'yes'}), ValueError, "share_heads must be True or False, got 'yes'"),
    (lambda: make('axial', reference_grid=()), ValueError, r'reference_grid must be one to three positive.*\(\)'),
    (lambda: make('axial', reference_grid=(4, 4, 4, 4)), ValueError, r'must be one to three positive .*\(4, 4, 4, 4\)'),
    (lambda: make('spiral', reference_grid=(14,)), ValueError, 'must be two positive.*directions go around in the pl'),
    (lambda: make('axial', {'registers': 4}, reference_grid=(14,)), ValueError, 'registers must be .* 0 where'),
    (lambda: make('spherical', {'order': 'yx'}, reference_grid=(4, 4, 4)), ValueError, "order.* 'zyx', 'zxy'.*'yx'"),
    (lambda: make('axial', reference_grid=(14,))((3, 4)), ValueError, r'grid_size must be one positive .*\(3, 4'),
    (lambda: make('axial', reference_grid=(14,))(3), ValueError, 'grid_size must be one positive integer.*got 3'),
    (lambda: make('axial', reference_grid=(4, 4, 4))((3, 4)), ValueError, 'three positive integers .frames, rows'),
    (lambda: make('axial')((3,)), ValueError, r'two positive integers .*\(3,\)'),
    (lambda: torch.jit.script(make('axial', reference_grid=(14,))), ValueError, 'TorchScript takes .* images only'),
    (lambda: make('axial', reference_grid=(0, 14)), ValueError, r'reference_grid.*\(0, 14\)'),
    (lambda: make('axial', reference_grid=14), ValueError, 'reference_grid.*14'),
    (lambda: make('axial', reference_grid=(14., 14.)), ValueError, 'reference_grid'),
    (lambda: make('axial', num_heads=0), ValueError, 'num_heads'),
    (lambda: make('axial', depth=-1), ValueError, 'depth'),
    (lambda: make('axial')((0, 3)), ValueError, r'grid_size must be two positive integers.*\(0, 3\)'),
    (lambda: make('axial')((3, -1)), ValueError, 'grid_size'),
    (lambda: make('axial').rotate(torch.ones(1, 2, 5, 64), make('axial')((2, 2))[0]), ValueError, '5 tokens'),
    (lambda: make('axial').rotate(torch.ones(1, 2, 4, 32), make('axial')((2, 2))[0]), ValueError, 'head_dim 64'),
    (lambda: make('axial', {'rope_coords': 'cells', 'coords': 'cells'}), TypeError, 'twice'),
])
def test_bad_input(call, error, words):
    with pytest.raises(error, match=words):
        call()


def test_options_may_carry_the_prefix_of_the_models():
    assert make('spherical', {'rope_order': 'xy'}).options['order'] == 'xy'


def test_a_name_is_defined_once():
    from timm_rope.encodings._base import RotaryEncoding
    with pytest.raises(ValueError, match="'axial' is already defined"):
        class Other(RotaryEncoding, name='axial'):
            pass


def test_loading_without_a_model_is_checked_too():
    saved = make('axial').state_dict()
    make('axial').load_state_dict(saved)
    with pytest.raises(RuntimeError, match="'axial' is not 'uniform'"):
        make('uniform').load_state_dict(saved)
    foreign = make('mixed').state_dict()
    del foreign['signature']  # weights from elsewhere have none
    make('mixed').load_state_dict(foreign)
    foreign['freqs'][0, 0, 0, 0] = math.inf
    with pytest.raises(ValueError, match='freqs of the checkpoint has 1 non-finite of 256 values'):
        make('mixed').load_state_dict(foreign)
