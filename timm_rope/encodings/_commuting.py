"""Generators of blocks that commute: plane waves in an orthogonal basis P (STRING, arXiv 2502.02562, section 3).

    cayley      A = P B P^T with P = (I - S) (I + S)^-1, where B turns channels 2k to 2k + 1 by the wave k.
                `freqs` (1, L, K, 2 (b // 2) + b (b - 1) / 2): waves along x, along y, strict upper triangle of S
    circulant   A = C - C^T, C circulant: the column 0, a_1 .. a_M, (0,) -a_M .. -a_1, moved down from one to the next.
                `freqs` (2, L, K, M): a, M = (b - 1) // 2

Generators are strict upper triangles row by row, (2, L, K, b (b - 1) / 2) with x first, as `BlockRotation` takes them;
K = H G blocks of b channels with p planes. Of D dimensions there are D instead of 2, and as many waves. Functions are
to be called by way of this module, in which FX looks for them.
"""
import math
from typing import Tuple

import torch
from torch import Tensor

from .._precision import widest, without_autocast
from .._tracing import recording
from ..rotations.exponential import skew


@torch.fx.wrap
def planes(freqs: Tensor, dims: int, size: int, basis: str) -> Tensor:
    """Waves and basis as `PlanesRotation` takes them, (1, L, K, p (D + 2 b)).

    Waves of cayley are learned numbers, those of circulant sums of them, which float32 holds too coarsely for angles of
    64 rad: they are in float64 where they are not learned now.
    """
    if torch.jit.is_scripting():
        return _packed(freqs, dims, size, basis)
    with without_autocast(freqs):
        return _packed(freqs, dims, size, basis)


def _packed(freqs: Tensor, dims: int, size: int, basis: str) -> Tensor:
    waves, columns = _planes(freqs, dims, size, basis)
    out = torch.cat([waves[i] for i in range(dims)] + [columns.flatten(-2)], dim=-1).unsqueeze(0)
    return out.to(freqs.dtype) if basis == 'cayley' or (torch.is_grad_enabled() and freqs.requires_grad) else out


def generators(freqs: Tensor, dims: int, size: int, basis: str) -> Tensor:
    """What turns the blocks, in the widest dtype there is."""
    waves, columns = _planes(freqs, dims, size, basis)
    half = (columns[..., 1::2] * waves.unsqueeze(-2)) @ columns[..., ::2].transpose(-1, -2)
    upper = torch.triu_indices(size, size, 1, device=freqs.device)
    return (half - half.transpose(-1, -2)).flatten(-2).index_select(-1, upper[0] * size + upper[1])


def _planes(freqs: Tensor, dims: int, size: int, basis: str) -> Tuple[Tensor, Tensor]:
    """Waves (D, L, K, p), and the basis of the planes as columns (L, K, b, 2 p)."""
    wide = widest(freqs)
    if basis == 'cayley':
        pairs = size // 2
        s = skew(wide[0, ..., dims * pairs:], size)
        eye = torch.eye(size, dtype=wide.dtype, device=wide.device)
        waves = torch.stack([wide[0, ..., i * pairs:(i + 1) * pairs] for i in range(dims)])
        return waves, _solve(eye + s, eye - s)[..., :2 * pairs]  # factors commute
    k = torch.arange(1, wide.shape[-1] + 1, dtype=wide.dtype, device=wide.device)
    angle = torch.arange(size, dtype=wide.dtype, device=wide.device).unsqueeze(-1) * k * (2 * math.pi / size)
    columns = math.sqrt(2 / size) * torch.stack((angle.cos(), angle.sin()), dim=-1).flatten(-2)
    # eigenvalues of a circulant matrix are a Fourier transform
    return 2 * wide @ angle[1:1 + len(k)].sin(), columns.expand(wide.shape[1], wide.shape[2], -1, -1)


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
        made = generators(freqs, len(freqs), size, basis).to(triangles.dtype)
        if not torch.allclose(made, triangles, rtol=0, atol=8 * torch.finfo(made.dtype).eps * float(made.abs().max())):
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
