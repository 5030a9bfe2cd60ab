"""From positions to payloads: those of all patches of a grid, or of points anywhere."""
from typing import ClassVar, List, Optional, Tuple

import torch
from torch import Tensor

from .._tracing import plain, recording
from ..positions.augmentation import augment
from ..positions.coordinates import grid_axes, point_axes, read_grid, reference_side, to_grid
from ..positions.scaling import growth, interpolate, rescale
from ..rotations import Rotation
from ._cache import KeepsPayloads
from ._payloads import per_block, take_rows
from ._state import SavedState
from ._usage import HasUsage

# FX keeps these as single nodes; it looks for them by name in the module that calls them, so not only where they stand
for _name in ('augment', 'by_image', 'grid_axes', 'growth', 'per_block', 'point_axes', 'reference_side', 'rescale'):
    torch.fx.wrap(_name)


PER_POINT = 8  # patches of a grid that are worth making for each point that is one, if they are cached


class MakesPayloads(HasUsage, KeepsPayloads, SavedState):
    """Part of `RotaryEncoding` that turns positions into payloads, by the convention and the usage of the encoding."""
    coords: str
    rotation: Rotation
    span: ClassVar[float]
    centered: ClassVar[bool]
    axes_apart: ClassVar[bool]

    def frequencies(self) -> Tensor:
        raise NotImplementedError

    def _payloads(self, height: int, width: int, num_prefix_tokens: int) -> List[Tensor]:
        axes = grid_axes(height, width, self.reference_grid, self.freqs, self.coords, self.span, self.centered)
        identity, table = self._tables(axes[0], axes[1], (height, width))
        return per_block(identity, table, num_prefix_tokens, self.depth)

    def at(
            self, coordinates: Tensor, num_prefix_tokens: int = 0, extent: Optional[Tuple[int, int]] = None,
    ) -> List[Tensor]:
        """Payloads of points anywhere, as calling the module gives those of the patches of a grid.

        Coordinates are those of a grid of `extent` patches: (2, 5) is the middle of the patch in row 2 and column 5,
        (-0.5, -0.5) the upper left corner of the image, and there may be points beyond it. All patches of a grid, with
        the grid as `extent`, have the payloads of that grid: equal bits, except in blocks of LieRE above 4, where they
        agree to rounding. Integers that are patches of `extent` are looked up in its payloads, which are cached where
        they need no gradient; nothing else is cached. Gradients reach the frequencies and the coordinates.

        The rule for larger grids, the middle of the image and random coordinates in training go by `extent`, too.

        Args:
            coordinates: (N, 2), or (B, N, 2) where every image has its own: row and column, floats or integers.
            num_prefix_tokens: Tokens in front of the points (class, registers); their payload is the identity.
            extent: (rows, columns) of patches of the image that the points lie in, by default the reference grid.

        Returns:
            One payload per block, (H or 1, prefix + N, W), or (B, H or 1, prefix + N, W).

        Raises:
            TypeError: `coordinates` are no tensor of real numbers.
            ValueError: They are of another shape or device, or not finite (only seen in eager mode), or `extent` is not
                two positive integers.
        """
        traced = isinstance(coordinates, torch.fx.Proxy)
        if not traced:
            check_coordinates(coordinates, self.freqs.device)
        if extent is not None and not torch.compiler.is_compiling():
            extent = to_grid(extent, 'extent')
        if self._undecided and not recording() and not traced:
            self._settle(extent)
        if self._are_patches(coordinates, extent):
            rows, columns = extent or read_grid(self.reference_grid, 'reference_grid')
            places = coordinates[..., 0].long() * columns + coordinates[..., 1].long()
            ahead = torch.arange(num_prefix_tokens, device=places.device).expand(*places.shape[:-1], -1)
            places = torch.cat((ahead, places + num_prefix_tokens), dim=-1)
            tables = self((rows, columns), num_prefix_tokens)
            if tables[0] is tables[-1]:
                return [take_rows(tables[0], places)] * self.depth
            return [take_rows(table, places) for table in tables]
        axes = point_axes(
            coordinates, extent, self.reference_grid, self.freqs, self.coords, self.span, self.centered)
        identity, table = self._tables(axes[0], axes[1], extent)
        parts = by_image(identity, table[:, :, 1:-1], coordinates)  # without the ends of the grid
        return per_block(parts[0], parts[1], num_prefix_tokens, self.depth)

    def _are_patches(self, coordinates: Tensor, extent: Optional[Tuple[int, int]]) -> bool:
        """Whether points are patches of their grid, and enough of them to make its payloads for."""
        if torch.compiler.is_compiling() or torch.jit.is_tracing() or not plain(coordinates, self.reference_grid):
            return False
        if coordinates.is_floating_point() or (self._augmented and self.training):
            return False
        rows, columns = extent or read_grid(self.reference_grid, 'reference_grid')
        kept = not (torch.is_grad_enabled() and self.freqs.requires_grad)
        if rows * columns > coordinates.numel() // 2 * (PER_POINT if kept else 1):
            return False
        last = torch.tensor([rows - 1, columns - 1], device=coordinates.device)
        return bool(((coordinates >= 0) & (coordinates <= last)).all())

    def _settle(self, extent: Optional[Tuple[int, int]]) -> None:
        """In a training step, decide the grid that the coordinates are in units of."""
        if extent is None and not torch.compiler.is_compiling() and not self.reference_grid.is_meta:
            extent = read_grid(self.reference_grid, 'reference_grid')
        if extent is not None:
            self.settle_reference_grid(extent)

    def _tables(self, y: Tensor, x: Tensor, grid: Optional[Tuple[int, int]]) -> Tuple[Tensor, Tensor]:
        """Payloads (L, H, 1, W) of a prefix token and (L, H, N, W) of positions in a grid; None is the reference grid.

        y and x are as `Rotation.table` takes them; the first and the last are those of the grid.
        """
        freqs = self.frequencies()
        if self.scaling != 'extrapolate' and grid is not None:
            s = growth(grid[0], grid[1], self.reference_grid, self.freqs)
            if self.scaling == 'interpolate':
                y, x = interpolate(y, s[1], self.coords), interpolate(x, s[0], self.coords)
            else:
                side = reference_side(self.reference_grid, self.freqs, self.coords, self.span)
                freqs = rescale(self.scaling, freqs, s, side, self.axes_apart)
        if self._augmented and self.training:
            moved = augment(
                y, x, reference_side(self.reference_grid, self.freqs, self.coords, self.span),
                self._shift, self._jitter, self._rescale)
            y, x = moved[0], moved[1]
        # R(0) is the identity in every encoding: a prefix token sits at the origin
        origin = torch.zeros_like(y[:1])
        dtype = self.freqs.dtype  # frequencies may be wider
        return self.rotation.table(freqs, origin, origin).to(dtype), self.rotation.table(freqs, y, x).to(dtype)


