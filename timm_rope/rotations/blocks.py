"""Blocks of channels turn by the exponential of a skew-symmetric matrix, which `exponential.py` makes."""
from typing import List

import torch
from torch import Tensor

from .._precision import without_autocast
from .._tracing import recording
from .base import Rotation, with_rest
from .exponential import block_table, block_table_nd, commuting_table

torch.fx.wrap('commuting_table')
torch.fx.wrap('block_table')  # in every module that calls it: FX looks the name up there


class BlockRotation(Rotation):
    """Channels (bg, ..., bg+b-1) turn by exp(x A_x + y A_y), A skew-symmetric b x b (LieRE, arXiv 2406.10322, eq. 3).

    Here `freqs` holds the strict upper triangles of the generators, row by row: (2, L, H, G, b (b - 1) / 2).
    Payload: the G matrices, row-major.

    Args:
        commuting: Whether A_x and A_y of every block commute, whatever is learned: then `table` is faster and closer.
    """
    kind = 'blocks'

    def __init__(self, head_dim: int, size: int, commuting: bool = False) -> None:
        groups = head_dim // size
        super().__init__(head_dim, size, groups, groups * size * size)
        self.commuting = commuting

    def table(self, freqs: Tensor, y: Tensor, x: Tensor) -> Tensor:
        if self.commuting:
            return commuting_table(freqs, y, x, self.size)
        return block_table(freqs, y, x, self.size)

    def table_nd(self, freqs: Tensor, axes: List[Tensor]) -> Tensor:
        # one axis has the fast way of two
        return super().table_nd(freqs, axes) if len(axes) == 1 else block_table_nd(freqs, axes, self.size)

    def forward(self, x: Tensor, payload: Tensor) -> Tensor:
        return turn_blocks(x, payload, self.groups, self.size)


@torch.fx.wrap
def turn_blocks(x: Tensor, payload: Tensor, groups: int, size: int) -> Tensor:
    if torch.jit.is_scripting():
        return _turn_blocks(x, payload, groups, size)
    with without_autocast(x):
        return _turn_blocks(x, payload, groups, size)


def _turn_blocks(x: Tensor, payload: Tensor, groups: int, size: int) -> Tensor:
    rotated = groups * size
    matrices = payload.unflatten(-1, [groups, size, size])
    blocks = x[..., :rotated].to(payload.dtype).unflatten(-1, [groups, size])
    return with_rest(_matrix_times_vector(matrices, blocks), x, rotated, x.shape[-1])


def _matrix_times_vector(matrices: Tensor, vectors: Tensor) -> Tensor:
    if not torch.jit.is_scripting():
        if recording():
            # ONNX knows no einsum whose ellipsis broadcasts; elsewhere this one would copy the matrices for each image
            return (matrices @ vectors.unsqueeze(-1)).squeeze(-1)
    return torch.einsum('...ij,...j->...i', [matrices, vectors])
