"""ComRoPE: blocks of channels turn by learned generators that commute by construction."""
from typing import Any, Dict, Tuple

import torch
from torch import Tensor

from .._checks import check_choice, check_group, check_integer
from .._precision import widest
from ..rotations import BlockRotation
from ._base import RotaryEncoding


class ComRoPE(RotaryEncoding, name='comrope'):
    """ComRoPE (arXiv 2506.03737): R(p) = exp((x t_x + y t_y) A), a learned skew-symmetric A of block x block.

    As LieRE, but the generators of a block are parallel and so commute: exactly relative whatever is learned. 'ld'
    learns t_x and t_y, and with block 2 is RoPE-Mixed in other coordinates; with 'ap' they are (0, 1) and (1, 0) in
    turn, so that a block sees one axis, and nothing is oblique. A starts as P - P^T and t_x, t_y with standard normal
    numbers. The authors' heads share t_x and t_y, here each has its own; their class token turns as a patch in the
    middle of every image, which is coords 'dinov3' with an offset of -0.5. Larger grids extrapolate. Channels of
    head_dim beyond the last block pass unrotated. `freqs`: (1, depth, heads * blocks, block (block - 1) / 2, with 'ld'
    2 more): triangles, t_x, t_y.

    In D dimensions, as in the paper, 'ld' learns D numbers, and with 'ap' block j turns with coordinate j mod D of a
    position, the row first of an image.

    Args:
        variant: 'ld' (linearly dependent generators) or 'ap' (axial partition; head_dim must hold a block for each
            axis).
        block: Size of the generators, 2 .. head_dim; the authors' are at most 8. Exact closed forms for 2, 3, 4.
        offset: Of patches from prefix tokens, along both axes: in patches with 'index' and 'eva', else in images.
        coords: 'cells' (as published: patch centres, from 0 to 1 across the reference grid), 'ends' or 'index'.
        share_heads: One set of generators for all heads of a layer.
        share_layers: One set of generators for all layers.
    """
    summary = 'LieRE with generators that commute: learned rotations of whole blocks, and exactly relative.'
    source = 'arXiv 2506.03737'
    learned = True
    oblique = True  # of 'ld'
    defaults = dict(variant='ld', block=8, offset=0., coords='cells')
    span = 1.
    centered = False
    scalings = ('extrapolate', 'interpolate')

    def _checked(self, options: Dict[str, Any]) -> Dict[str, Any]:
        options = super()._checked(options)
        self.one_axis = check_choice(options['variant'], ('ld', 'ap'), 'variant') == 'ap'
        blocks = self.dims if self.one_axis else 1
        check_group(self.head_dim, check_integer(options['block'], 'block', 2) * blocks, self.name)
        return options

    def make_rotation(self) -> BlockRotation:
        return BlockRotation(self.head_dim, self.options['block'], commuting=True)

    def no_scaling(self) -> str:
        return 'a block turns by several frequencies at once, so only coordinates can change'

    def freqs_shape(self, layers: int, heads: int) -> Tuple[int, ...]:
        size = self.rotation.size
        return 1, layers, heads * self.rotation.groups, size * (size - 1) // 2 + self.dims * (not self.one_axis)

    def initial_freqs(self) -> Tensor:
        values = torch.randn_like(self.freqs)
        values[..., :self.rotation.size * (self.rotation.size - 1) // 2] *= 2 ** 0.5  # the difference of two
        return values

    def frequencies(self) -> Tensor:
        return generators(self.freqs[0].unflatten(1, [-1, self.rotation.groups]), self.dims, self.one_axis)

    def freqs_for(self, frequencies: Tensor) -> Tensor:
        larger = frequencies.take_along_dim(frequencies.square().sum(-1, True).argmax(0, True), 0)
        t = (frequencies * larger).sum(-1, True) / larger.square().sum(-1, True).clamp_min(1e-30)
        freqs = frequencies.sum(0, True) if self.one_axis else torch.cat((larger, *t.unsqueeze(1)), -1)
        rest = (frequencies - generators(freqs[0], self.dims, self.one_axis)).abs().max()
        if bool(rest > 8 * torch.finfo(frequencies.dtype).eps * frequencies.abs().max()):
            raise ValueError(f'the generators of a block of {self.name!r} are parallel, of one axis with variant "ap"')
        return freqs.flatten(2, 3)


@torch.fx.wrap
def generators(freqs: Tensor, dims: int, one_axis: bool) -> Tensor:
    """A_x and A_y, (D, L, H, G, T), in float64 while nothing learns: rounded products would turn by 2e-6 rad more."""
    freqs = freqs if torch.is_grad_enabled() and freqs.requires_grad else widest(freqs)
    if one_axis:
        axis = dims - 1 - torch.arange(freqs.shape[2], device=freqs.device).unsqueeze(-1) % dims
        return torch.stack([freqs * (axis == i) for i in range(dims)])
    entries = freqs.shape[-1] - dims
    return torch.stack([freqs[..., entries + i:entries + i + 1] * freqs[..., :entries] for i in range(dims)])
