"""Vision Transformer with any rotary encoding, for images of any size.

    image -> patch embedding -> tokens (B, N, C) and their grid (rows, columns)
    rope:    grid -> one payload per block
    block i: tokens, payload i -> tokens

Everything flows in that one direction as explicit arguments, so that patch dropout, gradient checkpointing and grids
that change from batch to batch need no special case.
"""
from typing import Any, Dict, List, Optional, Set, Tuple, Union

import torch
from timm.layers import PatchDropoutWithIndices
from timm.models import checkpoint
from timm.models._features import feature_take_indices
from torch import Tensor
from torch.jit import Final

from .._checks import check_flag, check_size
from .._timm import VisionTransformer
from ..encodings import RotaryEncoding, create_rope
from ..encodings._payloads import keep_tokens
from ..weights import fit_vit
from ..weights.fit_vit import checkpoint_filter_fn as checkpoint_filter_fn  # timm expects it beside the class
from ..weights.load_hooks import Checkpointed
from .attention import RopeBlock
from .block_positions import TakesTokens, place
from .norms import get_norm
from .patch_embed import GridPatchEmbed, new_sizes, to_image_size
from .plain_vit import PlainVisionTransformer, check_arguments
from .rotary import RotaryModel, take_options

# Traced graphs keep it as a single node. torch.fx patches names of the module in which `wrap` is called, so that each
# module which uses such a function has to say so.
torch.fx.wrap('keep_tokens')


