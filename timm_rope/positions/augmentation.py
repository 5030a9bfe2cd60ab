"""Random coordinates in training: the image moves, stretches and grows under the position encoding alone.

The augmentation of DINOv3 (arXiv 2508.10104), which trains with a rescale of 2. It teaches a model other
distances between patches than those of its reference grid.
"""
import math
from numbers import Real
from typing import Any, Tuple

import torch
from torch import Tensor


def check_amount(value: Any, name: str, neutral: float) -> float:
    """A finite number of at least the neutral one, which is what None stands for."""
    if value is None:
        return neutral
    if isinstance(value, bool) or not isinstance(value, Real) or not math.isfinite(value) or value < neutral:
        raise ValueError(f'{name} must be None or a finite number of at least {neutral:g}, got {value!r}.')
    return float(value)


@torch.fx.wrap
def augment(
        y: Tensor,
        x: Tensor,
        side: Tensor,
        shift: float,
        jitter: float,
        rescale: float,
) -> Tuple[Tensor, Tensor]:
    """Move and stretch the coordinates of a grid by one random draw.

    Along each axis p -> c + (p - c + a side / 2) f, with c the middle of the grid: what DINOv3 does to coordinates from
    -1 to 1. So the amounts mean the same in every coordinate convention. Five numbers are drawn by torch's generator of
    the device, whatever the amounts.

    Args:
        y: (rows,), coordinates of the rows.
        x: (columns,), coordinates of the columns.
        side: (2,), length of the reference grid along x and y in the unit of the coordinates.
        shift: a is uniform in [-shift, shift], for each axis apart; 1 is half the reference image.
        jitter: f has a factor that is log-uniform in [1 / jitter, jitter], for each axis apart.
        rescale: f has a factor that is log-uniform in [1 / rescale, rescale], for both axes together.

    Returns:
        y and x anew.
    """
    draw = torch.rand(5, dtype=y.dtype, device=y.device) * 2. - 1.
    offset = 0.5 * shift * draw[:2] * side
    factor = (math.log(jitter) * draw[2:4] + math.log(rescale) * draw[4:]).exp()
    return _move(y, offset[1], factor[1]), _move(x, offset[0], factor[0])


def _move(axis: Tensor, offset: Tensor, factor: Tensor) -> Tensor:
    middle = 0.5 * (axis[0] + axis[-1])
    return middle + (axis - middle + offset) * factor
