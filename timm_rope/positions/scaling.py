"""What happens on grids larger than the reference grid: rules for coordinates, frequencies and attention scores.

Along each axis s = max(size / reference size, 1) is how much the grid has grown; where it has not, nothing changes.
(In the coordinates of DINOv3 and EVA s is below 1 on smaller grids, see `own_rule`.)
With a coordinate p, a frequency w and r the turns that w makes over the reference grid:

    extrapolate   w p          the step between two patches is that of training, the range grows
    interpolate   w p / s      the grid is squeezed into the reference grid (position interpolation, arXiv 2306.15595)
    ntk           w' = w s^(-log(w_max / |w|) / log(w_max / w_min))
                               the highest frequency stays, the lowest is divided by s ("NTK-aware" interpolation,
                               arXiv 2309.00071, section 3.1)
    yarn          w' = w (ramp + (1 - ramp) / s),  ramp = (r - alpha) / (beta - alpha) between 0 and 1
                               slow waves are interpolated, fast ones stay ("NTK-by-parts" interpolation, arXiv
                               2309.00071, section 3.2)

For the geometric frequencies b^(-t / D), t = 0 .. D - 1, the exponent of `ntk` is -t / (D - 1): the change of base to
b s^(D / (D - 1)), which with d = 2 D channels is the paper's b s^(d / (d - 2)).

A wave vector keeps its direction where the grid grows by the same s along both axes: |w| and r are those of the whole
vector, s is that of each component's axis. For a vector on an axis this is the rule in one dimension. Two rotations in
sequence (triplets) have two frequencies, not one vector: there each counts by itself.

The paper of YaRN also makes attention sharper, its logits times (0.1 ln s + 1)^2 with s the ratio of the sequence
lengths. Here `log_n_scale` does that, for every rule and only if asked for: on 28 x 28 patches after 14 x 14 it is
1.26, YaRN's factor 1.30.

Frequencies have x first: (2, L, H, G), and of D axes (D, L, H, G). Everything is computed in the widest dtype there is.
"""
import math
from typing import List

import torch
from torch import Tensor

from .._precision import widest
from .coordinates import sizes, unit

RULES = ('extrapolate', 'interpolate', 'ntk', 'yarn')

# Turns over the reference grid, which bound the ramp of `yarn`. The paper's 1 and 32 are for thousands of tokens: the
# highest frequency that 14 patches can hold makes 7 turns, those of the published ViTs start at 2.2. Offsets between
# patches reach as far back as forth, so they show a wave of half a turn all its angles; a slower one would come to
# angles that were never seen. Above 2 turns the step between neighbours counts, and all angles are seen many times.
ALPHA, BETA = 0.5, 2.0


def own_rule(coords: str) -> str:
    """The rule that models with these coordinates are trained with, where no other is asked for.

    DINOv3 and EVA bring every grid to the size of the reference grid, smaller ones too: there s may be below 1, in all
    rules, and 'extrapolate' is the one that they were not made for.
    """
    return 'interpolate' if coords == 'eva' or coords.startswith('dinov3') else 'extrapolate'


def growth(grid: List[int], reference_grid: Tensor, like: Tensor, coords: str = 'index') -> Tensor:
    """How much a grid has grown along x, y, ..., (D,): at least 1, but see `own_rule`.

    Args:
        grid: D sizes of the grid, (rows, columns) of an image.
        reference_grid: Tensor (D,), those of the reference grid.
        like: Tensor whose dtype the result has at least.
        coords: Convention of the coordinates.
    """
    reference = widest(reference_grid.to(like.dtype)).round()
    # a number divided by a tensor is rounded twice, and 49 / 49 is not 1
    s = (unit(sizes(grid, reference), coords) / unit(reference, coords)).flip(0)
    return s if own_rule(coords) == 'interpolate' else s.clamp(min=1.)


