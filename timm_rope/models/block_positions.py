"""Blocks that somebody else runs: `model.blocks(tokens)`, as masked autoencoders, distillation and visualisation do.

A block turns queries and keys by a payload, which the model gives it. Called without one, it takes that of the image
that was embedded last if its tokens are all tokens of that image; else an error says how to give positions.
`rope_payloads` gives them for some of the patches, `model.rope.at` for points anywhere.
"""
from typing import Any, Dict, List, Optional, Tuple

import torch
from torch import Tensor, nn

from .._tracing import plain
from ..encodings import RotaryEncoding
from ..encodings._payloads import keep_tokens


class BlockPositions:
    """The payload of one block of a model, for calls without one; a copy of a model has blocks of its own."""

    def __init__(self, model: Any, index: int) -> None:
        self.model, self.index = model, index

    def __deepcopy__(self, memo: Dict[int, Any]) -> 'BlockPositions':
        # in a copy of the model it belongs to the copy; a copy of the block alone still belongs to the model
        return BlockPositions(memo.get(id(self.model), self.model), self.index)

    def payload(self, tokens: int) -> Tensor:
        """Payload of all tokens of the image that was embedded last, or before the first one of the nominal grid.

        In a compiled graph it is the nominal grid. More tokens are those of an earlier image, whose blocks run once
        more (gradient checkpointing).

        Raises:
            ValueError: Fewer tokens, or a number that fits no such grid; says how to give their positions.
        """
        rope, prefix = self.model.rope, self.model.num_prefix_tokens
        embed, nominal = self.model.patch_embed, tuple(self.model.patch_embed.grid_size)
        seen = getattr(embed, 'seen', {})
        # what a stem of timm embedded is known from the encoding alone, which others ask for other grids
        last = [*seen.values()][-1] if seen else nominal
        if not hasattr(embed, 'seen'):
            last = getattr(rope, 'last_grid', None) or nominal
        if torch.compiler.is_compiling():  # a graph does not note what it embeds, so that the last one may be older
            seen, last = {}, nominal
        grids = [last, nominal]
        if seen:  # some patches of a larger image may be as many as those of a smaller one: they are no grid
            grids = [last if tokens - prefix <= last[0] * last[1] else seen.get(tokens - prefix, nominal)]
        for rows, columns in grids:
            if prefix + rows * columns == tokens:
                payload: Tensor = rope((rows, columns), prefix)[self.index]
                return payload
        raise ValueError(
            f'A block that is called without a payload takes all tokens of the grid of its model, {prefix} + '
            f'{last[0]} x {last[1]}, got {tokens}. Give their positions: '
            f'block(x, payload=model.rope((rows, columns), {prefix})[{self.index}]), and where patches were dropped '
            f'model.rope_payloads((rows, columns), keep=...)[{self.index}].')


class TakesTokens:
    """Part of a ViT that gives the positions of tokens which somebody else leads through its blocks."""
    rope: Optional[RotaryEncoding]
    blocks: nn.Sequential
    num_prefix_tokens: int

    @torch.jit.ignore
    def rope_payloads(self, grid: Tuple[int, int], keep: Optional[Tensor] = None) -> List[Optional[Tensor]]:
        """Payloads of the prefix tokens and of some patches of an image, in their order.

            for block, payload in zip(model.blocks, model.rope_payloads((14, 14), keep)):
                tokens = block(tokens, payload=payload)

        With log-n, blocks take `score_scale=model.rope.score_scale(tokens.shape[1], model.num_prefix_tokens)` as well.

        Args:
            grid: (rows, columns) of patches of the image.
            keep: Numbers of patches, counted along the rows from 0, in any order: (K,), or (B, K) where every image
                keeps its own. None keeps all.

        Returns:
            One per block: (H or 1, prefix + K, W), with (B, K) patches (B, H or 1, prefix + K, W), or None in a model
            without an encoding.

        Raises:
            TypeError: `keep` is no tensor of integers.
            ValueError: `keep` is of another shape, or, if it can be looked at, has no such patch; or `grid` is not two
                positive integers.
        """
        if keep is not None:
            check_keep(keep, grid)
        if self.rope is None:
            return [None for _ in self.blocks]
        payloads = self.rope(grid, self.num_prefix_tokens)
        if keep is None:
            return list(payloads)
        kept = [keep_tokens(p, torch.atleast_2d(keep), self.num_prefix_tokens) for p in payloads]
        return [p if keep.ndim == 2 else p[0] for p in kept]


def check_keep(keep: Tensor, grid: Tuple[int, int]) -> None:
    """Refuse what are no numbers of patches (K,) or (B, K)."""
    if not isinstance(keep, Tensor) or keep.dtype not in (torch.int64, torch.int32):
        got = keep.dtype if isinstance(keep, Tensor) else type(keep).__name__
        raise TypeError(f'keep must be a tensor of integers, the numbers of the patches to keep, got {got}.')
    if keep.ndim not in (1, 2):
        raise ValueError(f'keep must be (K,) or (batch, K), got {tuple(keep.shape)}.')
    if not torch.compiler.is_compiling() and plain(keep) and keep.numel():
        patches, (least, most) = grid[0] * grid[1], keep.aminmax()
        if least < 0 or most >= patches:
            raise ValueError(
                f'keep must be numbers from 0 to {patches - 1}, the patches of {grid[0]} x {grid[1]}, got {int(least)} '
                f'to {int(most)}.')


def place(model: Any, rope: RotaryEncoding, told: bool) -> None:
    """Give the blocks of a ViT a way to their payloads, and its encoding the grid of its stem.

    Args:
        model: With `patch_embed` and `blocks`.
        rope: Its encoding.
        told: Whether the user named the reference grid.
    """
    for index, block in enumerate(model.blocks):
        block.attn.positions = BlockPositions(model, index)
    if not told:
        # a stem may have strides of its own; training may change the grid once more
        rope.set_initial_grid(model.patch_embed.grid_size)
