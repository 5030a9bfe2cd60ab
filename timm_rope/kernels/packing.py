"""Gradients of queries, keys and values side by side, as the projection made those."""
import torch
from torch import Tensor


def pack(*parts: Tensor) -> Tensor:
    """Parts (B, H, N, D) -> (B, N, parts, H, D), contiguous."""
    B, H, N, D = parts[0].shape
    out = torch.empty(B, N, len(parts), H, D, dtype=parts[0].dtype, device=parts[0].device)
    for i, part in enumerate(parts):
        out[:, :, i].copy_(part.transpose(1, 2))
    return out
