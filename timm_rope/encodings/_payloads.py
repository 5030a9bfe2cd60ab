"""Payloads of all positions: one for each block, with prefix tokens in front, for the tokens that were kept."""
from typing import List

import torch
from torch import Tensor


@torch.fx.wrap
def per_block(
        prefix: Tensor, table: Tensor, num_prefix_tokens: int, depth: int, registers: int = 0) -> List[Tensor]:
    """Payloads (L or 1, [B,] H or 1, N, W) with those of the prefix tokens in front -> one for each block.

    `prefix` (..., 1 + registers, W) holds the payload of each prefix token but the registers, and those of the
    registers, which come last.
    """
    if num_prefix_tokens < 0:
        raise ValueError(f'num_prefix_tokens must be at least 0, got {num_prefix_tokens}.')
    if num_prefix_tokens > 0:
        if num_prefix_tokens < registers:
            raise ValueError(
                f'num_prefix_tokens must be 0 or at least {registers}, the registers of the encoding, got '
                f'{num_prefix_tokens}.')
        shape = list(table.shape)
        shape[-2] = num_prefix_tokens - registers
        first = prefix[..., :1, :].expand(shape)
        if registers > 0:
            shape[-2] = registers
            first = torch.cat((first, prefix[..., 1:, :].expand(shape)), dim=-2)
        table = torch.cat((first, table), dim=-2)
    if table.shape[0] == 1:
        shared = table[0]
        return [shared for _ in range(depth)]
    return list(table.unbind(0))


@torch.fx.wrap
def keep_tokens(payload: Tensor, keep_indices: Tensor, num_prefix_tokens: int) -> Tensor:
    """Payload of the patches that patch dropout kept.

    Args:
        payload: (H or 1, prefix + N, W).
        keep_indices: (B, K), patches kept in each image, without the prefix tokens.
        num_prefix_tokens: Tokens in front, always kept.

    Returns:
        (B, H or 1, prefix + K, W).
    """
    batch = keep_indices.shape[0]
    prefix = torch.arange(num_prefix_tokens, device=keep_indices.device).unsqueeze(0).expand(batch, -1)
    index = torch.cat((prefix, keep_indices + num_prefix_tokens), dim=1)
    return payload[:, index].transpose(0, 1)


def take_rows(table: Tensor, rows: Tensor) -> Tensor:
    """Rows (N,) or (B, N) of a table (..., M, W), as (..., N, W) or (B, ..., N, W)."""
    taken = table.index_select(-2, rows.flatten())
    return taken if rows.ndim == 1 else taken.unflatten(-2, rows.shape).movedim(-3, 0)


@torch.jit.unused
def check_rotate(x: Tensor, payload: Tensor, num_heads: int, head_dim: int, width: int) -> None:
    """Refuse queries or keys (batch, heads, N, head_dim) and a payload (..., N, W) that do not fit each other."""
    if isinstance(payload, (list, tuple)):
        raise TypeError(f'payload must be that of one block, payloads[i], got a {type(payload).__name__} of them.')
    if not x.is_floating_point():
        raise TypeError(f'x must be of a floating dtype, got {x.dtype}.')
    if x.ndim != 4 or x.shape[1] != num_heads or x.shape[3] != head_dim:
        raise ValueError(
            f'x must be (batch, {num_heads} heads, tokens, head_dim {head_dim}), got {tuple(x.shape)}.')
    if payload.shape[-1] != width or payload.shape[-2] != x.shape[2]:
        raise ValueError(
            f'payload must end in ({x.shape[2]} tokens, {width}), got {tuple(payload.shape)}: call the encoding with '
            f'the grid size of x.')
