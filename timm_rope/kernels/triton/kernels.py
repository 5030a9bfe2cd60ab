"""Triton route: one kernel turns packed queries and keys, in place or into other memory, one packs and un-rotates
their gradients.

A program owns a tile of groups in a share of the batch: it reads the payload once, then goes from image to image.
Arithmetic is in float32 registers. The gradient of a payload is summed there too and leaves one partial sum per share,
so that no result depends on the order in which programs run. Rotations are orthogonal: what a rotation was given is its
transpose applied to what it returned, so the forward pass stores nothing.
"""
from typing import Optional, Tuple

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.runtime import JITFunction

from ...rotations import Rotation
from .arithmetic import payload_gradient, turned, turned_back
from .launch import all_constants, describe, images_per_program, kind_of, processors
from .tiles import load_groups, load_payload, places, store_groups, store_payload

NAME = 'triton'
MADE_WITH = f'Triton {triton.__version__}'
ALL_OR_NOTHING = True  # one kernel: what does not compile or launch has written nothing
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
LARGEST = 2 ** 30  # positions inside an image are 32 bit numbers, and the last tile may reach beyond it
RUNTIME = ['batch', 'chunk', 'tokens', 'tiles']  # the compiler need not know whether they are multiples of 16


# -- the two kernels; strides are called after their axis: _b images, _n tokens, _h heads, _d channels


@triton.jit(do_not_specialize=RUNTIME)
def turn_kernel(
        packed, q_out, k_out, v_out, payload,
        packed_b, packed_n, packed_part, packed_h,
        payload_b, payload_h, payload_n,
        batch, chunk, tokens, tiles,
        KIND: tl.constexpr, YX: tl.constexpr, HEADS: tl.constexpr, GROUPS: tl.constexpr, SIZE: tl.constexpr,
        WIDE: tl.constexpr, PAYLOAD_STEP: tl.constexpr, PAYLOAD_WIDE: tl.constexpr, E: tl.constexpr,
        HEAD_DIM: tl.constexpr, V_COUNT: tl.constexpr, REST_COUNT: tl.constexpr, IN_PLACE: tl.constexpr,
):
    ROTATED: tl.constexpr = GROUPS * SIZE
    PART: tl.constexpr = HEADS * HEAD_DIM
    tile = tl.program_id(0) % tiles
    first = tl.program_id(0) // tiles * chunk
    image = first.to(tl.int64)

    token, head, place, mask = places(tile, tokens, HEADS, GROUPS, PAYLOAD_STEP, PAYLOAD_WIDE, E)
    rotation_at = payload + (image * payload_b + token * payload_n + head * payload_h + place)
    rotation = load_payload(rotation_at, mask, KIND, GROUPS, SIZE, PAYLOAD_WIDE, E)

    token, head, channel, mask = places(tile, tokens, HEADS, GROUPS, SIZE, WIDE, E)
    at = token * packed_n + head * packed_h + channel
    out_at = token * PART + head * HEAD_DIM + channel  # of queries, keys and values that are written elsewhere
    if not IN_PLACE:
        # V_COUNT and REST_COUNT: see `turn_back_kernel`
        token, head, channel, v_mask = places(tile, tokens, HEADS, HEAD_DIM, 1, 1, V_COUNT)
        v_at = token * packed_n + head * packed_h + channel
        v_out_at = token * PART + head * HEAD_DIM + channel
        if ROTATED < HEAD_DIM:
            token, head, channel, rest_mask = places(tile, tokens, HEADS, HEAD_DIM - ROTATED, 1, 1, REST_COUNT)
            channel += ROTATED
            rest_at = token * packed_n + head * packed_h + channel
            rest_out_at = token * PART + head * HEAD_DIM + channel
    for _ in range(first, min(first + chunk, batch)):
        q_at = packed + image * packed_b
        k_at = q_at + packed_part
        q = load_groups(q_at + at, mask, 1, KIND, SIZE, WIDE, E)
        k = load_groups(k_at + at, mask, 1, KIND, SIZE, WIDE, E)
        if IN_PLACE:
            store_groups(q_at + at, turned(q, rotation, KIND, YX), mask, KIND, SIZE, WIDE, E)
            store_groups(k_at + at, turned(k, rotation, KIND, YX), mask, KIND, SIZE, WIDE, E)
        else:
            out = image * tokens * PART
            v = tl.load(q_at + 2 * packed_part + v_at, v_mask)
            store_groups(q_out + out + out_at, turned(q, rotation, KIND, YX), mask, KIND, SIZE, WIDE, E)
            store_groups(k_out + out + out_at, turned(k, rotation, KIND, YX), mask, KIND, SIZE, WIDE, E)
            tl.store(v_out + out + v_out_at, v, v_mask)
            if ROTATED < HEAD_DIM:
                tl.store(q_out + out + rest_out_at, tl.load(q_at + rest_at, rest_mask), rest_mask)
                tl.store(k_out + out + rest_out_at, tl.load(k_at + rest_at, rest_mask), rest_mask)
        image += 1


