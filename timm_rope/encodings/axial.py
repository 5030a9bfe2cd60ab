"""Axial: half of the channel pairs turn with the column, half with the row."""
from typing import Any, Tuple

import torch
from torch import Tensor

from .._checks import check_group
from ..rotations import PairRotation
from ._base import RotaryEncoding
from ._frequencies import axial, geometric


class Axial(RotaryEncoding, name='axial'):
    """RoPE-Axial (arXiv 2403.13298, section 3.1): a_g = x w_g in the first half of the pairs, y w_g in the second.

    w_g = temperature^(-g / G) with G = head_dim // 4, shared by all heads and layers. Exactly relative. Larger grids
    extrapolate to higher indices. head_dim must be at least 4; channels beyond its last multiple pass unrotated.

    In D dimensions each axis has G = head_dim // (2 D) pairs, x the first, then y, then z, as in V-JEPA 2 (arXiv
    2506.09985), where also what is left passes unrotated: 4 channels of 64 in three. In one it is RoPE (arXiv
    2104.09864).

    Args:
        temperature: Ratio of the highest to the lowest frequency (NAVER: 100 in ViT, 50 in Swin).
        coords: 'index' as NAVER; 'cells' or 'ends' give the axial encoding of arXiv 2511.08368.
    """
    summary = 'Rows and columns turn separate channels; the cheapest choice, blind to oblique directions.'
    source = 'arXiv 2403.13298'
    defaults = dict(temperature=100., coords='index')

    def make_rotation(self) -> PairRotation:
        return PairRotation(self.head_dim, self.dims * check_group(self.head_dim, 2 * self.dims, self.name))

    def initial_freqs(self) -> Any:
        return axial(geometric(self.rotation.groups // self.dims, self.options['temperature']), self.dims)


class AxialLearned(Axial, name='axial_learned'):
    """Axial with learned frequencies (arXiv 2511.08368, table 2), by default for every layer and head.

    Starts as `Axial`. The two halves learn separate frequencies, but the first never sees y nor the second x, so it
    stays axis-aligned and exactly relative. `freqs`: (1, depth, heads, pairs), x half first. head_dim and D dimensions
    as `Axial`.

    Args:
        temperature: Of the initial frequencies.
        coords: As `Axial`.
        share_heads: One set of frequencies for all heads of a layer.
        share_layers: One set of frequencies for all layers.
    """
    summary = 'Axial with trainable frequencies; adapts its scale, still blind to oblique directions.'
    source = 'arXiv 2511.08368'
    learned = True

    def freqs_shape(self, layers: int, heads: int) -> Tuple[int, ...]:
        return 1, layers, heads, self.rotation.groups

    def initial_freqs(self) -> Any:
        return geometric(self.rotation.groups // self.dims, self.options['temperature']) * self.dims

    def frequencies(self) -> Tensor:
        each, rows = self.rotation.groups // self.dims, []
        for axis in range(self.dims):
            row = []
            for other in range(self.dims):
                w = self.freqs[0, ..., other * each:(other + 1) * each]
                row.append(w if other == axis else torch.zeros_like(w))
            rows.append(torch.cat(row, -1))
        return torch.stack(rows)

    def freqs_for(self, frequencies: Tensor) -> Tensor:
        each = self.rotation.groups // self.dims
        freqs = torch.cat([w.narrow(-1, axis * each, each) for axis, w in enumerate(frequencies)], -1).unsqueeze(0)
        if int(frequencies.count_nonzero()) != int(freqs.count_nonzero()):
            raise ValueError(
                f'{self.name!r} turns the first {each} pairs of a head with x alone and the next {each} with y alone, '
                f'and these wave vectors are oblique or in other places')
        return freqs
