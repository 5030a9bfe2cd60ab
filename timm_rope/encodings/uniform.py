"""Uniform: axial with a single frequency."""
from typing import Tuple

import torch
from torch import Tensor

from ..checks import check_group
from ..encoding import RotaryEncoding
from ..frequencies import axial
from ..rotation import PairRotation


class Uniform(RotaryEncoding, name='uniform'):
    """Uniform RoPE (arXiv 2511.08368, section 3): every pair makes one turn over the reference grid.

    The first half of the pairs turns with x, the second with y, all with w = 1 on coordinates in [-pi, pi]. Exactly
    relative, and periodic with the reference grid: on larger grids positions one reference image apart look the same.
    With coords 'ends' the first and the last row coincide already on the reference grid.

    Args:
        head_dim: Channels per head, at least 4; channels beyond the last multiple of 4 pass unrotated.
        num_heads: Attention heads.
        depth: Blocks of the model.
        reference_grid: Grid over which one turn is made.
        coords: 'cells' (patch centres) or 'ends' (the paper's text).
    """
    summary = 'One frequency, one turn over the image: the control that shows what diverse frequencies bring.'
    source = 'arXiv 2511.08368'
    coords_choices = ('cells', 'ends')

    def __init__(
            self,
            head_dim: int,
            num_heads: int,
            depth: int,
            reference_grid: Tuple[int, int] = (14, 14),
            *,
            coords: str = 'cells',
            device=None,
            dtype=None,
    ) -> None:
        pairs = 2 * check_group(head_dim, 4, 'uniform')
        super().__init__(
            PairRotation(head_dim, pairs), (2, 1, 1, pairs), head_dim, num_heads, depth, reference_grid, coords,
            device=device, dtype=dtype)

    def initial_freqs(self) -> Tensor:
        w = [1.] * (self.rotation.groups // 2)
        return torch.tensor(axial(w, w), device=self.freqs.device, dtype=self.freqs.dtype).view_as(self.freqs)
