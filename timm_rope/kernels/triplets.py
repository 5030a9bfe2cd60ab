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

from ..rotation import Rotation, TripletRotation
from .memo import derived
from .packing import images_at_a_time, pack, pieces
from .pairs import as_complex, even

BY_IMAGE = True


def supports(packed: Tensor, payload: Tensor, rotation: Rotation) -> bool:
    return isinstance(rotation, TripletRotation) and even(packed)


def turn_(packed: Tensor, payload: Tensor, rotation: Rotation) -> None:
    x = packed[:, :, :2]
    for start, turns in derived(payload, steps, rotation):
        times_(x, start, turns)


def turn_back(
        dq: Tensor, dk: Tensor, dv: Tensor, payload: Tensor, rotation: Rotation,
        q: Optional[Tensor], k: Optional[Tensor], payload_grad: bool,
) -> Tuple[Tensor, Optional[Tensor]]:
    B, H, N, D = dv.shape
    out = pack(dq, dk, dv)
    sequence = derived(payload, steps, rotation)
    back = [turns.conj_physical() for _, turns in sequence]
    if not payload_grad or q is None or k is None:
        for (start, _), turns in zip(reversed(sequence), reversed(back)):
            times_(out[:, :, :2], start, turns)
        return out, None

    each = payload.ndim == 4  # every image has its own payload
    totals = [out.new_zeros(B if each else images_at_a_time(dv), N, 2, H, D) for _ in sequence]
    for images in pieces(dv):
        own = images if each else slice(images.stop - images.start)
        grads = out[images, :, :2]
        mirrored = pack(q[images], k[images])
        # its pairs seen from 0 are the conjugates of y, those seen from 1 the opposites of the conjugates
        mirrored[..., 1::2].neg_()
        for i in (2, 1, 0):
            start, turns = sequence[i]
            add_products_(totals[i][own], grads, mirrored, start)
            times_(grads, start, back[i][images] if each else back[i])
            if i:
                times_(mirrored, start, turns[images] if each else turns)
    products = []
    for total, (start, turns) in zip(totals, sequence):
        product = seen_from(total if each else total.sum(0), start).sum(-3).mul_(-1 if start else 1)
        # with y = c x it is g conj(x) = g conj(y) c
        product = (product.sum(-2, keepdim=True) if turns.shape[-2] == 1 else product) * turns
        products.append(product)
    return out, payload_gradient(products, payload, rotation)


def steps(payload: Tensor, rotation: Rotation) -> List[Tuple[int, Tensor]]:
    """First channel of the view and turns (N, H or 1, pairs) or (B, N, H or 1, pairs) of the three multiplications."""
    parts = payload.unflatten(-1, (4, rotation.groups)).transpose(-3, -4)  # tokens, heads, cos and sin of y and x
    roll = torch.complex(parts[..., 0, :], parts[..., 1, :])
    yaw = torch.complex(parts[..., 2, :], parts[..., 3, :])
    sequence = (roll, yaw) if first_channels(rotation) == (1, 0) else (yaw, roll)
    starts = (1, 0, 1)
    turns = [roll.new_ones(*roll.shape[:-1], (rotation.head_dim - start) // 2) for start in starts]
    for product, step, groups, pairs in places(rotation):
        turns[product][..., pairs] = sequence[step][..., groups]
    return list(zip(starts, turns))


def payload_gradient(totals: List[Tensor], payload: Tensor, rotation: Rotation) -> Tensor:
    """Gradients of the turns of the three multiplications -> gradient of the payload."""
    sequence = [totals[0].new_zeros(*totals[0].shape[:-1], rotation.groups) for _ in range(2)]
    for product, step, groups, pairs in places(rotation):
        sequence[step][..., groups] = totals[product][..., pairs]
    roll, yaw = sequence if first_channels(rotation) == (1, 0) else reversed(sequence)
    parts = torch.stack((roll.real, roll.imag, yaw.real, yaw.imag), dim=-2)
    return parts.transpose(-3, -4).reshape(payload.shape)


def first_channels(rotation: Rotation) -> Tuple[int, int]:
    """Channel of a triplet at which the pair of the first step starts, and that of the second: roll 1, yaw 0."""
    assert isinstance(rotation, TripletRotation)
    return (1, 0) if rotation.order == 'yx' else (0, 1)


def places(rotation: Rotation) -> Iterator[Tuple[int, int, slice, slice]]:
    """Which multiplication holds which step of which groups in which of its pairs."""
    for step, channel in enumerate(first_channels(rotation)):
        for odd in (0, 1):  # whether the pair starts at an odd channel of the head
            group = (channel + odd) % 2
            count = len(range(group, rotation.groups, 2))
            pair = (3 * group + channel) // 2
            # seen from channel 1, the first step comes first, the second last
            product = 2 * step if odd else 1
            yield product, step, slice(group, None, 2), slice(pair, pair + 3 * count, 3)


def times_(x: Tensor, start: int, turns: Tensor) -> None:
    """Multiply the pairs of channels of every head that begin at `start` by turns, in place."""
    pairs = seen_from(x, start)
    pairs.mul_(turns.unsqueeze(-3))
    if start and x.dtype != torch.float32:
        x[..., start:start + 2 * pairs.shape[-1]].copy_(torch.view_as_real(pairs).flatten(-2))


def add_products_(total: Tensor, x: Tensor, y: Tensor, start: int) -> None:
    """Add the products of the pairs of x and y to the pairs of `total`, all (images, N, 2, H, D)."""
    out = seen_from(total, start)
    out.addcmul_(seen_from(x, start), seen_from(y, start))
    if start and x.dtype != torch.float32:
        total[..., start:start + 2 * out.shape[-1]].copy_(torch.view_as_real(out).flatten(-2))


def seen_from(x: Tensor, start: int) -> Tensor:
    """Channels (start, start + 1), (start + 2, start + 3), ... of every head of x as complex numbers.

    From channel 1 it is a view in float32, and a copy in float64.
    """
    pairs = (x.shape[-1] - start) // 2
    if start == 0:
        return as_complex(x, pairs)
    if x.dtype != torch.float32:  # processors demand that the 16 bytes of a double number are aligned
        return as_complex(x[..., start:start + 2 * pairs].contiguous(), pairs)
    # torch views at even places of a memory only: so this is a view of the memory from the next number on
    memory = x.untyped_storage()[(x.storage_offset() + start) * x.element_size():]
    out = torch.empty(0, dtype=torch.complex64)
    return out.set_(memory, 0, (*x.shape[:-1], pairs), (*(s // 2 for s in x.stride()[:-1]), 1))
