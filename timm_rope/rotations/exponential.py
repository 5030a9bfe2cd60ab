"""Rotations of blocks of channels: the matrix exponential of skew-symmetric generators, for every position of a grid
or any points.

Blocks of 2, 3 and 4 have closed forms. Larger ones are made all at once by `grid_exponentials.py`, in a compiled graph
as an operator. Where a graph is recorded for another runtime, or a transform of torch.func or forward-mode AD looks on,
a plain formula runs instead.
"""
import math
from typing import List, Tuple

import torch
from torch import Tensor

from .._precision import without_autocast
from .._tracing import legacy_batched, recording, transformed
from . import grid_exponentials
from .base import by_rows
from .grid_exponentials import skew
from .space_exponentials import SpaceExponentials


@torch.fx.wrap
def block_table(freqs: Tensor, y: Tensor, x: Tensor, size: int, squared_wide: bool = False) -> Tensor:
    """exp(x A_x + y A_y) for all layers, heads, positions and blocks (LieRE, arXiv 2406.10322, eq. 3).

    Computed outside autocast. While nothing learns, and on every device that has it, the work is in float64, and the
    float32 result is within 3e-7 of the exact one for any block and grid. While float32 generators of blocks above 4
    learn, and in compiled graphs, the matrices are squared in float32: the result is within 5e-6, and 7e-6 on grids of
    64 x 64 patches, whose angles are larger. On a GPU, those of blocks of 8 then have kernels of their own
    (`gpu_exponentials.py`). The gradient of float32 generators is computed in float32, to about 5e-6 of its largest
    entry at block 8 and 1e-5 at block 64.

    Args:
        freqs: (2, L, H, G, b (b - 1) / 2), strict upper triangles of A_x and A_y row by row, radians per coordinate.
        y: (rows,), coordinates of the rows.
        x: (columns,), coordinates of the columns, or (rows, columns) where every row has its own.
        size: b.
        squared_wide: Square in float64 in eager mode, whatever learns.

    Returns:
        (L, H, N, G b b) in the dtype of `freqs`, matrices row-major, N = rows * columns row-major.
    """
    if torch.jit.is_scripting():
        return _plain_table(freqs, y, x, size)
    # matrix products under autocast would build the rotations in half precision
    with without_autocast(freqs):
        if size > 4 and _has_values(freqs, y, x):
            if torch.compiler.is_compiling():
                return grid_exponentials.operator(freqs, y, x, size)
            learning = torch.is_grad_enabled() and freqs.requires_grad and not squared_wide
            return _GridExponentials.apply(freqs, y, x, size, learning)
        return _plain_table(freqs, y, x, size)


@torch.fx.wrap
def commuting_table(freqs: Tensor, y: Tensor, x: Tensor, size: int) -> Tensor:
    """`block_table` where A_x and A_y of every block commute: exp(y A_y) of every row times exp(x A_x) of every column.

    So few exponentials are squared in float64 also while generators learn. Points are no grid, and a GPU has kernels.
    """
    if x.ndim == 2 or freqs.is_cuda:
        return block_table(freqs, y, x, size)
    at_y, at_x = torch.cat((y, torch.zeros_like(x))), torch.cat((torch.zeros_like(y), x))
    both = block_table(freqs, at_y, at_x.unsqueeze(1), size, True).unflatten(-1, [-1, size, size])
    if torch.jit.is_scripting():
        return _each_by_each(both[:, :, :y.shape[0]], both[:, :, y.shape[0]:])
    with without_autocast(freqs):
        return _each_by_each(both[:, :, :y.shape[0]], both[:, :, y.shape[0]:])


def _each_by_each(rows: Tensor, columns: Tensor) -> Tensor:
    """All products of (L, H, rows, G, b, b) and (L, H, columns, G, b, b), row-major: (L, H, N, G b b)."""
    size = rows.shape[-1]
    left, right = rows.transpose(2, 3).flatten(3, 4), columns.permute(0, 1, 3, 4, 2, 5).flatten(4)
    products = (left @ right).unflatten(-1, [-1, size]).unflatten(3, [-1, size])  # (L, H, G, rows, b, columns, b)
    return products.permute(0, 1, 3, 5, 2, 4, 6).flatten(4).flatten(2, 3)


