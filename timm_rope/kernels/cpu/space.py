"""Blocks of three channels as three multiplications of complex numbers, at the price of `triplets`.

Every rotation of space is a sequence of three turns in two planes, of channels (1, 2), (0, 1) and (1, 2) again, or of
(0, 1), (1, 2) and (0, 1). Seen as complex numbers from channel 1 of a head, the outer plane of the first sequence
is a number in every second triplet, that of the other sequence in the rest; the inner planes are numbers as seen from
channel 0. So with one sequence for even triplets and one for odd ones three multiplications turn all of them.
"""
from typing import List, Optional, Tuple

import torch
from torch import Tensor

from ...rotations import Rotation
from . import products
from .derived_cache import cached_table
from .packing import pack
from .pairs import viewable_as_complex
from .triplets import multiply_, torques

BY_IMAGE = True


def supports(packed: Tensor, payload: Tensor, rotation: Rotation) -> bool:
    return viewable_as_complex(packed) or products.supports(packed, payload, rotation)


def turn_(packed: Tensor, payload: Tensor, rotation: Rotation) -> None:
    if not viewable_as_complex(packed):
        products.turn_(packed, payload, rotation)
        return
    for start, turns in cached_table(payload, multiplications, rotation):
        multiply_(packed[:, :, :2], start, turns)


def turn_back(
        dq: Tensor, dk: Tensor, dv: Tensor, payload: Tensor, rotation: Rotation,
        q: Optional[Tensor], k: Optional[Tensor], payload_grad: bool,
) -> Tuple[Tensor, Optional[Tensor]]:
    if dv.shape[-1] % 2:
        return products.turn_back(dq, dk, dv, payload, rotation, q, k, payload_grad)
    out = pack(dq, dk, dv)
    grad = None
    if payload_grad and q is not None and k is not None:
        grad = matrix_gradient(torques(out, q, k, payload, rotation), payload, rotation)
    for start, turns in reversed(cached_table(payload, multiplications, rotation)):
        multiply_(out[:, :, :2], start, turns.conj_physical())
    return out, grad


def matrix_gradient(torque: Tuple[Tensor, Tensor, Tensor], payload: Tensor, rotation: Rotation) -> Tensor:
    """Gradient of the matrices R along the rotations: [t] R / 2 with [t] v = t x v.

    A small turn about an axis w changes R by [w] R, and the scalar product of the two is w t, as it must be.
    """
    rows = payload.unflatten(-1, (rotation.groups, 3, 3))
    axis = torch.stack(torque, dim=-1).unsqueeze(-1)
    return (0.5 * torch.linalg.cross(axis.expand_as(rows), rows, dim=-2)).flatten(-3)


def multiplications(payload: Tensor, rotation: Rotation) -> List[Tuple[int, Tensor]]:
    """The three multiplications: the channel from which a head is looked at, and the factors.

    Factors are complex numbers of length one, (N, H or 1, pairs) or (B, N, H or 1, pairs), and one where a pair of this
    view is not to turn.
    """
    matrices = payload.detach().double().transpose(-3, -2).unflatten(-1, (rotation.groups, 3, 3))
    even = turns_of(matrices[..., ::2, :, :])
    # from back to front the planes are those of the other sequence, and turn the other way
    odd = [turn.conj() for turn in turns_of(matrices[..., 1::2, :, :].flip(-1, -2))]
    out = []
    for i, start in enumerate((1, 0, 1)):
        pairs = (rotation.head_dim - start) // 2
        factors = even[i].new_ones(*even[i].shape[:-1], pairs)
        factors[..., 0:3 * even[i].shape[-1]:3] = even[i]
        first = 2 - start  # pair in which the outer or inner plane of triplet 1 is
        factors[..., first:first + 3 * odd[i].shape[-1]:3] = odd[i]
        out.append((start, factors.to(payload.dtype.to_complex())))
    return out


def turns_of(matrices: Tensor) -> Tuple[Tensor, Tensor, Tensor]:
    """Turns in planes (1, 2), (0, 1) and (1, 2), in the order in which they act, of rotation matrices (..., 3, 3).

    Each is found from what the ones before left over. So where the inner turn is none, and any share of the outer two
    would do, they still make up the matrix.
    """
    sine = torch.complex(matrices[..., 1, 0], matrices[..., 2, 0])
    last = torch.where(sine == 0, 1., sine.sgn())
    inner = torch.complex(matrices[..., 0, 0], sine.abs())
    rest = last.real.unsqueeze(-1) * matrices[..., 2, 1:] - last.imag.unsqueeze(-1) * matrices[..., 1, 1:]
    return torch.complex(rest[..., 1], rest[..., 0]).sgn(), inner.sgn(), last
