"""Spherical: channel triplets turn about two orthogonal axes, one for each axis of the image."""
from typing import Any, Dict, List

from .._checks import check_group
from ..rotations import AxesRotation, Rotation, TripletRotation
from ._base import ORDERS, RotaryEncoding
from ._frequencies import geometric


class Spherical(RotaryEncoding, name='spherical'):
    """Spherical RoPE (arXiv 2511.08368, section 3): R(p) = Yaw(w_g x) Roll(w_g y) on channel triplets.

    w_g = temperature^(-g / G) with G = head_dim // 3, the same for both axes, all heads and layers. The rotations do
    not commute, so the score is relative only along the axis that acts last. Larger grids extrapolate: the range grows,
    the step between patches stays. Channels beyond the last triplet pass unrotated: one of a head_dim of 64.

    In three dimensions z has a turn of its own, about the axis of space that is left: 'zyx' is R(p) = Yaw(w_g x)
    Roll(w_g y) Pitch(w_g z), relative along x. In one R(p) = Yaw(w_g x), which leaves the last channel of a triplet as
    it is. (The paper speaks of any number, and writes down two.)

    Args:
        temperature: Ratio of the highest to the lowest frequency. The formula printed in the paper is 10000.
        order: Axis that acts first: 'yx' as the paper's equation, 'xy' as the caption of its figure 2. Of three axes
            'zyx' or any other order of the three.
        coords: 'cells' (patch centres from -pi to pi across the reference grid), 'ends' (the paper's text) or 'index'.
    """
    summary = 'Non-commuting rotations of triplets: sees oblique directions without a learned parameter.'
    source = 'arXiv 2511.08368'
    oblique = True
    relative = 'last'
    axes_apart = True
    defaults = dict(temperature=100., order='yx', coords='cells')

    def _checked(self, options: Dict[str, Any]) -> Dict[str, Any]:
        return super()._checked({'order': ORDERS[self.dims][0], **options})

    def make_rotation(self) -> Rotation:
        groups = check_group(self.head_dim, 3, self.name)
        if self.dims == 3:
            return AxesRotation(self.head_dim, self.options['order'])
        return TripletRotation(self.head_dim, groups, self.options['order'])

    def initial_freqs(self) -> List[float]:
        return geometric(self.rotation.groups, self.options['temperature'])


class SphericalLearned(Spherical, name='spherical_learned'):
    """Spherical RoPE with learned frequencies (arXiv 2511.08368, table 2), by default for every layer and head.

    Starts as `Spherical`; x and y then learn apart. `freqs`: (2, depth, heads, head_dim // 3), x first.

    Args:
        temperature: Of the initial frequencies.
        order: As `Spherical`.
        coords: As `Spherical`.
        share_heads: One set of frequencies for all heads of a layer.
        share_layers: One set of frequencies for all layers.
    """
    summary = 'Spherical with trainable frequencies; in its paper as accurate as mixed on ImageNet.'
    learned = True
