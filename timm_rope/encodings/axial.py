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

    Args:
        temperature: Ratio of the highest to the lowest frequency (NAVER: 100 in ViT, 50 in Swin).
        coords: 'index' as NAVER; 'cells' or 'ends' give the axial encoding of arXiv 2511.08368.
    """
    summary = 'Rows and columns turn separate channels; the cheapest choice, blind to oblique directions.'
    source = 'arXiv 2403.13298'
    defaults = dict(temperature=100., coords='index')

    def make_rotation(self) -> PairRotation:
        return PairRotation(self.head_dim, 2 * check_group(self.head_dim, 4, self.name))

    def initial_freqs(self) -> Any:
        w = geometric(self.rotation.groups // 2, self.options['temperature'])
        return axial(w, w)


class AxialLearned(Axial, name='axial_learned'):
    """Axial with learned frequencies (arXiv 2511.08368, table 2), by default for every layer and head.

    Starts as `Axial`. The two halves learn separate frequencies, but the first never sees y nor the second x, so it
    stays axis-aligned and exactly relative. `freqs`: (1, depth, heads, pairs), x half first. head_dim as `Axial`.

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
        w = geometric(self.rotation.groups // 2, self.options['temperature'])
        return w + w

    def frequencies(self) -> Tensor:
        half = self.rotation.groups // 2
        x, y = self.freqs[0, ..., :half], self.freqs[0, ..., half:]
        return torch.stack((torch.cat((x, torch.zeros_like(y)), -1), torch.cat((torch.zeros_like(x), y), -1)))

    def freqs_for(self, frequencies: Tensor) -> Tensor:
        half = self.rotation.groups // 2
        if bool(frequencies[1, ..., :half].any()) or bool(frequencies[0, ..., half:].any()):
            raise ValueError(
                f'{self.name!r} turns the first {half} pairs of a head with x alone and the next {half} with y alone, '
                f'and these wave vectors are oblique or in other places')
        return torch.cat((frequencies[0, ..., :half], frequencies[1, ..., half:]), -1).unsqueeze(0)
