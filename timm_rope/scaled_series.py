"""exp(x A_x + y A_y) for all positions of a grid at once: scaling and squaring, with its own backward.

The matrix of a position is scaled down by 2^s, exponentiated by a polynomial and squared s times. The polynomial is a
polynomial in the two numbers x and y: (x A + y B)^n = sum_k x^k y^(n-k) S_k with S_k the sum of all products of k A's
and n - k B's. So the S_k are made once for a pair of generators, and the positions are one matrix product.

E = F^2 gives dE = F dF + dF F. These maps are their own adjoints up to a transpose, and those of all squarings commute,
since every F is a function of the same matrix. The backward therefore walks the squarings in the order of the forward,
on the transposed matrices (the exponentials of -A), and has to keep none of them.

Shapes: P pairs of generators, N positions, K terms of the polynomial, b size of the matrices.
"""
import math
from functools import lru_cache
from typing import List, Tuple

import torch
from torch import Tensor

SQUARING = 50  # one squaring, forward and backward, takes the time of about 50 terms (CPU, measured at b = 8)
CHUNK = 2 ** 19  # elements of the matrices that are worked on at a time: stays in the cache of a CPU
CHUNK_OF_A_GPU = 2 ** 26  # where many small launches would cost more than they save


def largest_norm(a: Tensor, y: Tensor, x: Tensor) -> float:
    """Upper bound of the spectral norm of x A_x + y A_y over a grid, at most (b / 2)^(1/8) too large.

    A norm is convex, so that it is largest at a corner of the grid. The eigenvalues of a skew-symmetric matrix come in
    pairs +-i t, and the squared Frobenius norm of its fourth power is the sum of t^8, twice each.

    Args:
        a: (2, P, b, b), skew-symmetric, x first.
        y: (rows,), coordinates of the rows.
        x: (columns,), coordinates of the columns.
    """
    corners = [u * a[0] + v * a[1] for u in (x.min(), x.max()) for v in (y.min(), y.max())]
    matrices = torch.cat(corners)
    largest = matrices.abs().amax()
    unit = matrices / largest.clamp_min(torch.finfo(matrices.dtype).tiny)  # whose eighth power is always in range
    square = unit @ unit
    return float(largest * ((square @ square).square().sum((-1, -2)).amax() / 2) ** 0.125)


def plan(norm: float, tolerance: float) -> Tuple[int, int]:
    """Cheapest number of squarings and degree of the polynomial.

    The polynomial of `coefficients` is off by 4 (r / 2)^(n + 1) / (n + 1)! on matrices of norm r = norm / 2^s, and
    every squaring doubles that. One degree more is taken for the sake of the derivative.

    Args:
        norm: Upper bound of the spectral norm; what NaN leads to is NaN.
        tolerance: Absolute error that the polynomial may leave in the result.
    """
    best = (math.inf, 0, 0)
    start = max(0, math.ceil(math.log2(norm / 4))) if norm > 4 else 0  # above, terms cancel
    for squarings in range(start, start + 6):
        half = norm / 2 ** (squarings + 1)
        degree, error = 1, 4 * half
        while error * 2 ** squarings > tolerance:
            degree += 1
            error *= half / degree
        best = min(best, ((degree + 1) * (degree + 2) / 2 + SQUARING * squarings, squarings, degree))
    return best[1], best[2]


@lru_cache(maxsize=8)
def coefficients(radius: float, degree: int) -> List[float]:
    """c_0 .. c_n of the polynomial that approximates exp(i t) for |t| <= radius as the sum of c_k (i t)^k.

    Even powers interpolate (cos t - 1) / t^2 and odd ones sin t / t at Chebyshev nodes in t^2. At the same degree that
    is 2^n times closer than the Taylor series. c_0 is 1, so that exp(0) is the identity.
    """
    out = [1.0] + [1 / math.factorial(k) for k in range(1, degree + 1)]
    for first in (1, 2):
        count = (degree - first) // 2 + 1
        if count < 1 or radius < 1e-2:  # so close to 0 the interpolated values cancel, and the Taylor series is as good
            continue
        nodes = torch.arange(count, dtype=torch.float64).add(0.5).mul(math.pi / count).cos().add(1).div(2)
        t = radius * nodes.sqrt()
        value = t.sin() / t if first == 1 else -(t / 2).sin().square() * 2 / t.square()
        powers = nodes.unsqueeze(-1) ** torch.arange(count)
        for k, c in enumerate(torch.linalg.solve(powers, value).tolist()):
            out[first + 2 * k] = c * (-1) ** (k + first - 1) / radius ** (2 * k)
    return out


