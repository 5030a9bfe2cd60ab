"""The route of the CPU: whole-tensor operations of torch, in place.

What turns how is in three engines with the functions of a route, each for float32 or float64: `pairs`, `diagonals`
(triplets and small blocks), `products` (large blocks). bfloat16 and float16, for which torch has no complex numbers
and slow arithmetic, go through float32, a few images at a time, so that the copy stays in the cache.
"""
from types import ModuleType
from typing import Iterator, Optional, Tuple

import torch
from torch import Tensor

from ...rotations.formulas import PairRotation, Rotation, TripletRotation
from . import diagonals, pairs, products, triplets
from .packing import pieces

NAME = 'inplace'
FULL = (torch.float32, torch.float64)


def engine_for(rotation: Rotation) -> ModuleType:
    if isinstance(rotation, PairRotation):
        return pairs
    if isinstance(rotation, TripletRotation) and rotation.head_dim % 2 == 0:
        return triplets
    return diagonals if rotation.size <= diagonals.LARGEST else products


def supports(packed: Tensor, payload: Tensor, rotation: Rotation) -> bool:
    """Whether this route turns such tensors."""
    if packed.device.type != 'cpu' or payload.device.type != 'cpu' or packed.numel() == 0:
        return False
    if payload.dtype not in FULL or (packed.dtype != payload.dtype and packed.dtype.itemsize != 2):
        return False
    return engine_for(rotation).supports(packed, payload, rotation)  # type: ignore[no-any-return]


def turn_(packed: Tensor, payload: Tensor, rotation: Rotation) -> None:
    """Turn queries and keys of `packed` (B, N, 3, H, D) in place."""
    engine = engine_for(rotation)
    if packed.dtype == payload.dtype:
        engine.turn_(packed, payload, rotation)
        return
    for images in parts(packed, engine):
        x = packed[images, :, :2]
        wide = x.to(payload.dtype)
        engine.turn_(wide, own(payload, images), rotation)
        x.copy_(wide)


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
        return engine.turn_back(dq, dk, dv, payload, rotation, q, k, payload_grad)  # type: ignore[no-any-return]
    B, H, N, D = dv.shape
    out = dv.new_empty(B, N, 3, H, D)
    total = torch.zeros_like(payload) if payload_grad else None
    for images in parts(out, engine):
        dq_, dk_, dv_, q_, k_ = (
            None if x is None else x[images].to(payload.dtype) for x in (dq, dk, dv, q, k))
        part, grad = engine.turn_back(dq_, dk_, dv_, own(payload, images), rotation, q_, k_, payload_grad)
        out[images].copy_(part)
        if total is not None:
            own(total, images).add_(grad)
    return out, total


def parts(x: Tensor, engine: ModuleType) -> Iterator[slice]:
    """Ranges of images that are worked on one after the other in float32."""
    return pieces(x) if engine.BY_IMAGE else iter([slice(0, x.shape[0])])


def own(payload: Tensor, images: slice) -> Tensor:
    """The payload of some of the images, if each has its own."""
    return payload[images] if payload.ndim == 4 else payload
