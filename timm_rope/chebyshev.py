"""Interpolation at Chebyshev nodes along one axis of a grid.

exp(A + z B) with skew-symmetric A and B is smooth in z: its n-th derivative is at most |B|^n, as every factor of it is
a rotation. The polynomial through n Chebyshev nodes of -1 <= z <= 1 is then off by 2 (|B| / 2)^n / n! at most. If
B changes by a matrix of norm 1, the change of the exponential is off by the derivative of that with respect to |B|,
(|B| / 2)^(n - 1) / (n - 1)!.
"""
import math

import torch
from torch import Tensor


def nodes_needed(reach: float, tolerance: float, of_derivative: float, limit: int) -> int:
    """Number of nodes with which the interpolation is within `tolerance`, and its derivative within `of_derivative`.

    Args:
        reach: |B|, the spectral norm over half the length of the interval; finite.
        tolerance: Positive.
        of_derivative: Positive.
        limit: The most that are of use; returned where more would be needed, too.
    """
    count, error, change = 1, reach, 1.0
    while count < limit and (error > tolerance or change > of_derivative):
        change *= reach / 2 / count
        count += 1
        error *= reach / 2 / count
    return count


def nodes(coordinates: Tensor, count: int) -> Tensor:
    """(count,), the Chebyshev nodes of the interval that the coordinates (n,) cover."""
    middle, half = _interval(coordinates)
    return middle + half * _angles(coordinates, count).cos()


def weights(coordinates: Tensor, count: int) -> Tensor:
    """(n, count), what the values at the nodes contribute to that at each of the coordinates (n,)."""
    middle, half = _interval(coordinates)
    unit = (coordinates - middle) / torch.where(half > 0, half, torch.ones_like(half))
    # the polynomials cos(j acos z) are orthogonal on the nodes
    order = torch.arange(count, dtype=coordinates.dtype, device=coordinates.device)
    at_coordinates = (order * unit.clamp(-1, 1).acos().unsqueeze(1)).cos()
    at_nodes = (order.unsqueeze(1) * _angles(coordinates, count)).cos()
    return at_coordinates @ at_nodes * (2 / count) - 1 / count


def _interval(coordinates: Tensor) -> tuple[Tensor, Tensor]:
    low, high = coordinates.aminmax()
    return (high + low) / 2, (high - low) / 2


def _angles(like: Tensor, count: int) -> Tensor:
    return (torch.arange(count, dtype=like.dtype, device=like.device) + 0.5) * (math.pi / count)
