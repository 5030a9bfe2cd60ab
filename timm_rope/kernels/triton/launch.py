"""How the two kernels are launched: the constants they are compiled with, and how many images a program goes through.

Comes in: a rotation, shapes and the device. Goes out: the keyword arguments of a kernel and the size of its grid.
"""
from functools import cache
from typing import Any, Dict, Optional, Tuple

import torch
import triton
from torch import Tensor

from ...rotations import Rotation, TripletRotation

BLOCK_SIZES = (2, 4, 8, 16)  # what a tile can be reshaped to, and whose matrices fit in registers


def kind_of(rotation: Rotation) -> str:
    """Name of the mathematics in the kernels, '' for rotations that they do not know."""
    return rotation.kind if rotation.kind != 'blocks' or rotation.size in BLOCK_SIZES else ''


@cache
def processors(index: Optional[int]) -> int:
    """Multiprocessors of a CUDA device, 0 of one the kernels are not made for; 1 for the interpreter (None)."""
    if index is None:
        return 1
    properties = torch.cuda.get_device_properties(index)
    return properties.multi_processor_count if torch.version.cuda and properties.major >= 8 else 0


@cache
def constants(kind: str, order: str, heads: int, groups: int, size: int, itemsize: int) -> Dict[str, Any]:
    """Compile-time arguments of both kernels that say what is turned, and how."""
    wide, payload_step, payload_wide, each = size, 2, 2, 512  # pairs: 8 channels a thread
    if kind == 'triplets':
        wide, payload_step, payload_wide, each = 1, 1, 1, 128  # one group a thread
    elif kind == 'blocks':
        payload_step = size * size
        if size <= 8:  # a thread holds a whole matrix
            wide, payload_wide, each = min(size, 16 // itemsize), 4, 128
        else:
            payload_wide, each = payload_step, 16
    return dict(
        KIND=kind, YX=order == 'yx', HEADS=heads, GROUPS=groups, SIZE=size, WIDE=wide, PAYLOAD_STEP=payload_step,
        PAYLOAD_WIDE=payload_wide, E=each, num_warps=4, enable_fp_fusion=True)


@cache
def all_constants(head_dim: int, *shared: Any) -> Dict[str, Any]:
    """Compile-time arguments of both kernels, with the tiles for channels that are only copied."""
    given = constants(*shared)
    each, groups = given['E'], given['GROUPS']
    rest = max(1, head_dim - groups * given['SIZE'])
    return dict(
        **given, HEAD_DIM=head_dim,
        V_COUNT=triton.next_power_of_2(triton.cdiv(each * head_dim, groups)),
        REST_COUNT=triton.next_power_of_2(triton.cdiv(each * rest, groups)))


def describe(rotation: Rotation, heads: int, dtype: torch.dtype) -> Tuple[Any, ...]:
    """Kind, order, heads, groups, size and bytes of a number, as `constants` takes them."""
    order = rotation.order if isinstance(rotation, TripletRotation) else ''
    return kind_of(rotation), order, heads, rotation.groups, rotation.size, dtype.itemsize


def images_per_program(tiles: int, batch: int, payload: Tensor, given: Dict[str, Any], payload_grad: bool) -> int:
    """Images that one program goes through, so that all programs run at once and keep the memory busy.

    A multiprocessor has room for eight; for fewer of those kernels that take more than 64 registers a thread, and for
    more of those that take fewer than 52.
    """
    if payload.ndim == 4:
        return 1
    programs = 8
    if given['KIND'] == 'blocks' and given['SIZE'] > 4:
        programs = 2 if payload_grad else 4
    elif given['KIND'] == 'triplets':
        programs = 6 if payload_grad else 10
    shares = programs * processors(payload.device.index) // tiles
    return triton.cdiv(batch, max(1, min(shares, batch)))  # type: ignore[no-any-return]
