"""At which positions of a grid, and at which scale, exp(x A_x + y A_y) is computed rather than interpolated.

exp(A) is exp(A / 2^s) squared s times. The more the generators are scaled down, the smoother is their exponential over
the grid, and the fewer nodes it takes to interpolate it everywhere. So the exponentials of a strongly scaled A are made
at a few nodes, squared there, interpolated to more nodes, squared, and so on up to the positions of the grid.
"""
import functools
import math
from typing import List, NamedTuple, Optional, Tuple

import torch
from torch import Tensor

from . import chebyshev, power_series

MOST = 4  # squarings of one level: more, in float32, would lose more than four bits
FINEST = 2.0 ** -56  # a tolerance that float64 cannot resolve asks for no more nodes

# Nanoseconds, forward and backward, on two cores of a Xeon with AVX-512
SQUARING = 270.0, 0.14  # of a matrix, and for each of its b^3 products
LEVEL = 450.0, 50.0  # of a matrix that is copied for a level, and for each position of the grid while a level is set up
COEFFICIENT = 560.0, 0.3  # of a coefficient of the polynomial, and for each of the b^3 products of its matrices
INTERPOLATION = 0.2  # of an entry at a node, or of a coefficient, for an entry at a position


class Norms(NamedTuple):
    """Upper bounds of spectral norms, each the largest over all pairs of generators.

    Attributes:
        whole: Of x A_x + y A_y at any position.
        rows: Of A_y times half the length that the rows cover.
        columns: Of A_x times half the length that the columns cover.
    """
    whole: float
    rows: float
    columns: float


class Level(NamedTuple):
    """Positions where exponentials are interpolated from the next level, or made if there is none, and then squared.

    Attributes:
        squarings: How often the exponentials of this level are squared.
        rows: Number of rows of positions.
        columns: Number of columns of positions.
        from_rows: Weights (rows, rows of the next level), None where these are the same.
        from_columns: Weights (columns, columns of the next level), None where these are the same.
    """
    squarings: int
    rows: int
    columns: int
    from_rows: Optional[Tensor] = None
    from_columns: Optional[Tensor] = None

    @property
    def positions(self) -> int:
        return self.rows * self.columns


class Grid(NamedTuple):
    """How to make the exponentials of a grid.

    Attributes:
        levels: The whole grid first.
        scale: What the generators are multiplied by for the last level, a scalar.
        x: (n,), positions of the last level, row-major, in that unit.
        y: (n,), the same.
        degree: Of the polynomial that makes the exponentials of the last level.
    """
    levels: List[Level]
    scale: Tensor
    x: Tensor
    y: Tensor
    degree: int


def norms_of(a: Tensor, y: Tensor, x: Tensor) -> Norms:
    """Norms of generators over a grid, each at most (b / 2)^(1/8) too large.

    A norm is convex, so that it is largest at a corner of the grid. The eigenvalues of a skew-symmetric matrix come in
    pairs +-i t, and the squared Frobenius norm of its fourth power is the sum of t^8, twice each.

    Args:
        a: (2, P, b, b), skew-symmetric, x first.
        y: (rows,), coordinates of the rows.
        x: (columns,), coordinates of the columns.
    """
    (left, right), (top, bottom) = x.aminmax(), y.aminmax()
    zero = torch.zeros_like(left)
    factors = [left, top, left, bottom, right, top, right, bottom, zero, (bottom - top) / 2, (right - left) / 2, zero]
    matrices = torch.tensordot(torch.stack(factors).view(-1, 2).to(a.dtype), a, 1)
    largest = matrices.abs().amax()
    unit = matrices / largest.clamp_min(torch.finfo(a.dtype).tiny)  # whose eighth power is always in range
    square = unit @ unit
    *corners, rows, columns = (largest * ((square @ square).square().sum((-1, -2)).amax(1) / 2) ** 0.125).tolist()
    return Norms(max(corners), rows, columns)


