"""exp(x A_x + y A_y) for 8 x 8 generators that learn, on a GPU: one Triton kernel forward, one backward.

`grid_exponentials.py` is many small operations, which a processor needs longer to launch than a GPU to run, and it
waits for the GPU to learn how often to square. On an H100 a training step of ViT-S (batch 256) took 1.5 times as long
as one without a rotation, although the GPU worked 7 % longer.

Here a program makes E matrices at a time in registers. Each tile is divided by the power of two that brings its largest
norm below 4, where 24 terms of the Taylor series leave 1e-10, and squared as often: the series in float64, squares and
the backward pass in float32. The latter is the derivative of the same series at the transposed matrices, exp(-A), in
the direction of the gradient: E = F^2 gives dE = F dF + dF F.
"""
import warnings
from typing import Dict, Tuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from .grid_exponentials import skew

SIZE = 8
TILE = 16  # matrices that a program works on at a time
SHARES = 4  # programs that share the positions of a pair of generators in the backward pass
TERMS, RADIUS = tl.constexpr(24), tl.constexpr(4.)

_works: Dict[torch.device, bool] = {}  # devices that were tried


# Matrices are tensors (row, E, column), so that a thread has whole columns, and (column of the left, row, E, 1) where
# they are multiplied from the left, so that it sums over registers. Only squares exchange numbers between threads.


@triton.jit
def as_left(a):
    return tl.permute(a, (2, 0, 1))[:, :, :, None]


@triton.jit
def times(left, right):
    """Products of matrices, the first as `as_left` gives them."""
    return tl.sum(left * right[:, None, :, :], axis=0)


@triton.jit
def scaled(a_x, a_y, x, y):
    """A / 2^s and s, so large that no norm is above RADIUS. The norm is at most that of Frobenius / sqrt(2)."""
    a = x[None, :, None] * a_x[:, None, :] + y[None, :, None] * a_y[:, None, :]
    norm = tl.sqrt(tl.max(tl.sum(tl.sum(a * a, axis=2), axis=0), axis=0) * 0.5).to(tl.float32) / RADIUS
    finite = norm < 1e30  # nan and inf go through the arithmetic below, and come out as nan
    squarings = tl.where(finite, tl.ceil(tl.log2(tl.maximum(tl.where(finite, norm, 1.), 1.))), 0.)
    return a * tl.exp2(-squarings), squarings.to(tl.int32)


