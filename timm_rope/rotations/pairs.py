"""Pairs of channels turn by one angle: a plane rotation, as in RoPE for text."""
from typing import List

import torch
from torch import Tensor

from .base import Rotation, by_rows, with_rest
from .sines import cos_sin


class PairRotation(Rotation):
    """Channels (2g, 2g+1) turn by the angle w_x x + w_y y, counter-clockwise (arXiv 2403.13298, eq. 5 and 9).

    Payload: cosine and sine of the G angles, next to each other.
    """
    kind = 'pairs'

    def __init__(self, head_dim: int, groups: int) -> None:
        super().__init__(head_dim, 2, groups, 2 * groups)

    def table(self, freqs: Tensor, y: Tensor, x: Tensor) -> Tensor:
        return pair_table(freqs, y, x)

    def table_nd(self, freqs: Tensor, axes: List[Tensor]) -> Tensor:
        return pair_turns(freqs, axes)

    def forward(self, x: Tensor, payload: Tensor) -> Tensor:
        cos, sin = payload[..., 0::2], payload[..., 1::2]
        a, b = x[..., 0:self.rotated:2], x[..., 1:self.rotated:2]
        turned = torch.stack((a * cos - b * sin, a * sin + b * cos), dim=-1)
        return with_rest(turned, x, self.rotated, self.head_dim)


@torch.fx.wrap
def pair_table(freqs: Tensor, y: Tensor, x: Tensor) -> Tensor:
    return pair_turns(freqs, [y.unsqueeze(1), by_rows(x)])


def pair_turns(freqs: Tensor, axes: List[Tensor]) -> Tensor:
    """Cosine and sine of every angle, next to each other; arguments as `Rotation.table_nd`, of one axis or more."""
    cos, sin = cos_sin(axes[-1], freqs[0])  # (L, H, 1 or rows, columns, G)
    for i in range(1, len(axes)):
        of_cos, of_sin = cos_sin(axes[-1 - i], freqs[i])  # (L, H, rows, 1, G)
        cos, sin = of_cos * cos - of_sin * sin, of_sin * cos + of_cos * sin
    return torch.stack((cos, sin), dim=-1).flatten(-2).flatten(2, -2)
