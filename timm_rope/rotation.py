"""How a group of channels turns: pairs (2x2), triplets (two 3x3 rotations in sequence), blocks (matrix exponential).

A rotation knows two things. `table` turns frequencies and coordinates into a *payload*: everything that is left to do
for one position, flattened into the last axis. `forward` applies a payload to queries or keys. It is the plain
out-of-place formula and the single source of truth: a fused kernel has to reproduce it.

Shapes: B batch, H heads, N tokens, D head_dim, L layers (blocks of the model), G groups of channels, W payload width.
L and H are 1 in frequencies and payloads that are shared. Groups are consecutive channels; channels left over at the
end of a head pass unrotated.

Everything is real arithmetic on strided slices, so that TorchScript, FX, export and ONNX need no special case.
Functions under `torch.fx.wrap` stay one node in a traced graph.
"""
from typing import Tuple

import torch
from torch import Tensor, nn

from .precision import recording, widest, without_autocast


class Rotation(nn.Module):
    """Base of the three rotations. Holds no tensors, so one instance may serve every block.

    Args:
        head_dim: Channels per head, D.
        size: Channels per group.
        groups: Number of groups, G.
        width: Width of the payload, W.
    """

    def __init__(self, head_dim: int, size: int, groups: int, width: int) -> None:
        super().__init__()
        self.head_dim = head_dim
        self.size = size
        self.groups = groups
        self.width = width
        self.rotated = size * groups  # leading channels that turn

    def table(self, freqs: Tensor, y: Tensor, x: Tensor) -> Tensor:
        """Payloads of a grid for all layers.

        Args:
            freqs: (2, L, H, G), radians per unit of coordinate, x first.
            y: (rows,), coordinates of the rows.
            x: (columns,), coordinates of the columns.

        Returns:
            (L, H, N, W) in the dtype of `freqs`, N = rows * columns, row-major.
        """
        raise NotImplementedError

    def forward(self, x: Tensor, payload: Tensor) -> Tensor:
        """Rotate queries or keys; computed in the payload's precision, returned in that of `x`, nothing is mutated.

        Args:
            x: (B, H, N, D).
            payload: (H or 1, N, W), or (B, H or 1, N, W) where every image has its own positions.

        Returns:
            (B, H, N, D).
        """
        raise NotImplementedError

    def extra_repr(self) -> str:
        rest = self.head_dim - self.rotated
        return f'{self.groups} groups of {self.size}' + (f', {rest} of {self.head_dim} unrotated' if rest else '')


class PairRotation(Rotation):
    """Channels (2g, 2g+1) turn by the angle w_x x + w_y y, counter-clockwise (arXiv 2403.13298, eq. 5 and 9).

    Payload: cosines then sines of the G angles.
    """

    def __init__(self, head_dim: int, groups: int) -> None:
        super().__init__(head_dim, 2, groups, 2 * groups)

    def table(self, freqs: Tensor, y: Tensor, x: Tensor) -> Tensor:
        return pair_table(freqs, y, x)

    def forward(self, x: Tensor, payload: Tensor) -> Tensor:
        if not torch.jit.is_scripting():
            if takes_complex(x, payload):
                return turn_complex(x, payload, self.groups)
        cos, sin = payload[..., :self.groups], payload[..., self.groups:]
        a, b = x[..., 0:self.rotated:2], x[..., 1:self.rotated:2]
        turned = torch.stack((a * cos - b * sin, a * sin + b * cos), dim=-1)
        return with_rest(turned, x, self.rotated, self.head_dim)


