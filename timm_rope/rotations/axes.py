"""Triplets of channels turn about two axes of space in sequence, one for each axis of the image."""
from typing import List

import torch
from torch import Tensor

from .._precision import widest
from .base import by_rows
from .blocks import BlockRotation
from .sines import cos_sin

torch.fx.wrap('axes_table')


class AxesRotation(BlockRotation):
    """Channels (3g, 3g+1, 3g+2) turn by exp(x [a_x]) exp(y [a_y]), [a] v = a x v (QuatRo, arXiv 2511.11665).

    Here `freqs` holds the axes of rotation, as long as their frequency: (2, L, H, G, 3). Payload as `BlockRotation`:
    the G matrices, row-major.

    Of one and of three axes there are as many factors. Frequencies (3, L, H, G) turn about the axes of space: x about
    the third, as the yaw of `TripletRotation`, y about the first, as its roll, and z about the second.

    Args:
        order: In which order the axes of the image act. 'yx': y first, as written above; 'xy': x.
    """

    def __init__(self, head_dim: int, order: str = 'yx') -> None:
        super().__init__(head_dim, 3)
        self.order = order

    def table(self, freqs: Tensor, y: Tensor, x: Tensor) -> Tensor:
        return axes_table(freqs, y, x, self.order)

    def table_nd(self, freqs: Tensor, axes: List[Tensor]) -> Tensor:
        freqs = about_space(freqs) if freqs.ndim == 4 else freqs
        turns = [_quaternions(axes[-1 - i], freqs[i]) for i in map('xyz'.index, self.order)]
        turn = turns[0]
        for following in turns[1:]:
            turn = _product(following, turn)
        return _matrices(turn).flatten(-2).flatten(2, -2)

    def extra_repr(self) -> str:
        return f'{super().extra_repr()}, order={self.order}'


def about_space(freqs: Tensor) -> Tensor:
    """Frequencies (D, L, H, G) as axes of rotation (D, L, H, G, 3): of x the third axis of space, first, second."""
    units = torch.eye(3, dtype=freqs.dtype, device=freqs.device).roll(1, 0)[:len(freqs)]
    return freqs.unsqueeze(-1) * units[:, None, None, None]


def axes_table(freqs: Tensor, y: Tensor, x: Tensor, order: str) -> Tensor:
    along_x, along_y = _quaternions(by_rows(x), freqs[0]), _quaternions(y.unsqueeze(1), freqs[1])
    turns = _product(along_x, along_y) if order == 'yx' else _product(along_y, along_x)
    return _matrices(turns).flatten(-2).flatten(2, 3)


def _quaternions(position: Tensor, axes: Tensor) -> Tensor:
    """Unit quaternions of turns about axes (L, H, G, 3) at positions (...): (L, H, ..., G, 4), real part first."""
    wide = widest(axes)
    length = wide.square().sum(-1).clamp_min(1e-20).sqrt()  # the clamp keeps the derivative finite at 0
    cos, sin = cos_sin(position, 0.5 * length)
    direction = wide / length.unsqueeze(-1)
    for _ in range(position.ndim):
        direction = direction.unsqueeze(2)
    return torch.cat((cos.unsqueeze(-1), sin.unsqueeze(-1) * direction), dim=-1).to(axes.dtype)


def _product(p: Tensor, q: Tensor) -> Tensor:
    """p q, the turn by q followed by that of p."""
    a, b, c, d = p[..., 0], p[..., 1], p[..., 2], p[..., 3]
    e, f, g, h = q[..., 0], q[..., 1], q[..., 2], q[..., 3]
    return torch.stack((
        a * e - b * f - c * g - d * h, a * f + b * e + c * h - d * g,
        a * g - b * h + c * e + d * f, a * h + b * g - c * f + d * e), dim=-1)


def _matrices(q: Tensor) -> Tensor:
    """Rotation matrices, row-major: (..., 4) -> (..., 9)."""
    a, b, c, d = q[..., 0], 2 * q[..., 1], 2 * q[..., 2], 2 * q[..., 3]
    bb, cc, dd = b * q[..., 1], c * q[..., 2], d * q[..., 3]
    bc, bd, cd = b * q[..., 2], b * q[..., 3], c * q[..., 3]
    return torch.stack((
        1 - cc - dd, bc - a * d, bd + a * c, bc + a * d, 1 - bb - dd, cd - a * b, bd - a * c, cd + a * b, 1 - bb - cc),
        dim=-1)
