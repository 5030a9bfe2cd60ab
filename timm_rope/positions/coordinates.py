"""Where the patches of an image are: coordinates of the rows and columns of a grid of any size, and of points.

Sequences have one axis and videos or volumes three: their sizes and coordinates are (x,) and (z, y, x), as those of an
image are (y, x), row and column.

A *reference grid* is the grid the weights were trained on. It fixes the unit of the relative conventions, so a larger
grid reaches further and the step between two patches never changes (but see 'ends', and the rules of `scaling.py`).
The conventions of DINOv3 and EVA differ in what happens without a rule, see `own_rule` there.
"""
import math
from numbers import Integral
from typing import TYPE_CHECKING, Any, List, Optional, Sequence, Tuple

import torch
from torch import Tensor

from .._precision import widest

if TYPE_CHECKING:
    Grid = Tuple[int, ...]  # sizes along each axis
else:
    Grid = Tuple[int, int]  # TorchScript knows one length only: that of images, which is what it is for

LARGEST_DIMS = 3
LARGEST_SIDE = 65535  # patches
LARGEST_DRIFT = 0.25  # of a number that averages of equal numbers may have moved
NORMALISED = ('cells', 'ends', 'dinov3', 'dinov3_min', 'dinov3_max')
COORDS = ('index', 'eva', *NORMALISED)


def in_patches(coords: str) -> bool:
    """Whether coordinates count patches, and are not normalised."""
    return coords == 'index' or coords == 'eva'


def unit(grid: Tensor, coords: str) -> Tensor:
    """Patches in the image that coordinates are normalised by, (D,), of a grid (D,)."""
    if coords == 'dinov3_min':
        return grid.amin(0, keepdim=True).expand(grid.shape[0])
    if coords == 'dinov3_max':
        return grid.amax(0, keepdim=True).expand(grid.shape[0])
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
        grid: List[int],
        reference_grid: Tensor,
        like: Tensor,
        coords: str,
        span: float,
        centered: bool,
        offset: float = 0.,
) -> List[Tensor]:
    """Coordinates along each axis of a grid; a patch is at (y[row], x[column]).

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
        grid: D sizes of the grid, (rows, columns) of an image.
        reference_grid: Tensor (D,), those of the reference grid, which are rounded.
        like: Tensor whose dtype the result has at least; float64 where it can be had.
        coords: One of COORDS.
        span: Length of the reference image in the returned unit (2 pi for an angle, 1 for a fraction).
        centered: Put the origin in the middle of the image instead of its top left corner.
        offset: Added along every axis: patches in 'index' and 'eva', else sides of the image that is at hand.

    Returns:
        D tensors (size,), y and x of an image.
    """
    reference = widest(reference_grid.to(like.dtype)).round()
    size = sizes(grid, reference)
    indices = [index_axis(grid[i], reference) for i in range(len(grid))]
    reference, size = unit(reference, coords), unit(size, coords)
    return [_places(indices[i], size[i], reference[i], coords, span, centered, offset) for i in range(len(grid))]


def sizes(grid: List[int], like: Tensor) -> Tensor:
    """The sizes of a grid, (D,), as another tensor (D,) of sizes; they may be symbols of a graph."""
    return torch.stack([torch.full_like(like[i], grid[i]) for i in range(len(grid))])


def index_axis(size: int, like: Tensor) -> Tensor:
    """0 .. size - 1 in the dtype of another tensor."""
    return torch.arange(size, device=like.device).to(like.dtype)


