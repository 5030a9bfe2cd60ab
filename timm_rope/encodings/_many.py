"""Payloads for images of several shapes: the patches of all their grids in one table, out of which tokens are taken."""
from typing import List, Sequence, Tuple

import torch
from torch import Tensor

from ._positions import MakesPayloads

STEP = 8  # patches: sides of a table that may be cached are rounded up to it, so that other images find it again
Places = List[Tuple[int, int]]


class ServesManyGrids(MakesPayloads):
    """Part of `RotaryEncoding` for a batch of images that have a grid each."""

    @torch.jit.unused
    def of_grids(
            self, grids: Sequence[Tuple[int, int]], num_prefix_tokens: int = 0, alone: bool = False,
    ) -> Tuple[List[Tensor], Places]:
        """Payloads of the patches of several grids in one table; those of each grid are what calling the module gives.

        Where rows and columns alone say where a patch is, as index coordinates do, it is the table of one grid that
        holds all others. Else the grids follow one another, each with its own middle, scaling and augmentation.

        A training step does not make any of these grids the reference grid: that stays the one of the constructor.

        Args:
            grids: (rows, columns) of each, at least one.
            num_prefix_tokens: Tokens in front of every image; their payload is the identity.
            alone: Have the only grid as calling the module gives it, M its patches.

        Returns:
            One table per block, (H or 1, prefix + M, W), blocks that share their frequencies share it; and for each
            grid (start, step): the payload of its patch in row y and column x is row start + y * step + x.
        """
        if self._undecided:
            self._settle(None)
        if alone:
            return self(grids[0], num_prefix_tokens), one_after_another(grids, num_prefix_tokens)
        if self._places_agree():
            rows, columns = (max(sides) for sides in zip(*grids))
            if not (self.freqs.requires_grad and torch.is_grad_enabled()):
                rows, columns = -(-rows // STEP) * STEP, -(-columns // STEP) * STEP
            return self((rows, columns), num_prefix_tokens), [(num_prefix_tokens, columns)] * len(grids)
        parts = [self(grid) for grid in grids]
        if num_prefix_tokens:
            parts.insert(0, [payload[..., :num_prefix_tokens, :] for payload in self((1, 1), num_prefix_tokens)])
        shared = parts[-1][0] is parts[-1][-1]
        tables = [torch.cat(tables, dim=-2) for tables in list(zip(*parts))[:1 if shared else None]]
        return tables * self.depth if shared else tables, one_after_another(grids, num_prefix_tokens)

    def _places_agree(self) -> bool:
        """Whether patches of the same row and column have the same payload in all grids."""
        # an offset of normalised coordinates is in images, of each its own
        free = self.coords == 'index' or (self.coords == 'cells' and not self.centered and self.offset == 0.)
        return free and self.rotation.boundless and self.scaling == 'extrapolate' and not (
            self._augmented and self.training)


def one_after_another(grids: Sequence[Tuple[int, int]], start: int) -> Places:
    """Where each grid starts, and its step from row to row, in a table of all patches that has `start` rows before."""
    places = []
    for rows, columns in grids:
        places.append((start, columns))
        start += rows * columns
    return places