@triton.jit(do_not_specialize=RUNTIME)
def turn_back_kernel(
        dq, dk, dv, q, k, payload, packed, partial,
        dq_b, dq_h, dq_n, dq_d, dk_b, dk_h, dk_n, dk_d, dv_b, dv_h, dv_n, dv_d,
        q_b, q_h, q_n, q_d, k_b, k_h, k_n, k_d, payload_b, payload_h, payload_n, batch, chunk, tokens, tiles,
        KIND: tl.constexpr, YX: tl.constexpr, HEADS: tl.constexpr, GROUPS: tl.constexpr, SIZE: tl.constexpr,
        WIDE: tl.constexpr, PAYLOAD_STEP: tl.constexpr, PAYLOAD_WIDE: tl.constexpr, E: tl.constexpr,
        HEAD_DIM: tl.constexpr, WIDTH: tl.constexpr, V_COUNT: tl.constexpr, REST_COUNT: tl.constexpr,
        PAYLOAD_GRAD: tl.constexpr,
):
    ROTATED: tl.constexpr = GROUPS * SIZE
    PART: tl.constexpr = HEADS * HEAD_DIM
    tile = tl.program_id(0) % tiles
    share = tl.program_id(0) // tiles
    first = share * chunk
    image = first.to(tl.int64)

    token, head, place, payload_mask = places(tile, tokens, HEADS, GROUPS, PAYLOAD_STEP, PAYLOAD_WIDE, E)
    rotation_at = payload + (image * payload_b + token * payload_n + head * payload_h + place)
    rotation = load_payload(rotation_at, payload_mask, KIND, GROUPS, SIZE, PAYLOAD_WIDE, E)
    gradient = tl.zeros_like(rotation)
    gradient_at = partial + (((share * HEADS + head) * tokens + token) * WIDTH + place)

    token, head, channel, mask = places(tile, tokens, HEADS, GROUPS, SIZE, WIDE, E)
    dq_at = dq + (token * dq_n + head * dq_h + channel * dq_d)
    dk_at = dk + (token * dk_n + head * dk_h + channel * dk_d)
    q_at = q + (token * q_n + head * q_h + channel * q_d)
    k_at = k + (token * k_n + head * k_h + channel * k_d)
    out_at = packed + (token * (3 * PART) + head * HEAD_DIM + channel)

    # V_COUNT and REST_COUNT are so large that all channels of v, and all that do not turn, lie in one of the tiles
    token, head, channel, v_mask = places(tile, tokens, HEADS, HEAD_DIM, 1, 1, V_COUNT)
    dv_at = dv + (token * dv_n + head * dv_h + channel * dv_d)
    out_v_at = packed + (token * (3 * PART) + 2 * PART + head * HEAD_DIM + channel)
    if ROTATED < HEAD_DIM:
        token, head, channel, rest_mask = places(tile, tokens, HEADS, HEAD_DIM - ROTATED, 1, 1, REST_COUNT)
        channel += ROTATED
        dq_rest_at = dq + (token * dq_n + head * dq_h + channel * dq_d)
        dk_rest_at = dk + (token * dk_n + head * dk_h + channel * dk_d)
        out_rest_at = packed + (token * (3 * PART) + head * HEAD_DIM + channel)

    for _ in range(first, min(first + chunk, batch)):
        out = image * tokens * (3 * PART)
        q_grad = load_groups(dq_at + image * dq_b, mask, dq_d, KIND, SIZE, WIDE, E)
        k_grad = load_groups(dk_at + image * dk_b, mask, dk_d, KIND, SIZE, WIDE, E)
        v_grad = tl.load(dv_at + image * dv_b, v_mask)
        if PAYLOAD_GRAD:
            q_out = load_groups(q_at + image * q_b, mask, q_d, KIND, SIZE, WIDE, E)
            k_out = load_groups(k_at + image * k_b, mask, k_d, KIND, SIZE, WIDE, E)
            gradient += payload_gradient(q_grad, q_out, rotation, KIND, YX)
            gradient += payload_gradient(k_grad, k_out, rotation, KIND, YX)
        store_groups(out_at + out, turned_back(q_grad, rotation, KIND, YX), mask, KIND, SIZE, WIDE, E)
        store_groups(out_at + (out + PART), turned_back(k_grad, rotation, KIND, YX), mask, KIND, SIZE, WIDE, E)
        tl.store(out_v_at + out, v_grad, v_mask)
        if ROTATED < HEAD_DIM:
            tl.store(out_rest_at + out, tl.load(dq_rest_at + image * dq_b, rest_mask), rest_mask)
            tl.store(out_rest_at + (out + PART), tl.load(dk_rest_at + image * dk_b, rest_mask), rest_mask)
        image += 1

    if PAYLOAD_GRAD:
        store_payload(gradient_at, gradient, payload_mask, KIND, GROUPS, SIZE, PAYLOAD_WIDE, E)


