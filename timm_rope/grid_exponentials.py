"""Matrix exponentials of a whole grid from packed generators, forward and backward, and the operators made of them.

The operators `timm_rope::grid_exponentials` and `timm_rope::grid_exponentials_backward` are what a compiled graph
holds: how often to square depends on the norm of the generators, which no graph knows.
"""
import torch
from torch import Tensor

from .precision import without_autocast
from .scaled_series import Grid, exponentials, exponentials_backward, largest_norm


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


def norm_of(freqs: Tensor, y: Tensor, x: Tensor, size: int) -> float:
    """Upper bound of the spectral norm over the grid; arguments as `forward`."""
    wide = _wide(freqs)
    return largest_norm(skew(wide, size).flatten(1, 3), y.to(wide.dtype), x.to(wide.dtype))


def forward(freqs: Tensor, y: Tensor, x: Tensor, size: int, norm: float, squared_in: torch.dtype) -> Tensor:
    """exp(x A_x + y A_y), a few layers and heads at a time: little memory is needed beside the result.

    Args:
        freqs: (2, L, H, G, b (b - 1) / 2), strict upper triangles of A_x and A_y.
        y: (rows,), coordinates of the rows.
        x: (columns,), coordinates of the columns.
        size: b.
        norm: What `norm_of` says.
        squared_in: Dtype of the squarings; the polynomial is in float64 where the device has it.

    Returns:
        (L, H, N, G b b) in the dtype of `freqs`.
    """
    layers, heads, groups = freqs.shape[1:4]
    wide = _wide(freqs)
    grid = Grid(y, x, norm, torch.finfo(freqs.dtype).eps / 2, wide.dtype)
    generators = grid.scale * skew(wide, size).flatten(1, 2)
    out = freqs.new_empty(layers * heads, len(grid), groups, size, size)
    for part in grid.chunks(layers * heads, groups * size * size):
        made = exponentials(generators[:, part].flatten(1, 2), grid, squared_in)
        out[part] = made.unflatten(0, [-1, groups]).transpose(1, 2)
    return out.view(layers, heads, len(grid), groups * size * size)


def backward(grad: Tensor, freqs: Tensor, y: Tensor, x: Tensor, size: int, norm: float) -> Tensor:
    """Gradient of `freqs` from that of the exponentials (L, H, N, G b b), in the dtype of `freqs`."""
    groups = freqs.shape[3]
    grid = Grid(y, x, norm, torch.finfo(freqs.dtype).eps / 2, freqs.dtype)
    generators = grid.scale * skew(freqs, size).flatten(1, 2)
    grad = grad.unflatten(-1, [groups, size, size]).flatten(0, 1)
    out = torch.empty_like(generators)
    for part in grid.chunks(grad.shape[0], groups * size * size):
        of_part = grad[part].transpose(1, 2).flatten(0, 1)
        made = exponentials_backward(generators[:, part].flatten(1, 2), grid, of_part)
        out[:, part] = made.unflatten(1, [-1, groups])
    out *= grid.scale
    row, column = torch.triu_indices(size, size, 1, device=out.device)
    return (out - out.mT)[..., row, column].view_as(freqs)


def _wide(freqs: Tensor) -> Tensor:
    return freqs.detach() if freqs.device.type == 'mps' else freqs.detach().double()


@torch.library.custom_op('timm_rope::grid_exponentials', mutates_args=())
def operator(freqs: Tensor, y: Tensor, x: Tensor, size: int) -> Tensor:
    """`forward`, squared in the dtype of `freqs`: a graph makes the matrices anew whenever it runs."""
    with without_autocast(freqs):
        return forward(freqs, y, x, size, norm_of(freqs, y, x, size), freqs.dtype)


@torch.library.custom_op('timm_rope::grid_exponentials_backward', mutates_args=())
def operator_backward(grad: Tensor, freqs: Tensor, y: Tensor, x: Tensor, size: int) -> Tensor:
    """`backward`."""
    with without_autocast(freqs):
        return backward(grad, freqs, y, x, size, norm_of(freqs, y, x, size))


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