def block_table_nd(freqs: Tensor, axes: List[Tensor], size: int) -> Tensor:
    """exp(x A_x + y A_y + z A_z): `block_table` for any number of axes, by a general exponential in float64.

    The gradient of blocks above 4 is in the dtype of the generators.

    Args:
        freqs: (D, L, H, G, b (b - 1) / 2), x first.
        axes: As `Rotation.table_nd`.
        size: b.
    """
    with without_autocast(freqs):
        if size > 4 and not torch.compiler.is_compiling() and _are_plain(freqs, *axes):
            return SpaceExponentials.apply(_exponentials, size, freqs, *axes)  # type: ignore[no-any-return]
        return _exponentials(freqs, axes, size)


def _plain_table(freqs: Tensor, y: Tensor, x: Tensor, size: int) -> Tensor:
    return _exponentials(freqs, [y.unsqueeze(1), by_rows(x)], size)


def _exponentials(freqs: Tensor, axes: List[Tensor], size: int) -> Tensor:
    # the error of an exponential grows with its norm, over 100 rad at 64x64 patches: 3e-5 in float32 at block 8
    wide = freqs if freqs.device.type == 'mps' else freqs.double()
    for _ in range(axes[0].ndim):
        wide = wide.unsqueeze(3)
    triangle = axes[-1].to(wide.dtype).unsqueeze(-1).unsqueeze(-1) * wide[0]
    for i in range(1, len(axes)):
        triangle = triangle + axes[-1 - i].to(wide.dtype).unsqueeze(-1).unsqueeze(-1) * wide[i]
    # (L, H, N, G, b (b - 1) / 2) -> (L, H, N, G b b)
    return skew_exp(triangle.flatten(2, -3), size, freqs.dtype).flatten(-3)


def _has_values(freqs: Tensor, y: Tensor, x: Tensor) -> bool:
    """Whether these are plain tensors with values, now or when what is compiled runs, and nothing but reverse-mode
    autograd follows them."""
    if (y.requires_grad or x.requires_grad) and (x.ndim == 1 or torch.compiler.is_compiling()):
        return False  # gradients of points are made in eager mode only, those of the axes of a grid nowhere
    return _are_plain(freqs, y, x)


def _are_plain(*tensors: Tensor) -> bool:
    if recording() or tensors[0].is_meta:
        return False
    if any(type(t) not in (Tensor, torch.nn.Parameter) for t in tensors):  # a fake or distributed tensor
        return False
    return not transformed()


class _GridExponentials(torch.autograd.Function):
    """`grid_exponentials` in eager mode, with derivatives of any order."""

    @staticmethod
    def forward(ctx, freqs: Tensor, y: Tensor, x: Tensor, size: int, learning: bool) -> Tensor:
        ctx.save_for_backward(freqs, y, x)
        ctx.size, ctx.plan, ctx.gpu = size, None, grid_exponentials.kernels_for(freqs, size) if learning else None
        if ctx.gpu is not None:
            return ctx.gpu.forward(freqs, y, x)
        ctx.plan = grid_exponentials.plan(freqs, y, x, size)
        # where it is made anew in every step, squarings in float64 would take most of the time
        squared_in = freqs.dtype if learning or freqs.device.type == 'mps' else torch.float64
        return grid_exponentials.forward(freqs, y, x, size, ctx.plan, squared_in)

    @staticmethod
    def backward(ctx, grad: Tensor):
        freqs, y, x = inputs = ctx.saved_tensors
        needed = ctx.needs_input_grad[:3]
        with without_autocast(freqs):
            batched = legacy_batched(grad)  # torch.autograd.grad(is_grads_batched=True)
            further = torch.is_grad_enabled()
            if further or batched or transformed():
                with torch.enable_grad():
                    out = _plain_table(freqs, y, x, ctx.size)
                    wanted = [t for t, need in zip(inputs, needed) if need]
                    grads = iter(torch.autograd.grad(out, wanted, grad, create_graph=further))
                    return (*(next(grads) if need else None for need in needed), None, None)
            of_points = needed[1] or needed[2]
            if ctx.gpu is not None and not of_points:
                return ctx.gpu.backward(grad, freqs, y, x), None, None, None, None
            plan = grid_exponentials.plan(freqs, y, x, ctx.size) if ctx.plan is None else ctx.plan
            made = grid_exponentials.backward(grad, freqs, y, x, ctx.size, plan, of_points)
            return (*made, None, None)


