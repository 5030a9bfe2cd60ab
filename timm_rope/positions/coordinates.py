"""Where the patches of an image are: coordinates of the rows and columns of a grid of any size, and of points.

A *reference grid* is the grid the weights were trained on. It fixes the unit of the relative conventions, so a larger
grid reaches further and the step between two patches never changes (but see 'ends', and the rules of `scaling.py`).
The conventions of DINOv3 and EVA differ in what happens without a rule, see `own_rule` there.
"""
import math
from numbers import Integral
from typing import Any, List, Optional, Tuple

import torch
from torch import Tensor

from .._precision import widest

LARGEST_SIDE = 65535  # patches
LARGEST_DRIFT = 0.25  # of a number that averages of equal numbers may have moved
NORMALISED = ('cells', 'ends', 'dinov3', 'dinov3_min', 'dinov3_max')
COORDS = ('index', 'eva', *NORMALISED)


def in_patches(coords: str) -> bool:
    """Whether coordinates count patches, and are not normalised."""
    return coords == 'index' or coords == 'eva'


def unit(grid: Tensor, coords: str) -> Tensor:
    """Patches in the image that coordinates are normalised by, (2,), of a grid (rows, columns)."""
    if coords == 'dinov3_min':
        return grid.amin(0, keepdim=True).expand(2)
    if coords == 'dinov3_max':
        return grid.amax(0, keepdim=True).expand(2)
    return grid


def _places(
        index: Tensor, size: Tensor, reference: Tensor, coords: str, span: float, centered: bool, offset: float,
) -> Tensor:
    """Coordinates of what lies where patch `index` of `size` patches does; all shapes that broadcast."""
    if in_patches(coords):
        return index + offset
    if coords == 'ends':
        images = index * (size / ((size - 1.).clamp(min=1.) * reference))
        images = images + torch.where(size > 1., torch.zeros_like(size), 0.5 / reference)  # one patch is in its middle
    else:
        images = (index + 0.5) / reference
    return (images + (offset - 0.5 if centered else offset) * size / reference) * span


def grid_axes(
        height: int,
        width: int,
        reference_grid: Tensor,
        like: Tensor,
        coords: str,
        span: float,
        centered: bool,
        offset: float = 0.,
) -> Tuple[Tensor, Tensor]:
    """Coordinates of the rows and of the columns of a grid; a patch is at (y[row], x[column]).

    * 'index': row and column number from 0; independent of the reference grid. Larger grids extrapolate.
    * 'cells': centre of each patch, (i + 0.5) / n_ref in units of the reference image. Larger grids extrapolate with
      an unchanged step.
    * 'ends': evenly spaced with both ends on the border, as arXiv 2511.08368 (section 4) and LieRE (arXiv 2406.10322)
      print it: from 0 to n / n_ref. The step is n / (n - 1) / n_ref, so it shrinks by 3.7 % from 14 to 28 patches.
    * 'dinov3': as 'cells', of a model that was trained to have every grid squeezed or stretched to the reference image
      (DINOv3, arXiv 2508.10104). 'dinov3_min' and 'dinov3_max' normalise both axes by the shorter or the longer side,
      and have the origin half of that side from the corner.
    * 'eva': as 'index', of a model that was trained so: patch i is then at i n_ref / n (EVA-02, arXiv 2303.11331).

    Args:
        height: Rows of the grid.
        width: Columns of the grid.
        reference_grid: Tensor (2,), rows and columns of the reference grid, which are rounded.
        like: Tensor whose dtype the result has at least; float64 where it can be had.
        coords: One of COORDS.
        span: Length of the reference image in the returned unit (2 pi for an angle, 1 for a fraction).
        centered: Put the origin in the middle of the image instead of its top left corner.
        offset: Added along both axes: patches in 'index' and 'eva', else sides of the image that is at hand.

    Returns:
        y (height,) and x (width,).
    """
    reference = widest(reference_grid.to(like.dtype)).round()
    size = torch.stack((torch.full_like(reference[0], height), torch.full_like(reference[1], width)))
    rows, columns = index_axis(height, reference), index_axis(width, reference)
    reference, size = unit(reference, coords), unit(size, coords)
    return (
        _places(rows, size[0], reference[0], coords, span, centered, offset),
        _places(columns, size[1], reference[1], coords, span, centered, offset),
    )