class Grid:
    """Positions of a grid as the polynomial takes them, and how often to square.

    Args:
        y: (rows,), coordinates of the rows.
        x: (columns,), coordinates of the columns.
        norm: Upper bound of the spectral norm of x A_x + y A_y.
        tolerance: Absolute error that the polynomial may leave in the result.
        dtype: In which to compute.

    Attributes:
        scale: (2, 1, 1, 1, 1), factors of A_x and A_y: the coordinates are divided by the largest, so that no power
            of them overflows, and every squaring halves the generators.
        degree: Of the polynomial.
        monomials: (N, K), c_n n! x^k y^(n-k) for n = 0 .. degree and k = 0 .. n at every position, row-major over the
            grid. The factorials are in the terms.
        sign: (K,), (-1)^n.
    """

    def __init__(self, y: Tensor, x: Tensor, norm: float, tolerance: float, dtype: torch.dtype) -> None:
        self.squarings, degree = plan(norm, tolerance)
        self.degree = degree
        c = coefficients(norm / 2 ** self.squarings, degree)
        reach = torch.stack((x.abs().amax(), y.abs().amax()))
        reach = torch.where(reach > 0, reach, torch.ones_like(reach))
        power = torch.arange(degree + 1, device=x.device)
        up_x, up_y = (x / reach[0]).unsqueeze(-1) ** power, (y / reach[1]).unsqueeze(-1) ** power
        self.monomials = torch.stack([
            c[n] * math.factorial(n) * up_y[:, n - k].unsqueeze(1) * up_x[:, k]
            for n in range(degree + 1) for k in range(n + 1)
        ], dim=-1).flatten(0, 1).to(dtype)
        sign = [(-1.) ** n for n in range(degree + 1) for _ in range(n + 1)]
        self.sign = torch.tensor(sign, dtype=dtype, device=x.device)
        self.scale = (reach / 2 ** self.squarings).to(dtype).reshape(2, 1, 1, 1, 1)

    def __len__(self) -> int:
        return self.monomials.shape[0]

    def chunks(self, heads: int, width: int) -> List[slice]:
        """Slices of a number of heads, for matrices of `width` elements per head and position."""
        room = CHUNK if self.monomials.device.type == 'cpu' else CHUNK_OF_A_GPU
        step = max(1, room // (len(self) * width))
        return [slice(i, i + step) for i in range(0, heads, step)]


def terms(a: Tensor, degree: int) -> List[Tensor]:
    """The sum of all products of k A_x's and n - k A_y's over n!: for every n one tensor (P, n + 1, b, b)."""
    pairs, size = a.shape[1], a.shape[-1]
    out = [torch.eye(size, dtype=a.dtype, device=a.device).expand(pairs, 1, size, size)]
    for n in range(1, degree + 1):
        below = out[-1].flatten(1, 2)
        term = a.new_zeros(pairs, n + 1, size, size)
        term[:, 1:] = torch.bmm(below, a[0] / n).unflatten(1, [n, size])
        term[:, :-1] += torch.bmm(below, a[1] / n).unflatten(1, [n, size])
        out.append(term)
    return out


def terms_backward(a: Tensor, series: List[Tensor], grads: List[Tensor]) -> Tensor:
    """Gradient (2, P, b, b) of the generators from those of the terms (P, n + 1, b, b)."""
    out = torch.zeros_like(a)
    above = grads[-1]
    for n in reversed(range(1, len(series))):
        below = series[n - 1].flatten(1, 2)
        by_x, by_y = above[:, 1:].flatten(1, 2), above[:, :-1].flatten(1, 2)
        out[0].baddbmm_(below.mT, by_x, alpha=1 / n)
        out[1].baddbmm_(below.mT, by_y, alpha=1 / n)
        above = torch.bmm(by_x, a[0] / -n).baddbmm_(by_y, a[1] / -n).view_as(grads[n - 1]) + grads[n - 1]
    return out


def exponentials(a: Tensor, grid: Grid, dtype: torch.dtype) -> Tensor:
    """(P, N, b, b) exponentials from scaled generators (2, P, b, b), squared and returned in `dtype`."""
    size = a.shape[-1]
    out = torch.matmul(grid.monomials, torch.cat(terms(a, grid.degree), dim=1).flatten(2)).view(-1, size, size)
    out = out.to(dtype)
    other = torch.empty_like(out)
    for _ in range(grid.squarings):
        torch.bmm(out, out, out=other)
        out, other = other, out
    return out.view(-1, len(grid), size, size)


def exponentials_backward(a: Tensor, grid: Grid, grad: Tensor) -> Tensor:
    """Gradient (2, P, b, b) of the scaled generators from that of the exponentials (P, N, b, b)."""
    size = a.shape[-1]
    series = terms(a, grid.degree)
    # an odd power of a skew-symmetric matrix changes its sign when transposed
    transposed = torch.matmul(grid.monomials * grid.sign, torch.cat(series, dim=1).flatten(2)).view(-1, size, size)
    grad = _through_squarings(transposed, grad.reshape(-1, size, size), grid.squarings)
    of_terms = torch.matmul(grid.monomials.mT, grad.reshape(-1, len(grid), size * size)).unflatten(-1, [size, size])
    return terms_backward(a, series, list(of_terms.split([term.shape[1] for term in series], dim=1)))


def _through_squarings(f: Tensor, grad: Tensor, squarings: int) -> Tensor:
    """grad <- f grad + grad f, f <- f f for every squaring; both (M, b, b)."""
    size = f.shape[-1]
    both = torch.cat((f, grad), dim=-1)  # f f and f grad in one product, which for small b costs as much as one of them
    for _ in range(squarings):
        f, grad = both[..., :size], both[..., size:]
        other = torch.bmm(grad, f)
        both = torch.bmm(f, both)
        both[..., size:] += other
    return both[..., size:]