def skew_exp(triangle: Tensor, size: int, dtype: torch.dtype) -> Tensor:
    """Matrix exponential of skew-symmetric matrices: closed forms for 2, 3 and 4, `torch.linalg.matrix_exp` beyond.

    Export has no operator for it and gets a Taylor series with a fixed number of squarings.

    Args:
        triangle: (..., b (b - 1) / 2), strict upper triangle row by row.
        size: b.
        dtype: Of the result. Angles and their sines are computed in that of `triangle`.

    Returns:
        (..., b, b), rotation matrices.
    """
    if size == 2:
        cos, sin = triangle.cos().to(dtype), triangle.sin().to(dtype)
        return torch.cat((cos, sin, -sin, cos), dim=-1).unflatten(-1, [2, 2])
    if size == 3:
        return _exp3(triangle, dtype)
    if size == 4:
        return _exp4(triangle, dtype)
    matrix = skew(triangle, size)
    if not torch.jit.is_scripting():
        if recording():
            return _exp_taylor(matrix).to(dtype)
    return torch.linalg.matrix_exp(matrix).to(dtype)


def _exp_taylor(matrix: Tensor, squarings: int = 12) -> Tensor:
    """exp(A) = exp(A / 2^s)^(2^s), degree 8 (Paterson-Stockmeyer): below 1e-8 in float64 to a norm of 800."""
    a = matrix / 2 ** squarings
    a2 = a @ a
    a4 = a2 @ a2
    eye = torch.eye(matrix.shape[-1], device=matrix.device, dtype=matrix.dtype)
    low = eye + a + a2 / 2 + a2 @ a / 6
    high = eye / 24 + a / 120 + a2 / 720 + a2 @ a / 5040 + a4 / 40320
    out = low + a4 @ high
    for _ in range(squarings):
        out = out @ out
    return out


def _cos_sinc(square: Tensor) -> Tuple[Tensor, Tensor]:
    """cos(t) and sin(t) / t for t^2 = square. The clamp keeps the root's derivative finite at t = 0."""
    t = square.clamp_min(1e-20).sqrt()
    if not torch.jit.is_scripting():
        if recording():  # onnxruntime before 1.24, the last for Python 3.10, has no cosine of float64
            rest = (t - 2 * math.pi * (t / (2 * math.pi)).round()).float()
            return rest.cos().to(t.dtype), rest.sin().to(t.dtype) / t
    return t.cos(), t.sin() / t


def _quaternion(v: Tensor, dtype: torch.dtype) -> Tensor:
    """cos|v| and sin|v| / |v| v, (..., 3) -> (..., 4)."""
    cos, sinc = _cos_sinc(v.square().sum(-1, keepdim=True))
    return torch.cat((cos, sinc * v), dim=-1).to(dtype)


def _products(like: Tensor) -> Tensor:
    """(4, 4, 4, 4): products of the units of the left quaternions (axis 0) with those of the right ones (axis 1)."""
    zero = [0., 0., 0., 0., 0., 0.]
    left = [zero, [1., 0., 0., 0., 0., 1.], [0., 1., 0., 0., -1., 0.], [0., 0., 1., 1., 0., 0.]]
    right = [zero, [1., 0., 0., 0., 0., -1.], [0., 1., 0., 0., 1., 0.], [0., 0., 1., -1., 0., 0.]]
    units = skew(torch.tensor([left, right], dtype=like.dtype, device=like.device), 4)
    units[:, 0] = torch.eye(4, dtype=like.dtype, device=like.device)
    return units[0].unsqueeze(1) @ units[1]


def _exp3(triangle: Tensor, dtype: torch.dtype) -> Tensor:
    """A rotation of three channels is one of four that spares the last: its two quaternions differ in one sign."""
    q = _quaternion(0.5 * triangle, dtype)
    sign = torch.tensor([1., 1., 1., -1.], dtype=dtype, device=q.device)
    products = _products(q)[..., :3, :3] * sign.reshape(4, 1, 1)
    outer = (q.unsqueeze(-1) * q.unsqueeze(-2)).flatten(-2)
    return (outer @ products.reshape(16, 9)).unflatten(-1, [3, 3])


def _exp4(triangle: Tensor, dtype: torch.dtype) -> Tensor:
    """so(4) = so(3) + so(3): A = P + M with commuting P and M, left and right multiplication by a quaternion each.

    The exponential is exp(P) exp(M), so linear in the 16 products of one entry of each of two unit quaternions.
    """
    # (A01, A02, A03) and (A23, -A13, A12): their sum is twice the vector of P, their difference twice that of M
    near, far = triangle[..., :3], torch.stack((triangle[..., 5], -triangle[..., 4], triangle[..., 3]), dim=-1)
    left, right = _quaternion(0.5 * (near + far), dtype), _quaternion(0.5 * (near - far), dtype)
    outer = (left.unsqueeze(-1) * right.unsqueeze(-2)).flatten(-2)
    return (outer @ _products(left).reshape(16, 16)).unflatten(-1, [4, 4])
