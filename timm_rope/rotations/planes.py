"""Blocks of channels turn pair by pair in an orthogonal basis: the exponential of generators that commute."""
from typing import List

import torch
import torch.nn.functional as F
from torch import Tensor

from .._precision import without_autocast
from .base import by_rows
from .blocks import BlockRotation
from .pairs import pair_turns


class PlanesRotation(BlockRotation):
    """Channels (bg, ..., bg+b-1) turn by I + sum_k (cos a_k - 1) (u u^T + v v^T) + sin a_k (v u^T - u v^T).

    Plane k of a block is spanned by u and v, orthogonal to each other and to all other planes, and turns from u to v by
    a_k = w_x x + w_y y. All positions are one product of matrices, those of sines by those of planes.

    Here `freqs` (1, L, H, G, p (D + 2 b)) holds for p planes of a block the waves w along x, those along y, ..., then
    the b rows of the basis (u_1, v_1, u_2, ...). Payload as `BlockRotation`: the G matrices, row-major.

    Args:
        planes: p, at most b // 2; what they leave of a block rests.
    """

    def __init__(self, head_dim: int, size: int, planes: int) -> None:
        super().__init__(head_dim, size)
        self.planes = planes

    def table(self, freqs: Tensor, y: Tensor, x: Tensor) -> Tensor:
        return planes_table(freqs, y, x, self.groups, self.size, self.planes)

    def table_nd(self, freqs: Tensor, axes: List[Tensor]) -> Tensor:
        with without_autocast(freqs):
            return _table(freqs, axes, self.groups, self.size, self.planes)


@torch.fx.wrap
def planes_table(freqs: Tensor, y: Tensor, x: Tensor, groups: int, size: int, planes: int) -> Tensor:
    if torch.jit.is_scripting():
        return _table(freqs, [y.unsqueeze(1), by_rows(x)], groups, size, planes)
    with without_autocast(freqs):
        return _table(freqs, [y.unsqueeze(1), by_rows(x)], groups, size, planes)


def _table(freqs: Tensor, axes: List[Tensor], groups: int, size: int, planes: int) -> Tensor:
    dims, packed = len(axes), freqs[0]  # (L, H, G, p (D + 2 b))
    waves = torch.stack([packed[..., i * planes:(i + 1) * planes].flatten(2) for i in range(dims)])  # (D, L, H, G p)
    turns = pair_turns(waves, axes).unflatten(-1, [groups, planes, 2]).transpose(2, 3)  # (L, H, G, N, p, 2)
    turns = F.pad(torch.stack((turns[..., 0] - 1, turns[..., 1]), dim=-1).flatten(-2), [0, 1], value=1.)
    columns = packed[..., dims * planes:].unflatten(-1, [size, 2 * planes]).transpose(-1, -2)
    u, v = columns[..., ::2, :], columns[..., 1::2, :]  # (L, H, G, p, b)
    both, around = _outer(u, u) + _outer(v, v), _outer(v, u) - _outer(u, v)
    parts = torch.stack((both, around), dim=-3).flatten(-2).flatten(-3, -2)  # (L, H, G, 2 p, b b)
    eye = torch.eye(size, dtype=parts.dtype, device=parts.device).flatten()
    parts = torch.cat((parts, eye.expand(parts[..., :1, :].shape)), dim=-2)
    return (turns @ parts).transpose(2, 3).flatten(3)


def _outer(a: Tensor, b: Tensor) -> Tensor:
    return a.unsqueeze(-1) * b.unsqueeze(-2)
