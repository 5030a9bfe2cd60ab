"""What every rotation of groups of channels states: how payloads are made, and how they are applied."""
from typing import List

import torch
from torch import Tensor, nn


class Rotation(nn.Module):
    """Base of the rotations. Holds no tensors, so one instance may serve every block.

    Args:
        head_dim: Channels per head, D.
        size: Channels per group.
        groups: Number of groups, G.
        width: Width of the payload, W.
    """
    kind = ''  # name of the formula of `forward`, by which kernels know it; '' for one of its own
    boundless = True  # whether `table` turns a position alike in all grids, wherever they end

    def __init_subclass__(cls, **kwargs) -> None:
        super().__init_subclass__(**kwargs)
        if 'forward' in vars(cls) and 'kind' not in vars(cls):
            cls.kind = ''

    def __init__(self, head_dim: int, size: int, groups: int, width: int) -> None:
        super().__init__()
        self.head_dim = head_dim
        self.size = size
        self.groups = groups
        self.width = width
        self.rotated = size * groups  # leading channels that turn

    def table(self, freqs: Tensor, y: Tensor, x: Tensor) -> Tensor:
        """Payloads of a grid, or of points, for all layers.

        Args:
            freqs: (2, L, H, G), radians per unit of coordinate, x first.
            y: (rows,), coordinates of the rows.
            x: (columns,), coordinates of the columns, or (rows, columns) where every row has its own. Points anywhere
                are rows of one column: y (N,) and x (N, 1).

        Returns:
            (L, H, N, W) in the dtype of `freqs`, N = rows * columns, row-major.
        """
        raise NotImplementedError

    def table_nd(self, freqs: Tensor, axes: List[Tensor]) -> Tensor:
        """`table` in one or three dimensions, which TorchScript does not know.

        Args:
            freqs: (D, L, H, G), radians per unit of coordinate, x first.
            axes: Coordinates along each axis, x last: D tensors of D dimensions that broadcast to the grid, or those of
                points, (N,) each.

        Returns:
            (L, H, N, W) in the dtype of `freqs`, positions row-major.
        """
        if len(axes) != 1:
            raise NotImplementedError(f'{type(self).__name__} turns by one or two coordinates.')
        x = axes[0]  # a sequence is an image of one row that nothing turns by; its tokens are points if they learn
        y, x = (torch.zeros_like(x), x.unsqueeze(1)) if x.requires_grad else (torch.zeros_like(x[:1]), x)
        return self.table(torch.cat((freqs, torch.zeros_like(freqs))), y, x)

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


def by_rows(x: Tensor) -> Tensor:
    """Coordinates of the columns, (rows or 1, columns); `torch.atleast_2d` is unknown to other runtimes."""
    return x if x.ndim == 2 else x.unsqueeze(0)


def with_rest(groups: Tensor, x: Tensor, rotated: int, head_dim: int) -> Tensor:
    """Turned groups (..., G, size) in the dtype of `x`, followed by the channels of `x` that belong to no group."""
    out = groups.flatten(-2).to(x.dtype)
    if rotated < head_dim:
        out = torch.cat((out, x[..., rotated:]), dim=-1)
    return out
