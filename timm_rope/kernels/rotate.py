"""Turning queries and keys where they lie: the one op in front of every attention.

`rotate` takes the packed output of the projection, turns queries and keys in place and returns views of it. Nothing is
stored for the backward pass that attention does not store already: a rotation is undone by its transpose, and the
gradient of learned angles follows from the turned queries and keys. The backward pass writes the three gradients into
one buffer and turns two of them back on the way. Which route does this is chosen in `routes.py`.
"""
from typing import Any, List, Optional, Tuple

import torch
from torch import Tensor, nn

from .._precision import without_autocast
from .._tracing import unobserved
from ..rotations import Rotation
from . import graph, guard, routes


def rotate(
        qkv: Tensor,
        payload: Tensor,
        rotation: Rotation,
        num_heads: int,
) -> Tuple[Tensor, Tensor, Tensor]:
    """Rotate the queries and keys of a packed projection and split it.

    The result shares memory with `qkv` where a route turns in place; `qkv` must not be used afterwards.

    Args:
        qkv: (B, N, 3 * H * D), not a leaf that requires a gradient.
        payload: (H or 1, N, W), or (B, H or 1, N, W) where every image has its own positions.
        rotation: How a payload turns.
        num_heads: H.

    Returns:
        Queries, keys and values, (B, H, N, D) each.

    Raises:
        ValueError: The payload is of another number of tokens or images, or TIMM_ROPE_KERNEL names no route.
        RuntimeError: TIMM_ROPE_KERNEL names a route that cannot take this input.
    """
    tokens, places = qkv.shape[1], payload.shape[-2]
    if _differ(tokens, places):
        raise ValueError(
            f'The payload is of {places} tokens, the queries and keys are of {tokens}: call the encoding with the grid '
            f'of these tokens, and if some were dropped or inserted, index its payload (axis -2) likewise.')
    images = payload.shape[:-3]
    if isinstance(images, tuple) and images and _differ(images[0], qkv.shape[0]):
        raise ValueError(
            f'The payload is of {images[0]} images of their own, the queries and keys are of {qkv.shape[0]}: give one '
            f'payload (heads, tokens, width) for all images, or one for each of them.')
    if torch.compiler.is_compiling():
        name = graph.route_for(qkv, payload, rotation, num_heads)
        if name:
            return graph.rotate(qkv, payload, rotation, num_heads, name)
    route = routes.find_route(qkv, payload, rotation, num_heads)
    if route is None:
        q, k, v = unpack(qkv, num_heads)
        return rotation(q, payload), rotation(k, payload), v
    if torch.is_grad_enabled() and (qkv.requires_grad or payload.requires_grad):
        return _Rotate.apply(qkv, payload, rotation, num_heads, route)
    return _turn_in_place(qkv, payload, rotation, num_heads, route)


def _differ(a: Any, b: Any) -> bool:
    """Whether two sizes differ; those that are being recorded are no plain numbers, and need not be compared."""
    return type(a) is int and type(b) is int and a != b


