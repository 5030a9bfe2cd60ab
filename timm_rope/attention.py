"""Attention and transformer block that turn queries and keys by a payload.

Both keep timm's parameter names, so weights of other Vision Transformers fit.
"""
from typing import Any, Optional

import torch
import torch.nn.functional as F
from timm.layers import Attention, maybe_add_mask, resolve_self_attn_mask
from timm.models.vision_transformer import Block
from torch import Tensor

from .rotation import Rotation

# traced graphs keep these two as single nodes, as timm's own attention does
torch.fx.wrap('maybe_add_mask')
torch.fx.wrap('resolve_self_attn_mask')


class RopeAttention(Attention):
    """timm's self-attention with a rotation of queries and keys, after their norm and before the scores.

    Values are never rotated. `rotation` is set by the block; None gives plain attention.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.rotation: Optional[Rotation] = None

    def forward(
            self,
            x: Tensor,
            attn_mask: Optional[Tensor] = None,
            is_causal: bool = False,
            payload: Optional[Tensor] = None,
    ) -> Tensor:
        """Attend.

        Args:
            x: Tokens (B, N, C).
            attn_mask: Boolean (True attends) or additive mask, broadcastable to (B, H, N, N).
            is_causal: Each token sees itself and those before it.
            payload: Payload of all N tokens, prefix tokens included; required if the attention rotates.
        """
        B, N, _ = x.shape
        qkv = self.qkv(x).reshape(B, N, 3, self.num_heads, self.head_dim).permute(2, 0, 3, 1, 4)
        q, k, v = qkv.unbind(0)
        q, k = self.q_norm(q), self.k_norm(k)
        if self.rotation is not None:
            if payload is None:
                raise ValueError('This attention rotates its queries and keys: it needs the payload of its tokens.')
            q, k = self.rotation(q, payload), self.rotation(k, payload)

        if self.fused_attn:
            out = F.scaled_dot_product_attention(
                q, k, v,
                attn_mask=attn_mask,
                dropout_p=self.attn_drop.p if self.training else 0.,
                is_causal=is_causal,
            )
        else:
            scores = (q * self.scale) @ k.transpose(-2, -1)
            scores = maybe_add_mask(scores, resolve_self_attn_mask(N, scores, attn_mask, is_causal))
            out = self.attn_drop(scores.softmax(dim=-1)) @ v

        out = self.norm(out.transpose(1, 2).reshape(B, N, self.attn_dim))
        if self.gate is not None:
            out = out * self.gate(x).sigmoid()
        return self.proj_drop(self.proj(out))


class RopeBlock(Block):
    """timm's pre-norm transformer block whose attention takes a payload.

    Args:
        rotation: How queries and keys turn; None for a block without rotation.
        **kwargs: Arguments of timm's `Block`.
    """

    def __init__(self, *args: Any, rotation: Optional[Rotation] = None, **kwargs: Any) -> None:
        super().__init__(*args, **{**kwargs, 'attn_layer': RopeAttention})
        setattr(self.attn, 'rotation', rotation)  # noqa: B010 (mypy takes attributes of a child for tensors)

    def forward(
            self,
            x: Tensor,
            attn_mask: Optional[Tensor] = None,
            is_causal: bool = False,
            payload: Optional[Tensor] = None,
    ) -> Tensor:
        x = x + self.drop_path1(self.ls1(self.attn(self.norm1(x), attn_mask, is_causal, payload)))
        return x + self.drop_path2(self.ls2(self.mlp(self.norm2(x))))
