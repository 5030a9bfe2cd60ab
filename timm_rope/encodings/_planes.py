"""Generators that commute: the basis of channels in which a block turns pair by pair.

If A_x and A_y commute, one orthogonal Q brings both to planes: Q^T (x A_x + y A_y) Q turns pairs of channels by the
angles w_x x + w_y y, so that exp(x A_x + y A_y) = Q R(x, y) Q^T with the rotation R of Mixed RoPE. So LieRE whose
generators commute is Mixed (arXiv 2511.08368, theorem 3), and with one axis alone, where nothing is left to commute,
LieRE is RoPE with learned frequencies (theorem 1). A score is (Q^T q)^T R (Q^T k): Q goes into the weights of queries
and keys. Of three axes any two generators have to commute.
"""
import itertools
import math
from typing import Tuple

import torch
from torch import Tensor

from ..rotations.grid_exponentials import skew

TOLERANCE = 1e-6  # what may be left outside the planes, of the largest entry of the generators
DIRECTIONS = 16  # tried, since in an unlucky one two planes turn alike


def planes(generators: Tensor, head_dim: int, size: int) -> Tuple[Tensor, Tensor]:
    """Bring commuting generators to planes, in float64.

    Args:
        generators: (D, L, H, G, b (b - 1) / 2), strict upper triangles of A_x, A_y, ..., row by row.
        head_dim: Channels beyond the G b of the blocks do not turn.
        size: b.

    Returns:
        Wave vectors of the pairs, (D, L, H, head_dim // 2), x first, and the basis Q, (L, H, head_dim, head_dim): its
        columns are the pairs (2k, 2k + 1), then what does not turn.

    Raises:
        ValueError: The generators of a block do not commute; the message is a reason and says by how much.
    """
    a = skew(generators.double().cpu(), size)  # (D, L, H, G, b, b)
    layers, heads, groups = a.shape[1:4]
    vectors = a.new_zeros(len(a), layers, heads, head_dim // 2)
    basis = torch.eye(head_dim, dtype=a.dtype, device='cpu').repeat(layers, heads, 1, 1)
    for layer in range(layers):
        for head in range(heads):
            turning, resting, waves = [], [], []
            for group in range(groups):
                place = slice(group * size, (group + 1) * size)
                q, w = _block(a[:, layer, head, group], f'layer {layer}, head {head}, block {group}')
                columns = a.new_zeros(head_dim, size)
                columns[place] = q
                turning.append(columns[:, :2 * w.shape[1]])
                resting.append(columns[:, 2 * w.shape[1]:])
                waves.append(w)
            rest = torch.eye(head_dim, dtype=a.dtype, device='cpu')[:, groups * size:]
            basis[layer, head] = torch.cat((*turning, *resting, rest), dim=1)
            found = torch.cat(waves, dim=1)
            vectors[:, layer, head, :found.shape[1]] = found
    return vectors, basis


def _block(a: Tensor, where: str) -> Tuple[Tensor, Tensor]:
    """Basis (b, b) of commuting generators (D, b, b), planes first, and the wave vectors of the planes (D, P)."""
    largest = a.abs().max().item()
    best = None
    for i in range(DIRECTIONS):
        angle = 0.1 + i * (math.sqrt(5) - 1) / 2 * math.pi
        along = (math.cos(angle), math.sin(angle), math.sin(math.e * angle))
        q, count = _planes_of(sum(c * one for c, one in zip(along[1:], a[1:])) + along[0] * a[0])
        inside = q.T @ a @ q
        waves = torch.stack([inside[:, 2 * k + 1, 2 * k] for k in range(count)], 1) if count else a.new_zeros(len(a), 0)
        for k in range(count):
            inside[:, 2 * k + 1, 2 * k] = 0
            inside[:, 2 * k, 2 * k + 1] = 0
        left = inside.abs().max().item()
        if best is None or left < best[0]:
            best = left, q, waves
        if left <= 1e-12 * largest:
            break
    assert best is not None
    if best[0] > TOLERANCE * largest:
        ratio, x, y = max(
            (float((a[i] @ a[j] - a[j] @ a[i]).norm() / (a[i].norm() * a[j].norm()).clamp_min(1e-30)), i, j)
            for i, j in itertools.combinations(range(len(a)), 2))
        one, other = f'A_{"xyz"[x]}', f'A_{"xyz"[y]}'
        raise ValueError(
            f'the generators of {where} do not commute: |{one} {other} - {other} {one}| is {ratio:.2g} of '
            f'|{one}| |{other}|, and '
            f'{best[0] / largest:.2g} of the largest entry couples more than pairs in every basis')
    return best[1], best[2]


def _planes_of(c: Tensor) -> Tuple[Tensor, int]:
    """Orthogonal basis of one skew-symmetric matrix: planes it turns counter-clockwise, then what rests; their number.

    With i C v = t v and v = (u + i w) / sqrt(2), C turns u to t w and w to -t u.
    """
    values, v = torch.linalg.eigh(1j * c)
    turning = values > 1e-9 * max(values.abs().max().item(), torch.finfo(values.dtype).tiny)
    v = v[:, turning] * math.sqrt(2)
    planes = torch.stack((v.real, v.imag), dim=-1).flatten(1)
    # what is orthogonal to all planes, by the projector onto it
    rest = torch.eye(len(c), dtype=planes.dtype, device='cpu') - planes @ planes.T
    count = len(c) - planes.shape[1]
    resting = torch.linalg.eigh(rest)[1][:, len(c) - count:]
    return torch.cat((planes, resting), dim=1), v.shape[1]
