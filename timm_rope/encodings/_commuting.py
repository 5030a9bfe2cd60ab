"""Generators of blocks that commute: plane waves in an orthogonal basis P (STRING, arXiv 2502.02562, section 3).

    cayley      A = P B P^T with P = (I - S) (I + S)^-1, where B turns channels 2k to 2k + 1 by the wave k.
                `freqs` (1, L, K, 2 (b // 2) + b (b - 1) / 2): waves along x, along y, strict upper triangle of S
    circulant   A = C - C^T, C circulant: the column 0, a_1 .. a_M, (0,) -a_M .. -a_1, moved down from one to the next.
                `freqs` (2, L, K, M): a, M = (b - 1) // 2

Generators are strict upper triangles row by row, (2, L, K, b (b - 1) / 2) with x first, as `BlockRotation` takes them;
K = H G blocks of b channels. Of D dimensions there are D instead of 2, and as many waves. Functions are to be called by
way of this module, in which FX looks for them.
"""
import math
from typing import Tuple

import torch
from torch import Tensor

from .._precision import widest, without_autocast
from .._tracing import recording
from ..rotations.exponential import skew


@torch.fx.wrap
def generators(freqs: Tensor, dims: int, size: int, basis: str) -> Tensor:
    """What turns the blocks; in the widest dtype there is where it is not learned now."""
    if torch.jit.is_scripting():
        return _generators(freqs, dims, size, basis)
    with without_autocast(freqs):
        return _generators(freqs, dims, size, basis)


def _generators(freqs: Tensor, dims: int, size: int, basis: str) -> Tensor:
    if basis == 'cayley':
        waves, columns = _cayley(freqs, dims, size)
        half = (columns[..., 1::2] * waves.unsqueeze(-2)) @ columns[..., 0:size // 2 * 2:2].transpose(-1, -2)
        matrix = half - half.transpose(-1, -2)
        rows = [matrix[..., 0, 1:]]
        for i in range(1, size - 1):
            rows.append(matrix[..., i, i + 1:])
    else:
        wide = widest(freqs)
        column = torch.cat((wide, torch.zeros_like(wide[..., :(size - 1) % 2]), -wide.flip(-1)), dim=-1)
        rows = [-column]
        for i in range(1, size - 1):
            rows.append(-column[..., :size - 1 - i])
    out = torch.cat(rows, dim=-1)
    return out.to(freqs.dtype) if torch.is_grad_enabled() and freqs.requires_grad else out


def _cayley(freqs: Tensor, dims: int, size: int) -> Tuple[Tensor, Tensor]:
    pairs, wide = size // 2, widest(freqs[0])
    s, eye = skew(wide[..., dims * pairs:], size), torch.eye(size, dtype=wide.dtype, device=wide.device)
    waves = [wide[..., i * pairs:(i + 1) * pairs] for i in range(dims)]
    return torch.stack(waves), _solve(eye + s, eye - s)  # factors commute


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


def freqs_of_waves(waves: Tensor, size: int, basis: str) -> Tensor:
    """`freqs` whose planes turn by waves (D, L, K, number of planes), with S drawn close to 0."""
    if basis == 'circulant':  # its eigenvalues are a sine transform, of which this is the inverse
        k = torch.arange(1, waves.shape[-1] + 1, dtype=waves.dtype, device=waves.device)
        return 2 / size * waves @ torch.sin(2 * math.pi / size * k * k.unsqueeze(-1))
    shape = (*waves.shape[1:3], size * (size - 1) // 2)
    return torch.cat((*waves, 0.01 * torch.randn(
        shape, dtype=waves.dtype, device=waves.device)), dim=-1).unsqueeze(0)


def freqs_of(triangles: Tensor, size: int, basis: str) -> Tensor:
    """Inverse of `generators`; for cayley only with S = 0.

    Raises:
        ValueError: They have no such form; the message is a reason.
    """
    if basis == 'circulant':
        freqs = -triangles[..., :(size - 1) // 2]
        made = _generators(freqs, len(freqs), size, basis).to(triangles.dtype)
        if not torch.allclose(made, triangles, rtol=0, atol=1e-12):
            raise ValueError('these generators are not circulant')
        return freqs
    channel = 2 * torch.arange(size // 2, device=triangles.device)
    entry = channel * (2 * size - channel - 1) // 2
    rest = triangles.clone()
    rest[..., entry] = 0
    if bool(rest.any()):
        raise ValueError('these generators couple more than channel pairs, and no basis is looked for that gives them')
    waves = -triangles[..., entry]
    return torch.cat((*waves, rest[0]), dim=-1).unsqueeze(0)
