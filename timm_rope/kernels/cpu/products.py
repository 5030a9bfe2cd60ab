"""Blocks of channels by batched matrix products.

All queries and keys that are turned by one matrix, those of every image at one position and head, are gathered as the
rows of one product, so that a matrix is read once and not once for each image.
"""
import functools
from typing import Optional, Tuple

import torch
from torch import Tensor

from ...rotations import BlockRotation, Rotation
from .derived_cache import cached_table
from .packing import pack, packed_of

BY_IMAGE = False  # a product of a matrix with few rows is slow
STRIDED = 32  # rows of at least so many channels are copied by strides; below, index_select is three times as fast
JOINED = 8  # up to this size two neighbouring blocks become one: half as many rows to gather


def supports(packed: Tensor, payload: Tensor, rotation: Rotation) -> bool:
    return isinstance(rotation, BlockRotation) and payload.ndim == 3


def turn_(packed: Tensor, payload: Tensor, rotation: Rotation) -> None:
    matrices = cached_table(payload, matrices_of, rotation)
    x = fetch(packed, rotation, payload.shape[0] == 1)
    store(packed, torch.bmm(x, matrices.transpose(1, 2)), rotation, payload.shape[0] == 1)


def turn_back(
        dq: Tensor, dk: Tensor, dv: Tensor, payload: Tensor, rotation: Rotation,
        q: Optional[Tensor], k: Optional[Tensor], payload_grad: bool,
) -> Tuple[Tensor, Optional[Tensor]]:
    shared = payload.shape[0] == 1
    out = pack(dq, dk, dv)
    grad = fetch(out, rotation, shared)
    sums = None
    if payload_grad and q is not None and k is not None:  # before `store`, since the rows may be a view of `out`
        sums = torch.bmm(grad.transpose(1, 2), fetch(packed_of(q, k), rotation, shared))
    store(out, torch.bmm(grad, cached_table(payload, matrices_of, rotation)), rotation, shared)
    if sums is None:
        return out, None
    b, count = rotation.size, rotation.groups // blocks(rotation)[0]
    sums = torch.stack([sums[:, i * b:i * b + b, i * b:i * b + b] for i in range(count)], dim=1)
    # with y = R x it is g x^T = (g y^T) R
    return out, torch.bmm(sums.flatten(0, 1), payload.reshape(-1, b, b)).view_as(payload)


def blocks(rotation: Rotation) -> Tuple[int, int]:
    """How many matrices turn the channels of a head, and their size, once neighbours are joined."""
    count = 2 if rotation.size <= JOINED and rotation.groups % 2 == 0 else 1
    return rotation.groups // count, rotation.size * count


def matrices_of(payload: Tensor, rotation: Rotation) -> Tensor:
    """(H or 1, N, W) -> all matrices (H or 1 * N * `blocks`), row by row."""
    b, (groups, wide) = rotation.size, blocks(rotation)
    count = rotation.groups // groups
    parts = payload.reshape(-1, count, b, b)
    if count == 1:
        return parts[:, 0]
    out = payload.new_zeros(parts.shape[0], wide, wide)
    for i in range(count):
        out[:, i * b:i * b + b, i * b:i * b + b] = parts[:, i]
    return out


def fetch(packed: Tensor, rotation: Rotation, shared: bool) -> Tensor:
    """Queries and keys of (B, N, 2 or 3, H, D) as rows: (matrices, rows to a matrix, size of a matrix)."""
    groups, size = blocks(rotation)
    matrices = packed.shape[1] * groups * (1 if shared else packed.shape[3])
    if size < STRIDED and rotation.rotated == rotation.head_dim and packed.is_contiguous():
        index = row_numbers(*packed.shape[:4], groups, shared)
        return packed.view(-1, size).index_select(0, index).view(matrices, -1, size)
    return by_matrix(rows_of(packed, rotation), shared).reshape(matrices, -1, size)


def store(packed: Tensor, x: Tensor, rotation: Rotation, shared: bool) -> None:
    """Write rows (matrices, rows to a matrix, size) back to where `fetch` has taken them from."""
    target = by_matrix(rows_of(packed, rotation), shared)
    target.copy_(x.view(target.shape))


def rows_of(packed: Tensor, rotation: Rotation) -> Tensor:
    """Queries and keys, (B, N, 2, H, matrices of a head, size)."""
    return packed[:, :, :2, :, :rotation.rotated].unflatten(-1, blocks(rotation))


def by_matrix(rows: Tensor, shared: bool) -> Tensor:
    """(B, N, 2, H, G, ...) -> (H, N, G, B, 2, ...), or (N, G, B, 2, H, ...) where heads share their matrices."""
    rest = range(5, rows.ndim)
    return rows.permute(*((1, 4, 0, 2, 3) if shared else (3, 1, 4, 0, 2)), *rest)


@functools.lru_cache(maxsize=4)
def row_numbers(batch: int, tokens: int, parts: int, heads: int, groups: int, shared: bool) -> Tensor:
    """Numbers of the rows of a packed tensor in the order in which `fetch` takes them."""
    with torch.inference_mode(False):
        number = torch.arange(batch * tokens * parts * heads * groups, dtype=torch.int32, device='cpu')
        return by_matrix(number.view(batch, tokens, parts, heads, groups)[:, :, :2], shared).flatten()
