"""Triplets of channels turn by two angles, one for each axis of the image: two rotations of space in sequence."""
import torch
from torch import Tensor

from .base import Rotation, by_rows, with_rest
from .sines import cos_sin


class TripletRotation(Rotation):
    """Channels (3g, 3g+1, 3g+2) turn by Yaw(w_x x) Roll(w_y y) (arXiv 2511.08368, section 3, Spherical RoPE).

    Yaw turns the first two channels of a triplet, roll the last two. The two do not commute, so the score is relative
    only along the axis that acts last. Payload: cos and sin of the roll angles, then cos and sin of the yaw angles.

    Args:
        order: Which axis acts first. 'yx': the roll by y, as the paper's equation; 'xy': the yaw by x, as the caption
            of its figure 2.
    """
    kind = 'triplets'

    def __init__(self, head_dim: int, groups: int, order: str = 'yx') -> None:
        super().__init__(head_dim, 3, groups, 4 * groups)
        self.order = order

    def table(self, freqs: Tensor, y: Tensor, x: Tensor) -> Tensor:
        return triplet_table(freqs, y, x)

    def forward(self, x: Tensor, payload: Tensor) -> Tensor:
        n = self.groups
        cos_y, sin_y = payload[..., :n], payload[..., n:2 * n]
        cos_x, sin_x = payload[..., 2 * n:3 * n], payload[..., 3 * n:]
        a, b, c = x[..., 0:self.rotated:3], x[..., 1:self.rotated:3], x[..., 2:self.rotated:3]
        if self.order == 'yx':
            turned = b * cos_y - c * sin_y
            last = b * sin_y + c * cos_y
            first = a * cos_x - turned * sin_x
            middle = a * sin_x + turned * cos_x
        else:
            first = a * cos_x - b * sin_x
            turned = a * sin_x + b * cos_x
            middle = turned * cos_y - c * sin_y
            last = turned * sin_y + c * cos_y
        return with_rest(torch.stack((first, middle, last), dim=-1), x, self.rotated, self.head_dim)

    def extra_repr(self) -> str:
        return f'{super().extra_repr()}, order={self.order}'


@torch.fx.wrap
def triplet_table(freqs: Tensor, y: Tensor, x: Tensor) -> Tensor:
    yaw = torch.cat(cos_sin(by_rows(x), freqs[0]), dim=-1).expand(-1, -1, y.shape[0], -1, -1)
    roll = torch.cat(cos_sin(y.unsqueeze(1), freqs[1]), dim=-1).expand(-1, -1, -1, x.shape[-1], -1)
    return torch.cat((roll, yaw), dim=-1).flatten(2, 3)
