"""nD: fixed wave vectors in threes, 120 degrees apart, turned at random in every head."""
import math
import random
from typing import Any, Dict, List, Tuple

from torch import Tensor

from .._checks import check_group, check_integer
from ..rotations import PairRotation
from ._base import RotaryEncoding
from ._frequencies import geometric, joined, split

LARGEST_SEED = 2 ** 31 - 1


def _line(draw: random.Random) -> List[Tuple[float, ...]]:
    return [(1.,), (-1.,)]


def _triangle(draw: random.Random) -> List[Tuple[float, ...]]:
    turn = 2 * math.pi * draw.random()
    angles = [turn + 2 * math.pi * j / 3 for j in range(3)]
    return [(math.cos(phi), math.sin(phi)) for phi in angles]


def _tetrahedron(draw: random.Random) -> List[Tuple[float, ...]]:
    """Four corners of a cube, turned by a quaternion that is drawn evenly (K. Shoemake, 1992)."""
    u, alpha, beta = draw.random(), 2 * math.pi * draw.random(), 2 * math.pi * draw.random()
    low, high = math.sqrt(1 - u), math.sqrt(u)
    a, b, c, d = low * math.sin(alpha), low * math.cos(alpha), high * math.sin(beta), high * math.cos(beta)
    rows = [
        (1 - 2 * (c * c + d * d), 2 * (b * c - a * d), 2 * (b * d + a * c)),
        (2 * (b * c + a * d), 1 - 2 * (b * b + d * d), 2 * (c * d - a * b)),
        (2 * (b * d - a * c), 2 * (c * d + a * b), 1 - 2 * (b * b + c * c))]
    corners = [(1, 1, 1), (1, -1, -1), (-1, 1, -1), (-1, -1, 1)]
    return [tuple(sum(r * s for r, s in zip(row, corner)) / math.sqrt(3) for row in rows) for corner in corners]


class SimplexWaves(RotaryEncoding, name='nd'):
    """nD-RoPE (arXiv 2606.12146), of images: the waves of each scale point to the corners of a regular triangle.

    Pair 3 s + j, j = 0, 1, 2, of head h turns by a = w_s (x cos phi + y sin phi) with

        w_s = scale temperature^(-s / S), S = head_dim // 6     radians per unit of coordinate
        phi = turn_h + 2 pi j / 3                               one random turn of each head, for all its scales

    Three such waves and their opposites form a hexagon: seen from the middle all directions are alike to the fourth
    order, with the crosses that `mixed` begins with to the second. All is fixed, and the same in all layers. Exactly
    relative. Larger grids extrapolate to higher indices. head_dim must be at least 6, channels beyond its last multiple
    pass unrotated: 4 of 64 (the paper made its ViT-S 396 wide, with heads of 66).

    In D dimensions the D + 1 waves of a scale point to the corners of a regular simplex, and S = head_dim // (2 D + 2).
    In three it is a tetrahedron, turned at random in space; in one they are 1 and -1, and no turn is left.

    The turns are drawn by Python's generator from `seed`, so that a model is the same everywhere, whatever torch's own
    seed. The seed is saved with the weights, in the signature, and weights of another one are refused.

    `freqs`: (2 D, 1, heads, (D + 1) S), x and y rounded to float32, then what rounding left of them.

    Args:
        temperature: Ratio of the highest to the lowest frequency.
        scale: Highest frequency.
        seed: Of the turns of the heads, from 0 to 2^31 - 1.
        coords: 'index' as published; others in `positions/coordinates.py`.
    """
    summary = 'Fixed waves in threes, 120 degrees apart; in its paper far ahead of mixed on turned images.'
    source = 'arXiv 2606.12146'
    oblique = True
    defaults = dict(temperature=100., scale=1., seed=0, coords='index')

    def _checked(self, options: Dict[str, Any]) -> Dict[str, Any]:
        options = super()._checked(options)
        options['seed'] = check_integer(options['seed'], 'seed', 0)
        if options['seed'] > LARGEST_SEED:
            raise ValueError(f'seed must be at most {LARGEST_SEED}, got {options["seed"]}.')
        return options

    def make_rotation(self) -> PairRotation:
        corners = self.dims + 1
        return PairRotation(self.head_dim, corners * check_group(self.head_dim, 2 * corners, self.name))

    def freqs_shape(self, layers: int, heads: int) -> Tuple[int, ...]:
        return 2 * self.dims, 1, self.num_heads, self.rotation.groups

    def initial_freqs(self) -> Tensor:
        draw = random.Random(self.options['seed'])
        count = self.rotation.groups // (self.dims + 1)
        lengths = [self.options['scale'] * w for w in geometric(count, self.options['temperature'])]
        corners = {1: _line, 2: _triangle, 3: _tetrahedron}[self.dims]
        return split(list(zip(*(
            [w * part for part in corner]
            for waves in [corners(draw) for _ in range(self.num_heads)] for w in lengths for corner in waves))))

    def frequencies(self) -> Tensor:
        return joined(self.freqs)

    def freqs_for(self, frequencies: Tensor) -> Tensor:
        return split(frequencies)
