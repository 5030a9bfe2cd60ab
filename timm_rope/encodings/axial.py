"""Axial: half of the channel pairs turn with the column, half with the row."""
from typing import Tuple

import torch
from torch import Tensor

from ..checks import check_group, check_positive
from ..encoding import RotaryEncoding, layers_and_heads
from ..frequencies import axial, geometric
from ..rotation import PairRotation


class Axial(RotaryEncoding, name='axial'):
    """RoPE-Axial (arXiv 2403.13298, section 3.1): a_g = x w_g in the first half of the pairs, y w_g in the second.

    w_g = temperature^(-g / G) with G = head_dim // 4, shared by all heads and layers. Exactly relative. Larger grids
    extrapolate to higher indices.

    Args:
        head_dim: Channels per head, at least 4; channels beyond the last multiple of 4 pass unrotated.
        num_heads: Attention heads.
        depth: Blocks of the model.
        reference_grid: Grid the weights are trained on; no effect with coords 'index'.
        temperature: Ratio of the highest to the lowest frequency (NAVER: 100 in ViT, 50 in Swin).
        coords: 'index' as NAVER; 'cells' or 'ends' give the axial encoding of arXiv 2511.08368.
    """
    summary = 'Rows and columns turn separate channels; the cheapest choice, blind to oblique directions.'
    source = 'arXiv 2403.13298'

    def __init__(
            self,
            head_dim: int,
            num_heads: int,
            depth: int,
            reference_grid: Tuple[int, int] = (14, 14),
            *,
            temperature: float = 100.,
            coords: str = 'index',
            device=None,
            dtype=None,
    ) -> None:
        self.temperature = check_positive(temperature, 'temperature')
        pairs = 2 * check_group(head_dim, 4, 'axial')
        super().__init__(
            PairRotation(head_dim, pairs), (2, 1, 1, pairs), head_dim, num_heads, depth, reference_grid, coords,
            options=dict(temperature=temperature), device=device, dtype=dtype)

    def initial_freqs(self) -> Tensor:
        w = geometric(self.rotation.groups // 2, self.temperature)
        return torch.tensor(axial(w, w), device=self.freqs.device, dtype=self.freqs.dtype).view_as(self.freqs)


class AxialLearned(RotaryEncoding, name='axial_learned'):
    """Axial with learned frequencies (arXiv 2511.08368, table 2), by default for every layer and head.

    Starts as `Axial`. The two halves learn separate frequencies, but the first never sees y nor the second x, so it
    stays axis-aligned and exactly relative. `freqs`: (1, depth, heads, pairs), x half first.

    Args:
        head_dim: Channels per head, at least 4; channels beyond the last multiple of 4 pass unrotated.
        num_heads: Attention heads.
        depth: Blocks of the model.
        reference_grid: Grid the weights are trained on; no effect with coords 'index'.
        temperature: Of the initial frequencies.
        coords: As `Axial`.
        share_heads: One set of frequencies for all heads of a layer.
        share_layers: One set of frequencies for all layers.
    """
    summary = 'Axial with trainable frequencies; adapts its scale, still blind to oblique directions.'
    source = 'arXiv 2511.08368'
    learned = True

    def __init__(
            self,
            head_dim: int,
            num_heads: int,
            depth: int,
            reference_grid: Tuple[int, int] = (14, 14),
            *,
            temperature: float = 100.,
            coords: str = 'index',
            share_heads: bool = False,
            share_layers: bool = False,
            device=None,
            dtype=None,
    ) -> None:
        self.temperature = check_positive(temperature, 'temperature')
        pairs = 2 * check_group(head_dim, 4, 'axial_learned')
        super().__init__(
            PairRotation(head_dim, pairs), (1, *layers_and_heads(depth, num_heads, share_layers, share_heads), pairs),
            head_dim, num_heads, depth, reference_grid, coords,
            options=dict(temperature=temperature, share_heads=share_heads, share_layers=share_layers),
            init_options=('temperature', 'share_heads', 'share_layers'), device=device, dtype=dtype)

    def initial_freqs(self) -> Tensor:
        w = geometric(self.rotation.groups // 2, self.temperature)
        return torch.tensor(w + w, device=self.freqs.device, dtype=self.freqs.dtype).expand_as(self.freqs)

    def frequencies(self) -> Tensor:
        half = self.rotation.groups // 2
        x, y = self.freqs[0, ..., :half], self.freqs[0, ..., half:]
        return torch.stack((torch.cat((x, torch.zeros_like(y)), -1), torch.cat((torch.zeros_like(x), y), -1)))
