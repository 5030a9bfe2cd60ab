"""Two neighbouring numbers seen as one element: float32 moved as float64, or a complex number (`kernels/pairs.py`)."""
from typing import Tuple

import torch
from torch import Tensor


def in_doubles(*tensors: Tensor) -> Tuple[Tensor, ...]:
    """Half as many elements of twice the size in the same memory, to be moved only; the same tensors where one of them
    cannot be seen like that.

    A CPU moves rows that are shorter than a few of its registers one element after the other.
    """
    return tuple(x.view(torch.float64) for x in tensors) if all(map(_in_pairs, tensors)) else tensors


def even(x: Tensor) -> bool:
    """Whether rows lie so that two neighbouring numbers can be seen as one element; their length may be odd."""
    return bool(x.stride(-1) == 1 and x.storage_offset() % 2 == 0 and all(s % 2 == 0 for s in x.stride()[:-1]))


def _in_pairs(x: Tensor) -> bool:
    return x.device.type == 'cpu' and x.dtype == torch.float32 and x.shape[-1] % 2 == 0 and even(x)
