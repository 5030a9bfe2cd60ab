"""What the tests of encodings share: small ones, rotations as matrices, and how far scores are from relative."""
import torch

import timm_rope


def make(name, options=None, head_dim=64, num_heads=2, depth=2, reference_grid=(14, 14), **kwargs):
    torch.manual_seed(0)
    return timm_rope.create_rope(name, head_dim, num_heads, depth, reference_grid, **kwargs, **(options or {}))


def matrices(rope, grid, layer=0):
    """(H, N, D, D) rotation matrices, by rotating the unit vectors."""
    payload = rope(grid)[layer]
    n, d = grid[0] * grid[1], rope.head_dim
    columns = torch.eye(d, dtype=payload.dtype).reshape(d, 1, 1, d).expand(d, rope.num_heads, n, d)
    return rope.rotate(columns, payload).permute(1, 2, 3, 0)


def shift_errors(rope, grid=(5, 6)):
    """Largest change of R_i^T R_j over all pairs when both positions move by one along y, and along x."""
    r = matrices(rope, grid)[0].detach().reshape(*grid, rope.head_dim, rope.head_dim)

    def scores(part):
        flat = part.reshape(-1, rope.head_dim, rope.head_dim)
        return torch.einsum('iab,jac->ijbc', flat, flat)

    return (
        (scores(r[:-1]) - scores(r[1:])).abs().max().item(),
        (scores(r[:, :-1]) - scores(r[:, 1:])).abs().max().item(),
    )
