"""Mixed: every channel pair turns with its own learned direction and scale."""
from typing import Tuple

import torch
from torch import Tensor

from ..checks import check_group, check_positive
from ..encoding import RotaryEncoding, layers_and_heads
from ..frequencies import geometric, turned_basis
from ..rotation import PairRotation


class Mixed(RotaryEncoding, name='mixed'):
    """RoPE-Mixed (arXiv 2403.13298, section 3.2): a_k = x f_xk + y f_yk, learned for every layer, head and pair.

    Starts as the axial basis (temperature 10) turned by a random angle per layer and head. Exactly relative whatever
    is learned. Larger grids extrapolate to higher indices. `freqs`: (2, depth, heads, head_dim / 2), x first.

    Args:
        head_dim: Channels per head, at least 2; an odd one leaves its last channel unrotated.
        num_heads: Attention heads.
        depth: Blocks of the model.
        reference_grid: Grid the weights are trained on; no effect with coords 'index'.
        temperature: Ratio of the longest to the shortest initial wave vector.
        coords: 'index' as NAVER; 'cells' or 'ends' are normalised to the reference grid.
        share_heads: One set of frequencies for all heads of a layer.
        share_layers: One set of frequencies for all layers.
    """
    summary = 'Learned wave vectors in any direction; in its paper it loses less than axial on larger images.'
    source = 'arXiv 2403.13298'
    learned = True
    oblique = True

    def __init__(
            self,
            head_dim: int,
            num_heads: int,
            depth: int,
            reference_grid: Tuple[int, int] = (14, 14),
            *,
            temperature: float = 10.,
            coords: str = 'index',
            share_heads: bool = False,
            share_layers: bool = False,
            device=None,
            dtype=None,
    ) -> None:
        self.temperature = check_positive(temperature, 'temperature')
        pairs = check_group(head_dim, 2, 'mixed')
        super().__init__(
            PairRotation(head_dim, pairs), (2, *layers_and_heads(depth, num_heads, share_layers, share_heads), pairs),
            head_dim, num_heads, depth, reference_grid, coords,
            options=dict(temperature=temperature, share_heads=share_heads, share_layers=share_layers),
            init_options=('temperature', 'share_heads', 'share_layers'), device=device, dtype=dtype)

    def initial_freqs(self) -> Tensor:
        pairs = self.rotation.groups
        half = (pairs + 1) // 2
        w = geometric(half, self.temperature)
        magnitudes = torch.tensor(w + w[:pairs - half], device=self.freqs.device, dtype=self.freqs.dtype)
        turn = 2 * torch.pi * torch.rand(
            self.freqs.shape[1], self.freqs.shape[2], 1, device=self.freqs.device, dtype=self.freqs.dtype)
        return turned_basis(magnitudes, turn)
