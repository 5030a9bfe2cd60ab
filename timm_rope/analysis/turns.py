"""Which blocks of a model turn their queries and keys, and by what: matrices and generators, in float64.

In comes a model of this package (ViT or Swin) or one of timm's own with a rotary encoding (EVA-02, DINOv3, NAVER's,
Perception Encoder); out come rotations in one form, so that everything else in this room asks no more which it was.
"""
import copy
import math
from dataclasses import dataclass
from typing import Any, List, Optional

import torch
from torch import Tensor, nn

from ..encodings import RotaryEncoding
from ..positions.coordinates import Grid, grid_axes, to_grid


@dataclass(frozen=True)
class Turn:
    """The rotation of one block.

    Attributes:
        name: Of the block in the model, 'blocks.3'.
        rope: Its encoding, ours or timm's.
        index: Which of the layers of the encoding it is.
        grid: (rows, columns) of the patches that attend to each other at the nominal size.
        head_dim: Channels per head.
    """
    name: str
    rope: nn.Module
    index: int
    grid: Grid
    head_dim: int


def rotary_layers(model: nn.Module) -> List[Turn]:
    """The blocks that rotate, from the first to the last.

    Raises:
        ValueError: The model has no rotary encoding that is understood.
    """
    parts: Any = model
    rope = getattr(model, 'rope', None)
    if isinstance(rope, nn.Module) and hasattr(model, 'blocks'):
        if not isinstance(rope, RotaryEncoding) and not hasattr(rope, 'get_embed'):
            raise ValueError(f'{type(rope).__name__} is no rotary encoding that is understood here.')
        grid = to_grid(tuple(parts.patch_embed.grid_size), 'grid_size')
        head_dim = rope.head_dim if isinstance(rope, RotaryEncoding) else _embed(rope, grid).shape[-1] // 2
        return [Turn(f'blocks.{i}', rope, i, grid, head_dim) for i in range(len(parts.blocks))]
    turns = [
        Turn(f'layers.{i}.blocks.{j}', block.attn.rope, 0, tuple(block.window_size), block.attn.rope.head_dim)
        for i, stage in enumerate(getattr(parts, 'layers', ()))
        for j, block in enumerate(getattr(stage, 'blocks', ()))
        if isinstance(getattr(getattr(block, 'attn', None), 'rope', None), RotaryEncoding)]
    if not turns:
        raise ValueError(
            f'{type(model).__name__} has no rotary encoding: of this package, or timm\'s own in `model.rope`.')
    return turns


@torch.no_grad()
def rotation_matrices(turn: Turn, grid: Optional[Grid] = None) -> Tensor:
    """What the queries and keys of each patch are multiplied by, group by group.

    Args:
        turn: One of `rotary_layers`.
        grid: (rows, columns) of patches, the nominal one by default. Scaling rules are followed, augmentation is not.

    Returns:
        (H or 1, N, G, b, b) in float64, N row-major; orthogonal. Channels that belong to no group are left out.
    """
    grid = turn.grid if grid is None else to_grid(grid, 'grid')
    if not isinstance(turn.rope, RotaryEncoding):
        return _turned_by(_angles(turn, grid))
    rope = _layer_of(turn)
    return _matrices(rope, rope(grid)[0])


