"""The memory of a projection: side by side the queries, keys and values of every token.

Gradients are put into the same order here, the memory behind queries and keys is found again, and batches are cut into
ranges of images that stay in the cache of a core.
"""
from typing import Iterator

import torch
from torch import Tensor

PIECE = 80 * 1024  # numbers of queries or keys worked on at a time: a few such arrays stay in the cache of a core


def pack(*parts: Tensor) -> Tensor:
    """Parts (B, H, N, D) -> (B, N, parts, H, D), contiguous."""
    B, H, N, D = parts[0].shape
    out = torch.empty(B, N, len(parts), H, D, dtype=parts[0].dtype, device=parts[0].device)
    for i, part in enumerate(parts):
        out[:, :, i].copy_(part.transpose(1, 2))
    return out


def packed_of(q: Tensor, k: Tensor) -> Tensor:
    """(B, N, 2 or 3, H, D) that begins with q and k (B, H, N, D): the memory that they are views of, or a copy."""
    B, H, N, D = q.shape
    token = q.stride(2)
    # The strides are those that `unpack` gives to views of (B, N, 2 or 3, H, D); the keys must follow the queries in
    # the same memory, and the last token must lie inside it.
    if token in (2 * H * D, 3 * H * D) and q.stride() == k.stride() == (N * token, D, token, 1):
        storage, start = q.untyped_storage(), q.storage_offset()
        room = storage.nbytes() // q.element_size() - start
        if k.storage_offset() == start + H * D and k.untyped_storage().data_ptr() == storage.data_ptr():
            if room >= B * N * token:
                return q.as_strided([B, N, token // (H * D), H, D], [N * token, token, H * D, D, 1])
    return pack(q, k)


def images_at_a_time(x: Tensor) -> int:
    """How many images of x (B, ...) make a piece: one that is large, many that are small."""
    return max(1, min(x.shape[0], PIECE // max(1, x[0].numel())))


def image_ranges(x: Tensor) -> Iterator[slice]:
    """Ranges of images of x (B, ...) that are worked on one after the other, so that each stays in the cache."""
    step = images_at_a_time(x)
    for start in range(0, x.shape[0], step):
        yield slice(start, min(start + step, x.shape[0]))
