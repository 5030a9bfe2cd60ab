"""QuatRo: channel triplets turn about two learned axes of space, one for each axis of the image."""
from typing import Any, Dict, Tuple

import torch
import torch.nn.functional as F
from torch import Tensor

from .._checks import check_group
from ..rotations import AxesRotation
from ._base import ORDERS, RotaryEncoding
from ._frequencies import geometric


class QuatRo(RotaryEncoding, name='quatro'):
    """QuatRo (arXiv 2511.11665): v -> r v r* on channel triplets, r = exp(x a_x / 2) exp(y a_y / 2), both learned.

    a_x and a_y are vectors of space, read as imaginary quaternions: axes of rotation, as long as their frequency in
    radians per unit of coordinate (half as long in the paper, without the 1 / 2). Parallel axes make the triplet a
    pair of RoPE-Mixed and a channel that does not turn, orthogonal ones Spherical RoPE. The score is relative along the
    axis that acts last, x in the paper, and along both where the axes are parallel. Larger grids extrapolate: the range
    grows, the step between patches stays. Channels of head_dim beyond the last triplet pass unrotated.

    Starts with the frequencies of Spherical, about axes drawn evenly from all directions for every layer, head and
    triplet; how the authors start is not in what could be read. `freqs`: (2, depth, heads * triplets, 3), x first.

    In D dimensions there are D axes and factors; one turns a triplet about one axis, as a pair in a learned plane.

    Args:
        temperature: Ratio of the highest to the lowest initial frequency.
        order: Axis that acts first: 'yx' as the paper, or 'xy'. Of three axes 'zyx' or any other order of the three.
        coords: 'cells' (patch centres from -pi to pi across the reference grid), 'ends' or 'index'.
        share_heads: One set of axes for all heads of a layer.
        share_layers: One set of axes for all layers.
    """
    summary = 'Spherical about learned axes: anything between mixed (parallel) and spherical (orthogonal).'
    source = 'arXiv 2511.11665'
    learned = True
    oblique = True
    relative = 'last'
    defaults = dict(temperature=100., order='yx', coords='cells')
    scalings = ('extrapolate', 'interpolate')

    def _checked(self, options: Dict[str, Any]) -> Dict[str, Any]:
        return super()._checked({'order': ORDERS[self.dims][0], **options})

    def make_rotation(self) -> AxesRotation:
        check_group(self.head_dim, 3, self.name)
        return AxesRotation(self.head_dim, self.options['order'])

    def no_scaling(self) -> str:
        return 'a triplet turns about an axis that depends on the direction, so only coordinates can change'

    def freqs_shape(self, layers: int, heads: int) -> Tuple[int, ...]:
        return self.dims, layers, heads * self.rotation.groups, 3

    def initial_freqs(self) -> Tensor:
        groups = self.rotation.groups
        dtype, device = self.freqs.dtype, self.freqs.device  # of whole tensors, also where `freqs` is sharded
        lengths = torch.tensor(geometric(groups, self.options['temperature']), dtype=dtype, device=device)
        axes = F.normalize(torch.randn(self.freqs.shape, dtype=dtype, device=device), dim=-1)
        return axes * lengths.repeat(self.freqs.shape[2] // groups).unsqueeze(-1)

    def frequencies(self) -> Tensor:
        return self.freqs.unflatten(2, [-1, self.rotation.groups])

    def freqs_for(self, frequencies: Tensor) -> Tensor:
        return frequencies.flatten(2, 3)