class TripletRotation(Rotation):
    """Channels (3g, 3g+1, 3g+2) turn by Yaw(w_x x) Roll(w_y y) (arXiv 2511.08368, section 3, Spherical RoPE).

    Yaw turns the first two channels of a triplet, roll the last two. The two do not commute, so the score is relative
    only along the axis that acts last. Payload: cos and sin of the roll angles, then cos and sin of the yaw angles.

    Args:
        order: Which axis acts first. 'yx': the roll by y, as the paper's equation; 'xy': the yaw by x, as the caption
            of its figure 2.
    """

    def __init__(self, head_dim: int, groups: int, order: str = 'yx') -> None:
        super().__init__(head_dim, 3, groups, 4 * groups)
        self.order = order

    def table(self, freqs: Tensor, y: Tensor, x: Tensor) -> Tensor:
        return triplet_table(freqs, y, x)

    def forward(self, x: Tensor, payload: Tensor) -> Tensor:
        n = self.groups
        cos_y, sin_y = payload[..., :n], payload[..., n:2 * n]
        cos_x, sin_x = payload[..., 2 * n:3 * n], payload[..., 3 * n:]
        a, b, c = x[..., 0:self.rotated:3], x[..., 1:self.rotated:3], x[..., 2:self.rotated:3]
        if self.order == 'yx':
            turned = b * cos_y - c * sin_y
            last = b * sin_y + c * cos_y
            first = a * cos_x - turned * sin_x
            middle = a * sin_x + turned * cos_x
        else:
            first = a * cos_x - b * sin_x
            turned = a * sin_x + b * cos_x
            middle = turned * cos_y - c * sin_y
            last = turned * sin_y + c * cos_y
        return with_rest(torch.stack((first, middle, last), dim=-1), x, self.rotated, self.head_dim)

    def extra_repr(self) -> str:
        return f'{super().extra_repr()}, order={self.order}'


class BlockRotation(Rotation):
    """Channels (bg, ..., bg+b-1) turn by exp(x A_x + y A_y), A skew-symmetric b x b (LieRE, arXiv 2406.10322, eq. 3).

    Here `freqs` holds the strict upper triangles of the generators, row by row: (2, L, H, G, b (b - 1) / 2).
    Payload: the G matrices, row-major.
    """

    def __init__(self, head_dim: int, size: int) -> None:
        groups = head_dim // size
        super().__init__(head_dim, size, groups, groups * size * size)

    def table(self, freqs: Tensor, y: Tensor, x: Tensor) -> Tensor:
        return block_table(freqs, y, x, self.size)

    def forward(self, x: Tensor, payload: Tensor) -> Tensor:
        return turn_blocks(x, payload, self.groups, self.size)


def with_rest(groups: Tensor, x: Tensor, rotated: int, head_dim: int) -> Tensor:
    """Turned groups (..., G, size) in the dtype of `x`, followed by the channels of `x` that belong to no group."""
    out = groups.flatten(-2).to(x.dtype)
    if rotated < head_dim:
        out = torch.cat((out, x[..., rotated:]), dim=-1)
    return out


def takes_complex(x: Tensor, payload: Tensor) -> bool:
    """Whether pairs may be turned as complex numbers: one pass over memory instead of a dozen.

    Only where nothing is recorded, since no compiler has code for complex numbers; and on the CPU, where it was
    measured. In half precision there are none, and views of bfloat16 are copies under autocast.
    """
    if not isinstance(x, Tensor) or recording() or torch.compiler.is_compiling():  # not a Tensor in torch.fx
        return False
    return bool(
        x.device.type == 'cpu' and x.dtype == payload.dtype and x.dtype in (torch.float32, torch.float64)
        and x.stride(-1) == 1 and x.storage_offset() % 2 == 0 and all(s % 2 == 0 for s in x.stride()[:-1]))


def turn_complex(x: Tensor, payload: Tensor, groups: int) -> Tensor:
    turns = torch.complex(payload[..., :groups], payload[..., groups:])
    pairs = torch.view_as_complex(x[..., :2 * groups].unflatten(-1, [groups, 2]))
    return with_rest(torch.view_as_real(pairs * turns), x, 2 * groups, x.shape[-1])


