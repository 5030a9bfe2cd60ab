"""exp(x A_x + y A_y) at every position of a grid, with its own gradient: scaling, Taylor polynomial, squaring.

Points anywhere are a grid of one column in which every row has its own x: y (N,) and x (N, 1). They have no axes to sum
along; all coefficients meet all monomials x^i y^(k-i) in one product of matrices.

A = x A_x + y A_y is divided by 2^s, so that few terms of the Taylor series sum_k A^k / k! suffice. That polynomial of a
matrix is also a polynomial in the two numbers x and y. Its coefficients, the sums of all products of i times A_x and
k - i times A_y, are made once for a pair of generators. They are summed first with the powers of y, for every row, and
then with those of x, for every position of it, so that a position costs as many products as the degree, and not as many
as there are coefficients. The result is squared s times.

E = F^2 gives dE = F dF + dF F. For skew-symmetric A this map is its own adjoint up to a transpose, and those of all
squarings commute, since every F is a function of the same A. So the backward walks the squarings in the order of the
forward, on the transposed matrices (those at -x, -y), and keeps none of them.

The operators `timm_rope::grid_exponentials` and `timm_rope::grid_exponentials_backward` are what a compiled graph
holds: how often to square depends on the norm of the generators, which no graph knows.

Shapes: L layers, H heads, G pairs of generators to a head, P = L H G, N positions, K powers from 0 to the degree,
b size of a matrix.
"""
import itertools
import math
from functools import cache
from types import ModuleType
from typing import List, NamedTuple, Optional, Tuple

import torch
from torch import Tensor

from .._precision import without_autocast
from .._tracing import recording

# Norm up to which the polynomial is used: beyond, another squaring costs less than more terms. Terms are made once for
# a pair of generators, squares for every position, so that large grids are better off with fewer squarings.
RADIUS, RADIUS_OF_LARGE_GRIDS, LARGE = 2., 4., 1024
CHUNK = 2 ** 19  # numbers worked on at a time: stays in the cache of a CPU
CHUNK_OF_A_GPU = 2 ** 26  # where many small launches would cost more than they save


def skew(triangle: Tensor, size: int) -> Tensor:
    """Skew-symmetric matrices (..., b, b) from their strict upper triangles (..., b (b - 1) / 2)."""
    entries = torch.cat((triangle, -triangle, torch.zeros_like(triangle[..., :1])), dim=-1)
    if not torch.jit.is_scripting():
        if recording():  # not every runtime knows the functions below; a GPU would have to wait for a list
            return entries.index_select(-1, _places(size, triangle.device)).unflatten(-1, [size, size])
    upper = torch.triu_indices(size, size, 1, device=triangle.device)
    row, column = upper[0], upper[1]
    index = torch.full([size, size], 2 * triangle.shape[-1], device=triangle.device, dtype=torch.long)
    entry = torch.arange(triangle.shape[-1], device=triangle.device)
    index[row, column] = entry
    index[column, row] = entry + triangle.shape[-1]
    return entries.index_select(-1, index.flatten()).unflatten(-1, [size, size])


def _places(size: int, device: torch.device) -> Tensor:
    """Where the entries of a matrix are among those of its upper triangle, their negatives, and a zero."""
    count = size * (size - 1) // 2
    upper = {pair: entry for entry, pair in enumerate(itertools.combinations(range(size), 2))}
    both = {**upper, **{(row, column): count + entry for (column, row), entry in upper.items()}}
    pairs = itertools.product(range(size), range(size))
    return torch.tensor([both.get(pair, 2 * count) for pair in pairs], device=device)


def kernels_for(freqs: Tensor, size: int) -> Optional[ModuleType]:
    """`gpu_exponentials`, if it makes the exponentials of these generators."""
    gpu = _gpu_kernels() if freqs.is_cuda else None
    return gpu if gpu is not None and gpu.takes(freqs, size) else None


@cache
def _gpu_kernels() -> Optional[ModuleType]:
    try:
        from . import gpu_exponentials  # needs Triton, which is not everywhere
    except ImportError:
        return None
    return gpu_exponentials


class Plan(NamedTuple):
    """How to make the exponentials of a grid: squarings, degree of the polynomial, length that coordinates are in."""
    squarings: int
    degree: int
    reach: float
    finite: bool = True


