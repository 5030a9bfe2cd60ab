"""Products of batches of matrices, alone or together with a derivative, into buffers that are used again.

A matrix F with a derivative G is a dual number F + e G, e^2 = 0: (F + e G)(P + e Q) = F P + e (F Q + G P). Up to size 8
it is the block matrix [F G; 0 F], which for a CPU is one product of a size that fills its registers; above, F and G are
two slices of one tensor.
"""
import math
from typing import Dict, Tuple

import torch
from torch import Tensor

from .doubles import in_doubles

BLOCK = 8  # a product of 16 x 16 matrices takes 1.7 times as long as one of 8 x 8, where three would be needed


class Buffers:
    """Memory by name, used again: fresh megabytes come from the system page by page, which takes longer than to fill
    them."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._held: Dict[Tuple[str, torch.dtype], Tensor] = {}

    def __call__(self, name: str, dtype: torch.dtype, *shape: int, zeros: bool = False) -> Tensor:
        """A tensor that holds what was written to it last, or nothing yet, then zeros if that is asked for."""
        count = math.prod(shape)
        held = self._held.get((name, dtype))
        if held is None or held.numel() < count:
            make = torch.zeros if zeros else torch.empty
            held = self._held[name, dtype] = make(count, dtype=dtype, device=self.device)
        return held[:count].view(shape)

    def like(self, name: str, tensor: Tensor) -> Tensor:
        """One of the shape and dtype of another tensor."""
        return self(name, tensor.dtype, *tensor.shape)


def dual(f: Tensor, g: Tensor, buffers: Buffers) -> Tensor:
    """F + e G of matrices (M, b, b): (M, 2 b, 2 b) up to `BLOCK`, (2, M, b, b) above."""
    count, size = f.shape[:2]
    if size > BLOCK:
        out = buffers('dual', f.dtype, 2, *f.shape)
        out[0], out[1] = f, g
        return out
    # nobody else writes to this buffer, so that the lower left stays zero
    out = buffers('dual', f.dtype, count, 2 * size, 2 * size, zeros=True)
    to, f, g = in_doubles(out, f, g)
    columns = f.shape[-1]
    to[:, :size, :columns] = f
    to[:, :size, columns:] = g
    to[:, size:, columns:] = f
    return out


def multiply(a: Tensor, b: Tensor, out: Tensor) -> Tensor:
    """Products of matrices (M, b, b) or dual matrices, into `out`."""
    if a.ndim == 3:
        return torch.bmm(a, b, out=out)
    torch.bmm(a[0], b[1], out=out[1]).baddbmm_(a[1], b[0])
    torch.bmm(a[0], b[0], out=out[0])
    return out


def squared(m: Tensor, times: int, buffers: Buffers) -> Tensor:
    """m^(2^times)."""
    for _ in range(times):
        out = buffers.like('square', m)
        m = multiply(m, m, out if out.data_ptr() != m.data_ptr() else buffers.like('square of it', m))
    return m


def derivative_of_squared(m: Tensor, times: int, buffers: Buffers) -> Tensor:
    """G of (F + e G)^(2^times), (M, b, b), contiguous; times > 0."""
    m = squared(m, times - 1, buffers)
    if m.ndim == 4:
        return torch.bmm(m[0], m[1], out=buffers.like('derivative', m[0])).baddbmm_(m[1], m[0])
    size = m.shape[-1] // 2
    return torch.bmm(m[:, :size], m[:, :, size:], out=buffers('derivative', m.dtype, len(m), size, size))
