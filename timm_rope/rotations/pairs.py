"""Pairs of channels turn by one angle: a plane rotation, as in RoPE for text."""
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

    def forward(self, x: Tensor, payload: Tensor) -> Tensor:
        cos, sin = payload[..., 0::2], payload[..., 1::2]
        a, b = x[..., 0:self.rotated:2], x[..., 1:self.rotated:2]
        turned = torch.stack((a * cos - b * sin, a * sin + b * cos), dim=-1)
        return with_rest(turned, x, self.rotated, self.head_dim)


@torch.fx.wrap
def pair_table(freqs: Tensor, y: Tensor, x: Tensor) -> Tensor:
    cos_x, sin_x = cos_sin(by_rows(x), freqs[0])  # (L, H, rows or 1, columns, G)
    cos_y, sin_y = cos_sin(y.unsqueeze(1), freqs[1])  # (L, H, rows, 1, G)
    turns = torch.stack((cos_y * cos_x - sin_y * sin_x, sin_y * cos_x + cos_y * sin_x), dim=-1)
    return turns.flatten(-2).flatten(2, 3)