def by_image(identity: Tensor, table: Tensor, coordinates: Tensor) -> Tuple[Tensor, Tensor]:
    """Payloads (L, H, 1, W) and (L, H, points, W); of points of each image (L, 1, H, 1, W) and (L, B, H, N, W)."""
    if coordinates.ndim == 3:
        return identity.unsqueeze(1), table.unflatten(2, coordinates.shape[:2]).transpose(1, 2)
    return identity, table


def check_coordinates(coordinates: Tensor, device: torch.device) -> None:
    """Refuse what are no points (N, 2) or (B, N, 2)."""
    if not isinstance(coordinates, Tensor) or coordinates.is_complex() or coordinates.dtype == torch.bool:
        got = coordinates.dtype if isinstance(coordinates, Tensor) else type(coordinates).__name__
        raise TypeError(f'coordinates must be a tensor of real numbers, floats or integers, got {got}.')
    if coordinates.ndim not in (2, 3) or coordinates.shape[-1] != 2:
        raise ValueError(
            f'coordinates must be (N, 2) or (batch, N, 2), row and column of every point, got '
            f'{tuple(coordinates.shape)}.')
    if coordinates.device != device:
        raise ValueError(f'coordinates must be on the device of the encoding, {device}, got {coordinates.device}.')
    if not torch.compiler.is_compiling() and not torch.jit.is_tracing() and plain(coordinates):
        finite = torch.isfinite(coordinates).all(-1)
        if not bool(finite.all()):
            raise ValueError(
                f'coordinates must be finite, got {int((~finite).sum())} of {finite.numel()} points that are not.')
