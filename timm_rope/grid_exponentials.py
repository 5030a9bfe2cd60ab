"""exp(x A_x + y A_y) at all positions of a grid, forward and backward, and the operators made of them.

Those of strongly scaled generators are polynomials in x and y (`power_series.py`). They are evaluated at a few nodes,
squared there, interpolated and squared, level by level (`grid_levels.py`).

E = F^2 gives dE = F dF + dF F. These maps are their own adjoints up to a transpose, and those of all squarings commute,
since every F is a function of the same matrix. The backward therefore walks the squarings of a level in the order of
the forward, on the transposed matrices (those at -x, -y), and has to keep none of them.

The operators `timm_rope::grid_exponentials` and `timm_rope::grid_exponentials_backward` are what a compiled graph
holds: how often to square depends on the norm of the generators, which no graph knows.

Shapes: L layers, H heads, G pairs of generators to a head, N positions, b size of the matrices, W = G b b.
"""
import math
from typing import List, Optional

import torch
from torch import Tensor

from . import power_series
from .dual_matrices import Buffers, derivative_of_squared, dual, multiply, squared
from .grid_levels import Grid, Level, Norms, grid_of, norms_of
from .precision import without_autocast

# Numbers that are worked on at a time
COEFFICIENTS = 2 ** 21  # there are so few that most of the time would go to the calls
POSITIONS = 2 ** 19  # stay in the cache of a CPU
ROOM_OF_A_GPU = 2 ** 24  # where many small launches would cost more than a cache saves


def skew(triangle: Tensor, size: int) -> Tensor:
    """Skew-symmetric matrices (..., b, b) from their strict upper triangles (..., b (b - 1) / 2)."""
    upper = torch.triu_indices(size, size, 1, device=triangle.device)
    row, column = upper[0], upper[1]
    index = torch.full([size, size], 2 * triangle.shape[-1], device=triangle.device, dtype=torch.long)
    entry = torch.arange(triangle.shape[-1], device=triangle.device)
    index[row, column] = entry
    index[column, row] = entry + triangle.shape[-1]
    entries = torch.cat((triangle, -triangle, torch.zeros_like(triangle[..., :1])), dim=-1)
    return entries.index_select(-1, index.flatten()).unflatten(-1, [size, size])


def norms(freqs: Tensor, y: Tensor, x: Tensor, size: int) -> Norms:
    """Upper bounds of the spectral norms over the grid; arguments as `forward`."""
    wide = _wide(freqs)
    return norms_of(skew(wide, size).flatten(1, 3), y.to(wide.dtype), x.to(wide.dtype))


def forward(freqs: Tensor, y: Tensor, x: Tensor, size: int, norms: Norms, squared_in: torch.dtype) -> Tensor:
    """exp(x A_x + y A_y), a few layers and heads at a time: little memory is needed beside the result.

    Args:
        freqs: (2, L, H, G, b (b - 1) / 2), strict upper triangles of A_x and A_y.
        y: (rows,), coordinates of the rows.
        x: (columns,), coordinates of the columns.
        size: b.
        norms: What `norms` says.
        squared_in: Dtype of the last squarings; all before are in float64 where the device has it.

    Returns:
        (L, H, N, W) in the dtype of `freqs`, all NaN where a generator is not finite.
    """
    layers, heads, groups = freqs.shape[1:4]
    out = freqs.new_empty(layers * heads, len(y) * len(x), groups * size * size)
    if not math.isfinite(sum(norms)):
        return out.fill_(math.nan).unflatten(0, [layers, heads])
    wide = _wide(freqs)
    y, x = y.to(wide.dtype), x.to(wide.dtype)
    grid = grid_of(y, x, size, norms, torch.finfo(freqs.dtype).eps)
    squarings = grid.levels[0].squarings
    generators = skew(wide, size).flatten(1, 2) * grid.scale
    monomials = power_series.monomials(grid.x, grid.y, grid.degree)
    eye = torch.eye(size, dtype=wide.dtype, device=wide.device)
    origin = ((y == 0).unsqueeze(1) & (x == 0)).flatten().nonzero().flatten()
    buffers = Buffers(freqs.device)
    for some in _slices(out, monomials.shape[1] * out.shape[2], COEFFICIENTS):
        coefficients = _coefficients(generators[:, some], grid.degree, buffers)
        for part in _slices(coefficients, out[0].numel(), POSITIONS):
            made = _at_positions(coefficients[part], monomials, grid, size, buffers)
            made.view(-1, out.shape[1], groups, size, size)[:, origin] = eye
            made = buffers('narrow', squared_in, *made.shape).copy_(made) if made.dtype != squared_in else made
            target = out[some][part].view(-1, size, size)
            if squarings and made.dtype == out.dtype:
                made = squared(made, squarings - 1, buffers)
                multiply(made, made, target)
            else:
                target.copy_(squared(made, squarings, buffers))
    return out.unflatten(0, [layers, heads])