class RopeVisionTransformer(RotaryModel, TakesTokens, Checkpointed, PlainVisionTransformer):
    """timm's VisionTransformer with a rotary position encoding.

    The encoding is the child `rope`, created from `rope_encoding` and every argument that starts with `rope_`; its
    options are listed by `python -m timm_rope encodings --options`. Images of any multiple of the patch are taken
    without a flag; `dynamic_img_pad=True` takes any size, `dynamic_img_size=False` only the one it was built for.

    Args:
        img_size: Nominal image size; its grid is the reference grid of a model trained from scratch.
        patch_size: Patch size.
        embed_dim: Width.
        depth: Number of blocks.
        num_heads: Attention heads.
        rope_encoding: Name of a rotary encoding (`timm_rope.list_ropes()`), or 'none'.
        pos_embed: 'learn' adds a learned absolute position embedding (APE), 'none' does not.
        no_embed_class: Whether prefix tokens have no absolute position embedding.
        pos_embed_antialias: How an APE is resized: bicubic, as NAVER's models, or with antialias, as timm's.
        dynamic_img_size: Take images of any size.
        dynamic_img_pad: Pad images to a multiple of the patch, at the right and the bottom.
        patch_drop_rate: Share of the patches dropped in training; the kept ones keep their positions.
        drop_path_rate: Stochastic depth of the last block.
        drop_path_uniform: Give every block the full rate, as DeiT-III and NAVER's RoPE-ViT, instead of timm's ramp.
        norm_layer: 'spiral_rms' (the norm of Spiral RoPE's published weights), or a name or class for timm; None is
            timm's LayerNorm.
        norm_eps: Epsilon of all these norms; None keeps theirs (timm's LayerNorm: 1e-6).
        weight_init: timm's schemes, or 'naver': truncated normal of 0.02 for the class token too.
        device: Device of all tensors.
        dtype: Dtype of all tensors but the encoding's, which stay float32 or float64.
        **kwargs: Options of the encoding with the prefix `rope_` (`rope_reference_grid` overrides the grid of
            `img_size`; `rope_scaling` and `rope_log_n` say what happens on larger grids, `rope_shift`, `rope_jitter`
            and `rope_rescale` augment coordinates in training), and all other arguments of timm's VisionTransformer;
            `mlp_layer` may be 'swiglu'.

    Raises:
        ValueError: A size or option that cannot work; names the argument and what would be right.
        TypeError: An argument that neither timm nor any encoding knows.
    """
    _fitting = fit_vit
    drop_patches: Final[bool]

    def __init__(
            self,
            img_size: Union[int, Tuple[int, int]] = 224,
            patch_size: Union[int, Tuple[int, int]] = 16,
            embed_dim: int = 768,
            depth: int = 12,
            num_heads: int = 12,
            rope_encoding: str = 'axial',
            pos_embed: str = 'none',
            no_embed_class: bool = True,
            pos_embed_antialias: bool = False,
            dynamic_img_size: bool = True,
            dynamic_img_pad: bool = False,
            patch_drop_rate: float = 0.,
            drop_path_rate: float = 0.,
            drop_path_uniform: bool = False,
            norm_layer: Any = None,
            norm_eps: Optional[float] = None,
            weight_init: str = '',
            device=None,
            dtype=None,
            **kwargs: Any,
    ) -> None:
        check_arguments(embed_dim, depth, num_heads, pos_embed, pos_embed_antialias, weight_init, kwargs)
        patch = check_size(patch_size, 'patch_size')
        img_size = to_image_size(img_size, patch, dynamic_img_pad)
        options = take_options(rope_encoding, kwargs)
        rope: Optional[RotaryEncoding] = None
        told = 'rope_reference_grid' in options
        if rope_encoding != 'none':
            options.setdefault('rope_reference_grid', (img_size[0] // patch[0], img_size[1] // patch[1]))
            rope = create_rope(
                rope_encoding, embed_dim // num_heads, num_heads, depth,
                options.pop('rope_reference_grid'), device, dtype, **options)

        def block(**block_kwargs: Any) -> RopeBlock:
            if check_flag(drop_path_uniform, 'drop_path_uniform'):
                block_kwargs['drop_path'] = drop_path_rate
            return RopeBlock(rotation=None if rope is None else rope.rotation, **block_kwargs)

        kwargs.setdefault('embed_layer', GridPatchEmbed)
        super().__init__(
            img_size=img_size, patch_size=patch_size, embed_dim=embed_dim, depth=depth, num_heads=num_heads,
            pos_embed=pos_embed, no_embed_class=check_flag(no_embed_class, 'no_embed_class'),
            dynamic_img_size=check_flag(dynamic_img_size, 'dynamic_img_size'), dynamic_img_pad=dynamic_img_pad,
            drop_path_rate=drop_path_rate, norm_layer=get_norm(norm_layer, norm_eps), weight_init='skip', device=device,
            dtype=dtype, block_fn=block, **kwargs)  # type: ignore[arg-type]  # timm only calls block_fn

        self.drop_patches = patch_drop_rate > 0
        if self.drop_patches:
            self.patch_drop = PatchDropoutWithIndices(  # type: ignore[assignment]
                patch_drop_rate, num_prefix_tokens=self.num_prefix_tokens)
        self._add_pos_embed_grid(pos_embed_antialias, device)
        self.rope = rope
        if rope is not None:
            place(self, rope, told)
        self._move_rope_before_blocks()
        self.weight_init_mode = 'reset' if weight_init == 'skip' else weight_init  # type: ignore[assignment]
        if weight_init != 'skip':
            self.init_weights(needs_reset=False)

    def _move_rope_before_blocks(self) -> None:
        """Let `parameters()` end with the head, as in timm's models.

        timm's adaptive gradient clipping (`--clip-mode agc`) leaves out the last two parameters as "the head". A dict
        keeps the order in which names were put in, so what comes after the encoding is taken out and put in again.
        """
        names = list(self._modules)
        for name in names[names.index('blocks'):]:
            if name != 'rope':
                self._modules[name] = self._modules.pop(name)

    # -- training

    @torch.jit.ignore
    def no_weight_decay(self) -> Set[str]:
        """Names of parameters without weight decay."""
        rope = self.rope.no_weight_decay() if self.rope is not None else set()
        return VisionTransformer.no_weight_decay(self) | {f'rope.{name}' for name in rope}

    @torch.jit.ignore
    def group_matcher(self, coarse: bool = False) -> Dict[str, Any]:
        """Parameter groups for layer-wise lr decay. Frequencies of all blocks are one tensor and go with the stem."""
        groups = VisionTransformer.group_matcher(self, coarse)  # super() refuses a scripted model
        return {**groups, 'stem': f'{groups["stem"]}|rope'}

    # -- size

    @torch.jit.ignore
    def set_input_size(
            self,
            img_size: Optional[Union[int, Tuple[int, int]]] = None,
            patch_size: Optional[Union[int, Tuple[int, int]]] = None,
            rope_scaling: Optional[str] = None,
    ) -> None:
        """Change the nominal image or patch size. The reference grid stays: it belongs to the weights.

        Only in a model that has neither been trained nor loaded any weights it becomes the new grid.

        Args:
            img_size: New nominal size; None keeps the current one.
            patch_size: New patch size, to which the patch embedding is resampled; None keeps the current one.
            rope_scaling: New rule for grids larger than the reference grid; None keeps the current one.
        """
        self._check_rope_scaling(rope_scaling)
        img_size, patch = new_sizes(self.patch_embed, img_size, patch_size)
        super().set_input_size(img_size, patch_size if patch_size is None else patch)
        if self.rope is not None and self.rope.undecided:
            self.rope.set_initial_grid(self.patch_embed.grid_size)
        if rope_scaling is not None:
            self.set_rope_scaling(rope_scaling)

    @torch.jit.ignore
    def _encodings(self) -> List[Optional[RotaryEncoding]]:
        return [self.rope]

    # -- forward

    def _embed(self, x: Tensor) -> Tuple[Tensor, List[Tensor], Optional[Tensor]]:
        """Image -> tokens (B, prefix + N, C), one payload per block, none without an encoding, and a score scale."""
        x = self.patch_embed(x)
        payloads: List[Tensor] = []
        if self.rope is not None:
            if self.dynamic_img_size:
                payloads = self.rope((x.shape[1], x.shape[2]), self.num_prefix_tokens)
            else:
                payloads = self.rope(self.patch_embed.grid_size, self.num_prefix_tokens)
        x = self._pos_embed(x)
        if self.drop_patches:
            x, keep_indices = self.patch_drop(x)
            if keep_indices is not None and self.rope is not None:
                payloads = [keep_tokens(payloads[i], keep_indices, self.num_prefix_tokens)
                            for i in range(len(self.blocks))]
        score_scale: Optional[Tensor] = None
        if self.rope is not None:
            if self.rope.log_n:
                score_scale = self.rope.score_scale(x.shape[1], self.num_prefix_tokens)
        return self.norm_pre(x), payloads, score_scale

    def _run_blocks(
            self, x: Tensor, attn_mask: Optional[Tensor], is_causal: bool, take_indices: List[int], last: int,
    ) -> Tuple[Tensor, List[Tensor]]:
        """Image (B, C, H, W) -> tokens (B, prefix + N, C) after block `last`, and those after `take_indices`."""
        x, payloads, score_scale = self._embed(x)
        taken: List[Tensor] = []
        for i, block in enumerate(self.blocks):
            if i <= last:  # TorchScript unrolls the loop and knows no slice of blocks
                payload: Optional[Tensor] = None
                if self.rope is not None:
                    payload = payloads[i]
                if self.grad_checkpointing and not torch.jit.is_scripting():
                    # positional, since reentrant checkpointing refuses keyword tensors
                    x = checkpoint(block, x, attn_mask, is_causal, payload, score_scale)
                else:
                    x = block(x, attn_mask, is_causal, payload, score_scale)
                if i in take_indices:
                    taken.append(x)
        return x, taken

    def forward_features(self, x: Tensor, attn_mask: Optional[Tensor] = None, is_causal: bool = False) -> Tensor:
        """Image (B, C, H, W) -> normalised tokens (B, prefix + N, C)."""
        x, _ = self._run_blocks(x, attn_mask, is_causal, [], len(self.blocks))
        return self.norm(x)

    def forward_intermediates(
            self,
            x: Tensor,
            indices: Optional[Union[int, List[int]]] = None,
            return_prefix_tokens: bool = False,
            norm: bool = False,
            stop_early: bool = False,
            output_fmt: str = 'NCHW',
            intermediates_only: bool = False,
            output_dict: bool = False,
            attn_mask: Optional[Tensor] = None,
            is_causal: bool = False,
    ) -> Union[List[Tensor], Tuple[Tensor, List[Tensor]], Dict[str, Any]]:
        """Features of intermediate blocks, with the arguments and results of timm's VisionTransformer."""
        if output_fmt not in ('NCHW', 'NLC'):
            raise ValueError(f'output_fmt must be NCHW or NLC, got {output_fmt}.')
        take_indices, max_index = feature_take_indices(len(self.blocks), indices)
        last = max_index if stop_early and not torch.jit.is_scripting() else len(self.blocks) - 1
        out, taken = self._run_blocks(x, attn_mask, is_causal, take_indices, last)
        if norm:
            taken = [self.norm(y) for y in taken]

        n = self.num_prefix_tokens
        prefix_tokens = [y[:, :n] for y in taken]
        taken = [y[:, n:] for y in taken]
        if output_fmt == 'NCHW':
            rows, columns = self.patch_embed.dynamic_feat_size((x.shape[2], x.shape[3]))
            taken = [y.reshape(x.shape[0], rows, columns, -1).permute(0, 3, 1, 2).contiguous() for y in taken]

        if output_dict:
            result: Dict[str, Any] = {'image_intermediates': taken}
            if n and return_prefix_tokens:
                result['image_intermediates_prefix'] = prefix_tokens
            if not intermediates_only:
                result['image_features'] = self.norm(out)
            return result
        if not torch.jit.is_scripting() and n and return_prefix_tokens:
            taken = list(zip(taken, prefix_tokens))  # type: ignore[arg-type]
        if intermediates_only:
            return taken
        return self.norm(out), taken

    def prune_intermediate_layers(
            self, indices: Union[int, List[int]] = 1, prune_norm: bool = False, prune_head: bool = True,
    ) -> List[int]:
        """Drop the blocks after the last one in `indices`, with their frequencies; see timm."""
        take_indices = super().prune_intermediate_layers(indices, prune_norm, prune_head)
        if self.rope is not None:
            self.rope.keep_layers(len(self.blocks))
        return take_indices
