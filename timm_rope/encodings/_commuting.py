"""Generators of blocks that commute: plane waves in an orthogonal basis (STRING, arXiv 2502.02562, section 3).

Generators are strict upper triangles row by row, (2, L, K, b (b - 1) / 2) with x first, as `BlockRotation` takes them;
K = H G blocks. Where they are not learned now, and on devices that have it, they come in float64. Call these functions
by way of the module, in which FX looks for them.
"""
import math
from typing import List

import torch
from torch import Tensor

from .._precision import widest, without_autocast
from .._tracing import recording
from ..rotations.exponential import skew


@torch.fx.wrap
def cayley_generators(freqs: Tensor, size: int) -> Tensor:
    """A = P B P^T with P = (I - S) (I + S)^-1, where B turns channels 2k to 2k + 1 by w_k.

    Args:
        freqs: (1, L, K, 2 (b // 2) + b (b - 1) / 2), waves along x, along y, strict upper triangle of S.
        size: b.
    """
    if torch.jit.is_scripting():
        return _cayley_generators(freqs, size)
    with without_autocast(freqs):
        return _cayley_generators(freqs, size)


def _cayley_generators(freqs: Tensor, size: int) -> Tensor:
    pairs, wide = size // 2, widest(freqs[0])
    s, eye = skew(wide[..., 2 * pairs:], size), torch.eye(size, dtype=wide.dtype, device=wide.device)
    basis = _solve(eye + s, eye - s)  # the two factors commute
    waves = torch.stack((wide[..., :pairs], wide[..., pairs:2 * pairs])).unsqueeze(-2)
    half = (basis[..., 1::2] * waves) @ basis[..., 0:2 * pairs:2].transpose(-1, -2)
    return _as_kept(_triangle(half - half.transpose(-1, -2), size), freqs)


def cayley_freqs_for(generators: Tensor, size: int) -> Tensor:
    """`freqs` of generators that couple nothing but the channels 2k and 2k + 1.

    Raises:
        ValueError: Others; the message is a reason.
    """
    channel = 2 * torch.arange(size // 2)
    entry = channel * (2 * size - channel - 1) // 2
    rest = generators.clone()
    rest[..., entry] = 0
    if bool(rest.any()):
        raise ValueError('these generators couple more than channel pairs, and no basis is looked for that gives them')
    waves = -generators[..., entry]
    return torch.cat((waves[0], waves[1], torch.zeros_like(rest[0])), dim=-1).unsqueeze(0)


@torch.fx.wrap
def circulant_generators(freqs: Tensor, size: int) -> Tensor:
    """A = C - C^T for circulant C: the column 0, a_1 .. a_M, (0,) -a_M .. -a_1, shifted down by one from row to row.

    Args:
        freqs: (2, L, K, M), a; M = (b - 1) // 2.
        size: b.
    """
    wide = widest(freqs)
    middle = torch.zeros_like(wide[..., :(size - 1) % 2])
    column = torch.cat((wide, middle, -wide.flip(-1)), dim=-1)  # without its zero in front
    rows = [-column[..., :size - 1 - i] for i in range(size - 1)]
    return _as_kept(torch.cat(rows, dim=-1), freqs)


def circulant_freqs_for(generators: Tensor, size: int) -> Tensor:
    """`freqs` of circulant generators.

    Raises:
        ValueError: Others; the message is a reason.
    """
    freqs = -generators[..., :(size - 1) // 2]
    if not torch.allclose(circulant_generators(freqs, size).to(generators.dtype), generators, rtol=0, atol=1e-12):
        raise ValueError('these generators are not circulant')
    return freqs


def circulant_freqs_of_waves(waves: Tensor, size: int) -> Tensor:
    """`freqs` whose planes turn by waves (2, L, K, M): the inverse of the sine transform that its eigenvalues are."""
    k = torch.arange(1, waves.shape[-1] + 1, dtype=waves.dtype, device=waves.device)
    return 2 / size * waves @ torch.sin(2 * math.pi / size * k * k.unsqueeze(-1))


def _triangle(matrix: Tensor, size: int) -> Tensor:
    rows: List[Tensor] = []
    for i in range(size - 1):
        rows.append(matrix[..., i, i + 1:])
    return torch.cat(rows, dim=-1)


def _as_kept(generators: Tensor, freqs: Tensor) -> Tensor:
    return generators.to(freqs.dtype) if torch.is_grad_enabled() and freqs.requires_grad else generators


def _solve(left: Tensor, right: Tensor) -> Tensor:
    if not torch.jit.is_scripting():
        if recording():  # other runtimes have no solver
            return _eliminate(left, right)
    return torch.linalg.solve(left, right)


def _eliminate(left: Tensor, right: Tensor) -> Tensor:
    """left^-1 right by elimination without pivots, which are 1 at least where left is the identity plus a skew one."""
    size = left.shape[-1]
    both, eye = torch.cat((left, right), dim=-1), torch.eye(size, dtype=left.dtype, device=left.device)
    for k in range(size):
        row = both[..., k:k + 1, :] / both[..., k:k + 1, k:k + 1]
        both = both - (both[..., :, k:k + 1] - eye[:, k:k + 1]) * row
    return both[..., size:]
