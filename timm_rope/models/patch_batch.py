"""What timm's NaFlex loader gives: checked, and the grid of every image read from the places of its patches."""
from dataclasses import dataclass
from typing import Any, List, NamedTuple, Optional, Tuple

import torch
from torch import Tensor

from ..positions.coordinates import LARGEST_SIDE


@dataclass
class PatchBatch:
    """Patches of images, as the model leads them on.

    Attributes:
        patches: (B, N, P * P * C), or (B, N, ...) with a patch that is not flattened.
        coord: (B, N, 2), row and column of each patch in its image, from 0.
        valid: (B, N), whether a patch is none of the padding; None if all are.
        attn_mask: The caller's, instead of one made of `valid`.
    """
    patches: Tensor
    coord: Tensor
    valid: Optional[Tensor]
    attn_mask: Optional[Tensor] = None

    @staticmethod
    def of(x: Any, coord: Any = None, valid: Any = None) -> Optional['PatchBatch']:
        """Of a dictionary of the loader, or of patches and what is known of them; None for images (B, C, H, W).

        Raises:
            TypeError: Patches or their places are missing or no tensors, places are no integers.
            ValueError: Shapes that do not fit each other.
        """
        mask = None
        if isinstance(x, dict):
            missing = [key for key in ('patches', 'patch_coord') if x.get(key) is None]
            if missing:
                raise TypeError(
                    f'A dictionary of patches needs patches and patch_coord, as the NaFlex loader gives them: '
                    f'{" and ".join(missing)} missing, it has {", ".join(map(str, x)) or "nothing"}.')
            x, coord, valid, mask = x['patches'], x['patch_coord'], x.get('patch_valid'), x.get('attn_mask')
        elif not isinstance(coord, Tensor):  # what a tracer passes is none
            return None
        if coord.is_floating_point() or coord.is_complex() or coord.dtype == torch.bool:
            raise TypeError(f'patch_coord must be integers, row and column of every patch, got {coord.dtype}.')
        if x.ndim < 3 or coord.shape != (*x.shape[:2], 2):
            raise ValueError(
                f'patch_coord must be (batch, patches, 2) for patches (batch, patches, ...), got {tuple(coord.shape)} '
                f'for {tuple(x.shape)}.')
        if valid is not None:
            if valid.shape != coord.shape[:2]:
                raise ValueError(f'patch_valid must be {tuple(coord.shape[:2])}, got {tuple(valid.shape)}.')
            valid = valid.bool()
        return PatchBatch(x, coord.long(), valid, mask)  # smaller integers overflow where places are counted


class Shapes(NamedTuple):
    """What has to be known on the host: one wait for the device in each step."""
    grids: List[Tuple[int, int]]  # of every image, (rows, columns)
    counts: List[int]  # patches of every image
    alike: bool  # whether all images have the same patches of the same grid, along its rows, and padding behind them
    whole: bool  # whether these are all patches of it, and there is no padding


def read_shapes(coord: Tensor, valid: Optional[Tensor]) -> Shapes:
    """Grids of images (B, N, 2): up to the last row and column that is no padding.

    Raises:
        ValueError: An image without patches, or places that are in no image.
    """
    if valid is None:
        valid = torch.ones_like(coord[..., 0], dtype=torch.bool)
    inside = valid.unsqueeze(-1)
    last = coord.masked_fill(~inside, -1).amax(1)
    first = coord.masked_fill(~inside, 0).amin((1, 2))
    number = coord[..., 0] * (last[:, 1:] + 1) + coord[..., 1]
    order, total = torch.arange(coord.shape[1], device=coord.device), valid.sum(1)
    in_order = ((number == order) & valid).sum(1) == total
    in_front = (valid & (order < total.unsqueeze(1))).sum(1) == total
    known = torch.stack((last[:, 0] + 1, last[:, 1] + 1, total, first, in_order & in_front), dim=1).tolist()
    for image, (rows, columns, count, least, _) in enumerate(known):
        if count == 0:
            raise ValueError(f'patch_valid leaves image {image} of the batch without a patch.')
        if least < 0 or max(rows, columns) > LARGEST_SIDE:
            raise ValueError(
                f'patch_coord must be rows and columns from 0 to {LARGEST_SIDE - 1}, image {image} of the batch has '
                f'{min(least, 0)} to {max(rows, columns) - 1}.')
    grids = [(rows, columns) for rows, columns, *_ in known]
    counts = [count for _, _, count, *_ in known]
    alike = all(ordered for *_, ordered in known) and len({*zip(grids, counts)}) == 1
    return Shapes(grids, counts, alike, alike and counts[0] == coord.shape[1] == grids[0][0] * grids[0][1])


def choose_patches(
        coord: Tensor, valid: Optional[Tensor], counts: List[int], rate: float) -> Tuple[Tensor, Tensor, List[int]]:
    """Patches that patch dropout keeps: of every image the same share of its own, at least one.

    Returns:
        Their numbers (B, K), which of these are no padding (B, K), and how many that is in every image.
    """
    noise = torch.rand(coord.shape[:2], device=coord.device)
    if valid is not None:
        noise = noise.masked_fill(~valid, 2.)
    kept = [max(1, int(count * (1. - rate))) for count in counts]
    number = torch.arange(max(kept), device=coord.device)
    return noise.argsort(dim=1)[:, :max(kept)], number < torch.tensor(kept, device=coord.device).unsqueeze(1), kept


def gather(x: Tensor, keep: Tensor) -> Tensor:
    """Tokens (B, N, ...) of numbers (B, K)."""
    return x.gather(1, keep.reshape(*keep.shape, *[1] * (x.ndim - 2)).expand(-1, -1, *x.shape[2:]))