# -- the host: the functions of a route

INTERPRETED = not isinstance(turn_kernel, JITFunction)  # TRITON_INTERPRET=1: NumPy on the CPU, for tests


def supports(packed: Tensor, payload: Tensor, rotation: Rotation) -> bool:
    """Whether the kernels can take them.

    Args:
        packed: (B, N, 3, H, D), queries, keys and values.
        payload: (H or 1, N, W), or (B, H or 1, N, W).
        rotation: What the payload belongs to.
    """
    if packed.dtype not in DTYPES or payload.dtype != torch.float32 or payload.device != packed.device:
        return False
    if not (processors(packed.device.index) if packed.is_cuda else INTERPRETED and packed.device.type == 'cpu'):
        return False
    if not kind_of(rotation) or packed.ndim != 5:
        return False
    batch, tokens, three, heads, head_dim = packed.shape
    shape, images = payload.shape[-3:], payload.shape[:-3]
    return (
        three == 3 and head_dim == rotation.head_dim <= 4 * rotation.rotated  # tiles of v grow with their ratio
        and shape in ((heads, tokens, rotation.width), (1, tokens, rotation.width)) and images in ((), (batch,))
        and packed.stride(-1) == 1 and payload.stride(-1) == 1 and 0 not in packed.stride()
        and tokens * heads * max(head_dim, rotation.width) < LARGEST)


def check_supported(packed: Tensor, payload: Tensor, rotation: Rotation) -> None:
    if not supports(packed, payload, rotation):
        raise ValueError(
            f'The Triton kernels do not take packed {tuple(packed.shape)} of {packed.dtype} on {packed.device} with '
            f'strides {packed.stride()}, payload {tuple(payload.shape)} of {payload.dtype} on {payload.device} and '
            f'{type(rotation).__name__}({rotation.extra_repr()}): ask `supports` first.')


def turn_(packed: Tensor, payload: Tensor, rotation: Rotation) -> None:
    """Turn queries and keys in place; values and channels that belong to no group are not touched.

    Args:
        packed: (B, N, 3, H, D), queries, keys and values, last stride 1.
        payload: (H or 1, N, W), or (B, H or 1, N, W) where every image has its own positions; float32.
        rotation: What the payload belongs to.

    Raises:
        ValueError: Not supported, see `supports`.
    """
    check_supported(packed, payload, rotation)
    _launch_turn(packed, (packed, packed, packed), payload, rotation, True)


def turned_copy(packed: Tensor, payload: Tensor, rotation: Rotation) -> Tuple[Tensor, Tensor, Tensor]:
    """Turned queries and keys and a copy of the values, (B, H, N, D) each, in memory of their own: (B, N, H, D).

    Arguments and errors are those of `turn_`; nothing that is given is changed.
    """
    check_supported(packed, payload, rotation)
    batch, tokens, _, heads, head_dim = packed.shape
    out = tuple(packed.new_empty(batch, tokens, heads, head_dim) for _ in range(3))
    _launch_turn(packed, out, payload, rotation, False)
    q, k, v = (x.transpose(1, 2) for x in out)
    return q, k, v