def backward(grad: Tensor, freqs: Tensor, y: Tensor, x: Tensor, size: int, norms: Norms) -> Tensor:
    """Gradient of `freqs` from that of the exponentials (L, H, N, W), in the dtype of `freqs`."""
    groups = freqs.shape[3]
    if not math.isfinite(sum(norms)):
        return torch.full_like(freqs, math.nan, memory_format=torch.contiguous_format)
    wide = _wide(freqs)
    tolerance = torch.finfo(freqs.dtype).eps
    grid = grid_of(y.to(wide.dtype), x.to(wide.dtype), size, norms, tolerance, 8 * tolerance)
    generators = skew(wide, size).flatten(1, 2) * grid.scale
    transposed = power_series.monomials(-grid.x, -grid.y, grid.degree)
    back = power_series.monomials(grid.x, grid.y, grid.degree).mT.to(freqs.dtype)
    grad = grad.flatten(0, 1)
    out = torch.empty_like(generators, dtype=freqs.dtype)
    buffers = Buffers(freqs.device)
    for some in _slices(grad, len(back) * grad.shape[2], COEFFICIENTS):
        terms: List[Tensor] = []
        coefficients = _coefficients(generators[:, some], grid.degree, buffers, terms, freqs.dtype)
        gathered = buffers('gathered', freqs.dtype, *coefficients.shape)
        for part in _slices(coefficients, grad[0].numel(), POSITIONS):
            kept: List[Tensor] = []
            start = _at_positions(coefficients[part], transposed, grid, size, buffers, kept, freqs.dtype)
            g = grad[some][part].reshape(-1, size, size)
            for level in grid.levels:
                if level.squarings:
                    g = derivative_of_squared(dual(start, g, buffers), level.squarings, buffers)
                if kept:
                    g, start = _gathered(g, level, len(coefficients[part]), buffers), kept.pop()
            torch.matmul(back, g.view(-1, back.shape[1], grad.shape[2]), out=gathered[part])
        by_degree = gathered.view(*gathered.shape[:2], groups, size, size).transpose(1, 2).flatten(0, 1).split(
            [k + 1 for k in range(grid.degree + 1)], dim=1)
        of_generators = power_series.gradient(
            by_degree, terms, generators[:, some].flatten(1, 2).to(freqs.dtype), buffers)
        torch.mul(of_generators.view_as(out[:, some]), grid.scale, out=out[:, some])
    row, column = torch.triu_indices(size, size, 1, device=out.device)
    return (out - out.mT)[..., row, column].contiguous().view_as(freqs)


def _coefficients(
        generators: Tensor, degree: int, buffers: Buffers,
        kept: Optional[List[Tensor]] = None, dtype: Optional[torch.dtype] = None,
) -> Tensor:
    """The exponentials of some heads as polynomials of the position.

    Args:
        generators: (2, heads, G, b, b), x first.
        degree: Of the polynomials.
        buffers: One of which is returned.
        kept: Gets the coefficients of degree 0, 1, ..., (heads * G, k + 1, b, b).
        dtype: Of what is kept.

    Returns:
        (heads, C, W).
    """
    heads, groups, size = generators.shape[1:4]
    out = buffers('coefficients', generators.dtype, heads, power_series.count(degree), groups, size, size)
    for k, term in enumerate(power_series.terms(generators.flatten(1, 2), degree, buffers)):
        out[:, power_series.count(k - 1):power_series.count(k)] = term.unflatten(0, [heads, groups]).transpose(1, 2)
        if kept is not None:
            kept.append(buffers(f'kept of degree {k}', dtype or term.dtype, *term.shape).copy_(term))
    return out.flatten(2)


