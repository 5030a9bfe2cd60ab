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
import torch
from torch import Tensor, nn

from .._precision import without_autocast
from .._tracing import recording
from .exponential import block_table
from .sines import cos_sin

torch.fx.wrap('block_table')


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

    Payload: cosine and sine of the G angles, next to each other.
    """

    def __init__(self, head_dim: int, groups: int) -> None:
        super().__init__(head_dim, 2, groups, 2 * groups)

    def table(self, freqs: Tensor, y: Tensor, x: Tensor) -> Tensor:
        return pair_table(freqs, y, x)

    def forward(self, x: Tensor, payload: Tensor) -> Tensor:
        cos, sin = payload[..., 0::2], payload[..., 1::2]
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


@torch.fx.wrap
def pair_table(freqs: Tensor, y: Tensor, x: Tensor) -> Tensor:
    cos_x, sin_x = cos_sin(x, freqs[0])
    cos_y, sin_y = cos_sin(y, freqs[1])
    cos_x, sin_x, cos_y, sin_y = cos_x.unsqueeze(2), sin_x.unsqueeze(2), cos_y.unsqueeze(3), sin_y.unsqueeze(3)
    turns = torch.stack((cos_y * cos_x - sin_y * sin_x, sin_y * cos_x + cos_y * sin_x), dim=-1)
    return turns.flatten(-2).flatten(2, 3)


@torch.fx.wrap
def triplet_table(freqs: Tensor, y: Tensor, x: Tensor) -> Tensor:
    yaw = torch.cat(cos_sin(x, freqs[0]), dim=-1).unsqueeze(2).expand(-1, -1, y.shape[0], -1, -1)
    roll = torch.cat(cos_sin(y, freqs[1]), dim=-1).unsqueeze(3).expand(-1, -1, -1, x.shape[0], -1)
    return torch.cat((roll, yaw), dim=-1).flatten(2, 3)


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