def _launch_turn(
        packed: Tensor, out: Tuple[Tensor, ...], payload: Tensor, rotation: Rotation, in_place: bool) -> None:
    batch, tokens, _, heads, head_dim = packed.shape
    if packed.numel() == 0:
        return
    given = all_constants(head_dim, *describe(rotation, heads, packed.dtype))
    tiles = triton.cdiv(tokens * heads * rotation.groups, given['E'])
    chunk = images_per_program(tiles, batch, payload, given, False)
    stride_b, stride_n, stride_part, stride_h, _ = packed.stride()
    with torch.cuda.device_of(packed):
        turn_kernel[(tiles * triton.cdiv(batch, chunk),)](
            packed, *out, payload, stride_b, stride_n, stride_part, stride_h, *payload_strides(payload),
            batch, chunk, tokens, tiles, **given, IN_PLACE=in_place)


def turn_back(
        dq: Tensor, dk: Tensor, dv: Tensor, payload: Tensor, rotation: Rotation, q: Optional[Tensor],
        k: Optional[Tensor], payload_grad: bool,
) -> Tuple[Tensor, Optional[Tensor]]:
    """Gradient of what `turn_` was given, from the gradients of attention, in one sweep.

    Args:
        dq, dk, dv: (B, H, N, D), any strides; read only.
        payload: As `turn_` was given.
        rotation: As `turn_` was given.
        q, k: (B, H, N, D), any strides: the queries and keys that `turn_` made, for the gradient of the payload.
        payload_grad: Whether to compute the gradient of the payload.

    Returns:
        Gradient of packed, contiguous (B, N, 3, H, D) in the dtype of `dq`, and of the payload in its shape and dtype
        or None. The latter is that of the formula for a payload of rotations: where its matrices are not orthogonal,
        the input cannot be had from the output.

    Raises:
        ValueError: Not supported, see `supports`.
    """
    batch, heads, tokens, head_dim = dq.shape
    packed = torch.empty((batch, tokens, 3, heads, head_dim), dtype=dq.dtype, device=dq.device)
    check_supported(packed, payload, rotation)
    if not payload_grad:
        q, k = dq, dk  # the kernel wants pointers, even to what it will not read
    if q is None or k is None:
        raise ValueError('q and k are needed for the gradient of the payload, got None.')
    for name, tensor in (('dk', dk), ('dv', dv), ('q', q), ('k', k)):
        if tensor.shape != dq.shape or tensor.dtype != dq.dtype or tensor.device != dq.device:
            raise ValueError(
                f'{name} must be {tuple(dq.shape)} of {dq.dtype} on {dq.device} as dq, got {tuple(tensor.shape)} of '
                f'{tensor.dtype} on {tensor.device}.')
    if packed.numel() == 0:
        return packed, torch.zeros_like(payload) if payload_grad else None
    given = all_constants(head_dim, *describe(rotation, heads, dq.dtype))
    tiles = triton.cdiv(tokens * heads * rotation.groups, given['E'])
    chunk = images_per_program(tiles, batch, payload, given, payload_grad)
    shares = triton.cdiv(batch, chunk)
    partial = payload
    if payload_grad:
        partial = torch.empty((shares, heads, tokens, rotation.width), dtype=torch.float32, device=dq.device)
    with torch.cuda.device_of(packed):
        turn_back_kernel[(tiles * shares,)](
            dq, dk, dv, q, k, payload, packed, partial,
            *dq.stride(), *dk.stride(), *dv.stride(), *q.stride(), *k.stride(), *payload_strides(payload),
            batch, chunk, tokens, tiles, **given, WIDTH=rotation.width, PAYLOAD_GRAD=payload_grad)
    return packed, summed(partial, payload) if payload_grad else None


def payload_strides(payload: Tensor) -> Tuple[int, int, int]:
    """Strides of images, heads and tokens; 0 along an axis whose values are shared."""
    image = payload.stride(0) if payload.ndim == 4 else 0
    return image, payload.stride(-3) if payload.shape[-3] > 1 else 0, payload.stride(-2)


def summed(partial: Tensor, payload: Tensor) -> Tensor:
    """Gradients (shares, H, N, W) added up to the shape of the payload."""
    axes = [0] if payload.ndim == 3 and partial.shape[0] > 1 else []
    if payload.shape[-3] < partial.shape[1]:
        axes.append(1)
    total = partial.sum(axes, keepdim=True) if axes else partial
    return total.view(payload.shape)