def plan(freqs: Tensor, y: Tensor, x: Tensor, size: int) -> Plan:
    """The fewest squarings and terms with which the result is within half a unit of the dtype of `freqs`.

    A norm is convex, so that it is largest at a corner of the grid. The eigenvalues of a skew-symmetric matrix are
    pairs +-i t: the squared Frobenius norm of its fourth power is twice the sum of t^8.
    """
    a = skew(_wide(freqs), size).flatten(1, 3)
    y, x = y.to(a.dtype), x.to(a.dtype)
    corners = torch.cat([u * a[0] + v * a[1] for u in x.aminmax() for v in y.aminmax()])
    largest = corners.abs().amax()
    fourth = torch.linalg.matrix_power(corners / largest.clamp_min(torch.finfo(a.dtype).tiny), 4)
    norm = float(largest * (fourth.square().sum((-1, -2)).amax() / 2) ** 0.125)
    reach = float(torch.cat((y, x.flatten())).abs().amax()) or 1.0
    if not math.isfinite(norm):
        return Plan(0, 1, reach, False)
    radius = RADIUS if y.shape[0] * x.shape[-1] < LARGE else RADIUS_OF_LARGE_GRIDS
    squarings = max(0, math.ceil(math.log2(max(norm, radius) / radius)))
    degree, error = 1, norm / 2 ** squarings
    while error * 2 ** squarings > torch.finfo(freqs.dtype).eps / 2:
        degree += 1
        error *= norm / 2 ** squarings / degree
    return Plan(squarings, degree + 1, reach)  # one more for the derivative


def forward(freqs: Tensor, y: Tensor, x: Tensor, size: int, plan: Plan, squared_in: torch.dtype) -> Tensor:
    """(2, L, H, G, b (b - 1) / 2) -> (L, H, N, G b b) in the dtype of `freqs`; the squarings are in `squared_in`."""
    layers, heads, groups = freqs.shape[1:4]
    positions = y.shape[0] * x.shape[-1]
    out = freqs.new_empty(layers * heads, positions, groups, size, size)
    if not plan.finite:
        return out.fill_(math.nan).flatten(2).unflatten(0, [layers, heads])
    a = _scaled(freqs, size, plan)
    up_y, up_x = (_powers(axis, plan, a.dtype) for axis in (y, x))
    for part in _chunks(out):
        made = _polynomial(_coefficients(a[:, part].flatten(1, 2), plan.degree), up_y, up_x).to(squared_in)
        for _ in range(plan.squarings):
            made = torch.bmm(made, made)
        out[part] = made.view(-1, groups, positions, size, size).transpose(1, 2)
    return out.flatten(2).unflatten(0, [layers, heads])


