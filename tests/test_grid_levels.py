"""What the exponentials of a grid are made of: bounds, nodes, levels, products with derivatives."""
import itertools
import math

import numpy as np
import pytest
import torch

from timm_rope import chebyshev, dual_matrices, grid_levels
from timm_rope.dual_matrices import (
    Buffers,
    derivative,
    derivative_of_squared,
    dual,
    exponential,
    multiply,
    squared,
)
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
    degree = grid_levels.degree_for(tolerance)
    assert (norm / 2 ** scale) ** (degree + 1) / math.factorial(degree + 1) <= max(tolerance / 2 ** scale, 2 ** -56)
    if rows * columns > 1000:
        assert len(steps) > 1, 'each of so many positions by itself takes far longer'


def test_levels_lead_to_the_whole_grid():
    y, x = torch.linspace(0, 1, 30, dtype=torch.float64) ** 2, torch.linspace(-1, 2, 40, dtype=torch.float64)
    norms = grid_levels.Norms(30.0, 10.0, 10.0)
    levels, positions, _ = grid_levels.grid_of(y, x, 8, norms, 2 ** -24, 2 ** -21)
    assert len(levels) > 1 and positions.shape == (levels[-1].positions, 2)
    for level, below in itertools.pairwise(levels):
        for weights, count, fewer in ((level.from_rows, level.rows, below.rows),
                                      (level.from_columns, level.columns, below.columns)):
            assert weights.shape == (count, fewer) if fewer < count else weights is None
    # what is linear in x and y is interpolated exactly
    scaled = positions * 2 ** sum(level.squarings for level in levels)
    for level in reversed(levels[:-1]):
        along_x = scaled.unflatten(0, [-1, level.from_columns.shape[1]])
        scaled = torch.einsum('rk,cl,klp->rcp', level.from_rows, level.from_columns, along_x).flatten(0, 1)
    assert torch.allclose(scaled, torch.stack((x.expand(30, -1), y.unsqueeze(1).expand(-1, 40)), -1).flatten(0, 1))


@pytest.mark.parametrize('size', [3, dual_matrices.BLOCK, dual_matrices.BLOCK + 1])
def test_duals_multiply_and_differentiate(size):
    buffers = Buffers(torch.device('cpu'))
    torch.manual_seed(0)
    f, g, p, q = torch.randn(4, 7, size, size, dtype=torch.float64)
    a = dual(f, g, buffers).clone()
    product = multiply(a, dual(p, q, buffers), torch.empty_like(a))
    assert torch.allclose(derivative(product, buffers), f @ q + g @ p)
    assert torch.allclose(derivative(squared(dual(f, g, buffers), 2, buffers), buffers),
                          f @ f @ (f @ g + g @ f) + (f @ g + g @ f) @ f @ f)
    for times in (1, 2, 3):
        expected = derivative(squared(dual(f, g, buffers), times, buffers), buffers).clone()
        assert torch.allclose(derivative_of_squared(dual(f, g, buffers), times, buffers), expected)
    small = 0.05 * (f - f.mT)
    value, change = torch.func.jvp(torch.linalg.matrix_exp, (small,), (g,))
    for degree, error in ((8, 2e-5), (16, 1e-12)):
        assert torch.allclose(exponential(small, degree, buffers), value, rtol=0, atol=error)
        tangent = derivative(exponential(dual(small, g, buffers), degree, buffers), buffers)
        assert torch.allclose(tangent, change, rtol=0, atol=100 * error)
        nothing = exponential(torch.zeros_like(f), degree, buffers)
        assert torch.equal(nothing, torch.eye(size, dtype=f.dtype).expand_as(f))


def test_a_bad_derivative_spoils_nothing_after_it():
    buffers = Buffers(torch.device('cpu'))
    f, g = torch.eye(8).expand(5, 8, 8), torch.full((5, 8, 8), math.nan)
    assert derivative(squared(dual(f, g, buffers), 2, buffers), buffers).isnan().all()
    ones = torch.ones_like(g)
    assert torch.equal(derivative(squared(dual(f, ones, buffers), 2, buffers), buffers), 4 * ones)
