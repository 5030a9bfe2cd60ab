"""What a channel group turns by: tables of frequencies. Plain numbers in, tensors out, no modules.

Frequencies are in radians per unit of coordinate. Everywhere the first axis is (x, y), x first, and of D dimensions
(x), or (x, y, z): the last coordinate of a position first.
"""
import math
from typing import Any, List

import torch
from torch import Tensor

from .._precision import widest


def geometric(count: int, temperature: float) -> List[float]:
    """temperature^(-g / count) for g = 0 .. count - 1: from 1 down to almost 1 / temperature.

    arXiv 2403.13298, eq. 7 with count = head_dim / 4. The formula printed in arXiv 2511.08368 (section 3),
    100^(-2g / count), is this one at temperature 10000.
    """
    return [temperature ** (-g / count) for g in range(count)]


def axial(w: List[float], dims: int) -> List[List[float]]:
    """Wave vectors on the axes: the first len(w) groups turn with x only, the next with y only, and so on."""
    return [[0.0] * len(w) * axis + w + [0.0] * len(w) * (dims - 1 - axis) for axis in range(dims)]


def turned_basis(count: int, temperature: float, dims: int, like: Tensor) -> Tensor:
    """Axial wave vectors turned together, the initialisation of RoPE-Mixed (arXiv 2403.13298, section 3.2).

    A part of the waves, as equal as can be and the earlier ones larger, lies on each axis, with lengths from 1 down to
    almost 1 / temperature. In the plane they are turned by a random angle, in space by a rotation drawn evenly from
    all of them; on a line there is nothing to turn.

    Args:
        count: P, waves.
        temperature: Ratio of the longest to the shortest.
        dims: D.
        like: (L, H), a basis each; its dtype and device are those of the result.

    Returns:
        (D, L, H, P), x first.
    """
    part = -(-count // dims)
    lengths = torch.tensor(
        (geometric(part, temperature) * dims)[:count], device=like.device, dtype=like.dtype)
    if dims == 2:
        angles = 2 * math.pi * torch.rand(*like.shape, 1, device=like.device, dtype=like.dtype)
        quarter = torch.zeros_like(lengths)
        quarter[part:] = math.pi / 2
        angles = angles + quarter
        return torch.stack((lengths * angles.cos(), lengths * angles.sin()))
    turn, triangle = torch.linalg.qr(torch.randn(*like.shape, dims, dims, device=like.device, dtype=like.dtype))
    turn = turn * triangle.diagonal(dim1=-2, dim2=-1).sign().unsqueeze(-2)  # even
    turn = turn * torch.linalg.det(turn).sign()[..., None, None]  # no reflection, as 1 and 3 are odd
    axis = torch.arange(count, device=like.device) // part
    return lengths * turn.index_select(-1, axis).movedim(-2, 0)


def split(values: Any) -> Tensor:
    """Frequencies (D, ...) as they are kept where float32 is too coarse: (2 D, ...), rounded, and what rounding left.

    An angle of 90 rad is off by up to 5e-6 if it is made of a frequency that was rounded to float32.
    """
    exact = torch.as_tensor(values, dtype=torch.float64, device='cpu')
    return torch.cat((exact.float().double(), exact - exact.float().double()))


def joined(freqs: Tensor) -> Tensor:
    """The frequencies (D, ...) that `split` made (2 D, ...) of, in the widest dtype there is."""
    half = freqs.shape[0] // 2
    return widest(freqs[:half]) + widest(freqs[half:])
