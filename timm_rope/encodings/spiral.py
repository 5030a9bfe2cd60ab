"""Spiral: axial, with the channel pairs spread over many directions instead of two."""
import math
from typing import Any, Dict, List

import torch
from torch import Tensor

from .._checks import check_flag, check_integer
from ..positions.scaling import RULES
from ..rotations import PairRotation
from ..rotations.base import by_rows
from ._base import RotaryEncoding
from ._frequencies import geometric


class Spiral(RotaryEncoding, name='spiral'):
    """Spiral RoPE (arXiv 2602.03227): a = theta (x cos phi + y sin phi), phi one of K directions in steps of pi / K.

    The first half of the pairs turns with a row axis, the second with a column axis; pair j of either half has
    theta_j = scale * temperature^(-j / P) radians per patch, P = head_dim // 4. For pairs 2m and 2m + 1, counted
    through both halves, the two axes are turned by alpha = (m mod K / 2) pi / K:

        row half:     a = theta (x sin alpha + y cos alpha)
        column half:  a = theta (x cos alpha - y sin alpha)

    This is the channel layout of the published weights. A head_dim that is a multiple of 4 K gives every direction the
    same number of channels; with a head_dim of 2 K times an odd number some directions get none. Nothing is learned,
    all heads and layers share the angles. Exactly relative unless clamped. Larger grids extrapolate to higher indices.

    Args:
        directions: K, even; head_dim must be a multiple of 2 K, it has no unrotated rest. 16 as the paper; if it is not
            given and head_dim is no multiple of 64, the largest K up to 16 that treats all directions alike (6 for a
            head_dim of 72, as the authors), or that fits at all.
        temperature: Ratio of the highest to the lowest frequency.
        scale: Highest frequency in radians per patch.
        clamp: Only to load weights that were trained with it, as the published ones. The authors' code finds the angles
            by turning an image of them about its centre; where a turned position falls outside, it takes the border.
            So patches near the corners get other angles than the formula's, and the score is no longer relative. That
            grid is square; here rows and columns of others turn about their centre in units of patches.
        coords: 'index', row and column number, or 'eva', squeezed onto the reference grid (not with clamp).
    """
    summary = 'Fixed waves in many directions: oblique without a learned parameter, and still exactly relative.'
    source = 'arXiv 2602.03227'
    oblique = True
    defaults = dict(directions=16, temperature=1e4, scale=1.5, clamp=False, coords='index')
    coords_choices = ('index', 'eva')
    dimensions, no_dimensions = (2,), 'its directions go around in the plane, and its paper names no others'

    def _checked(self, options: Dict[str, Any]) -> Dict[str, Any]:
        fitting = directions_of(self.head_dim)
        options = super()._checked({'directions': default_directions(self.head_dim), **options})
        if check_flag(options['clamp'], 'clamp') and options['coords'] == 'eva':
            raise ValueError("coords must be 'index' with clamp=True: where angles are clamped depends on the grid.")
        if not fitting:
            raise ValueError(f'head_dim must be a multiple of 4 for {self.name!r}, got {self.head_dim}.')
        options['directions'] = check_integer(options['directions'], 'directions', 2)
        if options['directions'] not in fitting:
            raise ValueError(
                f'directions must be even and head_dim a multiple of twice as many: {options["directions"]} directions '
                f'do not fit head_dim {self.head_dim}, which takes {", ".join(map(str, fitting))}.')
        return options

    def check_scaling(self, scaling: str) -> str:
        if self.options['clamp'] and scaling in RULES[1:]:
            raise ValueError(
                f"scaling must be 'extrapolate' for {self.name!r} with clamp=True, got {scaling!r}: where its angles "
                f'are clamped depends on the size of the grid.')
        return super().check_scaling(scaling)

    def make_rotation(self) -> PairRotation:
        rotation = ClampedPairRotation if self.options['clamp'] else PairRotation
        return rotation(self.head_dim, self.head_dim // 2)

    def initial_freqs(self) -> List[List[float]]:
        half = self.rotation.groups // 2
        theta = [self.options['scale'] * w for w in geometric(half, self.options['temperature'])]
        angles = self.options['directions'] // 2
        alpha = [math.pi / 2 * (pair // 2 % angles) / angles for pair in range(2 * half)]
        row = [(w * math.sin(a), w * math.cos(a)) for w, a in zip(theta, alpha[:half])]
        column = [(w * math.cos(a), -w * math.sin(a)) for w, a in zip(theta, alpha[half:])]
        return [list(axis) for axis in zip(*row, *column)]


def directions_of(head_dim: int) -> List[int]:
    """Numbers of directions that fit a head: even, with head_dim a multiple of twice as many."""
    return [k for k in range(2, head_dim // 2 + 1, 2) if head_dim % (2 * k) == 0]


def default_directions(head_dim: int) -> int:
    """The largest number up to 16 that gives every direction the same channels of a head, else that fits it."""
    fitting = [k for k in directions_of(head_dim) if k <= Spiral.defaults['directions']]
    return max([k for k in fitting if head_dim % (4 * k) == 0] or fitting, default=2)


class ClampedPairRotation(PairRotation):
    """Pairs that turn by the position along their wave, clamped to the extent of the grid along the unturned axis.

    With the centre c of the grid, the wave vector w and its length theta: a = theta c' + clamp(w . (p - c), -theta c',
    theta c'), where c' is the row of the centre in the first half of the pairs and its column in the second. Payload
    as `PairRotation`.
    """
    boundless = False

    def table(self, freqs: Tensor, y: Tensor, x: Tensor) -> Tensor:
        return clamped_pair_table(freqs, y, x)


@torch.fx.wrap
def clamped_pair_table(freqs: Tensor, y: Tensor, x: Tensor) -> Tensor:
    wide = freqs.to(y.dtype)  # coordinates come in the widest dtype there is
    x = by_rows(x)
    row, column = 0.5 * (y[0] + y[-1]), 0.5 * (x[0, 0] + x[-1, -1])
    theta = wide.square().sum(0).sqrt()
    half = theta.shape[-1] // 2
    extent = torch.cat((theta[..., :half] * row, theta[..., half:] * column), dim=-1).unsqueeze(2)
    along_x = (x - column).unsqueeze(-1) * wide[0].unsqueeze(2).unsqueeze(2)
    along_y = (y - row).reshape(1, 1, -1, 1, 1) * wide[1].unsqueeze(2).unsqueeze(2)
    angle = (along_x + along_y).flatten(2, 3)
    angle = extent + torch.minimum(torch.maximum(angle, -extent), extent)
    return torch.stack((angle.cos(), angle.sin()), dim=-1).flatten(-2).to(freqs.dtype)
