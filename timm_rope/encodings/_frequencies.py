"""What a channel group turns by: tables of frequencies. Plain numbers in, tensors out, no modules.

Frequencies are in radians per unit of coordinate. Everywhere the first axis of size 2 is (x, y), x first.
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


def axial(x: List[float], y: List[float]) -> List[List[float]]:
    """Wave vectors on the axes: the first len(x) groups turn with x only, the other len(y) with y only."""
    return [x + [0.0] * len(y), [0.0] * len(x) + y]


def turned_basis(lengths: List[float], angle: Tensor) -> Tensor:
    """Axial wave vectors turned together by an angle, the initialisation of RoPE-Mixed (arXiv 2403.13298, section 3.2).

    Args:
        lengths: P lengths of wave vectors; the second half of the pairs is 90 degrees from the first.
        angle: (..., 1), in radians.

    Returns:
        (2, ..., P), x first.
    """
    magnitudes = torch.tensor(lengths, device=angle.device, dtype=angle.dtype)
    quarter = torch.zeros_like(magnitudes)
    quarter[(len(lengths) + 1) // 2:] = math.pi / 2
    angles = angle + quarter
    return torch.stack((magnitudes * angles.cos(), magnitudes * angles.sin()))


def split(values: Any) -> Tensor:
    """Frequencies (2, ...) as they are kept where float32 is too coarse: (4, ...), rounded, and what rounding left.

    An angle of 90 rad is off by up to 5e-6 if it is made of a frequency that was rounded to float32.
    """
    exact = torch.as_tensor(values, dtype=torch.float64, device='cpu')
    return torch.cat((exact.float().double(), exact - exact.float().double()))


def joined(freqs: Tensor) -> Tensor:
    """The frequencies (2, ...) that `split` made (4, ...) of, in the widest dtype there is."""
    return widest(freqs[:2]) + widest(freqs[2:])
