"""The route of the CPU: whole-tensor operations of torch, in place.

Each kind of rotation has an engine with the functions of a route, for float32 and float64: `pairs`, `triplets`, and of
blocks `space` for those of three channels, `products` for all others. bfloat16 and float16, for which torch has no
complex numbers and slow arithmetic, go through float32, a few images at a time, so that the copy stays in the cache.
"""
from typing import Iterator, Optional, Protocol, Tuple

import torch
from torch import Tensor

from ...rotations import BlockRotation, PairRotation, Rotation, TripletRotation
from .. import routes
from . import pairs, products, space, triplets
from .packing import image_ranges

NAME = 'inplace'
MADE_WITH = f'torch {torch.__version__}'
ALL_OR_NOTHING = False  # several operations, one after the other
FULL = (torch.float32, torch.float64)


class CpuEngine(routes.Engine, Protocol):
    """An engine for float32 and float64."""
    BY_IMAGE: bool  # whether a batch may be cut into ranges of images without losing speed


def engine_for(rotation: Rotation) -> CpuEngine:
    """The engine for a kind of rotation."""
    if isinstance(rotation, PairRotation):
        return pairs
    if isinstance(rotation, TripletRotation):
        return triplets
    return space if isinstance(rotation, BlockRotation) and rotation.size == 3 else products


def supports(packed: Tensor, payload: Tensor, rotation: Rotation) -> bool:
    """Whether this route turns such tensors."""
    if packed.device.type != 'cpu' or payload.device.type != 'cpu' or packed.numel() == 0:
        return False
    if payload.dtype not in FULL or (packed.dtype != payload.dtype and packed.dtype.itemsize != 2):
        return False
    return engine_for(rotation).supports(packed, payload, rotation)


def turn_(packed: Tensor, payload: Tensor, rotation: Rotation) -> None:
    """Turn queries and keys of `packed` (B, N, 3, H, D) in place."""
    engine = engine_for(rotation)
    if packed.dtype == payload.dtype:
        engine.turn_(packed, payload, rotation)
        return
    for images in ranges_for(packed, engine):
        x = packed[images, :, :2]
        wide = x.to(payload.dtype)
        engine.turn_(wide, payload_of(payload, images), rotation)
        x.copy_(wide)


def turned_copy(packed: Tensor, payload: Tensor, rotation: Rotation) -> Tuple[Tensor, Tensor, Tensor]:
    """Turned queries and keys and a copy of the values, (B, H, N, D) each, in three memories (B, N, H, D)."""
    made = packed.contiguous().clone()
    turn_(made, payload, rotation)
    q, k, v = (x.clone(memory_format=torch.contiguous_format).transpose(1, 2) for x in made.unbind(2))
    return q, k, v


def turn_back(
        dq: Tensor, dk: Tensor, dv: Tensor, payload: Tensor, rotation: Rotation,
        q: Optional[Tensor], k: Optional[Tensor], payload_grad: bool,
) -> Tuple[Tensor, Optional[Tensor]]:
    """Gradients of `packed`, (B, N, 3, H, D), and of the payload.

    Args:
        dq: Gradient of the turned queries, (B, H, N, D).
        dk: Gradient of the turned keys.
        dv: Gradient of the values.
        payload: As in the forward pass.
        rotation: As in the forward pass.
        q: Turned queries (B, H, N, D), needed for the gradient of the payload.
        k: Turned keys.
        payload_grad: Whether the payload needs a gradient.
    """
    engine = engine_for(rotation)
    if dv.dtype == payload.dtype:
        return engine.turn_back(dq, dk, dv, payload, rotation, q, k, payload_grad)
    B, H, N, D = dv.shape
    out = dv.new_empty(B, N, 3, H, D)
    total = torch.zeros_like(payload) if payload_grad else None
    for images in ranges_for(out, engine):
        wide_dq, wide_dk, wide_dv = (x[images].to(payload.dtype) for x in (dq, dk, dv))
        wide_q, wide_k = (None if x is None else x[images].to(payload.dtype) for x in (q, k))
        part, grad = engine.turn_back(
            wide_dq, wide_dk, wide_dv, payload_of(payload, images), rotation, wide_q, wide_k, payload_grad)
        out[images].copy_(part)
        if total is not None and grad is not None:
            payload_of(total, images).add_(grad)
    return out, total


def ranges_for(x: Tensor, engine: CpuEngine) -> Iterator[slice]:
    """Ranges of images that an engine is given one after the other."""
    return image_ranges(x) if engine.BY_IMAGE else iter([slice(0, x.shape[0])])


def payload_of(payload: Tensor, images: slice) -> Tensor:
    """The payload of some of the images, if each has its own."""
    return payload[images] if payload.ndim == 4 else payload