@torch.no_grad()
def generators(turn: Turn) -> Tensor:
    """Skew-symmetric A_x and A_y of each group: a step of u patches to the right turns by exp(u A_x).

    Where the rotations commute, as of pairs, a patch at (x, y) turns by exp(x A_x + y A_y). They are those of the
    reference grid, where no scaling rule has an effect yet. Those of timm's encodings are read from the angle between
    neighbouring patches, so they are known only up to whole turns.

    Returns:
        (H or 1, G, 2, b, b), x first, in float64, radians per patch.

    Raises:
        ValueError: The grid of one of timm's encodings has only one patch along an axis, so that there is no step.
    """
    if not isinstance(turn.rope, RotaryEncoding):
        if min(turn.grid) < 2:
            raise ValueError(f'the grid must have two patches along each axis, to have a step, got {turn.grid}.')
        angles = _angles(turn, turn.grid).unflatten(1, turn.grid)
        steps = torch.stack((angles[:, 0, 1] - angles[:, 0, 0], angles[:, 1, 0] - angles[:, 0, 0]), dim=-1)
        steps = torch.remainder(steps + math.pi, 2 * math.pi) - math.pi
        zero = torch.zeros_like(steps)
        return torch.stack((torch.stack((zero, -steps), -1), torch.stack((steps, zero), -1)), -2)
    rope = _layer_of(turn)
    rows, columns = [max(2, round(side)) for side in rope.reference_grid.tolist()]
    y, x = grid_axes([rows, columns], rope.reference_grid, rope.freqs, rope.coords, rope.span, rope.centered)
    freqs = rope.table_freqs()
    # the slope at the origin, from four points: exact to 1e-9 for waves of up to 40 rad a patch
    h, origin = 1e-4, x.new_zeros(1)
    places = x.new_tensor([1., -1., 2., -2.]) * h
    slopes = []
    for along_x, along_y in (((x[1] - x[0]) * places, origin), (origin, (y[1] - y[0]) * places)):
        right, left, far_right, far_left = _matrices(rope, rope.rotation.table(freqs, along_y, along_x)[0]).unbind(1)
        slopes.append((8 * (right - left) - (far_right - far_left)) / (12 * h))
    return torch.stack(slopes, dim=2)


def _layer_of(turn: Turn) -> RotaryEncoding:
    """The encoding with one layer, that of the block, in float64."""
    rope: Any = copy.deepcopy(turn.rope).double().eval()
    if rope.freqs.shape[1] > 1:  # layers are on axis 1 in every encoding
        rope.freqs = nn.Parameter(rope.freqs[:, turn.index:turn.index + 1].detach().clone())
    rope.depth = 1
    return rope


def _matrices(rope: RotaryEncoding, payload: Tensor) -> Tensor:
    """(H or 1, N, G, b, b) of a payload (H or 1, N, W): what becomes of each channel of a group."""
    size, groups = rope.rotation.size, rope.rotation.groups
    channels = torch.eye(size, dtype=payload.dtype, device=payload.device).repeat(1, groups)
    x = payload.new_zeros(size, payload.shape[0], payload.shape[1], rope.head_dim)
    x[..., :size * groups] = channels[:, None, None]
    turned = rope.rotation(x, payload)[..., :size * groups].unflatten(-1, (groups, size))
    return turned.permute(1, 2, 3, 4, 0)


def _angles(turn: Turn, grid: Grid) -> Tensor:
    """Angles (H or 1, N, D / 2) by which one of timm's encodings turns the pairs of channels of each patch."""
    embed = _embed(turn.rope, grid)
    if embed.ndim == 4:  # of mixed frequencies, which every layer has of its own
        embed = embed[turn.index]
    sin, cos = embed.double().chunk(2, dim=-1)
    angles = torch.atan2(sin, cos)
    half = bool(getattr(turn.rope, 'rotate_half', False))
    angles = angles[..., :angles.shape[-1] // 2] if half else angles[..., ::2]
    return angles.unsqueeze(0) if angles.ndim == 2 else angles


@torch.no_grad()
def _embed(rope: nn.Module, grid: Grid) -> Tensor:
    """Sines and cosines of one of timm's encodings, (..., N, 2 D), without augmentation and without a trace in it."""
    still: Any = copy.deepcopy(rope).eval()
    fixed = getattr(still, 'feat_shape', None)
    return still.get_embed() if fixed is not None and tuple(fixed) == tuple(grid) else still.get_embed(shape=list(grid))


def _turned_by(angles: Tensor) -> Tensor:
    cos, sin = angles.cos(), angles.sin()
    return torch.stack((torch.stack((cos, -sin), -1), torch.stack((sin, cos), -1)), -2)
