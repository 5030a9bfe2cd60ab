"""Axial: half of the channel pairs turn with the column, half with the row."""
import math
from typing import Any, Dict, List, Tuple

import torch
import torch.nn.functional as F
from torch import Tensor

from .._checks import check_group, check_integer
from ..rotations import PairRotation
from ._base import RotaryEncoding
from ._frequencies import axial, geometric


class Axial(RotaryEncoding, name='axial'):
    """RoPE-Axial (arXiv 2403.13298, section 3.1): a_g = x w_g in the first half of the pairs, y w_g in the second.

    w_g = scale temperature^(-g / G) with G = head_dim // 4, shared by all heads and layers. Exactly relative. Larger
    grids extrapolate to higher indices. head_dim must be at least 4; channels beyond its last multiple pass unrotated.

    Up to the order of the channels the encodings of published models are, with y in the first half of their pairs:

        DINOv3 (arXiv 2508.10104)   coords='dinov3', scale=2, temperature=100
        EVA-02 (arXiv 2303.11331)   coords='eva', temperature=1e4, the reference grid that of pre-training
        PE (arXiv 2504.13181)       the same with offset=1
        ViT-5 (arXiv 2602.08071)    temperature=1e4, registers=4

    In D dimensions each axis has G = head_dim // (2 D) pairs, x the first, then y, then z, as in V-JEPA 2 (arXiv
    2506.09985), where also what is left passes unrotated: 4 channels of 64. In one it is RoPE (arXiv 2104.09864).

    Args:
        temperature: Ratio of the highest to the lowest frequency (NAVER: 100 in ViT, 50 in Swin).
        scale: Highest frequency, in radians per unit of coordinate: a patch in 'index' and 'eva', else the reference
            image is 2 pi long.
        offset: Of patches from prefix tokens, along both axes: in patches with 'index' and 'eva', else in images.
        registers: How many of the last prefix tokens, a square number, lie on a grid of their own, (0, 0), (0, 1) and
            so on; the others, as all if it is 0, do not turn.
        register_temperature: Instead of `temperature`, of those registers.
        coords: 'index' as NAVER; 'cells' or 'ends' give the axial encoding of arXiv 2511.08368; 'dinov3', 'dinov3_min',
            'dinov3_max' or 'eva' see `positions/coordinates.py`.
    """
    summary = 'Rows and columns turn separate channels; the cheapest choice, blind to oblique directions.'
    source = 'arXiv 2403.13298'
    defaults = dict(
        temperature=100., scale=1., offset=0., registers=0, register_temperature=100., coords='index')

    def _checked(self, options: Dict[str, Any]) -> Dict[str, Any]:
        options = super()._checked(options)
        count = check_integer(options.get('registers', 0), 'registers', 0)
        if math.isqrt(count) ** 2 != count or (count and self.dims != 2):
            raise ValueError(
                f'registers must be a square number, whose grid has as many rows as columns, and 0 where positions are '
                f'not those of images, got {count}.')
        if not count and options.get('register_temperature', 100.) != 100.:
            raise ValueError(
                f'register_temperature={options["register_temperature"]:g} needs registers that lie on a grid of their '
                f'own, got registers=0.')
        return options

    def make_rotation(self) -> PairRotation:
        return PairRotation(self.head_dim, self.dims * check_group(self.head_dim, 2 * self.dims, self.name))

    def series(self, temperature: str) -> List[float]:
        count = self.rotation.groups // self.dims
        return [self.options['scale'] * w for w in geometric(count, self.options[temperature])]

    def freqs_shape(self, layers: int, heads: int) -> Tuple[int, ...]:
        return self.dims * (2 if self.options['registers'] else 1), layers, heads, self.rotation.groups

    def initial_freqs(self) -> Any:
        freqs = axial(self.series('temperature'), self.dims)
        return freqs + (axial(self.series('register_temperature'), self.dims) if self.options['registers'] else [])

    def frequencies(self) -> Tensor:
        return self.freqs[:self.dims]

    def register_frequencies(self) -> Tensor:
        return self.freqs[-self.dims:]


class AxialLearned(Axial, name='axial_learned'):
    """Axial with learned frequencies (arXiv 2511.08368, table 2), by default for every layer and head.

    Starts as `Axial`. The two halves learn separate frequencies, but the first never sees y nor the second x, so it
    stays axis-aligned and exactly relative. `freqs`: (1, depth, heads, pairs), x half first. head_dim, D as `Axial`.

    Args:
        temperature: Of the initial frequencies.
        scale: Highest initial frequency.
        offset: As `Axial`.
        coords: As `Axial`.
        share_heads: One set of frequencies for all heads of a layer.
        share_layers: One set of frequencies for all layers.
    """
    summary = 'Axial with trainable frequencies; adapts its scale, still blind to oblique directions.'
    source = 'arXiv 2511.08368'
    learned = True
    defaults = {key: value for key, value in Axial.defaults.items() if not key.startswith('register')}

    def freqs_shape(self, layers: int, heads: int) -> Tuple[int, ...]:
        return 1, layers, heads, self.rotation.groups

    def initial_freqs(self) -> Any:
        return self.series('temperature') * self.dims

    def frequencies(self) -> Tensor:
        each, rows = self.rotation.groups // self.dims, []
        for axis in range(self.dims):
            w = self.freqs[0, ..., axis * each:(axis + 1) * each]
            rows.append(F.pad(w, [axis * each, (self.dims - 1 - axis) * each]))
        return torch.stack(rows)

    def freqs_for(self, frequencies: Tensor) -> Tensor:
        each = self.rotation.groups // self.dims
        freqs = torch.cat([w.narrow(-1, axis * each, each) for axis, w in enumerate(frequencies)], -1).unsqueeze(0)
        if int(frequencies.count_nonzero()) != int(freqs.count_nonzero()):
            raise ValueError(
                f'{self.name!r} turns the first {each} pairs of a head with x alone and the next {each} with y alone, '
                f'and these wave vectors are oblique or in other places')
        return freqs
