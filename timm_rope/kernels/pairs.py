"""Pairs of channels as complex numbers: one multiplication turns queries and keys."""
from typing import Optional, Tuple

import torch
from torch import Tensor

from ..rotation import PairRotation, Rotation

BY_IMAGE = True  # images may be worked on one by one


def supports(packed: Tensor, payload: Tensor, rotation: Rotation) -> bool:
    return isinstance(rotation, PairRotation) and even(packed)


def turn_(packed: Tensor, payload: Tensor, rotation: Rotation) -> None:
    x = as_complex(packed[:, :, :2], rotation.groups)
    x.mul_(turns(payload, rotation.groups).unsqueeze(-3))


def turn_back(
        dq: Tensor, dk: Tensor, dv: Tensor, payload: Tensor, rotation: Rotation,
        q: Optional[Tensor], k: Optional[Tensor], payload_grad: bool,
) -> Tuple[Tensor, Optional[Tensor]]:
    B, H, N, D = dv.shape
    out = dv.new_empty(B, N, 3, H, D)
    out[:, :, 2].copy_(dv.transpose(1, 2))
    back = turns(payload, rotation.groups).conj_physical()
    total = None
    for i, (grad, turned) in enumerate(((dq, q), (dk, k))):
        grad = grad.transpose(1, 2) if even(grad) else grad.transpose(1, 2).contiguous()
        torch.mul(as_complex(grad, rotation.groups), back, out=as_complex(out[:, :, i], rotation.groups))
        if rotation.rotated < D:
            out[:, :, i, :, rotation.rotated:].copy_(grad[..., rotation.rotated:])
        if payload_grad and turned is not None:
            y = turned.transpose(1, 2)
            total = products(
                as_complex(grad, rotation.groups), as_complex(y, rotation.groups), payload.ndim == 4, total)
    if total is None:
        return out, None
    if payload.shape[-3] == 1:
        total = total.sum(-2, keepdim=True)
    # with y = c x it is g conj(x) = g conj(y) c
    return out, torch.view_as_real(total * turns(payload, rotation.groups)).flatten(-2).transpose(-2, -3)


def products(grad: Tensor, turned: Tensor, each: bool, total: Optional[Tensor] = None) -> Tensor:
    """g conj(y) of (B, N, H, G): of `each` image, if it has its own angles, else summed over images to (N, H, G).

    Added to `total`, if it is given.
    """
    if total is None:
        total = grad.new_zeros(grad.shape[0 if each else 1:])
    scratch = torch.empty_like(total[0] if each else total)
    for image in range(grad.shape[0]):
        torch.conj_physical(turned[image], out=scratch)
        (total[image] if each else total).addcmul_(grad[image], scratch)
    return total


def turns(payload: Tensor, groups: int) -> Tensor:
    """(N, H or 1, G) or (B, N, H or 1, G), complex."""
    return as_complex(payload if even(payload) else payload.contiguous(), groups).transpose(-2, -3)


def even(x: Tensor) -> bool:
    """Whether neighbouring channels of x can be viewed as complex numbers."""
    return bool(
        x.stride(-1) == 1 and x.storage_offset() % 2 == 0 and all(s % 2 == 0 for s in x.stride()[:-1]))


def as_complex(x: Tensor, groups: int) -> Tensor:
    return torch.view_as_complex(x[..., :2 * groups].unflatten(-1, (groups, 2)))
