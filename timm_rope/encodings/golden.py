"""Golden: fixed wave vectors in directions that never repeat."""
import math
from typing import Any, Dict, Tuple

import torch
import torch.nn.functional as F
from torch import Tensor

from .._checks import check_group, check_positive, check_share
from ..positions.coordinates import NORMALISED
from ..rotations import PairRotation
from ._base import RotaryEncoding
from ._frequencies import joined, split

WIDE: Dict[str, Any] = dict(dtype=torch.float64, device='cpu')
SPACING = math.pi * (math.sqrt(5) - 1) / 2  # pi / golden ratio


def quasi_random_directions(count: int, dims: int) -> Tensor:
    """Unit vectors (dims, count), normal numbers made of multiples of powers of the generalised golden ratio."""
    ratio = 2.
    for _ in range(60):  # a contraction
        ratio = (1 + ratio) ** (1 / (dims + 1))
    number = torch.arange(1, count + 1, **WIDE)
    even = torch.stack([number * ratio ** -axis % 1 for axis in range(1, dims + 1)])
    return F.normalize(torch.erfinv(2 * even - 1), dim=0)


class Golden(RotaryEncoding, name='golden'):
    """Golden Gate RoPE (Jerry Xiong, 2025, jerryxio.ng/posts/nd-rope): a = w_i (x cos phi + y sin phi), all fixed.

    For pair i of P = head_dim // 2 and head h

        phi = (h P + i) pi / golden ratio       each pair of each head turned by 111 degrees from the one before
        w_i = min_freq (max_freq / min_freq)^((i - Z) / (P - Z - 1)),  0 in the first Z = round(P p_zero_freqs) pairs

    in radians per unit of coordinate, which goes from -1 to 1 across the reference grid. Unlike in `spiral`, no two
    heads look in the same directions; all layers have the same. Exactly relative. An odd head_dim leaves its last
    channel unrotated.

    Larger grids extrapolate with an unchanged step; the author's code squeezes them into [-1, 1], which is
    `coords='dinov3'`. There the sides of an image that is not square are sqrt(W / H) and sqrt(H / W) long, here
    each is 2 long. His published runs turned by twice the angle, his text recommends this one.

    In D = 1 and D = 3 dimensions directions are quasi-random, as in the author's code: with g^(D + 1) = g + 1 the
    one of wave n = h P + i + 1 is (e_1, ..., e_D) / |e|, x first, e_a = erfinv(2 (n g^-a mod 1) - 1). In one all that
    is left of it is a sign.

    `freqs`: (2 D, 1, heads, P), x and y rounded to float32, then what rounding left of them.

    Args:
        min_freq: Lowest frequency that is not zero; 0.2 in the author's runs on ImageNet, 1 on CIFAR-10.
        max_freq: Highest frequency; 20 on ImageNet, 100 on CIFAR-10. 20 is close to half a turn between 14 patches.
        p_zero_freqs: Share of the pairs that do not turn; a quarter did best on ImageNet, by 0.1 points.
        coords: 'cells' (patch centres), 'ends' (first and last row at -1 and 1, as published), or those of DINOv3.
    """
    summary = 'Fixed waves in directions that never repeat, others in every head; strong at 384 and 512 in its runs.'
    source = 'Jerry Xiong, 2025'
    oblique = True
    defaults = dict(min_freq=0.2, max_freq=20., p_zero_freqs=0., coords='cells')
    coords_choices = NORMALISED
    span = 2.

    def _checked(self, options: Dict[str, Any]) -> Dict[str, Any]:
        options = super()._checked(options)
        low, high = (check_positive(options[key], key) for key in ('min_freq', 'max_freq'))
        if high < low:
            raise ValueError(f'max_freq must be at least min_freq, got {high:g} and {low:g}.')
        check_share(options['p_zero_freqs'], 'p_zero_freqs')
        return options

    def make_rotation(self) -> PairRotation:
        return PairRotation(self.head_dim, check_group(self.head_dim, 2, self.name))

    def freqs_shape(self, layers: int, heads: int) -> Tuple[int, ...]:
        return 2 * self.dims, 1, self.num_heads, self.rotation.groups

    def initial_freqs(self) -> Tensor:
        pairs, low = self.rotation.groups, self.options['min_freq']
        zeros = round(pairs * self.options['p_zero_freqs'])
        ratio = math.log(self.options['max_freq'] / low) / max(pairs - zeros - 1, 1)
        lengths = [0.] * zeros + [low * math.exp(ratio * i) for i in range(pairs - zeros)]
        numbers = range(self.num_heads * pairs)
        if self.dims == 2:
            directions = torch.tensor([[math.cos(SPACING * i), math.sin(SPACING * i)] for i in numbers], **WIDE).T
        else:
            directions = quasi_random_directions(len(numbers), self.dims)
        return split(directions * torch.tensor(lengths * self.num_heads, **WIDE))

    def frequencies(self) -> Tensor:
        return joined(self.freqs)

    def freqs_for(self, frequencies: Tensor) -> Tensor:
        return split(frequencies)
