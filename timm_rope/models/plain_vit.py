"""timm's Vision Transformer with what published rotary models need and timm lacks, apart from the rotation itself.

The absolute position embedding knows its grid and how it is resized; there is NAVER's initialisation.
"""
from typing import Any, Dict, Optional, Tuple

import torch
from timm.layers import trunc_normal_
from torch import Tensor, nn

from .._checks import check_choice, check_flag, check_integer
from .._timm import VisionTransformer, resample_abs_pos_embed
from .mlps import get_mlp

# traced graphs keep it as a single node
torch.fx.wrap('resample_abs_pos_embed')

WEIGHT_INITS = ('', 'jax', 'jax_nlhb', 'moco', 'reset', 'skip', 'naver')


def check_arguments(
        embed_dim: Any, depth: Any, num_heads: Any, pos_embed: Any, pos_embed_antialias: Any, weight_init: Any,
        kwargs: Dict[str, Any],
) -> None:
    """Refuse arguments of the constructor that cannot work, before anything is built; an MLP may be named."""
    if 'mlp_layer' in kwargs:
        kwargs['mlp_layer'] = get_mlp(kwargs['mlp_layer'])
    for name in ('block_fn', 'attn_layer'):
        if name in kwargs:
            raise TypeError(f'{name} is set by RopeVisionTransformer and cannot be given.')
    check_choice(weight_init, WEIGHT_INITS, 'weight_init')
    check_choice(pos_embed, ('learn', 'none', ''), 'pos_embed')
    check_flag(pos_embed_antialias, 'pos_embed_antialias')
    check_integer(depth, 'depth')
    if check_integer(embed_dim, 'embed_dim') % check_integer(num_heads, 'num_heads'):
        raise ValueError(f'embed_dim must be a multiple of num_heads, got {embed_dim} and {num_heads}.')


class PlainVisionTransformer(VisionTransformer):
    """Base of `RopeVisionTransformer`; `pos_embed_grid` is the grid of the absolute position embedding, if any."""
    pos_embed_grid: Tensor
    pos_embed_antialias: bool

    def init_weights(self, mode: str = '', needs_reset: bool = True) -> None:
        """Initialise all weights; `mode` is one of timm's schemes or 'naver' (default: the one of the constructor)."""
        mode = mode or self.weight_init_mode
        if mode != 'naver':
            super().init_weights(mode, needs_reset)
        else:
            kept, self.weight_init_mode = self.weight_init_mode, ''
            super().init_weights('', needs_reset)
            self.weight_init_mode = kept
            for token in (self.cls_token, self.reg_token):
                if token is not None:
                    trunc_normal_(token, std=.02)
        if needs_reset and self.pos_embed is not None:
            self._record_pos_embed_grid()

    @torch.jit.ignore
    def set_input_size(
            self,
            img_size: Optional[Tuple[int, int]] = None,
            patch_size: Optional[Tuple[int, int]] = None,
    ) -> None:
        """Change the nominal image or patch size; an absolute position embedding is resized."""
        old_grid, pos_embed = self.patch_embed.grid_size, self.pos_embed
        self.pos_embed = None  # timm would resize it its own way
        try:
            super().set_input_size(img_size, patch_size)
        finally:
            self.pos_embed = pos_embed
        if pos_embed is not None and old_grid != self.patch_embed.grid_size:
            resized = self._resize_pos_embed(pos_embed.detach(), old_grid, self.patch_embed.grid_size)
            self.pos_embed = nn.Parameter(resized, requires_grad=pos_embed.requires_grad)
            self._record_pos_embed_grid()

    def _add_pos_embed_grid(self, antialias: bool, device: Any) -> None:
        self.pos_embed_antialias = antialias
        if self.pos_embed is not None:
            # tells 4x16 from 8x8 when the embedding is resized to another model's grid; not of integers, since people
            # average weights
            self.register_buffer('pos_embed_grid', torch.empty(2, device=device, dtype=torch.float32))
            self._record_pos_embed_grid()

    def _record_pos_embed_grid(self) -> None:
        self.pos_embed_grid.copy_(torch.tensor(self.patch_embed.grid_size, device=self.pos_embed_grid.device))

    def _resize_pos_embed(self, pos_embed: Tensor, old_grid: Tuple[int, int], new_grid: Tuple[int, int]) -> Tensor:
        # with antialias the bicubic kernel is another one, also for larger grids: RoPE-ViT's logits move by up to 8e-2
        return resample_abs_pos_embed(
            pos_embed,
            new_size=list(new_grid),
            old_size=list(old_grid),
            num_prefix_tokens=0 if self.no_embed_class else self.num_prefix_tokens,
            antialias=self.pos_embed_antialias,
        )

    def _pos_embed(self, x: Tensor) -> Tensor:
        """Patch embedding output (B, rows, columns, C) or (B, N, C) -> tokens with prefix tokens and, if any, APE."""
        pos_embed: Optional[Tensor] = self.pos_embed
        if self.dynamic_img_size:
            if pos_embed is not None:
                pos_embed = self._resize_pos_embed(
                    pos_embed, self.patch_embed.grid_size, (x.shape[1], x.shape[2]))
            x = x.flatten(1, 2)
        if self.no_embed_class and pos_embed is not None:
            x = x + pos_embed
        tokens = []
        if self.cls_token is not None:
            tokens.append(self.cls_token.expand(x.shape[0], -1, -1))
        if self.reg_token is not None:
            tokens.append(self.reg_token.expand(x.shape[0], -1, -1))
        tokens.append(x)
        x = torch.cat(tokens, dim=1)
        if not self.no_embed_class and pos_embed is not None:
            x = x + pos_embed
        return self.pos_drop(x)