def plan(
        rows: int, columns: int, size: int, norms: Norms, tolerance: float, of_derivative: float,
) -> List[Tuple[int, int, int]]:
    """The cheapest levels, (squarings, rows, columns) each, the whole grid first.

    Args:
        rows: Of the grid.
        columns: Of the grid.
        size: b.
        norms: Finite.
        tolerance: Absolute error of the exponentials that interpolation along an axis, or the polynomial, may cause.
        of_derivative: The same for how the exponentials change with the generators, per unit of change at the corners;
            infinite where nobody asks for that.
    """
    coefficient = COEFFICIENT[0] + COEFFICIENT[1] * size ** 3
    squaring = SQUARING[0] + SQUARING[1] * size ** 3
    setup = LEVEL[1] * rows * columns

    @functools.cache
    def cheapest(scale: int, rows: int, columns: int) -> Tuple[float, Tuple[Tuple[int, int, int], ...]]:
        found: Tuple[float, Tuple[Tuple[int, int, int], ...]] = (math.inf, ())
        for squarings in range(MOST + 1):
            shrunk = 0.5 ** (scale + squarings)
            allowed = max(tolerance * shrunk, FINEST)  # every squaring doubles an error, not that of a derivative
            cost = setup + rows * columns * (LEVEL[0] + squarings * squaring)
            fewer_rows = chebyshev.nodes_needed(norms.rows * shrunk, allowed, of_derivative, rows)
            fewer_columns = chebyshev.nodes_needed(norms.columns * shrunk, allowed, of_derivative, columns)
            small = norms.whole * shrunk <= 1  # a polynomial is of no use beyond
            if fewer_rows * fewer_columns < rows * columns or (squarings == MOST and not small):
                products = fewer_rows * columns * fewer_columns * (fewer_columns < columns)
                products += rows * columns * fewer_rows * (fewer_rows < rows)
                below, levels = cheapest(scale + squarings, fewer_rows, fewer_columns)
                through = cost + products * size ** 2 * INTERPOLATION + below
                found = min(found, (through, ((squarings, rows, columns), *levels)))
            if small:
                terms = power_series.count(power_series.degree_needed(norms.whole * shrunk, allowed, of_derivative))
                made = cost + terms * (coefficient + rows * columns * size ** 2 * INTERPOLATION)
                found = min(found, (made, ((squarings, rows, columns),)))
        return found

    return list(cheapest(0, rows, columns)[1])


def grid_of(
        y: Tensor, x: Tensor, size: int, norms: Norms, tolerance: float, of_derivative: float = math.inf,
) -> Grid:
    """How to make the exponentials of a grid.

    Args:
        y: (rows,), coordinates of the rows.
        x: (columns,), coordinates of the columns.
        size: b.
        norms: As `norms_of` says, finite.
        tolerance: As for `plan`.
        of_derivative: As for `plan`.
    """
    steps = plan(len(y), len(x), size, norms, tolerance, of_derivative)
    levels = []
    for (squarings, rows, columns), (_, fewer_rows, fewer_columns) in zip(steps, [*steps[1:], steps[-1]]):
        from_rows = from_columns = None
        if fewer_rows < rows:
            from_rows, y = chebyshev.weights(y, fewer_rows), chebyshev.nodes(y, fewer_rows)
        if fewer_columns < columns:
            from_columns, x = chebyshev.weights(x, fewer_columns), chebyshev.nodes(x, fewer_columns)
        levels.append(Level(squarings, rows, columns, from_rows, from_columns))
    # powers of large coordinates could overflow; where all are 0, nothing turns
    reach = torch.cat((y, x)).abs().amax().clamp_min(torch.finfo(y.dtype).tiny)
    shrunk = 0.5 ** sum(level.squarings for level in levels)
    degree = power_series.degree_needed(norms.whole * shrunk, max(tolerance * shrunk, FINEST), of_derivative)
    x, y = x.expand(len(y), -1).flatten() / reach, y.unsqueeze(1).expand(-1, len(x)).flatten() / reach
    return Grid(levels, reach * shrunk, x, y, degree)
