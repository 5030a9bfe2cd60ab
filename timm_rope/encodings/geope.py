"""GeoPE: channel triplets turn about one axis in the plane of two, whichever way the position lies."""
from typing import List

import torch
from torch import Tensor

from .._checks import check_group
from ..rotations import BlockRotation
from ._base import RotaryEncoding
from ._frequencies import geometric


class GeoPE(RotaryEncoding, name='geope'):
    """GeoPE (arXiv 2512.04963): R(p) = exp((w_g / 2) (y L_1 + x L_2)) on channel triplets.

    L_1 and L_2 turn space about its first two axes. The quaternions of the two rotations, exp(w y i / 2) and
    exp(w x j / 2), are averaged as logarithms: a turn by w |p| / 2 about the axis (y, x, 0). Unlike in Spherical, none
    of the two acts first, and the image may be transposed; but the score is relative along neither. It is LieRE with
    block 3 and these generators. w_g = temperature^(-g / G) with G = head_dim // 3, all heads and layers alike. Larger
    grids extrapolate: the range grows, the step between patches stays. Channels beyond the last triplet pass
    unrotated: one of a head_dim of 64.

    In three dimensions the third quaternion is exp(w z k / 2), and the mean turns by w |p| / 3 about (y, x, z); in one
    there is nothing to average, and a triplet turns by w x, exactly relative.

    Neither the exponent of w_g nor the coordinates are in what could be read of the paper: they are those of Spherical.

    Args:
        temperature: Ratio of the highest to the lowest frequency.
        coords: 'cells' (patch centres from -pi to pi across the reference grid), 'ends' or 'index'.
    """
    summary = 'Triplets turn about the axis a patch lies along: spherical without an order of the axes.'
    source = 'arXiv 2512.04963'
    oblique = True
    relative = ''
    defaults = dict(temperature=100., coords='cells')
    scalings = ('extrapolate', 'interpolate')

    def make_rotation(self) -> BlockRotation:
        check_group(self.head_dim, 3, self.name)
        return BlockRotation(self.head_dim, 3)

    def no_scaling(self) -> str:
        return 'a triplet turns about an axis that depends on the direction, so only coordinates can change'

    def initial_freqs(self) -> List[float]:
        return geometric(self.rotation.groups, self.options['temperature'])

    def frequencies(self) -> Tensor:
        signs, places = (1., -1., -1.), (1, 2, 0)  # (0, 2), (1, 2) and (0, 1) of the generators
        rows = []
        for axis in range(self.dims):
            row = [torch.zeros_like(self.freqs[axis]) for _ in range(3)]
            row[places[axis]] = signs[axis] / self.dims * self.freqs[axis]
            rows.append(torch.stack(row, -1))
        return torch.stack(rows)
