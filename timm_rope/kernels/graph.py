"""What a compiled graph holds on a GPU: operators that call a route when the graph runs, instead of the formula.

Inductor makes kernels of the formula, too, but slower ones: on an H100 a compiled ViT-S took 1.11 (pairs) and 1.56
(triplets) of the time of one without a rotation.

Without gradients queries and keys turn in place, as in eager mode. With gradients they are written to new memory, the
values too, since an operator may not return a view of what it was given. The backward pass packs and turns back in one
sweep. Whether a route works is tried when the graph is made, on the device itself; a route that fails later ends the
run. An exported graph has the formula.
"""
from functools import cache
from typing import Any, Callable, Dict, Tuple

import torch
from torch import Tensor

from .._tracing import constant_in_graphs, recording, transformed
from ..rotations import BlockRotation, PairRotation, Rotation, TripletRotation
from . import guard, routes

ROUTES: Dict[str, str] = {'cuda': 'triton'}  # type of device -> route that graphs on it call
CLASSES: Dict[str, Callable[..., Rotation]] = {cls.kind: cls for cls in (PairRotation, TripletRotation, BlockRotation)}
Tensors = Tuple[Tensor, Tensor, Tensor]


def route_for(qkv: Tensor, payload: Tensor, rotation: Rotation, num_heads: int) -> str:
    """Name of the route that the graph which is being compiled calls for this input, '' for the formula."""
    if qkv.device.type not in ROUTES or not rotation.kind or recording() or transformed():
        return ''
    return _that_works(
        qkv.device, qkv.dtype, payload.dtype, payload.shape[-3] == 1, payload.ndim == 4, num_heads, *describe(rotation))


@constant_in_graphs
def _that_works(
        device: torch.device, dtype: torch.dtype, payload_dtype: torch.dtype, shared: bool, per_image: bool,
        num_heads: int, kind: str, head_dim: int, groups: int, size: int, order: str) -> str:
    """Try the route on its device, in eager mode, while the graph waits."""
    name, choice = ROUTES[device.type], routes.kernel_choice()
    route = routes.load_route(name) if choice in ('auto', name) else None
    if route is None:
        return ''
    rotation = make_rotation(kind, head_dim, groups, size, order)
    packed = torch.empty(1, 2, 3, num_heads, head_dim, device=device, dtype=dtype)
    heads = 1 if shared else num_heads
    payload = torch.empty(*((1,) if per_image else ()), heads, 2, rotation.width, device=device, dtype=payload_dtype)
    forced = choice != 'auto'
    if not route.supports(packed, payload, rotation) or not guard.may_turn(route, packed, payload, rotation, forced):
        return ''
    try:
        route.turned_copy(packed, payload, rotation)
    except Exception as error:  # the guard has not tried this one
        guard.failed(route, device, error, forced)
        return ''
    return name


def describe(rotation: Rotation) -> Tuple[str, int, int, int, str]:
    """What `make_rotation` makes the same rotation of."""
    return rotation.kind, rotation.head_dim, rotation.groups, rotation.size, getattr(rotation, 'order', '')


@cache
def make_rotation(kind: str, head_dim: int, groups: int, size: int, order: str) -> Rotation:
    """A rotation by what describes it, since operators take no modules."""
    if kind == 'blocks':
        return BlockRotation(head_dim, size)
    return CLASSES[kind](head_dim, groups, **(dict(order=order) if kind == 'triplets' else {}))


def rotate(qkv: Tensor, payload: Tensor, rotation: Rotation, num_heads: int, route: str) -> Tensors:
    """`kernels.rotate` by the operators below."""
    described = route, num_heads, *describe(rotation)
    if torch.is_grad_enabled() and (qkv.requires_grad or payload.requires_grad):
        return turned(qkv, payload, *described)  # type: ignore[no-any-return]
    turn_(qkv, payload, *described)
    q, k, v = routes.packed_view(qkv, num_heads).permute(2, 0, 3, 1, 4).unbind(0)
    return q, k, v


def _found(route: str, *described: Any) -> Tuple[routes.Route, Rotation]:
    found = routes.load_route(route)
    if found is None:
        raise RuntimeError(f'The rotation kernels {route!r} were there when the graph was compiled, and are not now.')
    return found, make_rotation(*described)


@torch.library.custom_op('timm_rope::turn_', mutates_args=('qkv',))
def turn_(
        qkv: Tensor, payload: Tensor, route: str, num_heads: int, kind: str, head_dim: int, groups: int, size: int,
        order: str) -> None:
    """Turn the queries and keys of a packed projection (B, N, 3 * H * D) in place."""
    found, rotation = _found(route, kind, head_dim, groups, size, order)
    room = qkv.contiguous()
    found.turn_(routes.packed_view(room, num_heads), payload.contiguous(), rotation)
    if room.data_ptr() != qkv.data_ptr():
        qkv.copy_(room)


@torch.library.custom_op('timm_rope::turned', mutates_args=())
def turned(
        qkv: Tensor, payload: Tensor, route: str, num_heads: int, kind: str, head_dim: int, groups: int, size: int,
        order: str) -> Tuple[Tensor, Tensor, Tensor]:
    """Turned queries and keys and a copy of the values, (B, H, N, D) each, in memory (B, N, H, D)."""
    found, rotation = _found(route, kind, head_dim, groups, size, order)
    return found.turned_copy(routes.packed_view(qkv, num_heads), payload.contiguous(), rotation)


@torch.library.custom_op('timm_rope::turned_back', mutates_args=())
def turned_back(
        dq: Tensor, dk: Tensor, dv: Tensor, payload: Tensor, q: Tensor, k: Tensor, payload_grad: bool, route: str,
        kind: str, head_dim: int, groups: int, size: int, order: str) -> Tuple[Tensor, Tensor]:
    """Gradients of the projection and of the payload, the latter empty unless it is wanted."""
    found, rotation = _found(route, kind, head_dim, groups, size, order)
    dqkv, dpayload = found.turn_back(dq, dk, dv, payload.contiguous(), rotation, q, k, payload_grad)
    return dqkv.flatten(2), payload.new_empty(0) if dpayload is None else dpayload


@turned.register_fake
def _(qkv, payload, route, num_heads, kind, head_dim, groups, size, order):
    shape = qkv.shape[0], qkv.shape[1], num_heads, head_dim
    return tuple(qkv.new_empty(shape).transpose(1, 2) for _ in range(3))


@turned_back.register_fake
def _(dq, dk, dv, payload, q, k, payload_grad, route, kind, head_dim, groups, size, order):
    batch, heads, tokens, _ = dq.shape
    dpayload = payload.new_empty(payload.shape if payload_grad else 0)
    return dq.new_empty(batch, tokens, 3 * heads * head_dim), dpayload


def _keep(ctx: Any, inputs: Tuple[Any, ...], output: Tensors) -> None:
    _, payload, ctx.route, _, *ctx.described = inputs
    q, k, _ = output
    # attention keeps the turned queries and keys too, so that they cost nothing here
    ctx.save_for_backward(payload, q, k)
    ctx.payload_grad = payload.requires_grad


def _gradients(ctx: Any, dq: Tensor, dk: Tensor, dv: Tensor) -> Tuple[Any, ...]:
    payload, q, k = ctx.saved_tensors
    dqkv, dpayload = turned_back(dq, dk, dv, payload, q, k, ctx.payload_grad, ctx.route, *ctx.described)
    return (dqkv, dpayload if ctx.payload_grad else None, *[None] * 7)


turned.register_autograd(_gradients, setup_context=_keep)
