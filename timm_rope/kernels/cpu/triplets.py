"""Triplets of channels as three multiplications of complex numbers.

The two rotations of a triplet turn channels (0, 1) and (1, 2). In a head, channels 3 g + s and 3 g + s + 1 of one step
start at an even channel in every second group, and at an odd one in the others. So a head is looked at as complex
numbers in two ways, from channel 0 and from channel 1, and three multiplications turn all groups in their order:

    from 1: the first step of the groups where it starts odd
    from 0: the first step of the other groups, the second step of those
    from 1: the second step of the other groups

In each, channels that are not to turn are multiplied by one.
"""
from typing import Iterator, List, Optional, Tuple

import torch
from torch import Tensor

from ...rotations import Rotation, TripletRotation
from .derived_cache import cached_table
from .packing import image_ranges, images_at_a_time, pack
from .pairs import as_complex, viewable_as_complex

BY_IMAGE = True


def supports(packed: Tensor, payload: Tensor, rotation: Rotation) -> bool:
    return isinstance(rotation, TripletRotation) and viewable_as_complex(packed)


def turn_(packed: Tensor, payload: Tensor, rotation: Rotation) -> None:
    x = packed[:, :, :2]
    for start, turns in cached_table(payload, multiplications, rotation):
        multiply_(x, start, turns)


def turn_back(
        dq: Tensor, dk: Tensor, dv: Tensor, payload: Tensor, rotation: Rotation,
        q: Optional[Tensor], k: Optional[Tensor], payload_grad: bool,
) -> Tuple[Tensor, Optional[Tensor]]:
    out = pack(dq, dk, dv)
    total = None
    if payload_grad and q is not None and k is not None:
        total = angle_gradient(out, q, k, payload, rotation)
    for start, turns in reversed(cached_table(payload, multiplications, rotation)):
        multiply_(out[:, :, :2], start, turns.conj_physical())
    return out, total


def angle_gradient(grads: Tensor, q: Tensor, k: Tensor, payload: Tensor, rotation: Rotation) -> Tensor:
    """Gradient of the payload, along the circles that its cosines and sines are on.

    The derivative by the angle of the last rotation is the part of `torques` along its axis, and that by the angle of
    the first one the same of y and g before the last. y x g turns as both do: it can be summed first and turned then.

    Args: As `torques`.
    """
    along = torques(grads, q, k, payload, rotation)
    cos_y, sin_y, cos_x, sin_x = payload.unflatten(-1, (4, rotation.groups)).unbind(-2)
    if first_channels(rotation) == (1, 0):
        by_y, by_x = cos_x * along[0] + sin_x * along[1], along[2]
    else:
        by_y, by_x = along[0], cos_y * along[2] - sin_y * along[1]
    return torch.cat((-sin_y * by_y, cos_y * by_y, -sin_x * by_x, cos_x * by_x), dim=-1)


def torques(
        grads: Tensor, q: Tensor, k: Tensor, payload: Tensor, rotation: Rotation) -> Tuple[Tensor, Tensor, Tensor]:
    """The three components of y x g of every triplet, summed over queries, keys and what shares a payload.

    Turning y about an axis by a small angle adds axis x y to it, so y x g, with g the gradient of y, along an axis is
    the derivative by the angle of a turn about it.

    Args:
        grads: Gradients of the turned queries and keys, (B, N, 2 or 3, H, D).
        q: Turned queries (B, H, N, D).
        k: Turned keys.
        payload: As in the forward pass.
        rotation: As in the forward pass.

    Returns:
        Three tensors (H or 1, N, G), or (B, H or 1, N, G) where every image has its own payload.
    """
    B, N, _, H, D = grads.shape
    each = payload.ndim == 4  # every image has its own payload
    # y_c g_{c+shift} - y_{c+shift} g_c of every channel c, whether these are of one triplet or not: whole rows are fast
    sums = {shift: grads.new_zeros(B if each else images_at_a_time(q), N, H * D) for shift in (1, 2)}
    for i, turned in enumerate((q, k)):
        rows = turned.transpose(1, 2).flatten(2)
        for images in image_ranges(q):
            own = images if each else slice(images.stop - images.start)
            y, g = rows[images], grads[images, :, i].flatten(2)
            for shift, total in sums.items():
                total = total[own, :, :-shift]
                total.addcmul_(y[..., :-shift], g[..., shift:]).addcmul_(y[..., shift:], g[..., :-shift], value=-1)
    near, far = ((total if each else total.sum(0)).unflatten(-1, (H, D)).transpose(-2, -3) for total in sums.values())
    if payload.shape[-3] == 1:
        near, far = near.sum(-3, keepdim=True), far.sum(-3, keepdim=True)
    return near[..., 1:rotation.rotated:3], -far[..., :rotation.rotated:3], near[..., :rotation.rotated:3]