def point_axes(
        points: Tensor,
        extent: Optional[List[int]],
        reference_grid: Tensor,
        like: Tensor,
        coords: str,
        span: float,
        centered: bool,
        offset: float = 0.,
) -> List[Tensor]:
    """Coordinates of points, between those of the first and the last patch of their grid.

    What depends on where a grid ends (its middle, a clamped wave) finds its ends there, as in `grid_axes`.

    Args:
        points: (..., D), row and column, where the patches of the grid have whole numbers from 0.
        extent: Sizes of the grid; None is the reference grid.
        reference_grid, like, coords, span, centered, offset: As `grid_axes`.

    Returns:
        D tensors (1 + N + 1,).
    """
    reference = widest(reference_grid.to(like.dtype)).round()
    size = reference
    if extent is not None:
        size = sizes(extent, reference)
    wide = widest(points if points.dtype in (torch.float32, torch.float64) else points.to(like.dtype))
    wide = wide.reshape(-1, points.shape[-1])
    wide = torch.cat((torch.zeros_like(size).unsqueeze(0), wide, (size - 1.).unsqueeze(0)))
    places = _places(wide, unit(size, coords), unit(reference, coords), coords, span, centered, offset)
    return list(places.unbind(-1))


def reference_side(reference_grid: Tensor, like: Tensor, coords: str, span: float) -> Tensor:
    """Length of the reference grid along x, y, ..., (D,), in the unit of the coordinates; arguments as `grid_axes`."""
    side = widest(reference_grid.to(like.dtype)).round()
    return side.flip(0) if in_patches(coords) else (side / unit(side, coords) * span).flip(0)


def square_grid(tokens: int) -> Optional[Tuple[int, int]]:
    """The square grid of a number of patches, None if there is none."""
    side = math.isqrt(max(tokens, 0))
    return (side, side) if side and side * side == tokens else None


def to_grid(value: Any, name: str, dims: Optional[int] = 2) -> Grid:
    """Validate the sizes of a grid; `name` is the argument named in the error, None of dimensions any number to 3."""
    if isinstance(value, Tensor):
        raise TypeError(
            f'{name} must be the grid of an image, two integers (rows, columns) that count its patches, got a tensor '
            f'of shape {tuple(value.shape)}. The children of a model form no chain of layers: call the model.')
    items = list(value) if isinstance(value, (tuple, list, torch.Size)) else value
    if not isinstance(items, list) or len(items) not in (range(1, LARGEST_DIMS + 1) if dims is None else (dims,)) or (
            any(isinstance(i, bool) or not isinstance(i, Integral) or i < 1 for i in items)):
        raise ValueError(f'{name} must be {describe_grid(dims)}, got {value!r}.')
    return tuple(int(i) for i in items)


def describe_grid(dims: Optional[int]) -> str:
    """What a grid is in D dimensions, in words."""
    return {
        None: 'one to three positive integers, as (tokens,), (rows, columns) or (frames, rows, columns)',
        1: 'one positive integer (tokens,)', 2: 'two positive integers (rows, columns)',
        3: 'three positive integers (frames, rows, columns)'}[dims]


def format_grid(grid: Sequence[int]) -> str:
    """A grid in words: '14 x 14'."""
    return ' x '.join(map(str, grid))


def read_grid(value: Tensor, name: str, dims: Optional[int] = 2) -> Grid:
    """The sizes of a grid that is saved as a tensor: integers, or floating point numbers close to integers.

    Raises:
        ValueError: It is no grid of that many dimensions, None being any; `name` is what the error calls it.
    """
    numbers: List[Any] = [value] if value.is_complex() else value.detach().cpu().flatten().tolist()
    if len(numbers) <= LARGEST_DIMS and value.is_floating_point():
        # what averaging may have moved; in half precision the numbers are whole from 2048 on
        if any(not math.isfinite(n) or abs(n - round(n)) > LARGEST_DRIFT for n in numbers):
            words = describe_grid(dims).replace('positive integer', 'whole number')
            raise ValueError(f'{name} must be {words}, got {numbers}: an average of weights of two grids has none.')
        numbers = [round(n) for n in numbers]
    grid = to_grid(numbers, name, dims)
    if max(grid) > LARGEST_SIDE:
        raise ValueError(f'{name} must be the grid of an image, of at most {LARGEST_SIDE} patches a side, got {grid}.')
    return grid
