"""LieRE: blocks of channels turn by the exponential of learned generators."""
from typing import Tuple

import torch
from torch import Tensor

from ..checks import check_group, check_integer
from ..encoding import RotaryEncoding, layers_and_heads
from ..rotation import BlockRotation


class LieRE(RotaryEncoding, name='liere'):
    """LieRE (arXiv 2406.10322): R(p) = exp(x A_x + y A_y) with learned skew-symmetric generators of block x block.

    block 2 is RoPE-Mixed in other coordinates, block = head_dim the dense LieRE, 8 the best of its paper. Generators
    start uniform in (0, 2 pi), by default for every layer and head. Not relative, unless A_x and A_y commute. Larger
    grids extrapolate: coordinates grow beyond 1, the step between patches stays.

    `freqs`: (2, depth, heads * blocks, block (block - 1) / 2), strict upper triangles row by row, x first.

    Args:
        head_dim: Channels per head; channels beyond the last whole block pass unrotated.
        num_heads: Attention heads.
        depth: Blocks of the model.
        reference_grid: Grid that coordinates from 0 to 1 cover.
        block: Size of the generators, 2 .. head_dim. Exact closed forms for 2, 3, 4.
        coords: 'cells' (patch centres), 'ends' (as published) or 'index'.
        share_heads: One set of generators for all heads of a layer.
        share_layers: One set of generators for all layers.
    """
    summary = 'Learned rotations of whole blocks, the most general and the most expensive form.'
    source = 'arXiv 2406.10322'
    learned = True
    oblique = True
    relative = ''
    span = 1.
    centered = False

    def __init__(
            self,
            head_dim: int,
            num_heads: int,
            depth: int,
            reference_grid: Tuple[int, int] = (14, 14),
            *,
            block: int = 8,
            coords: str = 'cells',
            share_heads: bool = False,
            share_layers: bool = False,
            device=None,
            dtype=None,
    ) -> None:
        check_integer(block, 'block', 2)
        blocks = check_group(head_dim, block, 'liere')
        layers, heads = layers_and_heads(depth, num_heads, share_layers, share_heads)
        # at most 4 dimensions: `model.to(memory_format=torch.channels_last)` refuses parameters with 5
        super().__init__(
            BlockRotation(head_dim, block),
            (2, layers, heads * blocks, block * (block - 1) // 2),
            head_dim, num_heads, depth, reference_grid, coords,
            options=dict(block=block, share_heads=share_heads, share_layers=share_layers),
            init_options=('share_heads', 'share_layers'), device=device, dtype=dtype)

    def initial_freqs(self) -> Tensor:
        return 2 * torch.pi * torch.rand_like(self.freqs)

    def frequencies(self) -> Tensor:
        return self.freqs.unflatten(2, [-1, self.rotation.groups])