def unpack(qkv: Tensor, num_heads: int) -> Tuple[Tensor, Tensor, Tensor]:
    """Queries, keys and values (B, H, N, D) of a packed projection (B, N, 3 * H * D), as views."""
    B, N, C = qkv.shape
    q, k, v = qkv.reshape(B, N, 3, num_heads, C // (3 * num_heads)).permute(2, 0, 3, 1, 4).unbind(0)
    return q, k, v


def owned(output: Tensor, projection: nn.Module) -> Tensor:
    """The output of a projection if nobody else sees it, so that it may be written to; a copy otherwise.

    A hook may keep it, and a wrapped, patched or parametrised projection may need it in its backward pass.
    """
    if type(projection) is nn.Linear and unobserved(projection):
        return output
    return output.clone()


def does_nothing(module: nn.Module) -> bool:
    """Whether a norm may be left out: no norm at all, and nobody looks at what comes out."""
    return type(module) is nn.Identity and unobserved(module)


# -- forward and backward

def _is_forced() -> bool:
    return routes.kernel_choice() != 'auto'


def _turn_in_place(
        qkv: Tensor, payload: Tensor, rotation: Rotation, num_heads: int, route: routes.Route,
) -> Tuple[Tensor, Tensor, Tensor]:
    # a product of matrices, or a view of bfloat16 as complex numbers, is not what it says under autocast
    with without_autocast(qkv):
        try:
            route.turn_(routes.packed_view(qkv, num_heads), payload, rotation)
        except Exception as error:
            guard.failed(route, qkv.device, error, _is_forced() or not route.ALL_OR_NOTHING)
            q, k, v = unpack(qkv, num_heads)
            return rotation(q, payload), rotation(k, payload), v
    return unpack(qkv, num_heads)


class _Rotate(torch.autograd.Function):
    """Forward in place, backward into one fresh buffer."""

    @staticmethod
    def forward(
            ctx: Any, qkv: Tensor, payload: Tensor, rotation: Rotation, num_heads: int, route: routes.Route,
    ) -> Tuple[Tensor, Tensor, Tensor]:
        # views of the detached tensor: what is returned is new to autograd, though the memory is the same
        q, k, v = _turn_in_place(qkv.detach(), payload, rotation, num_heads, route)
        ctx.rotation, ctx.route = rotation, route
        # attention keeps the turned queries and keys too, so that they cost nothing here
        ctx.save_for_backward(payload, *((q, k) if ctx.needs_input_grad[1] else ()))
        return q, k, v

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tuple[Optional[Tensor], ...]:
        payload, *turned = ctx.saved_tensors
        dq, dk, dv = grads
        if torch.is_grad_enabled():
            dqkv, dpayload = _differentiable_backward(dq, dk, dv, payload, ctx.rotation, turned)
        else:
            dqkv, dpayload = _turn_back(ctx.route, dq, dk, dv, payload, ctx.rotation, turned)
        return dqkv.flatten(2), dpayload, None, None, None


def _turn_back(
        route: routes.Route, dq: Tensor, dk: Tensor, dv: Tensor, payload: Tensor, rotation: Rotation,
        turned: List[Tensor],
) -> Tuple[Tensor, Optional[Tensor]]:
    """Gradients by the route, or by the formula where the route fails or has failed on this device."""
    q, k = turned or (None, None)
    if not guard.is_off(route, dq.device):
        try:
            with without_autocast(dq):
                return route.turn_back(dq, dk, dv, payload, rotation, q, k, bool(turned))
        except Exception as error:
            guard.failed(route, dq.device, error, _is_forced())
    with torch.enable_grad():
        leaf = payload.detach().requires_grad_()
        dqkv, dpayload = _differentiable_backward(dq, dk, dv, leaf, rotation, turned)
    return dqkv.detach(), None if dpayload is None else dpayload.detach()


def _differentiable_backward(
        dq: Tensor, dk: Tensor, dv: Tensor, payload: Tensor, rotation: Rotation, turned: List[Tensor],
) -> Tuple[Tensor, Optional[Tensor]]:
    """The same gradients by the derivative of the formula, for derivatives of derivatives."""
    def turned_back(y: Tensor) -> Tensor:
        # a rotation is linear and its inverse is its transpose: the derivative at any point
        x = torch.zeros_like(y, requires_grad=True)
        return torch.autograd.grad(rotation(x, payload), x, y, create_graph=True)[0]  # type: ignore[no-any-return]

    dpayload = None
    if turned:
        inputs = [turned_back(y) for y in turned]
        direct = payload.view_as(payload)  # the inputs depend on the payload, too, by way of this very function
        outputs = [rotation(x, direct) for x in inputs]
        dpayload = torch.autograd.grad(outputs, direct, (dq, dk), create_graph=True)[0]
    grads = (turned_back(dq), turned_back(dk), dv)
    return torch.stack([g.transpose(1, 2) for g in grads], dim=2), dpayload