def _at_positions(
        coefficients: Tensor, monomials: Tensor, grid: Grid, size: int, buffers: Buffers,
        kept: Optional[List[Tensor]] = None, dtype: Optional[torch.dtype] = None,
) -> Tensor:
    """Exponentials of some heads at the positions of the first level, before they are squared there.

    Args:
        coefficients: (heads, C, W).
        monomials: (n, C), of the positions of the last level.
        grid: How to make them.
        size: b.
        buffers: One of which is returned.
        kept: Gets, from the last level to the second, the exponentials before they are squared.
        dtype: Of what is kept and returned, by default that of the coefficients.

    Returns:
        (heads * N * G, b, b).
    """
    heads, _, width = coefficients.shape
    evaluated = buffers('evaluated', coefficients.dtype, heads, len(monomials), width)
    m = torch.matmul(monomials, coefficients, out=evaluated).view(-1, size, size)
    for below, level in zip(reversed(grid.levels), reversed(grid.levels[:-1])):
        if kept is not None:
            kept.append(buffers(f'kept {len(kept)}', dtype or m.dtype, *m.shape).copy_(m))
        m = squared(m, below.squarings, buffers)
        if level is grid.levels[0] and dtype is not None:
            m = buffers('narrow', dtype, *m.shape).copy_(m)
        m = _interpolated(m, level, heads, buffers)
    return m if dtype is None or m.dtype == dtype else buffers('narrow', dtype, *m.shape).copy_(m)


def _interpolated(m: Tensor, level: Level, heads: int, buffers: Buffers) -> Tensor:
    """Matrices (heads * n * G, b, b) at the positions of a level from those at the n positions of the next one."""
    rows = level.rows if level.from_rows is None else level.from_rows.shape[1]
    columns = level.columns if level.from_columns is None else level.from_columns.shape[1]
    out = m.view(heads, rows, columns, -1)
    if level.from_columns is not None:
        out = _weighted(level.from_columns, out.flatten(0, 1), 'along columns', buffers)
    if level.from_rows is not None:
        out = _weighted(level.from_rows, out.view(heads, rows, -1), 'along rows', buffers)
    return out.view(-1, *m.shape[1:])


def _gathered(g: Tensor, level: Level, heads: int, buffers: Buffers) -> Tensor:
    """Transpose of `_interpolated`."""
    out = g.reshape(heads, level.rows, level.columns, -1)
    rows = level.rows
    if level.from_rows is not None:
        out = _weighted(level.from_rows.mT, out.flatten(2), 'along rows', buffers)
        rows = level.from_rows.shape[1]
    if level.from_columns is not None:
        out = _weighted(level.from_columns.mT, out.reshape(heads * rows, level.columns, -1), 'along columns', buffers)
    return out.view(-1, *g.shape[1:])


def _weighted(weights: Tensor, values: Tensor, name: str, buffers: Buffers) -> Tensor:
    """weights (n, k) @ values (M, k, w)."""
    out = buffers(name, values.dtype, values.shape[0], weights.shape[0], values.shape[2])
    return torch.bmm(weights.to(values.dtype).expand(len(values), -1, -1), values, out=out)


def _slices(matrices: Tensor, numbers: int, room: int) -> List[slice]:
    """Slices of heads (L H, ...) of which each takes so many numbers."""
    step = max(1, (room if matrices.device.type == 'cpu' else ROOM_OF_A_GPU) // max(1, numbers))
    return [slice(i, i + step) for i in range(0, len(matrices), step)]


def _wide(freqs: Tensor) -> Tensor:
    return freqs.detach() if freqs.device.type == 'mps' else freqs.detach().double()


@torch.library.custom_op('timm_rope::grid_exponentials', mutates_args=())
def operator(freqs: Tensor, y: Tensor, x: Tensor, size: int) -> Tensor:
    """`forward`, squared in the dtype of `freqs`: a graph makes the matrices anew whenever it runs."""
    with without_autocast(freqs):
        return forward(freqs, y, x, size, norms(freqs, y, x, size), freqs.dtype)


@torch.library.custom_op('timm_rope::grid_exponentials_backward', mutates_args=())
def operator_backward(grad: Tensor, freqs: Tensor, y: Tensor, x: Tensor, size: int) -> Tensor:
    """`backward`."""
    with without_autocast(freqs):
        return backward(grad, freqs, y, x, size, norms(freqs, y, x, size))


@operator.register_fake
def _(freqs: Tensor, y: Tensor, x: Tensor, size: int) -> Tensor:
    return freqs.new_empty(*freqs.shape[1:3], y.shape[0] * x.shape[0], freqs.shape[3] * size * size)


@operator_backward.register_fake
def _(grad: Tensor, freqs: Tensor, y: Tensor, x: Tensor, size: int) -> Tensor:
    return torch.empty_like(freqs, memory_format=torch.contiguous_format)


def _keep(ctx, inputs, output: Tensor) -> None:
    freqs, y, x, ctx.size = inputs
    ctx.save_for_backward(freqs, y, x)


def _gradient(ctx, grad: Tensor):
    return operator_backward(grad, *ctx.saved_tensors, ctx.size), None, None, None


operator.register_autograd(_gradient, setup_context=_keep)
