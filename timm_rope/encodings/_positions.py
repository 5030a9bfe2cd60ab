"""From positions to payloads: those of all patches of a grid, or of points anywhere."""
import math
from typing import ClassVar, List, Optional, Tuple

import torch
from torch import Tensor

from .._tracing import plain, recording
from ..positions.augmentation import augment
from ..positions.coordinates import (
    Grid,
    describe_grid,
    grid_axes,
    index_axis,
    point_axes,
    read_grid,
    reference_side,
    to_grid,
)
from ..positions.scaling import growth, interpolate, rescale
from ..rotations import Rotation
from ._cache import KeepsPayloads
from ._payloads import per_block, take_rows
from ._state import SavedState
from ._usage import HasUsage

# FX keeps these as single nodes; it looks for them by name in the module that calls them, so not only where they stand
for _name in (
        'augment', 'by_image', 'grid_axes', 'growth', 'index_axis', 'per_block', 'point_axes', 'reference_side',
        'rescale'):
    torch.fx.wrap(_name)


PER_POINT = 8  # patches of a grid that are worth making for each point that is one, if they are cached


class MakesPayloads(HasUsage, KeepsPayloads, SavedState):
    """Part of `RotaryEncoding` that turns positions into payloads, by the convention and the usage of the encoding."""
    coords: str
    offset: float
    register_side: int
    rotation: Rotation
    span: ClassVar[float]
    centered: ClassVar[bool]
    axes_apart: ClassVar[bool]

    def frequencies(self) -> Tensor:
        raise NotImplementedError

    def __prepare_scriptable__(self) -> 'MakesPayloads':
        if self.dims != 2:
            raise ValueError(
                f'TorchScript takes encodings of images only, this one has grids of {describe_grid(self.dims)}: '
                f'torch.compile and torch.export take it.')
        return self

    def table_freqs(self) -> Tensor:
        """What the rotation makes its table of: `frequencies`, or another form of the same that is quicker."""
        return self.frequencies()

    def register_frequencies(self) -> Tensor:
        """Frequencies of registers that lie on a grid of their own; overridden by encodings with that option."""
        return self.frequencies()

    def _payloads(self, grid: List[int], num_prefix_tokens: int) -> List[Tensor]:
        axes = grid_axes(grid, self.reference_grid, self.freqs, self.coords, self.span, self.centered, self.offset)
        prefix, table = self._tables(axes, grid, False)
        return per_block(prefix, table, num_prefix_tokens, self.depth, self.register_side * self.register_side)

    def at(
            self, coordinates: Tensor, num_prefix_tokens: int = 0, extent: Optional[Grid] = None,
    ) -> List[Tensor]:
        """Payloads of points anywhere, as calling the module gives those of the patches of a grid.

        Coordinates are those of a grid of `extent` patches: (2, 5) is the middle of the patch in row 2 and column 5,
        (-0.5, -0.5) the upper left corner of the image, and there may be points beyond it. All patches of a grid, with
        the grid as `extent`, have the payloads of that grid: equal bits, except in blocks of LieRE above 4 and of
        STRING, where they agree to rounding. Integers that are patches of `extent` are looked up in its payloads, which
        are cached where they need no gradient; nothing else is cached. Gradients reach the frequencies and the
        coordinates.

        The rule for larger grids, the middle of the image and random coordinates in training go by `extent`, too.

        Args:
            coordinates: (N, D), or (B, N, D) where every image has its own, floats or integers: row and column, as many
                numbers as the reference grid has sizes, in their order.
            num_prefix_tokens: Tokens in front of the points (class, registers); their payload is the identity.
            extent: (rows, columns) of patches of the image that the points lie in, by default the reference grid.

        Returns:
            One payload per block, (H or 1, prefix + N, W), or (B, H or 1, prefix + N, W).

        Raises:
            TypeError: `coordinates` are no tensor of real numbers.
            ValueError: They are of another shape or device, or not finite (only seen in eager mode), or `extent` is no
                such grid.
        """
        traced = isinstance(coordinates, torch.fx.Proxy)
        if not traced:
            check_coordinates(coordinates, self.freqs.device, self.dims)
        if extent is not None and not torch.compiler.is_compiling():
            extent = to_grid(extent, 'extent', self.dims)
        if self._undecided and not recording() and not traced:
            self._settle(extent)
        looked_up = self._grid_of_patches(coordinates, extent)
        if looked_up is not None:
            return self._look_up(coordinates, looked_up, num_prefix_tokens)
        grid = None if extent is None else list(extent)
        axes = point_axes(
            coordinates, grid, self.reference_grid, self.freqs, self.coords, self.span, self.centered, self.offset)
        prefix, table = self._tables(axes, grid, True)
        parts = by_image(prefix, table[:, :, 1:-1], coordinates)  # without the ends of the grid
        return per_block(parts[0], parts[1], num_prefix_tokens, self.depth, self.register_side * self.register_side)

    def _grid_of_patches(self, coordinates: Tensor, extent: Optional[Grid]) -> Optional[Grid]:
        """The grid that all points are patches of, if they are enough of them to make its payloads for; else None."""
        if torch.compiler.is_compiling() or torch.jit.is_tracing() or not plain(coordinates, self.reference_grid):
            return None
        if coordinates.is_floating_point() or (self._augmented and self.training):
            return None
        grid = extent or read_grid(self.reference_grid, 'reference_grid', self.dims)
        kept = not (torch.is_grad_enabled() and self.freqs.requires_grad)
        if math.prod(grid) > coordinates.numel() // self.dims * (PER_POINT if kept else 1):
            return None
        last = torch.tensor([side - 1 for side in grid], device=coordinates.device)
        return grid if bool(((coordinates >= 0) & (coordinates <= last)).all()) else None

    def _look_up(self, coordinates: Tensor, grid: Grid, num_prefix_tokens: int) -> List[Tensor]:
        """Rows of the payloads of the whole grid."""
        tables = self(grid, num_prefix_tokens)
        places = torch.zeros_like(coordinates[..., 0], dtype=torch.long)
        for axis, side in enumerate(grid):
            places = places * side + coordinates[..., axis].long()
        ahead = torch.arange(num_prefix_tokens, device=places.device).expand(*places.shape[:-1], -1)
        places = torch.cat((ahead, places + num_prefix_tokens), dim=-1)
        if tables[0] is tables[-1]:
            return [take_rows(tables[0], places)] * self.depth
        return [take_rows(table, places) for table in tables]

    def _settle(self, extent: Optional[Grid]) -> None:
        """In a training step, decide the grid that the coordinates are in units of."""
        if extent is None and not torch.compiler.is_compiling() and not self.reference_grid.is_meta:
            extent = read_grid(self.reference_grid, 'reference_grid', self.dims)
        if extent is not None:
            self.settle_reference_grid(extent)

    def _tables(self, axes: List[Tensor], grid: Optional[List[int]], points: bool) -> Tuple[Tensor, Tensor]:
        """Payloads (L, H, 1 + R, W) of a prefix token and the registers that have places, and (L, H, N, W) of positions
        in a grid; None is the reference grid.

        Axes are those of a grid (size,), or of points (N,); the first and the last place are those of the grid.
        """
        freqs = self.table_freqs()
        dims = self.dims
        if self.scaling != 'extrapolate' and grid is not None:
            s = growth(grid, self.reference_grid, self.freqs, self.coords)
            if self.scaling == 'interpolate':
                axes = [interpolate(axes[i], s[dims - 1 - i], self.coords, self.offset) for i in range(dims)]
            else:
                side = reference_side(self.reference_grid, self.freqs, self.coords, self.span)
                freqs = rescale(self.scaling, freqs, s, side, self.axes_apart)
        if self._augmented and self.training:
            axes = augment(
                axes, reference_side(self.reference_grid, self.freqs, self.coords, self.span),
                self._shift, self._jitter, self._rescale)
        # R(0) is the identity in every encoding: a prefix token sits at the origin
        origin = torch.zeros_like(axes[0][:1])
        prefix = self._table(freqs, [origin for _ in range(dims)], False)
        if self.register_side > 0:  # of images only
            axis = index_axis(self.register_side, origin)
            prefix = torch.cat((prefix, self.rotation.table(self.register_frequencies(), axis, axis)), dim=2)
        dtype = self.freqs.dtype  # frequencies may be wider
        return prefix.to(dtype), self._table(freqs, axes, points).to(dtype)

    def _table(self, freqs: Tensor, axes: List[Tensor], points: bool) -> Tensor:
        if not torch.jit.is_scripting():
            if self.dims != 2:
                if not points:  # in the shape of the grid
                    axes = [a.reshape([1] * i + [-1] + [1] * (self.dims - 1 - i)) for i, a in enumerate(axes)]
                return self.rotation.table_nd(freqs, axes)
        x = axes[1]
        return self.rotation.table(freqs, axes[0], x.unsqueeze(1) if points else x)  # points: a grid of one column