def cos_sin(position: Tensor, freqs: Tensor) -> Tuple[Tensor, Tensor]:
    """cos and sin of position * frequency: (n,) and (L, H, G) -> two (L, H, n, G) in the dtype of `freqs`."""
    angle = widest(position).unsqueeze(-1) * widest(freqs).unsqueeze(-2)
    return angle.cos().to(freqs.dtype), angle.sin().to(freqs.dtype)


@torch.fx.wrap
def pair_table(freqs: Tensor, y: Tensor, x: Tensor) -> Tensor:
    cos_x, sin_x = cos_sin(x, freqs[0])
    cos_y, sin_y = cos_sin(y, freqs[1])
    cos_x, sin_x, cos_y, sin_y = cos_x.unsqueeze(2), sin_x.unsqueeze(2), cos_y.unsqueeze(3), sin_y.unsqueeze(3)
    return torch.cat((cos_y * cos_x - sin_y * sin_x, sin_y * cos_x + cos_y * sin_x), dim=-1).flatten(2, 3)


@torch.fx.wrap
def triplet_table(freqs: Tensor, y: Tensor, x: Tensor) -> Tensor:
    yaw = torch.cat(cos_sin(x, freqs[0]), dim=-1).unsqueeze(2).expand(-1, -1, y.shape[0], -1, -1)
    roll = torch.cat(cos_sin(y, freqs[1]), dim=-1).unsqueeze(3).expand(-1, -1, -1, x.shape[0], -1)
    return torch.cat((roll, yaw), dim=-1).flatten(2, 3)


@torch.fx.wrap
def block_table(freqs: Tensor, y: Tensor, x: Tensor, size: int) -> Tensor:
    if torch.jit.is_scripting():
        return _block_table(freqs, y, x, size)
    # matrix products under autocast would build the rotations in half precision
    with without_autocast(freqs):
        return _block_table(freqs, y, x, size)


def _block_table(freqs: Tensor, y: Tensor, x: Tensor, size: int) -> Tensor:
    # the error of an exponential grows with its norm, over 100 rad at 64x64 patches: 3e-5 in float32 at block 8
    wide = freqs if freqs.device.type == 'mps' else freqs.double()
    along_x = x.to(wide.dtype).reshape(1, -1, 1, 1) * wide[0].unsqueeze(2).unsqueeze(2)
    along_y = y.to(wide.dtype).reshape(-1, 1, 1, 1) * wide[1].unsqueeze(2).unsqueeze(2)
    triangle = (along_x + along_y).flatten(2, 3)  # (L, H, N, G, b (b - 1) / 2)
    return skew_exp(triangle, size).to(freqs.dtype).flatten(-3)


@torch.fx.wrap
def turn_blocks(x: Tensor, payload: Tensor, groups: int, size: int) -> Tensor:
    if torch.jit.is_scripting():
        return _turn_blocks(x, payload, groups, size)
    with without_autocast(x):
        return _turn_blocks(x, payload, groups, size)


def _turn_blocks(x: Tensor, payload: Tensor, groups: int, size: int) -> Tensor:
    rotated = groups * size
    matrices = payload.unflatten(-1, [groups, size, size])
    blocks = x[..., :rotated].to(payload.dtype).unflatten(-1, [groups, size])
    return with_rest(_matrix_times_vector(matrices, blocks), x, rotated, x.shape[-1])


def _matrix_times_vector(matrices: Tensor, vectors: Tensor) -> Tensor:
    if not torch.jit.is_scripting():
        if recording():
            # ONNX knows no einsum whose ellipsis broadcasts; elsewhere this one would copy the matrices for each image
            return (matrices @ vectors.unsqueeze(-1)).squeeze(-1)
    return torch.einsum('...ij,...j->...i', [matrices, vectors])


