"""A ViT for the batches of timm's NaFlex loader: images of any size and shape, cut into patches, padded to one length.

    loader -> patches (B, N, P * P * C), their places (B, N, 2) as (row, column), and which of them are no padding
    each image turns by the positions of its own grid; nobody attends to padding, and no pool takes it

Why this is no subclass of timm's NaFlexVit: that hands its blocks one tensor of cosines and sines, zero where padding
is, and nothing else, so that all its forward passes would have to be written anew for payloads of other rotations and
for log-n; and its stem has parameters of other names and shapes, so that all that `weights/` knows (reference grid,
signature, layouts, warm start) would have to be said twice. Here the model is the plain one with a second way in, its
state dict is that of the plain one, and the pools of padded tokens are timm's.
"""
import copy
from typing import Any, Dict, List, NamedTuple, Optional, Sequence, Tuple, Union

import torch
from timm.layers import AttentionPoolLatent, PatchEmbed, disable_compiler
from timm.models.naflexvit import create_attention_mask, global_pool_naflex
from torch import Tensor, nn

from .._checks import check_flag
from ..encodings._many import Places, one_after_another
from ..encodings._payloads import take_rows
from ..weights.fit_vit import checkpoint_filter_fn as checkpoint_filter_fn  # timm expects it beside the class
from .patch_batch import PatchBatch, choose_patches, gather, read_shapes
from .patch_stem import embed_patches
from .vit import RopeVisionTransformer


