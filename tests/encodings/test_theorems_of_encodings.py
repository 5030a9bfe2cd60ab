"""Theorems about single encodings: where they start, what they turn, and which is a special case of which."""
import math

import pytest
import torch
from rotating import make, matrices, shift_errors

import timm_rope
from timm_rope.encodings._frequencies import geometric
from timm_rope.rotations.exponential import skew


def test_axial_channels_see_one_axis():
    for name in ('axial', 'axial_learned', 'uniform'):
        r = matrices(make(name), (3, 4))[0].detach().reshape(3, 4, 64, 64)
        assert torch.equal(r[0, :, :32, :32], r[2, :, :32, :32]), 'the first half turns with x only'
        assert torch.equal(r[:, 0, 32:, 32:], r[:, 3, 32:, 32:]), 'the second half turns with y only'
        assert not torch.equal(r[0, 0, :32, :32], r[0, 1, :32, :32])


def test_axial_learned_starts_as_axial_and_spherical_learned_as_spherical():
    for fixed, learned in (('axial', 'axial_learned'), ('spherical', 'spherical_learned')):
        assert torch.allclose(make(fixed)((4, 5))[1].expand(2, -1, -1), make(learned)((4, 5))[1], atol=1e-7)


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


def test_uniform_makes_one_turn_over_the_reference_grid():
    rope = make('uniform', reference_grid=(6, 10), dtype=torch.float64)
    payload = rope((12, 20))[0][0].reshape(12, 20, 64)
    assert torch.allclose(payload[:6], payload[6:], atol=1e-12)
    assert torch.allclose(payload[:, :10], payload[:, 10:], atol=1e-12)
    assert not torch.allclose(payload[:3, :, 32:], payload[3:6, :, 32:], atol=0.1)


@pytest.mark.parametrize('name', ['spherical', 'uniform', 'liere'])
def test_ends_shrink_the_step_as_the_papers_do(name):
    from timm_rope.positions.coordinates import grid_axes
    reference = torch.tensor([14, 14])
    for size in (14, 28):
        _, x = grid_axes([3, size], reference, torch.zeros(1, dtype=torch.float64), 'ends', 2 * math.pi, True)
        assert torch.allclose(x, torch.linspace(-math.pi, math.pi, size, dtype=torch.float64) * size / 14)


# -- commuting generators

def test_commuting_generators_make_liere_relative():
    rope = make('liere', head_dim=24, dtype=torch.float64)
    with torch.no_grad():
        rope.freqs[1] = 0.3 * rope.freqs[0]
    assert max(shift_errors(rope)) < 1e-10


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


@pytest.mark.parametrize('grid', [(64, 64), (9, 14)])
@pytest.mark.parametrize('block', [3, 8, 16])
def test_comrope_is_exact_while_it_learns(block, grid):
    """Generators that commute are squared for rows and columns only, so that float64 is cheap."""
    rope, exact = (make('comrope', {'block': block}, 48, 2, 1, dtype=d) for d in (torch.float32, torch.float64))
    exact.freqs.data.copy_(rope.freqs.data)
    got, expected = (r(grid)[0] for r in (rope, exact))
    assert got.dtype == torch.float32 and got.requires_grad and (got - expected).abs().max() < 3e-6
    weights = torch.randn_like(expected)
    a, b = (torch.autograd.grad((r * weights).sum(), f.freqs)[0] for r, f in ((got, rope), (expected, exact)))
    assert (a - b).abs().max() < 1e-5 * b.abs().max()


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


# -- turns in three dimensions

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