def multiplications(payload: Tensor, rotation: Rotation) -> List[Tuple[int, Tensor]]:
    """The three multiplications: the channel from which a head is looked at, and the factors.

    Factors are complex numbers of length one, (N, H or 1, pairs) or (B, N, H or 1, pairs), and one where a pair of this
    view is not to turn.
    """
    parts = payload.unflatten(-1, (4, rotation.groups)).transpose(-3, -4)  # tokens, heads, cos and sin of y and x
    roll = torch.complex(parts[..., 0, :], parts[..., 1, :])
    yaw = torch.complex(parts[..., 2, :], parts[..., 3, :])
    sequence = (roll, yaw) if first_channels(rotation) == (1, 0) else (yaw, roll)
    starts = (1, 0, 1)
    turns = [roll.new_ones(*roll.shape[:-1], (rotation.head_dim - start) // 2) for start in starts]
    for product, step, groups, pairs in pair_places(rotation):
        turns[product][..., pairs] = sequence[step][..., groups]
    return list(zip(starts, turns))


def first_channels(rotation: Rotation) -> Tuple[int, int]:
    """Channel of a triplet at which the pair of the first step starts, and that of the second; 1 is roll, 0 is yaw."""
    assert isinstance(rotation, TripletRotation)
    return (1, 0) if rotation.order == 'yx' else (0, 1)


def pair_places(rotation: Rotation) -> Iterator[Tuple[int, int, slice, slice]]:
    """Where the factors of each step go.

    Yields:
        Number of the multiplication, step, groups, and the pairs of channels in that view that belong to these groups.
    """
    for step, channel in enumerate(first_channels(rotation)):
        for odd in (0, 1):  # whether the pair starts at an odd channel of the head
            group = (channel + odd) % 2
            count = len(range(group, rotation.groups, 2))
            pair = (3 * group + channel) // 2
            # seen from channel 1, the first step comes first, the second last
            product = 2 * step if odd else 1
            yield product, step, slice(group, None, 2), slice(pair, pair + 3 * count, 3)


def multiply_(x: Tensor, start: int, turns: Tensor) -> None:
    """Multiply the pairs of channels of every head that begin at `start` by complex factors, in place."""
    pairs = complex_view(x, start)
    pairs.mul_(turns.unsqueeze(-3))
    if start and x.dtype != torch.float32:
        x[..., start:start + 2 * pairs.shape[-1]].copy_(torch.view_as_real(pairs).flatten(-2))


def complex_view(x: Tensor, start: int) -> Tensor:
    """Channels (start, start + 1), (start + 2, start + 3), ... of every head of x as complex numbers.

    From channel 1 it is a view in float32, and a copy in float64.
    """
    pairs = (x.shape[-1] - start) // 2
    if start == 0:
        return as_complex(x, pairs)
    if x.dtype != torch.float32:  # the 16 bytes of a complex double would not be aligned, which processors demand
        return as_complex(x[..., start:start + 2 * pairs].contiguous(), pairs)
    # torch makes complex views at even offsets of a storage only, so this is a storage that begins one number later
    memory = x.untyped_storage()[(x.storage_offset() + start) * x.element_size():]
    out = x.new_empty(0, dtype=torch.complex64)
    return out.set_(memory, 0, (*x.shape[:-1], pairs), (*(s // 2 for s in x.stride()[:-1]), 1))
