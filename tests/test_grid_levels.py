"""What the exponentials of a grid are made of: bounds, nodes, levels, products with derivatives."""
import itertools
import math

import numpy as np
import pytest
import torch

from timm_rope import chebyshev, dual_matrices, grid_levels, power_series
from timm_rope.dual_matrices import Buffers, derivative_of_squared, dual, multiply, squared
from timm_rope.grid_exponentials import skew


def generators(size, pairs=3, scale=2 * math.pi):
    torch.manual_seed(size)
    return skew(scale * torch.rand(2, pairs, size * (size - 1) // 2, dtype=torch.float64), size)


@pytest.mark.parametrize('size', [5, 8, 33])
def test_norms_are_bounded_from_above_and_closely(size):
    a = generators(size)
    y, x = torch.linspace(-0.7, 0.2, 14, dtype=torch.float64), torch.linspace(0.1, 2.0, 20, dtype=torch.float64)
    slack = (size / 2) ** 0.125 * (1 + 1e-12)
    whole = max(np.linalg.norm(u * m + v * n, 2) for u in x.tolist() for v in y.tolist() for m, n in zip(*a.numpy()))
    norms = grid_levels.norms_of(a, y, x)
    assert whole * (1 - 1e-12) <= norms.whole <= whole * slack
    for bound, half, matrices in ((norms.columns, 0.95, a[0]), (norms.rows, 0.45, a[1])):
        largest = half * max(np.linalg.norm(m, 2) for m in matrices.numpy())
        assert largest * (1 - 1e-12) <= bound <= largest * slack


@pytest.mark.parametrize('tolerance', [1e-3, 2 ** -24, 2 ** -45])
@pytest.mark.parametrize('reach', [0.0, 1e-6, 0.05, 0.6, 5.0, 30.0])
def test_interpolation_is_within_its_bounds(reach, tolerance):
    count = chebyshev.nodes_needed(reach, tolerance, 8 * tolerance, 1000)
    coordinates = torch.linspace(-1, 3, 101, dtype=torch.float64)
    at, weights = chebyshev.nodes(coordinates, count), chebyshev.weights(coordinates, count)
    assert at.min() >= -1 and at.max() <= 3 and weights.shape == (101, count)
    t, u = (coordinates - 1) / 2, (at - 1) / 2  # from -1 to 1
    for phase in (0.0, 1.0):  # exp(A + z B) of matrices that commute has entries like these
        exact, values = (phase + reach * t).cos(), (phase + reach * u).cos()
        assert (weights @ values - exact).abs().max() <= tolerance + 1e-13
        exact, values = -t * (phase + reach * t).sin(), -u * (phase + reach * u).sin()  # as reach changes
        assert (weights @ values - exact).abs().max() <= 17 * tolerance + 1e-13
    if count > 2 and tolerance < 1e-3:  # no more than that takes
        at, weights = chebyshev.nodes(coordinates, count - 2), chebyshev.weights(coordinates, count - 2)
        u = (at - 1) / 2
        errors = [(weights @ f(reach * u) - f(reach * t)).abs().max() for f in (torch.cos, torch.sin)]
        assert max(errors) > tolerance / 50


def test_no_more_nodes_than_are_of_use():
    assert chebyshev.nodes_needed(1e300, 1e-9, 1e-9, 7) == 7
    assert chebyshev.nodes_needed(0.0, 1e-9, math.inf, 7) == 1
    assert chebyshev.nodes_needed(0.0, 1e-9, 1e-9, 7) == 2  # one cannot tell how B acts, even if it is 0 now


def test_interpolation_of_one_coordinate():
    same = torch.full((3,), 0.4, dtype=torch.float64)
    for count in (1, 2):
        assert torch.equal(chebyshev.nodes(same, count), same[:count])
        assert torch.allclose(chebyshev.weights(same, count).sum(1), torch.ones(3, dtype=torch.float64))


@pytest.mark.parametrize('rows,columns,norm', [
    (14, 14, 39.0), (64, 64, 180.0), (1, 50, 100.0), (2, 2, 1e6), (9, 9, 1e300), (7, 7, 0.0)])
@pytest.mark.parametrize('tolerance', [2 ** -24, 2 ** -53])
def test_plans(rows, columns, norm, tolerance):
    norms = grid_levels.Norms(norm, norm / 4, norm / 4)
    steps = grid_levels.plan(rows, columns, 8, norms, tolerance, 8 * tolerance)
    assert steps[0][1:] == (rows, columns)
    assert all(a[1] >= b[1] and a[2] >= b[2] and (a[1:] != b[1:] or a[0] == 4) for a, b in itertools.pairwise(steps))
    assert max(squarings for squarings, *_ in steps) <= 4
    scale = sum(squarings for squarings, *_ in steps)
    assert norm / 2 ** scale <= 1, 'a polynomial would need many terms'
    assert scale <= max(math.log2(norm or 1), 0) + 12, 'squarings that nobody needs'
    if rows * columns > 1000:
        assert len(steps) > 1, 'each of so many positions by itself takes far longer'


def test_levels_lead_to_the_whole_grid():
    y, x = torch.linspace(0, 1, 30, dtype=torch.float64) ** 2, torch.linspace(-1, 2, 40, dtype=torch.float64)
    norms = grid_levels.Norms(30.0, 10.0, 10.0)
    tolerance, of_derivative = 2 ** -24, 2 ** -21
    levels, scale, at_x, at_y, degree = grid_levels.grid_of(y, x, 8, norms, tolerance, of_derivative)
    assert len(levels) > 1 and at_x.shape == at_y.shape == (levels[-1].positions,)
    shrunk = 0.5 ** sum(level.squarings for level in levels)
    assert max(at_x.abs().max(), at_y.abs().max()) == 1, 'powers of the coordinates must not overflow'
    assert degree == power_series.degree_needed(norms.whole * shrunk, tolerance * shrunk, of_derivative)
    for level, below in itertools.pairwise(levels):
        for weights, count, fewer in ((level.from_rows, level.rows, below.rows),
                                      (level.from_columns, level.columns, below.columns)):
            assert weights.shape == (count, fewer) if fewer < count else weights is None
    # what is linear in x and y is interpolated exactly
    scaled = torch.stack((at_x, at_y), dim=-1) * scale / shrunk
    for level in reversed(levels[:-1]):
        along_x = scaled.unflatten(0, [-1, level.from_columns.shape[1]])
        scaled = torch.einsum('rk,cl,klp->rcp', level.from_rows, level.from_columns, along_x).flatten(0, 1)
    assert torch.allclose(scaled, torch.stack((x.expand(30, -1), y.unsqueeze(1).expand(-1, 40)), -1).flatten(0, 1))


def test_a_grid_at_the_origin_turns_nothing():
    zero = torch.zeros(1, dtype=torch.float64)
    grid = grid_levels.grid_of(zero, zero, 8, grid_levels.Norms(0.0, 0.0, 0.0), 2 ** -24, 2 ** -21)
    assert torch.equal(grid.x, zero) and torch.equal(grid.y, zero) and math.isfinite(grid.scale)


def parts_of(m, size):
    """F and G of F + e G."""
    return (m[0], m[1]) if m.ndim == 4 else (m[:, :size, :size], m[:, :size, size:])


@pytest.mark.parametrize('dtype', [torch.float64, torch.float32])
@pytest.mark.parametrize('size', [3, 4, dual_matrices.BLOCK, dual_matrices.BLOCK + 1])
def test_duals_multiply_and_differentiate(size, dtype):
    buffers = Buffers(torch.device('cpu'))
    torch.manual_seed(0)
    f, g, p, q = (torch.randn(4, 7, size, size, dtype=torch.float64) / size ** 0.5).to(dtype)
    tolerance = 1e-12 if dtype == torch.float64 else 2e-5
    a = dual(f, g, buffers).clone()
    assert all(map(torch.equal, parts_of(a, size), (f, g)))
    product = multiply(a, dual(p, q, buffers), torch.empty_like(a))
    assert torch.allclose(parts_of(product, size)[0], f @ p, atol=tolerance)
    assert torch.allclose(parts_of(product, size)[1], f @ q + g @ p, atol=tolerance)
    shifted = torch.empty(g.numel() + 1, dtype=dtype)[1:].view_as(g).copy_(g)  # not where a float64 could lie
    assert torch.equal(dual(f, shifted, buffers), a)
    for times in (1, 2, 3):
        power = torch.func.jvp(lambda m, n=2 ** times: torch.linalg.matrix_power(m, n), (f,), (g,))
        m = squared(dual(f, g, buffers), times, buffers)
        for got, expected in zip(parts_of(m, size), power):
            assert torch.allclose(got, expected, atol=tolerance)
        got = derivative_of_squared(dual(f, g, buffers), times, buffers)
        assert got.is_contiguous() and torch.allclose(got, power[1], atol=tolerance)


def test_a_bad_derivative_spoils_nothing_after_it():
    buffers = Buffers(torch.device('cpu'))
    f, g = torch.eye(8).expand(5, 8, 8), torch.full((5, 8, 8), math.nan)
    assert derivative_of_squared(dual(f, g, buffers), 2, buffers).isnan().all()
    ones = torch.ones_like(g)
    assert torch.equal(derivative_of_squared(dual(f, ones, buffers), 2, buffers), 4 * ones)


# -- polynomials

@pytest.mark.parametrize('tolerance', [1e-3, 2 ** -24, 2 ** -53])
@pytest.mark.parametrize('norm', [0.0, 1e-9, 0.1, 1.0])
def test_degree_is_as_low_as_the_bounds_allow(norm, tolerance):
    degree = power_series.degree_needed(norm, tolerance, 8 * tolerance)

    def within(d):
        return norm ** (d + 1) / math.factorial(d + 1) <= tolerance and norm ** d / math.factorial(d) <= 8 * tolerance

    assert degree >= 1 and within(degree) and (degree == 1 or not within(degree - 1))
    assert power_series.degree_needed(norm, tolerance, math.inf) <= degree


@pytest.mark.parametrize('size', [5, 8])
@pytest.mark.parametrize('degree', [1, 2, 5, 15])
def test_polynomials_are_exponentials_and_have_their_gradient(size, degree):
    torch.manual_seed(degree)
    a = skew(0.3 * torch.randn(2, 3, size * (size - 1) // 2, dtype=torch.float64), size)
    x, y = torch.rand(2, 6, dtype=torch.float64) - 0.5
    grad = torch.randn(3, 6, size, size, dtype=torch.float64)
    monomials = power_series.monomials(x, y, degree)
    assert monomials.shape == (6, power_series.count(degree))
    leaf = a.clone().requires_grad_()
    exact = torch.linalg.matrix_exp(leaf[0].unsqueeze(1) * x.view(6, 1, 1) + leaf[1].unsqueeze(1) * y.view(6, 1, 1))
    expected, = torch.autograd.grad(exact, leaf, grad)
    buffers = Buffers(a.device)
    terms = [term.clone() for term in power_series.terms(a, degree, buffers)]  # the memory is used again
    assert [term.shape for term in terms] == [(3, k + 1, size, size) for k in range(degree + 1)]
    values = torch.einsum('nc,mcij->mnij', monomials, torch.cat(terms, 1))
    norm = max(np.linalg.norm(u * m + v * n, 2) for u, v in zip(x.tolist(), y.tolist()) for m, n in zip(*a.numpy()))
    change = norm ** degree / math.factorial(degree)
    assert (values - exact).abs().max() <= change * norm / (degree + 1) + 1e-14
    grads = torch.einsum('nc,mnij->mcij', monomials, grad).split([k + 1 for k in range(degree + 1)], dim=1)
    got = power_series.gradient(grads, terms, a, buffers)
    assert got.shape == a.shape
    bound = change * grad.square().sum((2, 3)).sqrt().sum(1)
    assert ((got - expected).square().sum((2, 3)) <= bound ** 2 + 1e-26).all()


def test_terms_are_exact():
    a = torch.tensor([[[[1., 2.], [0., 1.]]], [[[0., 1.], [1., 0.]]]])
    x, y = a[:, 0]
    one, first, second, third = (term[0] for term in power_series.terms(a, 3, Buffers(a.device)))
    assert torch.equal(one[0], torch.eye(2)) and torch.equal(first, a[:, 0])
    assert torch.equal(second, torch.stack([x @ x, x @ y + y @ x, y @ y]) / 2)
    mixed = x @ x @ y + x @ y @ x + y @ x @ x, x @ y @ y + y @ x @ y + y @ y @ x
    assert torch.allclose(third, torch.stack([x @ x @ x, *mixed, y @ y @ y]) / 6)
