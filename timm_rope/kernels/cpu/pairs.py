"""Pairs of channels as complex numbers: one multiplication turns queries and keys."""
from typing import Optional, Tuple

import torch
from torch import Tensor

from ...rotations import PairRotation, Rotation
from .packing import image_ranges, images_at_a_time

BY_IMAGE = True


def supports(packed: Tensor, payload: Tensor, rotation: Rotation) -> bool:
    return isinstance(rotation, PairRotation) and viewable_as_complex(packed)


def turn_(packed: Tensor, payload: Tensor, rotation: Rotation) -> None:
    x = as_complex(packed[:, :, :2], rotation.groups)
    x.mul_(complex_payload(payload, rotation.groups).unsqueeze(-3))


def turn_back(
        dq: Tensor, dk: Tensor, dv: Tensor, payload: Tensor, rotation: Rotation,
        q: Optional[Tensor], k: Optional[Tensor], payload_grad: bool,
) -> Tuple[Tensor, Optional[Tensor]]:
    B, H, N, D = dv.shape
    out = dv.new_empty(B, N, 3, H, D)
    out[:, :, 2].copy_(dv.transpose(1, 2))
    back = complex_payload(payload, rotation.groups).conj_physical()
    total = None
    for i, (grad, turned) in enumerate(((dq, q), (dk, k))):
        grad = grad.transpose(1, 2) if viewable_as_complex(grad) else grad.transpose(1, 2).contiguous()
        torch.mul(as_complex(grad, rotation.groups), back, out=as_complex(out[:, :, i], rotation.groups))
        if rotation.rotated < D:
            out[:, :, i, :, rotation.rotated:].copy_(grad[..., rotation.rotated:])
        if payload_grad and turned is not None:
            y = turned.transpose(1, 2)
            total = gradient_products(
                as_complex(grad, rotation.groups), as_complex(y, rotation.groups), payload.ndim == 4, total)
    if total is None:
        return out, None
    if payload.ndim == 3:
        total = total.sum(0)
    if payload.shape[-3] == 1:
        total = total.sum(-2, keepdim=True)
    # with y = c x it is g conj(x) = g conj(y) c
    return out, torch.view_as_real(total * complex_payload(payload, rotation.groups)).flatten(-2).transpose(-2, -3)


def gradient_products(grad: Tensor, turned: Tensor, each: bool, total: Optional[Tensor] = None) -> Tensor:
    """g conj(y) of (B, N, H, G): (B, N, H, G) if `each` image has its own angles, else sums (images of a piece, ...).

    Added to `total`, if it is given.
    """
    if total is None:
        total = grad.new_zeros(grad.shape[0] if each else images_at_a_time(grad), *grad.shape[1:])
    scratch = torch.empty_like(total[:images_at_a_time(grad)])
    for images in image_ranges(grad):
        count = images.stop - images.start
        torch.conj_physical(turned[images], out=scratch[:count])
        total[images if each else slice(count)].addcmul_(grad[images], scratch[:count])
    return total


def viewable_as_complex(x: Tensor) -> bool:
    """Whether rows lie so that two neighbouring numbers can be seen as a complex one; their length may be odd."""
    return bool(x.stride(-1) == 1 and x.storage_offset() % 2 == 0 and all(s % 2 == 0 for s in x.stride()[:-1]))


def complex_payload(payload: Tensor, groups: int) -> Tensor:
    """cos + i sin of every angle, (N, H or 1, G) or (B, N, H or 1, G)."""
    return as_complex(payload if viewable_as_complex(payload) else payload.contiguous(), groups).transpose(-2, -3)


def as_complex(x: Tensor, groups: int) -> Tensor:
    """The first pairs of channels of (..., D) as a view of complex numbers, (..., groups)."""
    return torch.view_as_complex(x[..., :2 * groups].unflatten(-1, (groups, 2)))