class RopeNaFlexVit(RopeVisionTransformer):
    """`RopeVisionTransformer` that takes batches of timm's NaFlex loader as well as images (B, C, H, W).

    A batch is a dictionary of `patches`, (B, N, P * P * C) or (B, N, P, P, C), `patch_coord`, (B, N, 2), and
    `patch_valid`, (B, N); an `attn_mask` in it replaces the mask of the padding. For patches (B, N, P, P, C) of another
    size than the model's the stem is resampled, as in FlexiViT (arXiv 2212.08013).

    An image of the batch gives what it gives alone, whatever the others are: its coordinates, the rule for larger
    grids, log-n and the position embedding go by its own grid. In training, patch dropout takes the same share of the
    patches of every image.

    The reference grid is that of `img_size`; unlike in the plain model, the first step of training does not change it,
    since its images have many grids.

    Weights are those of the plain model, in both directions. TorchScript makes the plain model of it.

    Args:
        *args: As `RopeVisionTransformer`.
        patchify_channels_last: Whether the colours of a pixel lie next to each other in a flattened patch, as the
            loader does by default; False for its `patchify_channels_last=False`.
        use_naflex: True, the argument of `create_model` that asks for this class.
        **kwargs: As `RopeVisionTransformer`.

    Raises:
        TypeError: An `embed_layer` that does not cut images into patches by one convolution.
    """

    def __init__(
            self, *args: Any, patchify_channels_last: bool = True, use_naflex: bool = True, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.patchify_channels_last = check_flag(patchify_channels_last, 'patchify_channels_last')
        if not isinstance(self.patch_embed, PatchEmbed):
            raise TypeError(
                f'use_naflex=True needs an embed_layer that is one convolution of patches, a PatchEmbed, '
                f'{type(self.patch_embed).__name__} is none: its input cannot be cut into patches beforehand.')

    def __prepare_scriptable__(self) -> RopeVisionTransformer:
        plain = copy.copy(self)
        plain.__class__ = RopeVisionTransformer  # type: ignore[assignment]
        return plain

    # -- what timm's scripts ask

    def get_patch_size(self) -> Tuple[int, int]:
        """(height, width) of a patch; asked by `train.py --naflex-loader`."""
        return tuple(self.patch_embed.patch_size)

    @property
    def embeds(self) -> nn.Module:
        """The stem, under the name that it has in NaFlexVit; asked by `validate.py --naflex-loader`."""
        return self.patch_embed

    # -- forward

    def forward(  # type: ignore[override]
            self,
            x,  # not annotated, since FX would hand the annotation on to TorchScript
            attn_mask: Optional[Tensor] = None,
            is_causal: bool = False,
            patch_coord: Optional[Tensor] = None,
            patch_valid: Optional[Tensor] = None,
    ) -> Tensor:
        """Images (B, C, H, W), a dictionary of patches, or patches with `patch_coord` -> logits."""
        # in two steps: across the break of `_place` dynamo of torch 2.8 would compile a bound method anew in every call
        features = self.forward_features(x, attn_mask, is_causal, patch_coord, patch_valid)
        return self.forward_head(features)

    def forward_features(  # type: ignore[override]
            self, x: Any, attn_mask: Optional[Tensor] = None, is_causal: bool = False,
            patch_coord: Optional[Tensor] = None, patch_valid: Optional[Tensor] = None,
    ) -> Union[Tensor, Dict[str, Optional[Tensor]]]:
        """Normalised tokens (B, prefix + N, C); of patches a dictionary of them, `patches`, and `patch_valid`."""
        batch = PatchBatch.of(x, patch_coord, patch_valid)
        tokens = super().forward_features(x if batch is None else batch, attn_mask, is_causal)  # type: ignore[arg-type]
        return tokens if batch is None else {'patches': tokens, 'patch_valid': batch.valid}

    def forward_intermediates(  # type: ignore[override]
            self, x: Any, *args: Any, patch_coord: Optional[Tensor] = None,
            patch_valid: Optional[Tensor] = None, **kwargs: Any) -> Any:
        """As the plain model's. Patches have no common map: they need `output_fmt='NLC'`.

        With `output_dict=True` the result says which tokens are no padding, `patch_valid` (B, N).
        """
        batch = PatchBatch.of(x, patch_coord, patch_valid)
        if batch is None:
            return super().forward_intermediates(x, *args, **kwargs)
        given = dict(zip(('indices', 'return_prefix_tokens', 'norm', 'stop_early', 'output_fmt', 'intermediates_only',
                          'output_dict', 'attn_mask', 'is_causal'), args), **kwargs)
        if given.get('output_fmt', 'NCHW') == 'NCHW':
            raise ValueError("output_fmt must be 'NLC' for patches: every image of the batch has a grid of its own.")
        if self.training and self.drop_patches and not given.get('output_dict'):
            raise ValueError('forward_intermediates of patches needs output_dict=True where some are dropped: it tells '
                             'which tokens are left.')
        out: Any = super().forward_intermediates(batch, **given)  # type: ignore[arg-type]
        if given.get('output_dict') and batch.valid is not None:
            out['patch_valid'] = batch.valid
        return out

    def forward_head(  # type: ignore[override]
            self, x: Any, pre_logits: bool = False, patch_valid: Optional[Tensor] = None,
    ) -> Tensor:
        """Tokens, or what `forward_features` gives -> logits; padding is in no pool."""
        if isinstance(x, dict):
            x, patch_valid = x['patches'], x['patch_valid']
        if not isinstance(patch_valid, Tensor):
            return super().forward_head(x, pre_logits)
        x = self.head_drop(self.fc_norm(self._pool_valid(x, patch_valid)))
        return x if pre_logits else self.head(x)

    def _pool_valid(self, x: Tensor, valid: Tensor) -> Tensor:
        n, kept = self.num_prefix_tokens, self.pool_include_prefix
        if self.attn_pool is None:
            return global_pool_naflex(x, valid, self.global_pool, n, kept)
        if not isinstance(self.attn_pool, AttentionPoolLatent):
            raise ValueError(f'global_pool must be token, avg, avgmax, max or map for patches, got {self.global_pool}.')
        mask = create_attention_mask(valid, n if kept else 0, symmetric=False, q_len=1, dtype=x.dtype)
        return self.attn_pool(x if kept else x[:, n:], attn_mask=mask)

    def _run_blocks(
            self, x: Any, attn_mask: Optional[Tensor], is_causal: bool, take_indices: List[int], last: int,
    ) -> Tuple[Tensor, List[Tensor]]:
        if not isinstance(x, PatchBatch):
            return super()._run_blocks(x, attn_mask, is_causal, take_indices, last)
        if is_causal:
            raise ValueError('is_causal has no meaning for patches of images of several shapes.')
        placed = self._place(x.coord, x.valid, torch.compiler.is_compiling())
        if placed.keep is not None:
            x.patches = gather(x.patches, placed.keep)
        x.valid = placed.valid
        for mask in (x.attn_mask, placed.mask):
            attn_mask = mask if attn_mask is None else attn_mask
        return super()._run_blocks((x.patches, placed), attn_mask, False, take_indices, last)  # type: ignore[arg-type]

    def _embed(self, x: Any) -> Tuple[Tensor, Any, Optional[Tensor]]:
        if not isinstance(x, tuple):
            return super()._embed(x)
        patches, placed = x
        tokens = embed_patches(self.patch_embed, patches, self.in_chans, self.patchify_channels_last)
        prefix = [t.expand(len(tokens), -1, -1) for t in (self.cls_token, self.reg_token) if t is not None]
        tokens = torch.cat([*prefix, tokens], dim=1)
        if placed.pos_embed is not None:
            tokens = tokens + placed.pos_embed
        return self.norm_pre(self.pos_drop(tokens)), placed.payloads, placed.score_scale

    @disable_compiler
    def _place(self, coord: Tensor, valid: Optional[Tensor], compiled: bool) -> 'Placed':
        """Everything that depends on where patches are. Not compiled: a graph would hold the shapes of one batch.

        Args:
            coord: Places (B, N, 2).
            valid: Which are no padding, (B, N); None if all are.
            compiled: Whether the blocks are compiled, for which all batches should look alike.
        """
        prefix = self.num_prefix_tokens
        grids, counts, alike, whole = read_shapes(coord, valid)
        keep = None
        if self.drop_patches and self.training:
            keep, valid, counts = choose_patches(coord, valid, counts, self.patch_drop.prob)
            coord, alike, whole = gather(coord, keep), False, False
        mask = None
        if valid is not None and (compiled or min(counts) < coord.shape[1]):
            mask = torch.cat((valid.new_ones(len(valid), prefix), valid), dim=1)[:, None, None]
        unique = sorted(set(grids))
        which = [unique.index(grid) for grid in grids]
        alone = whole and not compiled

        def take(tables: Sequence[Tensor], places: Places) -> 'OneByOne':
            start = torch.tensor([places[grid] for grid in which], device=coord.device)
            rows = start[:, :1] + coord[..., 0] * start[:, 1:] + coord[..., 1]
            if valid is not None:
                rows = rows.masked_fill(~valid, 0)  # any row will do: nobody looks at padding
            ahead = torch.arange(prefix, device=coord.device).expand(len(rows), -1)
            rows = torch.cat((ahead, rows), dim=1)
            return OneByOne(tables, rows[0] if alike and not compiled else rows)

        payloads: Sequence[Tensor] = []
        pos_embed = score_scale = None
        if self.rope is not None:
            tables, places = self.rope.of_grids(unique, prefix, alone)
            payloads = tables if alone else take(tables, places)
            if compiled:
                payloads = [payloads[i] for i in range(len(self.blocks))]
            if self.rope.log_n:
                scales = [self.rope.score_scale(prefix + count, prefix) for count in counts]
                score_scale = torch.stack(scales).reshape(-1, 1, 1, 1)
        if self.pos_embed is not None:
            pos_embed = take([self._pos_embed_table(self.pos_embed, unique)], one_after_another(unique, prefix))[0]
        return Placed(payloads, pos_embed, score_scale, mask, valid, keep)

    def _pos_embed_table(self, pos_embed: Tensor, grids: Sequence[Tuple[int, int]]) -> Tensor:
        """The position embedding of prefix tokens, zero if they have none, and of the patches of each grid, (M, C)."""
        n = self.num_prefix_tokens
        own = 0 if self.no_embed_class else n
        ahead = pos_embed[0, :n] if own else pos_embed.new_zeros(n, pos_embed.shape[2])
        grid = tuple(self.patch_embed.grid_size)
        return torch.cat([ahead, *(self._resize_pos_embed(pos_embed, grid, size)[0, own:] for size in grids)])


class Placed(NamedTuple):
    """What `RopeNaFlexVit` makes of the places of patches.

    Attributes:
        payloads: One per block.
        pos_embed: (B, prefix + N, C), or None.
        score_scale: (B, 1, 1, 1), or None.
        mask: Which keys are no padding, (B, 1, 1, prefix + N); None if all are.
        valid: Which patches are no padding, (B, N), or None.
        keep: Numbers of the patches that are kept, (B, N), or None.
    """
    payloads: Sequence[Tensor]
    pos_embed: Optional[Tensor]
    score_scale: Optional[Tensor]
    mask: Optional[Tensor]
    valid: Optional[Tensor]
    keep: Optional[Tensor]


class OneByOne(Sequence[Tensor]):
    """Rows of tables, taken when a block asks: without gradients only those of one block are there at a time."""

    def __init__(self, tables: Sequence[Tensor], rows: Tensor) -> None:
        self.tables, self.rows = tables, rows
        self.last: Tuple[Optional[Tensor], Optional[Tensor]] = None, None

    def __len__(self) -> int:
        return len(self.tables)

    def __getitem__(self, block: Any) -> Any:
        table = self.tables[block]
        if self.last[0] is not table:
            self.last = table, take_rows(table, self.rows)
        return self.last[1]
