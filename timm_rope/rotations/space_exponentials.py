"""exp(x A_x + y A_y + z A_z), with a gradient that keeps no matrices: those of all layers would take gigabytes.

The derivative of an exponential at A in a direction G, for skew-symmetric A, is the adjoint of that at -A. It comes
along with the exponential, through the Taylor series of A / 2^s and the squarings: E = F F, dE = F dF + dF F.
"""
import math
from typing import Callable, List, Tuple

import torch
from torch import Tensor

from .._precision import without_autocast
from .._tracing import legacy_batched
from .grid_exponentials import skew

RADIUS = 2.  # norm up to which the series is used


class SpaceExponentials(torch.autograd.Function):
    """`formula(freqs, axes, size)` in eager mode, (L, H, N, G b b); its second derivatives are those of `formula`."""

    @staticmethod
    def forward(ctx, formula: Callable[..., Tensor], size: int, freqs: Tensor, *axes: Tensor) -> Tensor:
        ctx.formula, ctx.size = formula, size
        ctx.save_for_backward(freqs, *axes)
        return torch.cat([formula(layer, list(axes), size) for layer in freqs.split(1, dim=1)])

    @staticmethod
    def backward(ctx, grad: Tensor):
        needed, inputs = ctx.needs_input_grad[2:], ctx.saved_tensors
        with without_autocast(inputs[0]):
            if torch.is_grad_enabled() or legacy_batched(grad):
                further, wanted = torch.is_grad_enabled(), [t for t, need in zip(inputs, needed) if need]
                with torch.enable_grad():
                    out = ctx.formula(inputs[0], list(inputs[1:]), ctx.size)
                    made = iter(torch.autograd.grad(out, wanted, grad, create_graph=further))
                return (None, None, *(next(made) if need else None for need in needed))
            of_freqs, of_axes = _gradients(inputs[0], list(inputs[1:]), grad, ctx.size)
            return (None, None, of_freqs, *of_axes)


def _gradients(freqs: Tensor, axes: List[Tensor], grad: Tensor, size: int) -> Tuple[Tensor, List[Tensor]]:
    """Those of generators (D, L, H, G, b (b - 1) / 2) and coordinates, in the dtype of the generators."""
    shape = torch.broadcast_shapes(*(axis.shape for axis in axes))
    positions = torch.stack([axis.expand(shape).flatten() for axis in reversed(axes)]).to(freqs.dtype)  # (D, N)
    upper = torch.triu_indices(size, size, 1, device=freqs.device)
    of_freqs, of_positions = torch.empty_like(freqs), torch.zeros_like(positions)
    for layer in range(freqs.shape[1]):
        for head in range(freqs.shape[2]):
            generators = skew(freqs[:, layer, head].detach(), size)  # (D, G, b, b)
            opposite = -torch.tensordot(positions, generators, ([0], [0]))  # (N, G, b, b)
            slope = derivative(opposite, grad[layer, head].unflatten(-1, opposite.shape[1:]))
            by_axis = torch.tensordot(positions, slope, ([1], [0]))
            of_freqs[:, layer, head] = (by_axis - by_axis.mT)[..., upper[0], upper[1]]
            of_positions += torch.tensordot(generators, slope, ([1, 2, 3], [1, 2, 3]))
    of_axes = [of_positions[len(axes) - 1 - i].view(shape).sum_to_size(a.shape).to(a.dtype) for i, a in enumerate(axes)]
    return of_freqs, of_axes


def derivative(a: Tensor, direction: Tensor) -> Tensor:
    """d/dt exp(A + t G) at t = 0 of skew-symmetric A and any G, (..., b, b)."""
    norm = float(a.square().sum((-1, -2)).amax() / 2) ** 0.5 if a.numel() else 0.  # at least that of the largest
    if not math.isfinite(norm):
        return torch.full_like(direction, math.nan)
    squarings = max(0, math.ceil(math.log2(max(norm, RADIUS) / RADIUS)))
    a, direction = a / 2 ** squarings, direction / 2 ** squarings
    made, slope = torch.eye(a.shape[-1], dtype=a.dtype, device=a.device) + a, direction
    term, of_term = a, direction
    degree, error = 1, RADIUS
    while error > torch.finfo(a.dtype).eps / 2:
        degree += 1
        error *= RADIUS / degree
        of_term = (a @ of_term + direction @ term) / degree
        term = a @ term / degree
        made, slope = made + term, slope + of_term
    for _ in range(squarings):
        slope = made @ slope + slope @ made
        made = made @ made
    return slope
