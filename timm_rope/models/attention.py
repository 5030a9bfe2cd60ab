"""Attention and transformer block that turn queries and keys by a payload.

Both keep timm's parameter names, so weights of other Vision Transformers fit.
"""
from typing import Any, Optional, Tuple

import torch
import torch.nn.functional as F
from timm.layers import maybe_add_mask
from torch import Tensor

from .._timm import Attention, Block, resolve_self_attn_mask
from .._tracing import sdpa_takes_proxies
from ..kernels import does_nothing, owned, rotate, unpack
from ..rotations import Rotation
from .block_positions import BlockPositions

# traced graphs keep these two as single nodes, as those of timm's own attention do
torch.fx.wrap('maybe_add_mask')
torch.fx.wrap('resolve_self_attn_mask')


def attend(
        q: Tensor, k: Tensor, v: Tensor, attn_mask: Optional[Tensor], dropout_p: float, is_causal: bool) -> Tensor:
    """torch's scaled dot-product attention; with an older torch FX keeps it as one node, under this name."""
    return F.scaled_dot_product_attention(q, k, v, attn_mask=attn_mask, dropout_p=dropout_p, is_causal=is_causal)


if not sdpa_takes_proxies():
    torch.fx.wrap('attend')


class RopeAttention(Attention):
    """timm's self-attention with a rotation of queries and keys, after their norm and before the scores.

    Values are never rotated. `rotation` is set by the block; None gives plain attention. `positions` is where a payload
    comes from that is not given.
    """
    __jit_ignored_attributes__ = ['positions']

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.rotation: Optional[Rotation] = None
        self.positions: Optional[BlockPositions] = None

    def forward(
            self,
            x: Tensor,
            attn_mask: Optional[Tensor] = None,
            is_causal: bool = False,
            payload: Optional[Tensor] = None,
            score_scale: Optional[Tensor] = None,
    ) -> Tensor:
        """Attend.

        Args:
            x: Tokens (B, N, C).
            attn_mask: Boolean (True attends) or additive mask, broadcastable to (B, H, N, N).
            is_causal: Each token sees itself and those before it.
            payload: Payload of all N tokens, prefix tokens included; required if the attention rotates.
            score_scale: Scalar tensor that the scores are multiplied by.
        """
        B, N, _ = x.shape
        qkv = self.qkv(x)
        if self.rotation is not None and payload is None:
            payload = self._own_payload(N)
        if torch.jit.is_scripting():
            q, k, v = self._split(qkv, payload)
        elif (self.rotation is not None and payload is not None
                and does_nothing(self.q_norm) and does_nothing(self.k_norm)):
            q, k, v = rotate(owned(qkv, self.qkv), payload, self.rotation, self.num_heads)
        else:
            q, k, v = self._split(qkv, payload)
        if score_scale is not None:
            q = q * score_scale

        if not torch.jit.is_scripting():
            if torch.jit.is_tracing():
                is_causal = bool(is_causal)  # the older exporter to ONNX passes a tensor
        if self.fused_attn:
            out = attend(q, k, v, attn_mask, self.attn_drop.p if self.training else 0., is_causal)
        else:
            scores = (q * self.scale) @ k.transpose(-2, -1)
            scores = maybe_add_mask(scores, resolve_self_attn_mask(N, scores, attn_mask, is_causal))
            out = self.attn_drop(scores.softmax(dim=-1)) @ v

        out = self.norm(out.transpose(1, 2).reshape(B, N, self.attn_dim))
        if self.gate is not None:
            out = out * self.gate(x).sigmoid()
        return self.proj_drop(self.proj(out))

    @torch.jit.unused
    def _own_payload(self, tokens: int) -> Tensor:
        if self.positions is None:
            raise ValueError('This attention rotates its queries and keys: it needs the payload of its tokens.')
        return self.positions.payload(tokens)

    def _split(self, qkv: Tensor, payload: Optional[Tensor]) -> Tuple[Tensor, Tensor, Tensor]:
        """Queries, keys and values of a projection by plain operations, with norms and rotation if there are any."""
        q, k, v = unpack(qkv, self.num_heads)
        q, k = self.q_norm(q), self.k_norm(k)
        if self.rotation is not None and payload is not None:
            q, k = self.rotation(q, payload), self.rotation(k, payload)
        return q, k, v


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
            score_scale: Optional[Tensor] = None,
    ) -> Tensor:
        x = x + self.drop_path1(self.ls1(self.attn(self.norm1(x), attn_mask, is_causal, payload, score_scale)))
        return x + self.drop_path2(self.ls2(self.mlp(self.norm2(x))))
