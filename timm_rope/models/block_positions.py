"""Blocks that somebody else runs: `model.blocks(tokens)`, as masked autoencoders, distillation and visualisation do.

A block turns queries and keys by a payload, which the model gives it. Called without one, it takes that of the grid of
the model if its tokens are all the tokens of such a grid; anything else is an error that says how to give positions.
"""
from typing import Any, Dict

from torch import Tensor

from ..encodings import RotaryEncoding


class BlockPositions:
    """The payload of one block of a model, for calls without one; a copy of a model has blocks of its own."""

    def __init__(self, model: Any, index: int) -> None:
        self.model, self.index = model, index

    def __deepcopy__(self, memo: Dict[int, Any]) -> 'BlockPositions':
        # in a copy of the model it belongs to the copy; a copy of the block alone still belongs to the model
        return BlockPositions(memo.get(id(self.model), self.model), self.index)

    def payload(self, tokens: int) -> Tensor:
        """Payload of all tokens of the grid the model saw last, or else of its nominal grid.

        Raises:
            ValueError: Neither has so many tokens; says how to give their positions.
        """
        rope, prefix = self.model.rope, self.model.num_prefix_tokens
        nominal = tuple(self.model.patch_embed.grid_size)
        for rows, columns in (getattr(rope, 'last_grid', None) or nominal, nominal):
            if prefix + rows * columns == tokens:
                payload: Tensor = rope((rows, columns), prefix)[self.index]
                return payload
        raise ValueError(
            f'A block that is called without a payload takes all tokens of the grid of its model, {prefix} + '
            f'{nominal[0]} x {nominal[1]}, got {tokens}. Give their positions: '
            f'block(x, payload=model.rope((rows, columns), {prefix})[{self.index}]), and where tokens were dropped '
            f'payload[:, kept].')


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