def by_image(prefix: Tensor, table: Tensor, coordinates: Tensor) -> Tuple[Tensor, Tensor]:
    """Payloads (L, H, 1, W) and (L, H, points, W); of points of each image (L, 1, H, 1, W) and (L, B, H, N, W)."""
    if coordinates.ndim == 3:
        return prefix.unsqueeze(1), table.unflatten(2, coordinates.shape[:2]).transpose(1, 2)
    return prefix, table


def check_coordinates(coordinates: Tensor, device: torch.device, dims: int) -> None:
    """Refuse what are no points (N, D) or (B, N, D)."""
    if not isinstance(coordinates, Tensor) or coordinates.is_complex() or coordinates.dtype == torch.bool:
        got = coordinates.dtype if isinstance(coordinates, Tensor) else type(coordinates).__name__
        raise TypeError(f'coordinates must be a tensor of real numbers, floats or integers, got {got}.')
    if coordinates.ndim not in (2, 3) or coordinates.shape[-1] != dims:
        names = {1: 'the place', 2: 'row and column', 3: 'frame, row and column'}[dims]
        raise ValueError(
            f'coordinates must be (N, {dims}) or (batch, N, {dims}), {names} of every point, got '
            f'{tuple(coordinates.shape)}.')
    if coordinates.device != device:
        raise ValueError(f'coordinates must be on the device of the encoding, {device}, got {coordinates.device}.')
    if not torch.compiler.is_compiling() and not torch.jit.is_tracing() and plain(coordinates):
        finite = torch.isfinite(coordinates).all(-1)
        if not bool(finite.all()):
            raise ValueError(
                f'coordinates must be finite, got {int((~finite).sum())} of {finite.numel()} points that are not.')
