"""Spherical: channel triplets turn about two orthogonal axes, one for each axis of the image."""
from typing import Tuple

import torch
from torch import Tensor

from ..checks import check_choice, check_group, check_positive
from ..encoding import RotaryEncoding, layers_and_heads
from ..frequencies import geometric
from ..rotation import TripletRotation

ORDERS = ('yx', 'xy')


class Spherical(RotaryEncoding, name='spherical'):
    """Spherical RoPE (arXiv 2511.08368, section 3): R(p) = Yaw(w_g x) Roll(w_g y) on channel triplets.

    w_g = temperature^(-g / G) with G = head_dim // 3, the same for both axes, all heads and layers. The rotations do
    not commute, so the score is relative only along the axis that acts last. Larger grids extrapolate: the range grows,
    the step between patches stays.

    Args:
        head_dim: Channels per head, at least 3; one of 64 passes unrotated (the paper's model has 63).
        num_heads: Attention heads.
        depth: Blocks of the model.
        reference_grid: Grid that coordinates from -pi to pi cover.
        temperature: Ratio of the highest to the lowest frequency. The formula printed in the paper is 10000.
        order: Axis that acts first: 'yx' as the paper's equation, 'xy' as the caption of its figure 2.
        coords: 'cells' (patch centres), 'ends' (the paper's text) or 'index'.
    """
    summary = 'Non-commuting rotations of triplets: sees oblique directions without a learned parameter.'
    source = 'arXiv 2511.08368'
    oblique = True
    relative = 'last'

    def __init__(
            self,
            head_dim: int,
            num_heads: int,
            depth: int,
            reference_grid: Tuple[int, int] = (14, 14),
            *,
            temperature: float = 100.,
            order: str = 'yx',
            coords: str = 'cells',
            device=None,
            dtype=None,
    ) -> None:
        self.temperature = check_positive(temperature, 'temperature')
        check_choice(order, ORDERS, 'order')
        triplets = check_group(head_dim, 3, 'spherical')
        super().__init__(
            TripletRotation(head_dim, triplets, order), (2, 1, 1, triplets),
            head_dim, num_heads, depth, reference_grid, coords,
            options=dict(temperature=temperature, order=order), device=device, dtype=dtype)

    def initial_freqs(self) -> Tensor:
        w = geometric(self.rotation.groups, self.temperature)
        return torch.tensor(w, device=self.freqs.device, dtype=self.freqs.dtype).expand_as(self.freqs)


class SphericalLearned(RotaryEncoding, name='spherical_learned'):
    """Spherical RoPE with learned frequencies (arXiv 2511.08368, table 2), by default for every layer and head.

    Starts as `Spherical`; x and y then learn apart. `freqs`: (2, depth, heads, head_dim // 3), x first.

    Args:
        head_dim: Channels per head, at least 3; channels beyond the last triplet pass unrotated.
        num_heads: Attention heads.
        depth: Blocks of the model.
        reference_grid: Grid that coordinates from -pi to pi cover.
        temperature: Of the initial frequencies.
        order: As `Spherical`.
        coords: As `Spherical`.
        share_heads: One set of frequencies for all heads of a layer.
        share_layers: One set of frequencies for all layers.
    """
    summary = 'Spherical with trainable frequencies; in its paper as accurate as mixed on ImageNet.'
    source = 'arXiv 2511.08368'
    learned = True
    oblique = True
    relative = 'last'

    def __init__(
            self,
            head_dim: int,
            num_heads: int,
            depth: int,
            reference_grid: Tuple[int, int] = (14, 14),
            *,
            temperature: float = 100.,
            order: str = 'yx',
            coords: str = 'cells',
            share_heads: bool = False,
            share_layers: bool = False,
            device=None,
            dtype=None,
    ) -> None:
        self.temperature = check_positive(temperature, 'temperature')
        check_choice(order, ORDERS, 'order')
        triplets = check_group(head_dim, 3, 'spherical_learned')
        super().__init__(
            TripletRotation(head_dim, triplets, order),
            (2, *layers_and_heads(depth, num_heads, share_layers, share_heads), triplets),
            head_dim, num_heads, depth, reference_grid, coords,
            options=dict(temperature=temperature, order=order, share_heads=share_heads, share_layers=share_layers),
            init_options=('temperature', 'share_heads', 'share_layers'), device=device, dtype=dtype)

    def initial_freqs(self) -> Tensor:
        w = geometric(self.rotation.groups, self.temperature)
        return torch.tensor(w, device=self.freqs.device, dtype=self.freqs.dtype).expand_as(self.freqs)
