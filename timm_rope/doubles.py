"""Two float32 numbers moved as one float64."""
from typing import Tuple

import torch
from torch import Tensor


def in_doubles(*tensors: Tensor) -> Tuple[Tensor, ...]:
    """Half as many elements of twice the size in the same memory, to be moved only; the same tensors where one of them
    cannot be seen like that.

    A CPU moves rows that are shorter than a few of its registers one element after the other.
    """
    return tuple(x.view(torch.float64) for x in tensors) if all(map(_in_pairs, tensors)) else tensors


def _in_pairs(x: Tensor) -> bool:
    if x.device.type != 'cpu' or x.dtype != torch.float32 or x.stride(-1) != 1:
        return False
    return not any(number % 2 for number in (x.shape[-1], x.storage_offset(), *x.stride()[:-1]))
