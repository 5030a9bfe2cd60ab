"""The reference grid of an encoding: the grid its weights were trained on, kept in a buffer and saved with them.

A model that was built without weights does not know yet at which size it will be trained. It starts with the grid of
its nominal image size and takes that of its first training step; weights that are loaded bring theirs, and keep it.
"""
import logging
from typing import Any, Dict, Optional

import torch
from torch import Tensor, nn

from ..positions.coordinates import Grid, describe_grid, format_grid, read_grid, to_grid
from ._signature import read_signature_grid

_logger = logging.getLogger(__name__)


class _Shared:
    """What a model and its copies agree on: a moving average is a copy that never sees a training step itself."""

    def __init__(self) -> None:
        self.grid: Optional[Grid] = None

    def __copy__(self) -> '_Shared':
        return self

    def __deepcopy__(self, memo: Any) -> '_Shared':
        return self


class HasReferenceGrid(nn.Module):
    """Part of `RotaryEncoding` that keeps the reference grid, (rows, columns), and settles it in training."""
    reference_grid: Tensor
    dims: int  # of positions: how many sizes a grid has
    _initial_grid: Grid
    __jit_unused_properties__ = ['undecided']
    __jit_ignored_attributes__ = ['_training_grid']

    def __init__(self) -> None:
        super().__init__()
        self._undecided = False
        self._training_grid = _Shared()

    @torch.jit.unused
    def set_reference_grid(self, grid: Grid) -> None:
        """Change the grid that the weights count as trained on; training does not change it any more.

        Args:
            grid: (rows, columns) of patches, or as many sizes as the encoding has dimensions.

        Raises:
            ValueError: `grid` is no such positive integers.
        """
        sizes = to_grid(grid, 'grid', self.dims)
        with torch.no_grad():
            self.reference_grid.copy_(torch.tensor(sizes, device='cpu'))
        self._undecided = False

    @torch.jit.unused
    def set_initial_grid(self, grid: Grid) -> None:
        """Set the grid of a model without trained weights, until its first training step."""
        self._initial_grid = to_grid(grid, 'grid', self.dims)
        self.set_reference_grid(grid)
        self._undecided = True

    @property
    def undecided(self) -> bool:
        """Whether the first training step will still change the reference grid."""
        return self._undecided

    @torch.jit.unused
    def settle_reference_grid(self, grid_size: Grid) -> None:
        """In the first training step, take its grid; a copy that is not trained takes that of the trained one.

        A training step is a call in training mode with gradients. Ranks decide alone, each by its first images;
        DistributedDataParallel then sends the buffers of rank 0 to all.
        """
        if not self._undecided or self.reference_grid.is_meta:
            return
        if self.training and torch.is_grad_enabled():
            grid = tuple(grid_size)
            with torch.no_grad():
                if torch.compiler.is_compiling():
                    self.reference_grid.copy_(torch.tensor(grid, dtype=torch.float32, device='cpu'))
                else:
                    grid = to_grid(grid, 'grid_size', self.dims)
                    before = read_grid(self.reference_grid, 'reference_grid', self.dims)
                    self.reference_grid.copy_(torch.tensor(grid, device='cpu'))
                    if before != grid:
                        _logger.info(
                            f'The reference grid is now {format_grid(grid)} patches, those of the first training step, '
                            f'instead of {format_grid(before)}; rope_reference_grid=... keeps another one.')
            self._undecided = False
            self._training_grid.grid = grid
        else:
            self.adopt_reference_grid()

    @torch.jit.unused
    def adopt_reference_grid(self) -> None:
        """Take the grid of the training steps of a model that this one was copied from, if it has had any."""
        if self._undecided and self._training_grid.grid is not None and not self.reference_grid.is_meta:
            self.set_reference_grid(self._training_grid.grid)


def saved_reference_grid(state_dict: Dict[str, Any], prefix: str, dims: int) -> Optional[Grid]:
    """The reference grid that a state dict holds; None if it holds none, or none with values.

    Raises:
        ValueError: It is no grid, one of another number of dimensions, or the average of two.
    """
    value = state_dict.get(f'{prefix}reference_grid')
    if not isinstance(value, Tensor) or value.is_meta:
        return None
    name = f'{prefix}reference_grid of the checkpoint'
    if value.numel() in (1, 2, 3) and value.numel() != dims:
        raise ValueError(
            f'{name} must be {describe_grid(dims)}, got {value.flatten().tolist()}: the weights are of positions in '
            f'{value.numel()} dimensions, build the encoding with such a reference_grid.')
    grid = read_grid(value, name, dims)
    named = read_signature_grid(state_dict.get(f'{prefix}signature')) if value.is_floating_point() else None
    if named is None:
        return grid  # integers may have been put there by hand, and are what is meant
    # half precision holds whole numbers to a hundredth at least; what else differs was changed by hand
    if any(abs(a - b) > b / 100 for a, b in zip(grid, named)):
        raise ValueError(
            f'{name} is {grid}, and {prefix}signature says {named}: the weights were changed by hand or are an average '
            f'of weights of different reference grids. To change the grid, put a tensor of integers there.')
    return named