def index_axis(size: int, like: Tensor) -> Tensor:
    """0 .. size - 1 in the dtype of another tensor."""
    return torch.arange(size, device=like.device).to(like.dtype)


def point_axes(
        points: Tensor,
        extent: Optional[Tuple[int, int]],
        reference_grid: Tensor,
        like: Tensor,
        coords: str,
        span: float,
        centered: bool,
        offset: float = 0.,
) -> Tuple[Tensor, Tensor]:
    """Coordinates of points, between those of the first and the last patch of their grid.

    What depends on where a grid ends (its middle, a clamped wave) finds its ends there, as in `grid_axes`.

    Args:
        points: (..., 2), row and column, where the patches of the grid have whole numbers from 0.
        extent: (rows, columns) of the grid; None is the reference grid.
        reference_grid, like, coords, span, centered, offset: As `grid_axes`.

    Returns:
        y (1 + N + 1,) and x (1 + N + 1, 1), a grid of one column: see `Rotation.table`.
    """
    reference = widest(reference_grid.to(like.dtype)).round()
    size = reference
    if extent is not None:
        size = torch.stack((torch.full_like(reference[0], extent[0]), torch.full_like(reference[1], extent[1])))
    wide = widest(points if points.dtype in (torch.float32, torch.float64) else points.to(like.dtype)).reshape(-1, 2)
    wide = torch.cat((torch.zeros_like(size).unsqueeze(0), wide, (size - 1.).unsqueeze(0)))
    places = _places(wide, unit(size, coords), unit(reference, coords), coords, span, centered, offset)
    return places[:, 0], places[:, 1:]


def reference_side(reference_grid: Tensor, like: Tensor, coords: str, span: float) -> Tensor:
    """Length of the reference grid along x and y, (2,), in the unit of the coordinates; arguments as `grid_axes`."""
    side = widest(reference_grid.to(like.dtype)).round()
    return side.flip(0) if in_patches(coords) else (side / unit(side, coords) * span).flip(0)


def square_grid(tokens: int) -> Optional[Tuple[int, int]]:
    """The square grid of a number of patches, None if there is none."""
    side = math.isqrt(max(tokens, 0))
    return (side, side) if side and side * side == tokens else None


def to_grid(value: Any, name: str) -> Tuple[int, int]:
    """Validate (rows, columns) of a grid; `name` is the argument named in the error."""
    if isinstance(value, Tensor):
        raise TypeError(
            f'{name} must be the grid of an image, two integers (rows, columns) that count its patches, got a tensor '
            f'of shape {tuple(value.shape)}. The children of a model form no chain of layers: call the model.')
    items = list(value) if isinstance(value, (tuple, list, torch.Size)) else value
    if not isinstance(items, list) or len(items) != 2 or any(
            isinstance(i, bool) or not isinstance(i, Integral) or i < 1 for i in items):
        raise ValueError(f'{name} must be two positive integers (rows, columns), got {value!r}.')
    return int(items[0]), int(items[1])


def read_grid(value: Tensor, name: str) -> Tuple[int, int]:
    """(rows, columns) of a grid that is saved as a tensor: integers, or floating point numbers close to integers.

    Raises:
        ValueError: It is no grid of an image; `name` is what the error calls it.
    """
    numbers: List[Any] = [value] if value.is_complex() else value.detach().cpu().flatten().tolist()
    if len(numbers) == 2 and value.is_floating_point():
        # what averaging may have moved; in half precision the numbers are whole from 2048 on
        if any(not math.isfinite(n) or abs(n - round(n)) > LARGEST_DRIFT for n in numbers):
            raise ValueError(f'{name} must be two whole numbers (rows, columns), got {numbers}: an average of weights '
                             f'of two grids has none.')
        numbers = [round(n) for n in numbers]
    grid = to_grid(numbers, name)
    if max(grid) > LARGEST_SIDE:
        raise ValueError(f'{name} must be the grid of an image, of at most {LARGEST_SIDE} patches a side, got {grid}.')
    return grid