def interpolate(axis: Tensor, s: Tensor, coords: str, offset: float = 0.) -> Tensor:
    """Coordinates of a grid that has grown by `s`, squeezed to where their patches are on the reference grid.

    Args:
        axis: (n,), coordinates along one axis.
        s: Growth along that axis.
        coords: Convention of the coordinates. Index coordinates have their origin in the middle of the first patch,
            half a patch from the border that stays where it is: patch i is at (i + 1/2) / s - 1/2.
        offset: That of the coordinates; index coordinates keep it, so that the border stays as far from prefix tokens.
    """
    if coords == 'index':
        return (axis - offset + 0.5) / s - 0.5 + offset
    return axis / s


def lengths(freqs: Tensor, apart: bool) -> Tensor:
    """Lengths of wave vectors (2, L, H, G) -> (1, L, H, G), or of each component if the axes are `apart`."""
    return freqs.abs() if apart else torch.linalg.vector_norm(freqs, dim=0, keepdim=True)


def ntk(freqs: Tensor, s: Tensor, apart: bool) -> Tensor:
    """Frequencies of which the highest of each head stays and the lowest is divided by `s`.

    Learned frequencies that are almost zero count as the lowest: the others are then hardly changed. Exact zeros do not
    count. Where all frequencies of a head are equal, each is the highest and stays.

    Args:
        freqs: (2, L, H, G), x first.
        s: (2,), growth along x and y.
        apart: Whether x and y have frequencies of their own, see `lengths`.
    """
    length = lengths(freqs, apart)
    highest = length.amax(dim=-1, keepdim=True)
    lowest = torch.where(length > 0, length, highest).amin(dim=-1, keepdim=True)
    reach = _log(highest) - _log(lowest)
    exponent = ((_log(highest) - _log(length)) / torch.where(reach > 0, reach, 1.)).clamp(0., 1.)
    return freqs * s.reshape(-1, 1, 1, 1) ** -exponent


def _log(length: Tensor) -> Tensor:
    return length.clamp(min=1e-30).log()  # finite where a length is zero


def yarn(freqs: Tensor, s: Tensor, side: Tensor, apart: bool, alpha: float = ALPHA, beta: float = BETA) -> Tensor:
    """Frequencies of which those below `alpha` turns are divided by `s` and those above `beta` stay.

    Args:
        freqs: (2, L, H, G), x first.
        s: (2,), growth along x and y.
        side: (2,), length of the reference grid along x and y in the unit of the coordinates.
        apart: Whether x and y have frequencies of their own, see `lengths`.
        alpha: Turns over the reference grid.
        beta: Turns over the reference grid, more than `alpha`.
    """
    turns = lengths(freqs * side.reshape(-1, 1, 1, 1), apart) / (2 * math.pi)
    ramp = ((turns - alpha) / (beta - alpha)).clamp(0., 1.)
    return freqs * (1. - (1. - ramp) * (1. - 1. / s.reshape(-1, 1, 1, 1)))


@torch.fx.wrap
def rescale(rule: str, freqs: Tensor, s: Tensor, side: Tensor, apart: bool) -> Tensor:
    """Frequencies by the rule 'ntk' or 'yarn', in their own dtype; arguments as `ntk` and `yarn`."""
    wide = widest(freqs)
    return (ntk(wide, s, apart) if rule == 'ntk' else yarn(wide, s, side, apart)).to(freqs.dtype)


@torch.fx.wrap
def log_n_scale(tokens: int, num_prefix_tokens: int, reference_grid: Tensor, like: Tensor) -> Tensor:
    """ln(n) / ln(n_ref), at least 1: what attention scores are multiplied by so that attention to n tokens is as sharp
    as it was to n_ref (arXiv 2202.12172).

    Args:
        tokens: n, prefix tokens included.
        num_prefix_tokens: Tokens in front of the patches.
        reference_grid: Tensor (2,); n_ref are its patches and the prefix tokens, at least 2.
        like: Tensor whose dtype the result has.

    Returns:
        A scalar tensor.
    """
    n_ref = (widest(reference_grid.to(like.dtype)).round().prod() + num_prefix_tokens).clamp(min=2.)
    return (torch.full_like(n_ref, tokens).log() / n_ref.log()).clamp(min=1.).to(like.dtype)