def backward(
        grad: Tensor, freqs: Tensor, y: Tensor, x: Tensor, size: int, plan: Plan, of_points: bool = False,
) -> Tuple[Tensor, Optional[Tensor], Optional[Tensor]]:
    """Gradient of `freqs` from that of the exponentials (L, H, N, G b b), and of the y and x of points if asked for."""
    if not plan.finite:
        nan = [torch.full_like(t, math.nan, memory_format=torch.contiguous_format) for t in (freqs, y, x)]
        return (nan[0], nan[1], nan[2]) if of_points else (nan[0], None, None)
    groups = freqs.shape[3]
    a = _scaled(freqs, size, plan).to(freqs.dtype)
    up_y, up_x = (_powers(axis, plan, freqs.dtype) for axis in (y, x))
    signs = torch.tensor([1., -1.], device=x.device, dtype=freqs.dtype).repeat(plan.degree // 2 + 1)[:plan.degree + 1]
    by_monomials = torch.zeros((), dtype=a.dtype, device=a.device)
    out, grad = torch.empty_like(a), grad.unflatten(-1, [groups, size, size]).flatten(0, 1)
    for part in _chunks(grad):
        generators = a[:, part].flatten(1, 2)
        terms = _coefficients(generators, plan.degree)
        f = _polynomial(terms, up_y * signs, up_x * signs)  # at the opposite positions
        both = torch.cat((f, grad[part].transpose(1, 2).reshape(-1, size, size)), -1)  # F F and F G are one product
        for _ in range(plan.squarings):
            f, g = both[..., :size], both[..., size:]
            other = torch.bmm(g, f)
            both = torch.bmm(f, both)
            both[..., size:] += other
        made = both[..., size:].reshape(-1, y.shape[0], x.shape[-1], size * size)
        if of_points:
            coefficients = torch.cat(terms, dim=1).flatten(2)
            by_monomials = by_monomials + torch.tensordot(made[:, :, 0], coefficients, ([0, 2], [0, 2]))
        grads = _polynomial_backward(made, up_y, up_x)
        out[:, part] = _coefficients_backward(generators, terms, grads).unflatten(1, [-1, groups])
    row, column = torch.triu_indices(size, size, 1, device=out.device)
    of_freqs = ((out - out.mT)[..., row, column] * (plan.reach / 2 ** plan.squarings)).contiguous().view_as(freqs)
    if not of_points:
        return of_freqs, None, None
    rising = torch.arange(plan.degree + 1, device=x.device)  # the slope of t^k is k t^(k - 1)
    of_y, of_x = (
        (by_monomials * _monomials(*powers)).sum(-1) / plan.reach
        for powers in ((up_y.roll(1, -1) * rising, up_x), (up_y, up_x.roll(1, -1) * rising)))
    return of_freqs, of_y.to(y.dtype), of_x.to(x.dtype).unsqueeze(-1)


def _scaled(freqs: Tensor, size: int, plan: Plan) -> Tensor:
    """(2, L H, G, b, b) in the widest dtype, for coordinates in units of `reach`."""
    return skew(_wide(freqs), size).flatten(1, 2) * (plan.reach / 2 ** plan.squarings)


def _wide(freqs: Tensor) -> Tensor:
    return freqs.detach() if freqs.device.type == 'mps' else freqs.detach().double()


def _powers(axis: Tensor, plan: Plan, dtype: torch.dtype) -> Tensor:
    """Powers 0 .. degree of the coordinates of an axis in units of `reach`, (..., K)."""
    return ((axis / plan.reach).unsqueeze(-1) ** torch.arange(plan.degree + 1, device=axis.device)).to(dtype)


def _monomials(up_y: Tensor, up_x: Tensor) -> Tensor:
    """Powers of the coordinates of points, (N, K) and (N, 1, K) -> (N, K (K + 1) / 2), in the order of the terms."""
    powers = torch.arange(up_y.shape[1], device=up_y.device)
    of_x = torch.cat([powers[:k + 1] for k in range(len(powers))])
    of_y = torch.cat([powers[:k + 1].flip(0) for k in range(len(powers))])
    return up_y[:, of_y] * up_x[:, 0, of_x]


def _polynomial(terms: List[Tensor], up_y: Tensor, up_x: Tensor) -> Tensor:
    """The sum of x^i y^(k-i) times the coefficients (P, k + 1, b, b) of every degree k, (P N, b, b)."""
    size, powers = terms[0].shape[-1], len(terms)
    if up_x.ndim == 3:
        return torch.matmul(_monomials(up_y, up_x), torch.cat(terms, dim=1).flatten(2)).view(-1, size, size)
    by_powers = terms[0].new_zeros(terms[0].shape[0], powers, powers, size * size)  # of y, of x
    for k, term in enumerate(terms):
        i = torch.arange(k + 1, device=term.device)
        by_powers[:, k - i, i] = term.flatten(2)
    rows = torch.matmul(up_y, by_powers.flatten(2)).unflatten(2, [powers, -1])
    return torch.matmul(up_x, rows).view(-1, size, size)


def _polynomial_backward(grad: Tensor, up_y: Tensor, up_x: Tensor) -> List[Tensor]:
    """Gradients of the coefficients of every degree from that of the sum, (P, rows, columns, b b)."""
    size, powers = math.isqrt(grad.shape[-1]), up_x.shape[-1]
    if up_x.ndim == 3:
        by_monomials = torch.matmul(_monomials(up_y, up_x).mT, grad.flatten(1, 2)).unflatten(-1, [size, size])
        return list(by_monomials.split(list(range(1, powers + 1)), dim=1))
    rows = torch.matmul(up_x.mT, grad)
    by_powers = torch.matmul(up_y.mT, rows.flatten(2)).view(-1, powers, powers, size, size)
    out = []
    for k in range(powers):
        i = torch.arange(k + 1, device=grad.device)
        out.append(by_powers[:, k - i, i])
    return out


def _coefficients(a: Tensor, degree: int) -> List[Tensor]:
    """For k = 0 .. degree the sums of all products of i A_x's and k - i A_y's over k!, (P, k + 1, b, b)."""
    out = [torch.eye(a.shape[-1], dtype=a.dtype, device=a.device).expand(a.shape[1], 1, -1, -1)]
    for k in range(1, degree + 1):
        below = out[-1].flatten(1, 2)
        term = a.new_zeros(a.shape[1], k + 1, *a.shape[2:])
        term[:, 1:] = torch.bmm(below, a[0] / k).unflatten(1, [k, -1])
        term[:, :-1] += torch.bmm(below, a[1] / k).unflatten(1, [k, -1])
        out.append(term)
    return out


def _coefficients_backward(a: Tensor, terms: List[Tensor], grads: List[Tensor]) -> Tensor:
    """Gradient (2, P, b, b) of the generators from those of the coefficients."""
    out, grad = torch.zeros_like(a), grads[-1]
    for k in range(len(terms) - 1, 0, -1):
        below = terms[k - 1].flatten(1, 2)
        by_x, by_y = grad[:, 1:].flatten(1, 2), grad[:, :-1].flatten(1, 2)
        out[0].baddbmm_(below.mT, by_x, alpha=1 / k)
        out[1].baddbmm_(below.mT, by_y, alpha=1 / k)
        grad = torch.bmm(by_x, a[0] / -k).baddbmm_(by_y, a[1] / -k).view_as(grads[k - 1]) + grads[k - 1]
    return out


def _chunks(matrices: Tensor) -> List[slice]:
    """Slices of heads (L H, ...) that are worked on at a time."""
    room = CHUNK if matrices.device.type == 'cpu' else CHUNK_OF_A_GPU
    step = max(1, room // max(1, matrices[0].numel()))
    return [slice(i, i + step) for i in range(0, len(matrices), step)]


@torch.library.custom_op('timm_rope::grid_exponentials', mutates_args=())
def operator(freqs: Tensor, y: Tensor, x: Tensor, size: int) -> Tensor:
    """`forward`, squared in the dtype of `freqs`: a graph makes the matrices anew whenever it runs."""
    gpu = kernels_for(freqs, size)
    if gpu is not None:
        return gpu.forward(freqs, y, x)  # type: ignore[no-any-return]
    with without_autocast(freqs):
        return forward(freqs, y, x, size, plan(freqs, y, x, size), freqs.dtype)


@torch.library.custom_op('timm_rope::grid_exponentials_backward', mutates_args=())
def operator_backward(grad: Tensor, freqs: Tensor, y: Tensor, x: Tensor, size: int) -> Tensor:
    """`backward`, with the plan made again."""
    gpu = kernels_for(freqs, size)
    if gpu is not None:
        return gpu.backward(grad, freqs, y, x)  # type: ignore[no-any-return]
    with without_autocast(freqs):
        return backward(grad, freqs, y, x, size, plan(freqs, y, x, size))[0]


@operator.register_fake
def _(freqs: Tensor, y: Tensor, x: Tensor, size: int) -> Tensor:
    return freqs.new_empty(*freqs.shape[1:3], y.shape[0] * x.shape[-1], freqs.shape[3] * size * size)


@operator_backward.register_fake
def _(grad: Tensor, freqs: Tensor, y: Tensor, x: Tensor, size: int) -> Tensor:
    return torch.empty_like(freqs, memory_format=torch.contiguous_format)


def _keep(ctx, inputs, output: Tensor) -> None:
    freqs, y, x, ctx.size = inputs
    ctx.save_for_backward(freqs, y, x)


def _gradient(ctx, grad: Tensor):
    return operator_backward(grad, *ctx.saved_tensors, ctx.size), None, None, None


operator.register_autograd(_gradient, setup_context=_keep)
