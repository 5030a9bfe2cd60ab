"""exp(x A_x + y A_y) as a polynomial in x and y, for small norms, and its derivative.

The term of degree k, (x A_x + y A_y)^k / k!, has k + 1 coefficients, those of x^(k - j) y^j. Each follows from two of
the term before it. That takes fewer products than the exponentials of as many positions, and larger ones: all
coefficients of a term are the rows of one.

Shapes: M pairs of generators, b size of the matrices, n positions, C = (d + 1) (d + 2) / 2 coefficients to degree d,
by degree, then by the power of y.
"""
from typing import Iterator, Sequence

import torch
from torch import Tensor

from .dual_matrices import Buffers


def count(degree: int) -> int:
    """C."""
    return (degree + 1) * (degree + 2) // 2


def degree_needed(norm: float, tolerance: float, of_derivative: float) -> int:
    """Degree, at least 1, with which the polynomial is within `tolerance`, and its derivative within `of_derivative`.

    Args:
        norm: Spectral norm of x A_x + y A_y, 1 at most.
        tolerance: Positive; the first term left out is smaller.
        of_derivative: Positive; the same for the change of the exponential per unit of change of its argument.
    """
    degree, change = 1, norm
    while change * norm / (degree + 1) > tolerance or change > of_derivative:
        degree += 1
        change *= norm / degree
    return degree


def monomials(x: Tensor, y: Tensor, degree: int) -> Tensor:
    """What the coefficients are multiplied by at positions x (n,), y (n,): (n, C)."""
    exponents = torch.tensor([(k - j, j) for k in range(degree + 1) for j in range(k + 1)], device=x.device)
    return x.unsqueeze(1) ** exponents[:, 0] * y.unsqueeze(1) ** exponents[:, 1]


def terms(a: Tensor, degree: int, buffers: Buffers) -> Iterator[Tensor]:
    """Coefficients of degree 0, 1, ..., (M, k + 1, b, b) each, in memory that the next but one is written to.

    Args:
        a: (2, M, b, b), x first, contiguous.
        degree: At least 1.
        buffers: Some of which are returned.
    """
    pairs, size = a.shape[1:3]
    yield torch.eye(size, dtype=a.dtype, device=a.device).expand(pairs, 1, size, size)
    term = buffers('term 1', a.dtype, pairs, 2, size, size).copy_(a.transpose(0, 1))
    yield term
    factors = _factors(a, buffers)
    for k in range(2, degree + 1):
        product = buffers('product', a.dtype, pairs, k * size, 2 * size)
        torch.bmm(term.view(pairs, k * size, size), factors / k, out=product)
        by_x, by_y = product.view(pairs, k, size, 2, size).unbind(3)
        term = buffers(f'term {k % 2}', a.dtype, pairs, k + 1, size, size)
        term[:, 0] = by_x[:, 0]
        torch.add(by_x[:, 1:], by_y[:, :-1], out=term[:, 1:-1])
        term[:, -1] = by_y[:, -1]
        yield term


def gradient(grads: Sequence[Tensor], terms: Sequence[Tensor], a: Tensor, buffers: Buffers) -> Tensor:
    """Gradient of the generators, (2, M, b, b).

    Args:
        grads: Of the coefficients of degree 0, 1, ..., (M, k + 1, b, b) of any strides.
        terms: The coefficients, contiguous.
        a: As for `terms`, of any strides.
        buffers: For what lies between.
    """
    pairs, size = a.shape[1:3]
    factors = _factors(a, buffers)
    out = torch.zeros_like(factors)
    grad = grads[-1]
    for k in range(len(grads) - 1, 1, -1):
        of_product = buffers('of product', a.dtype, pairs, k, size, 2, size)
        of_product[:, :, :, 0], of_product[:, :, :, 1] = grad[:, :-1], grad[:, 1:]
        rows = of_product.view(pairs, k * size, 2 * size)
        out.baddbmm_(terms[k - 1].reshape(pairs, k * size, size).mT, rows, alpha=1 / k)
        grad = buffers(f'grad {k % 2}', a.dtype, pairs, k, size, size)
        torch.bmm(rows, factors.mT / k, out=grad.view(pairs, k * size, size))
        grad += grads[k - 1]
    return out.view(pairs, size, 2, size).permute(2, 0, 1, 3) + grad.transpose(0, 1)


def _factors(a: Tensor, buffers: Buffers) -> Tensor:
    """[A_x A_y], (M, b, 2 b)."""
    _, pairs, size, _ = a.shape
    out = buffers('factors', a.dtype, pairs, size, 2, size)
    out.copy_(a.permute(1, 2, 0, 3))
    return out.view(pairs, size, 2 * size)