def skew_exp(triangle: Tensor, size: int) -> Tensor:
    """Matrix exponential of skew-symmetric matrices: closed forms for 2, 3 and 4, `torch.linalg.matrix_exp` beyond.

    Export has no operator for it and gets a Taylor series with a fixed number of squarings.

    Args:
        triangle: (..., b (b - 1) / 2), strict upper triangle row by row.
        size: b.

    Returns:
        (..., b, b), rotation matrices.
    """
    if size == 2:
        cos, sin = triangle.cos(), triangle.sin()
        return torch.cat((cos, sin, -sin, cos), dim=-1).unflatten(-1, [2, 2])
    if size == 3:
        return _exp3(triangle)
    if size == 4:
        return _exp4(triangle)
    matrix = skew(triangle, size)
    if not torch.jit.is_scripting():
        if recording():
            return _exp_taylor(matrix)
    return torch.linalg.matrix_exp(matrix)


def _exp_taylor(matrix: Tensor, squarings: int = 12) -> Tensor:
    """exp(A) = exp(A / 2^s)^(2^s), degree 8 (Paterson-Stockmeyer): below 1e-8 in float64 to a norm of 800."""
    a = matrix / 2 ** squarings
    a2 = a @ a
    a4 = a2 @ a2
    eye = torch.eye(matrix.shape[-1], device=matrix.device, dtype=matrix.dtype)
    low = eye + a + a2 / 2 + a2 @ a / 6
    high = eye / 24 + a / 120 + a2 / 720 + a2 @ a / 5040 + a4 / 40320
    out = low + a4 @ high
    for _ in range(squarings):
        out = out @ out
    return out


def skew(triangle: Tensor, size: int) -> Tensor:
    """Skew-symmetric matrices (..., b, b) from their strict upper triangles (..., b (b - 1) / 2)."""
    upper = torch.triu_indices(size, size, 1, device=triangle.device)
    row, column = upper[0], upper[1]
    index = torch.full([size, size], 2 * triangle.shape[-1], device=triangle.device, dtype=torch.long)
    entry = torch.arange(triangle.shape[-1], device=triangle.device)
    index[row, column] = entry
    index[column, row] = entry + triangle.shape[-1]
    entries = torch.cat((triangle, -triangle, torch.zeros_like(triangle[..., :1])), dim=-1)
    return entries.index_select(-1, index.flatten()).unflatten(-1, [size, size])


def _cos_sinc(square: Tensor) -> Tuple[Tensor, Tensor]:
    """cos(t) and sin(t) / t for t^2 = square. The clamp keeps the root's derivative finite at t = 0."""
    t = square.clamp_min(1e-20).sqrt()
    return t.cos(), t.sin() / t


def _exp3(triangle: Tensor) -> Tensor:
    """Rodrigues: I + sinc(t) A + sinc(t / 2)^2 / 2 A^2, t^2 the sum of the squared entries."""
    a = skew(triangle, 3)
    square = triangle.square().sum(-1, keepdim=True).unsqueeze(-1)
    _, sinc = _cos_sinc(square)
    _, half = _cos_sinc(square / 4)
    return torch.eye(3, device=a.device, dtype=a.dtype) + sinc * a + 0.5 * half.square() * (a @ a)


def _exp4(triangle: Tensor) -> Tensor:
    """so(4) = so(3) + so(3): A = P + M with commuting P, M whose squares are multiples of the identity."""
    a, b, c, f, g, d = triangle.unbind(-1)
    e = -g
    p = 0.5 * torch.stack((a + d, b + e, c + f), dim=-1)
    m = 0.5 * torch.stack((a - d, b - e, c - f), dim=-1)
    plus = skew(torch.stack((p[..., 0], p[..., 1], p[..., 2], p[..., 2], -p[..., 1], p[..., 0]), dim=-1), 4)
    minus = skew(torch.stack((m[..., 0], m[..., 1], m[..., 2], -m[..., 2], m[..., 1], -m[..., 0]), dim=-1), 4)
    eye = torch.eye(4, device=triangle.device, dtype=triangle.dtype)
    cos_p, sinc_p = _cos_sinc(p.square().sum(-1)[..., None, None])
    cos_m, sinc_m = _cos_sinc(m.square().sum(-1)[..., None, None])
    return (cos_p * eye + sinc_p * plus) @ (cos_m * eye + sinc_m * minus)
