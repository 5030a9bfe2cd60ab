"""What frequencies a model turns by: wave vectors, their spread over sizes and directions, and how far from commuting.

In comes a model (or the tensors of another function here), out come tensors in radians per patch; all in float64.
"""
import math
from typing import Dict

import torch
from torch import Tensor, nn

from .turns import generators, rotary_layers

LOW = 0.05  # radians per patch: less than a tenth of a turn over the 14 patches of a side of 224 pixels
ALIASED = math.pi  # radians per patch: a faster wave looks like a slower one on the patches


def wave_vectors(model: nn.Module) -> Tensor:
    """Wave vectors (w_x, w_y) of all groups of channels: what a group turns by from a patch to its neighbour.

    Of a pair, exactly its wave vector. Of a larger group its axes may turn in different planes: then w_x is the size of
    the turn by A_x, ||A_x||_F / sqrt(2), which of a triplet is its frequency, and w_y likewise; both without a sign.

    Returns:
        (L, H or 1, G, 2), radians per patch, x first; L counts the blocks. Where blocks differ in heads or groups, as
        in a Swin, those of a head are put behind each other: (L, 1, H * G, 2), filled up with NaN.

    Raises:
        ValueError: The model has no rotary encoding.
    """
    waves = [_waves(generators(turn)) for turn in rotary_layers(model)]
    if len({each.shape for each in waves}) > 1:
        flat = [each.flatten(0, 1) for each in waves]
        longest = max(len(each) for each in flat)
        waves = [torch.cat((each, each.new_full((longest - len(each), 2), math.nan)))[None] for each in flat]
    return torch.stack(waves)


def _waves(a: Tensor) -> Tensor:
    if a.shape[-1] == 2:
        return a[..., 1, 0]
    return torch.linalg.matrix_norm(a) / math.sqrt(2)


def isotropy(waves: Tensor) -> Tensor:
    """How evenly wave vectors point in all directions: 1 - |mean exp(2 i phi)| over the groups.

    1 where the directions are spread evenly, 0 where all are parallel; a wave and its opposite count as one direction.
    Waves of length 0 have no direction and are left out. Axial ones, half of them along each axis, have 1 too: the
    measure tells spread from bias, and not two directions from many.

    Args:
        waves: (..., G, 2).

    Returns:
        (...), NaN where no wave has a length.
    """
    moving = (waves.norm(dim=-1) > 0).to(waves.dtype)
    phi = torch.atan2(waves[..., 1], waves[..., 0])
    mean = [(f(2 * phi).nan_to_num() * moving).sum(-1) / moving.sum(-1) for f in (torch.cos, torch.sin)]
    return 1 - torch.hypot(mean[0], mean[1])


def spectrum(a: Tensor, angles: Tensor) -> Tensor:
    """Frequencies of a step of one patch in each direction: the eigenvalues of cos(u) A_x + sin(u) A_y.

    Args:
        a: Generators, (..., 2, b, b), of `generators`.
        angles: (U,), directions u in radians, from the x axis towards the lower rows.

    Returns:
        (..., U, b // 2), radians per patch, from the largest down; never negative.
    """
    angles = angles.to(a)
    step = angles.cos()[:, None, None] * a[..., 0:1, :, :] + angles.sin()[:, None, None] * a[..., 1:2, :, :]
    return torch.linalg.eigvalsh(1j * step).flip(-1)[..., :a.shape[-1] // 2].clamp(min=0)


def directed_waves(a: Tensor, directions: int = 24) -> Tensor:
    """Points for a scatter plot: the waves of a block, as vectors.

    Of pairs, their wave vectors. Of larger groups, which have no wave vector, the frequencies of a step in each
    direction, drawn along that direction: a group that turns alike in all directions is a circle.

    Args:
        a: Generators of a block, (H, G, 2, b, b), of `generators`.
        directions: How many, evenly spread over a turn.

    Returns:
        (points, 2), radians per patch, x first.
    """
    if a.shape[-1] == 2:
        return _waves(a).flatten(0, 1)
    angles = torch.arange(directions, dtype=a.dtype, device=a.device) * (2 * math.pi / directions)
    along = torch.stack((angles.cos(), angles.sin()), dim=-1)
    return (spectrum(a, angles)[..., None] * along[:, None]).flatten(0, -2)


def commutator_ratio(a: Tensor) -> Tensor:
    """||A_x A_y - A_y A_x||_F / (||A_x||_F ||A_y||_F): 0 where scores depend on offsets alone, at most sqrt(2).

    Args:
        a: Generators, (..., 2, b, b), of `generators`.

    Returns:
        (...); 0 where a group turns along one axis only.
    """
    x, y = a[..., 0, :, :], a[..., 1, :, :]
    norm = torch.linalg.matrix_norm
    size = norm(x) * norm(y)
    return torch.where(size > 0, norm(x @ y - y @ x) / size, 0.)


def frequency_summary(model: nn.Module, prefix: str = 'rope') -> Dict[str, float]:
    """Scalars for a log of training, as `wandb.log(frequency_summary(model), step=epoch)`.

    For each block `{prefix}/{block}/...`, and for all of them `{prefix}/...`: `mean` and `median` length of the wave
    vectors in radians per patch, `low` and `aliased`, the shares below 0.05 and above pi, `isotropy` over all heads,
    and `commutator`.

    Raises:
        ValueError: The model has no rotary encoding.
    """
    out: Dict[str, float] = {}
    every, ratios = [], []
    for turn in rotary_layers(model):
        a = generators(turn)
        every.append(_waves(a).flatten(0, 1))
        ratios.append(commutator_ratio(a).flatten())
        out.update(_scalars(f'{prefix}/{turn.name}', every[-1], ratios[-1]))
    out.update(_scalars(prefix, torch.cat(every), torch.cat(ratios)))
    return out


def _scalars(prefix: str, waves: Tensor, ratios: Tensor) -> Dict[str, float]:
    length = waves.norm(dim=-1)
    values = dict(
        mean=length.mean(), median=length.median(), low=(length < LOW).double().mean(),
        aliased=(length > ALIASED).double().mean(), isotropy=isotropy(waves), commutator=ratios.mean())
    return {f'{prefix}/{name}': float(value) for name, value in values.items()}
