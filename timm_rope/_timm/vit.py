"""timm's Vision Transformer, its block and attention, and how position embeddings are resized, as in the newest one.

Classes are replaced difference by difference, from the newest release to the oldest. Each stand-in is a subclass of
timm's class, so that `isinstance` holds, and has no annotations, which would hide those of timm from TorchScript.
"""
import inspect
from typing import Any, Callable, List, Optional

import timm.layers
import torch
from timm.layers import Attention as Attention
from timm.layers import resample_abs_pos_embed as resample_abs_pos_embed
from timm.layers import resample_abs_pos_embed_nhwc
from timm.layers._fx import register_notrace_function
from timm.models.vision_transformer import Block as Block
from timm.models.vision_transformer import LayerScale
from timm.models.vision_transformer import VisionTransformer as VisionTransformer
from torch import Tensor, nn

from ._common import Initialised, on_device, takes

# -- 1.0.29: 4 x 16 positions are not left as they are where 8 x 8 are asked for

def _resample(
        posemb: Tensor, new_size: List[int], old_size: List[int], num_prefix_tokens: int, antialias: bool) -> Tensor:
    patches = posemb[:, num_prefix_tokens:].reshape(1, old_size[0], old_size[1], -1)
    patches = resample_abs_pos_embed_nhwc(patches, new_size, antialias=antialias).flatten(1, 2)
    return torch.cat([posemb[:, :num_prefix_tokens], patches], dim=1)


_row = torch.arange(4.).reshape(1, 4, 1)
if resample_abs_pos_embed(_row, [2, 2], [1, 4], 0) is _row:
    resample_abs_pos_embed = register_notrace_function(_resample)


# -- 1.0.28: gated attention, 1.0.23: width of all heads as an attribute

class _Ungated(Attention):
    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.gate = None
        self.attn_dim = self.num_heads * self.head_dim


if not takes(Attention.__init__, 'gated'):
    Attention = _Ungated  # type: ignore[misc]


# -- 1.0.26: causal attention

def _self_attn_mask(
        seq_len: int, attn: Tensor, attn_mask: Optional[Tensor] = None, is_causal: bool = False) -> Optional[Tensor]:
    """What is added to the scores (B, H, N, N), as in scaled_dot_product_attention; None if nothing is."""
    if is_causal:
        attn_mask = torch.ones(seq_len, seq_len, dtype=torch.bool, device=attn.device).tril()
    if attn_mask is not None and attn_mask.dtype == torch.bool:
        added = torch.zeros_like(attn_mask, dtype=attn.dtype)
        return added.masked_fill(attn_mask.logical_not(), float('-inf'))
    return attn_mask


class _Causal(VisionTransformer):
    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.in_chans = kwargs.get('in_chans', 3)  # 1.0.25

    def forward(self, x: Tensor, attn_mask: Optional[Tensor] = None, is_causal: bool = False) -> Tensor:
        return self.forward_head(self.forward_features(x, attn_mask, is_causal))


resolve_self_attn_mask = getattr(timm.layers, 'resolve_self_attn_mask', _self_attn_mask)
if resolve_self_attn_mask is _self_attn_mask:
    register_notrace_function(_self_attn_mask)  # a single node in traced graphs, as timm's own
if not takes(VisionTransformer.forward, 'is_causal'):
    VisionTransformer = _Causal  # type: ignore[misc]


# -- 1.0.23: a block whose attention is of another class, and `init_weights` at any time

class _BlockOfAttention(Block):
    def __init__(self, *args: Any, attn_layer: Callable[..., Any] = Attention, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        given = inspect.signature(super().__init__).bind(*args, **kwargs)
        given.apply_defaults()
        names = (
            'num_heads', 'qkv_bias', 'qk_norm', 'proj_bias', 'attn_drop', 'proj_drop', 'norm_layer', 'device', 'dtype')
        self.attn = attn_layer(
            given.arguments['dim'], scale_norm=given.arguments['scale_attn_norm'],
            **{name: given.arguments[name] for name in names if name in given.arguments})
        if not hasattr(LayerScale, 'reset_parameters'):  # 1.0.21
            for scale in (self.ls1, self.ls2):
                if isinstance(scale, LayerScale):
                    scale.__class__, scale.init_values = _LayerScale, given.arguments['init_values']


class _LayerScale(LayerScale):
    def reset_parameters(self) -> None:
        nn.init.constant_(self.gamma, self.init_values)


class _InitialisedVit(Initialised, VisionTransformer):
    def __init__(self, *args: Any, fix_init: bool = False, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.fix_init = fix_init

    def init_weights(self, mode: str = '', needs_reset: bool = True) -> None:
        super().init_weights(mode, needs_reset)
        if self.fix_init:
            self.fix_init_weight()


if not takes(Block.__init__, 'attn_layer'):
    Block = _BlockOfAttention  # type: ignore[assignment, misc]
if not takes(VisionTransformer.init_weights, 'needs_reset'):
    VisionTransformer = _InitialisedVit  # type: ignore[misc]

Attention, Block, VisionTransformer = map(on_device, (Attention, Block, VisionTransformer))  # type: ignore[misc]
