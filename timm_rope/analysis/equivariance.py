"""What changes when everything moves: rotations, scores and logits under shifts, and images whose patches are moved.

In come rotation matrices of `rotation_matrices`, or a model and its images; out come errors without a unit, 0 where
only offsets matter.
"""
from typing import Callable, Iterable, Sequence, Tuple

import torch
from torch import Tensor, nn

from ..positions.coordinates import Grid
from .turns import Turn, rotation_matrices


def pattern_map(turn: Turn, grid: Grid = (31, 31)) -> Tensor:
    """How a patch in the middle scores all others by position alone: the mean over all unit vectors q = k.

    That is trace(R_0^T R_p) / D, for pairs the mean of cos(w (p - p_0)) (the maps of arXiv 2511.08368, figure 1);
    channels that do not turn count as 1.

    Args:
        turn: One of `rotary_layers`.
        grid: (rows, columns); scaling rules are followed.

    Returns:
        (H or 1, rows, columns), 1 in the middle.
    """
    matrices = rotation_matrices(turn, grid)
    middle = (grid[0] // 2) * grid[1] + grid[1] // 2
    turned = (matrices[:, middle:middle + 1] * matrices).sum((-3, -2, -1))  # traces of all groups
    still = turn.head_dim - matrices.shape[-3] * matrices.shape[-1]
    return ((turned + still) / turn.head_dim).unflatten(-1, grid)


def rotation_error(matrices: Tensor, grid: Grid) -> Tensor:
    """How far the relative rotations R_i^T R_j are from depending on the offset of j from i alone.

    Their variance around the mean of their offset, over that around the mean of all pairs.

    Args:
        matrices: (H, N, G, b, b).
        grid: (rows, columns), N = rows * columns; memory grows by N squared, so better a small one.

    Returns:
        (H,), from 0 (equivariant) to 1.
    """
    rows, columns = grid
    relative = torch.einsum('hngab,hmgac->hnmgbc', matrices, matrices).flatten(3)
    y, x = torch.meshgrid(*(torch.arange(n, device=matrices.device) for n in grid), indexing='ij')
    y, x = y.flatten(), x.flatten()
    offset = (y[None] - y[:, None] + rows - 1) * (2 * columns - 1) + x[None] - x[:, None] + columns - 1
    offset, pairs = offset.flatten(), relative.flatten(1, 2)  # (N * N,), (H, N * N, G * b * b)
    sums = pairs.new_zeros(pairs.shape[0], (2 * rows - 1) * (2 * columns - 1), pairs.shape[2])
    counts = torch.bincount(offset, minlength=sums.shape[1]).clamp(min=1)
    means = sums.index_add_(1, offset, pairs) / counts[:, None]
    within = (pairs - means[:, offset]).square().sum((1, 2))
    total = (pairs - pairs.mean(1, keepdim=True)).square().sum((1, 2))
    return torch.where(total > 0, within / total, 0.)


def score_shift_error(matrices: Tensor, grid: Grid, shift: Tuple[int, int], seed: int = 0) -> Tensor:
    """How much the scores of random queries and keys change when all positions move by whole patches.

    The norm of the change over that of the scores around their mean, for as many patches as have their place in the
    grid before and after.

    Args:
        matrices: (H, N, G, b, b).
        grid: (rows, columns), N = rows * columns.
        shift: (rows, columns) by which the positions move.
        seed: Of the queries and keys.

    Returns:
        (H,), 0 for an equivariant encoding.

    Raises:
        ValueError: The shift is negative, or leaves less than two patches in the grid.
    """
    rows, columns = grid[0] - shift[0], grid[1] - shift[1]
    if min(shift) < 0 or min(rows, columns) < 1 or rows * columns < 2:
        raise ValueError(f'shift must be (rows, columns) from 0 that leaves two patches in {grid}, got {shift}.')
    matrices = matrices.unflatten(1, grid)
    here = matrices[:, :rows, :columns].flatten(1, 2)
    there = matrices[:, shift[0]:, shift[1]:].flatten(1, 2)
    generator = torch.Generator().manual_seed(seed)
    q, k = torch.randn(2, *here.shape[:-1], generator=generator, dtype=torch.float64, device='cpu').to(here)

    def scores(turned: Tensor) -> Tensor:
        a, b = [(turned @ x[..., None]).flatten(2) for x in (q, k)]
        return a @ b.mT

    before, after = scores(here), scores(there)
    return (after - before).flatten(1).norm(dim=1) / (before - before.mean((1, 2), keepdim=True)).flatten(1).norm(dim=1)


@torch.no_grad()
def logit_shift_error(
        model: nn.Module,
        images: Tensor,
        shifts: Sequence[Tuple[int, int]],
        patch: Tuple[int, int],
) -> Tensor:
    """How much the logits change when the images are moved around by whole patches.

    The norm of the change over that of the logits around the mean of the images and classes. What leaves at one side
    comes in at the other, so that an equivariant encoding is not without an error, either.

    Args:
        model: In the mode it is to be measured in.
        images: (B, C, H, W).
        shifts: (rows, columns) of patches, each by itself.
        patch: (height, width) of a patch in pixels.

    Returns:
        (shifts,).
    """
    before = model(images)
    changes = [(model(shift_patches(images, shift, patch)) - before).norm() for shift in shifts]
    return torch.stack(changes) / (before - before.mean()).norm()


@torch.inference_mode()
def accuracy_drop(
        model: nn.Module,
        batches: Iterable[Tuple[Tensor, Tensor]],
        move: Callable[[Tensor], Tensor],
) -> Tuple[float, float]:
    """Share of right answers on images, and on the same images after they were moved.

        before, after = accuracy_drop(model, loader, lambda images: shuffle_patches(images, (16, 16)))

    Args:
        model: In the mode it is to be measured in.
        batches: Images (B, C, H, W) and their classes (B,), where the model is; read once.
        move: `shuffle_patches`, `shift_patches` or any other change of images.

    Raises:
        ValueError: There are no images.
    """
    right, count = [0, 0], 0
    for images, labels in batches:
        for i, shown in enumerate((images, move(images))):
            right[i] += int((model(shown).argmax(-1) == labels).sum())
        count += len(labels)
    if not count:
        raise ValueError('batches must hold images and their classes, got none.')
    return right[0] / count, right[1] / count


def shift_patches(images: Tensor, shift: Tuple[int, int], patch: Tuple[int, int]) -> Tensor:
    """Images (B, C, H, W) moved down and right by whole patches, around their edges."""
    return images.roll((shift[0] * patch[0], shift[1] * patch[1]), dims=(-2, -1))


def shuffle_patches(images: Tensor, patch: Tuple[int, int], seed: int = 0) -> Tensor:
    """Images whose patches are in random order, another one in each image (as in arXiv 2406.10322, section 5.5).

    Args:
        images: (B, C, H, W), H and W multiples of the patch.
        patch: (height, width) of a patch in pixels.
        seed: Of the orders.

    Raises:
        ValueError: The images are no multiple of the patch.
    """
    height, width = images.shape[-2:]
    if height % patch[0] or width % patch[1]:
        raise ValueError(f'images must be a multiple of the patch {patch}, got {height}x{width}.')
    rows, columns = height // patch[0], width // patch[1]
    patches = images.unflatten(-1, (columns, patch[1])).unflatten(-3, (rows, patch[0]))
    patches = patches.permute(0, 2, 4, 1, 3, 5).flatten(1, 2)
    generator = torch.Generator().manual_seed(seed)
    orders = [torch.randperm(rows * columns, generator=generator, device='cpu') for _ in images]
    moved = torch.stack([each[order.to(each.device)] for each, order in zip(patches, orders)])
    return moved.unflatten(1, (rows, columns)).permute(0, 3, 1, 4, 2, 5).flatten(4, 5).flatten(2, 3)
