"""LieRE: blocks of channels turn by the exponential of learned generators."""
from typing import Tuple

import torch
from torch import Tensor

from .._checks import check_group, check_integer
from ..rotations import BlockRotation
from ._base import RotaryEncoding


class LieRE(RotaryEncoding, name='liere'):
    """LieRE (arXiv 2406.10322): R(p) = exp(x A_x + y A_y) with learned skew-symmetric generators of block x block.

    block 2 is RoPE-Mixed in other coordinates, block = head_dim the dense LieRE, 8 the best of its paper. Generators
    start uniform in (0, 2 pi), by default for every layer and head. Not relative, unless A_x and A_y commute. Larger
    grids extrapolate: coordinates grow beyond 1, the step between patches stays. Channels of head_dim beyond the last
    whole block pass unrotated. In D dimensions there are D generators, as in the paper; of one it is relative, and RoPE
    in another basis (arXiv 2511.08368, theorem 1: `convert_encoding`).

    `freqs`: (2, depth, heads * blocks, block (block - 1) / 2), strict upper triangles row by row, x first.

    Args:
        block: Size of the generators, 2 .. head_dim. Exact closed forms for 2, 3, 4.
        coords: 'cells' (patch centres, from 0 to 1 across the reference grid), 'ends' (as published) or 'index'.
        share_heads: One set of generators for all heads of a layer.
        share_layers: One set of generators for all layers.
    """
    summary = 'Learned rotations of whole blocks, the most general and the most expensive form.'
    source = 'arXiv 2406.10322'
    learned = True
    oblique = True
    relative = ''
    defaults = dict(block=8, coords='cells')
    span = 1.
    centered = False
    scalings = ('extrapolate', 'interpolate')

    def make_rotation(self) -> BlockRotation:
        block = check_integer(self.options['block'], 'block', 2)
        check_group(self.head_dim, block, self.name)
        return BlockRotation(self.head_dim, block)

    def no_scaling(self) -> str:
        return 'a block turns by a mixture of frequencies that depends on the direction, so only coordinates can change'

    def freqs_shape(self, layers: int, heads: int) -> Tuple[int, ...]:
        # at most 4 dimensions: `model.to(memory_format=torch.channels_last)` refuses parameters with 5
        size = self.rotation.size
        return self.dims, layers, heads * self.rotation.groups, size * (size - 1) // 2

    def initial_freqs(self) -> Tensor:
        return 2 * torch.pi * torch.rand_like(self.freqs)

    def frequencies(self) -> Tensor:
        return self.freqs.unflatten(2, [-1, self.rotation.groups])

    def freqs_for(self, frequencies: Tensor) -> Tensor:
        return frequencies.flatten(2, 3)
