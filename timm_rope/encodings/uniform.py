"""Uniform: axial with a single frequency."""
from typing import List

from .._checks import check_group
from ..positions.coordinates import NORMALISED
from ..rotations import PairRotation
from ._base import RotaryEncoding
from ._frequencies import axial


class Uniform(RotaryEncoding, name='uniform'):
    """Uniform RoPE (arXiv 2511.08368, section 3): every pair makes one turn over the reference grid.

    The first half of the pairs turns with x, the second with y, all with w = 1 on coordinates in [-pi, pi]. Exactly
    relative, and periodic with the reference grid: on larger grids positions one reference image apart look the same.
    With coords 'ends' the first and the last row coincide already on the reference grid. head_dim must be at least 4;
    channels beyond its last multiple pass unrotated. In D dimensions the axes have head_dim // (2 D) pairs each, x the
    first, as in `axial`; the paper's form is that of two.

    Args:
        coords: 'cells' (patch centres), 'ends' (the paper's text), or those of DINOv3: one turn over any image.
    """
    summary = 'One frequency, one turn over the image: the control that shows what diverse frequencies bring.'
    source = 'arXiv 2511.08368'
    defaults = dict(coords='cells')
    coords_choices = NORMALISED
    scalings = ('extrapolate', 'interpolate')

    def make_rotation(self) -> PairRotation:
        return PairRotation(self.head_dim, self.dims * check_group(self.head_dim, 2 * self.dims, self.name))

    def no_scaling(self) -> str:
        return 'there is one frequency, and those rules tell high ones from low ones'

    def initial_freqs(self) -> List[List[float]]:
        return axial([1.] * (self.rotation.groups // self.dims), self.dims)