@triton.jit
def forward_kernel(out, generators, x, y, pairs, columns, x_row, positions, GROUPS: tl.constexpr, E: tl.constexpr):
    pair = tl.program_id(0)
    i, j = tl.arange(0, 8), tl.arange(0, 8)
    entry = i[:, None] * 8 + j[None, :]
    a_x = tl.load(generators + pair * 64 + entry).to(tl.float64)
    a_y = tl.load(generators + (pairs + pair) * 64 + entry).to(tl.float64)
    position = tl.program_id(1) * E + tl.arange(0, E)
    there = position < positions
    along_x = tl.load(x + position // columns * x_row + position % columns, there, other=0.).to(tl.float64)
    along_y = tl.load(y + position // columns, there, other=0.).to(tl.float64)
    a, squarings = scaled(a_x, a_y, along_x, along_y)

    left = as_left(a)
    series = tl.where(i[:, None] == j[None, :], 1., 0.)[:, None, :] + a
    term = a
    degree = tl.full((1, 1, 1), 1., tl.float64)
    for _ in range(TERMS - 1):
        degree += 1.
        term = times(left, term) / degree
        series += term
    made = series.to(tl.float32)
    for _ in range(squarings):
        made = times(as_left(made), made)
    head, group = pair // GROUPS, pair % GROUPS
    at = ((head.to(tl.int64) * positions + position) * GROUPS + group) * 64
    tl.store(out + at[None, :, None] + entry[:, None, :], made, there[None, :, None])


@triton.jit
def backward_kernel(partial, grad, generators, x, y, pairs, columns, x_row, positions, tiles, GROUPS: tl.constexpr,
                    E: tl.constexpr, SHARES: tl.constexpr):
    pair = tl.program_id(0)
    share = tl.program_id(1)
    i, j = tl.arange(0, 8), tl.arange(0, 8)
    entry = i[:, None] * 8 + j[None, :]
    a_x = tl.load(generators + pair * 64 + entry)
    a_y = tl.load(generators + (pairs + pair) * 64 + entry)
    head, group = pair // GROUPS, pair % GROUPS
    eye = tl.where(i[:, None] == j[None, :], 1., 0.)[:, None, :]
    sum_x = tl.zeros((8, E, 8), tl.float32)
    sum_y = tl.zeros((8, E, 8), tl.float32)
    for tile in range(share, tiles, SHARES):
        position = tile * E + tl.arange(0, E)
        there = position < positions
        along_x = tl.load(x + position // columns * x_row + position % columns, there, other=0.)
        along_y = tl.load(y + position // columns, there, other=0.)
        a, squarings = scaled(a_x, a_y, -along_x, -along_y)
        at = ((head.to(tl.int64) * positions + position) * GROUPS + group) * 64
        given = tl.load(grad + at[None, :, None] + entry[:, None, :], there[None, :, None], other=0.)
        slope = given * tl.exp2(-squarings.to(tl.float32))

        left, left_slope = as_left(a), as_left(slope)
        made = eye + a
        term = a
        term_slope = slope
        degree = tl.full((1, 1, 1), 1., tl.float32)
        for _ in range(TERMS - 1):
            degree += 1.
            term_slope = (times(left, term_slope) + times(left_slope, term)) / degree
            term = times(left, term) / degree
            made += term
            slope += term_slope
        for _ in range(squarings):
            left = as_left(made)
            slope = times(left, slope) + times(as_left(slope), made)
            made = times(left, made)
        sum_x += slope * along_x[None, :, None]
        sum_y += slope * along_y[None, :, None]
    at = partial + (share * 2 * pairs + pair) * 64 + entry
    tl.store(at, tl.sum(sum_x, axis=1))
    tl.store(at + pairs * 64, tl.sum(sum_y, axis=1))


# -- the host

INTERPRETED = not isinstance(forward_kernel, triton.runtime.JITFunction)  # TRITON_INTERPRET=1, for tests


def takes(freqs: Tensor, size: int) -> bool:
    """Whether the kernels make exponentials of such generators: (2, L, H, G, 28) in float32, on a GPU they work on."""
    if size != SIZE or freqs.dtype != torch.float32 or freqs.numel() == 0:
        return False
    return works(freqs.device) if freqs.is_cuda else INTERPRETED


def forward(freqs: Tensor, y: Tensor, x: Tensor) -> Tensor:
    """(2, L, H, G, 28) -> (L, H, N, G * 64); arguments as for `exponential.block_table`, which says how exact it is."""
    _, layers, heads, groups, _ = freqs.shape
    generators, y, x = _given(freqs, y, x)
    columns, pairs = x.shape[-1], layers * heads * groups
    x_row, positions = columns * (x.ndim - 1), len(y) * columns
    out = freqs.new_empty(layers, heads, positions, groups * SIZE * SIZE)
    if positions:
        with torch.cuda.device_of(freqs):
            forward_kernel[(pairs, triton.cdiv(positions, TILE))](
                out, generators, x, y, pairs, columns, x_row, positions, GROUPS=groups, E=TILE)
    return out


def backward(grad: Tensor, freqs: Tensor, y: Tensor, x: Tensor) -> Tensor:
    """Gradient of `freqs` from that of the exponentials (L, H, N, G * 64)."""
    _, layers, heads, groups, _ = freqs.shape
    generators, y, x = _given(freqs, y, x)
    columns, pairs = x.shape[-1], layers * heads * groups
    x_row, positions = columns * (x.ndim - 1), len(y) * columns
    partial = freqs.new_empty(SHARES, 2, layers, heads, groups, SIZE, SIZE)
    with torch.cuda.device_of(freqs):
        backward_kernel[(pairs, SHARES)](
            partial, grad.float().contiguous(), generators, x, y, pairs, columns, x_row, positions,
            triton.cdiv(positions, TILE), GROUPS=groups, E=TILE, SHARES=SHARES)
    total = partial.sum(0)
    row, column = torch.triu_indices(SIZE, SIZE, 1, device=freqs.device)
    return (total - total.mT)[..., row, column]


def _given(freqs: Tensor, y: Tensor, x: Tensor) -> Tuple[Tensor, Tensor, Tensor]:
    return skew(freqs.detach(), SIZE).contiguous(), y.to(freqs.dtype).contiguous(), x.to(freqs.dtype).contiguous()


def works(device: torch.device) -> bool:
    """Whether the kernels are right on a device: tried once, on a few positions, against float64."""
    if device not in _works:
        if torch.cuda.is_current_stream_capturing():
            return False  # a trial would wait for the device, which a CUDA graph does not allow
        known = bool(torch.version.cuda) and torch.cuda.get_device_capability(device)[0] >= 8
        _works[device] = known and _tried(device)
    return _works[device]


def _tried(device: torch.device) -> bool:
    try:
        problem = _difference(device)
    except torch.OutOfMemoryError:
        raise
    except Exception as error:
        problem = f'raised {type(error).__name__}: {" ".join(str(error).split())[:300]}'
    if problem:
        warnings.warn(
            f'The kernels of matrix exponentials (Triton {triton.__version__}) do not work on '
            f'{torch.cuda.get_device_name(device)}: they {problem}. LieRE is made by other operations from now on, '
            f'which are right, but take longer; please report it with the output of `python -m timm_rope doctor`.',
            stacklevel=2)
    return not problem


def _difference(device: torch.device) -> str:
    """What is wrong with the results for random generators, '' if nothing."""
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float32, device='cpu').to(device)

    freqs, grad = normal(2, 1, 2, 2, 28), normal(1, 2, 12, 128)
    y, x = (torch.arange(n, dtype=torch.float32, device=device) - 1 for n in (3, 4))
    by_x, by_y = skew(freqs.double(), SIZE).unsqueeze(-3).unbind(0)  # (1, 2, 2, 1, 8, 8)
    along_x, along_y = (u.double().reshape(-1, 1, 1) for u in (x.repeat(3), y.repeat_interleave(4)))
    angles = along_x * by_x + along_y * by_y  # (1, 2, 2, 12, 8, 8)
    directions = grad.double().unflatten(-1, [2, SIZE, SIZE]).transpose(2, 3)
    # the derivative of exp at -A in a direction is a block of the exponential of [[-A, direction], [0, -A]]
    both = torch.cat((torch.cat((-angles, directions), -1), torch.cat((torch.zeros_like(angles), -angles), -1)), -2)
    slopes = torch.linalg.matrix_exp(both)[..., :SIZE, SIZE:]
    slopes = torch.stack(((along_x * slopes).sum(3), (along_y * slopes).sum(3)))
    row, column = torch.triu_indices(SIZE, SIZE, 1, device=device)
    expected = torch.linalg.matrix_exp(angles).transpose(2, 3).flatten(3)
    for name, got, exact in (
            ('matrices', forward(freqs, y, x), expected),
            ('gradients', backward(grad, freqs, y, x), (slopes - slopes.mT)[..., row, column])):
        error = float((got.double() - exact).abs().max() / exact.abs().max())
        if not error <= 1e-4:  # nan is no less
            return f'return wrong {name}, off by {error:.2g} of the largest value'
    return ''
