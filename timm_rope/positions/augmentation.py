"""Random coordinates in training: the image moves, stretches and grows under the position encoding alone.

The augmentation of DINOv3 (arXiv 2508.10104), which trains with a rescale of 2. It teaches a model other
distances between patches than those of its reference grid.
"""
import math
from numbers import Real
from typing import Any, List

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
        axes: List[Tensor],
        side: Tensor,
        shift: float,
        jitter: float,
        rescale: float,
) -> List[Tensor]:
    """Move and stretch the coordinates of a grid by one random draw.

    Along each axis p -> c + (p - c + a side / 2) f, with c the middle of the grid: what DINOv3 does to coordinates from
    -1 to 1. So the amounts mean the same in every coordinate convention. 2 D + 1 numbers are drawn by torch's generator
    of the device for D axes, five for an image, whatever the amounts.

    Args:
        axes: Coordinates along each axis of the grid, x last, on axis 0 from its first place to its last.
        side: (D,), length of the reference grid along x, y, ... in the unit of the coordinates.
        shift: a is uniform in [-shift, shift], for each axis apart; 1 is half the reference image.
        jitter: f has a factor that is log-uniform in [1 / jitter, jitter], for each axis apart.
        rescale: f has a factor that is log-uniform in [1 / rescale, rescale], for all axes together.

    Returns:
        The axes anew.
    """
    dims = len(axes)
    draw = torch.rand(2 * dims + 1, dtype=axes[0].dtype, device=axes[0].device) * 2. - 1.
    offset = 0.5 * shift * draw[:dims] * side
    factor = (math.log(jitter) * draw[dims:2 * dims] + math.log(rescale) * draw[2 * dims:]).exp()
    return [_move(axes[i], offset[dims - 1 - i], factor[dims - 1 - i]) for i in range(dims)]


def _move(axis: Tensor, offset: Tensor, factor: Tensor) -> Tensor:
    middle = 0.5 * (axis[0] + axis[-1])
    return middle + (axis - middle + offset) * factor
