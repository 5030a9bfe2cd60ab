"""What differs between the releases of timm that this package works with, 1.0.20 and later: the only place that knows.

Everything here is imported under the name it has in the newest timm, and is timm's own wherever timm has it. Older
releases get a small stand-in, made of what they have. Each entry says which release brought it and what it is for.
Features are asked for, not numbers: a checkout between two releases calls itself by the next one.

Not bridged, since it is timm's own behaviour and no part of our models: timm's `save_for_hf` notes the arguments of a
model from 1.0.31 on (before, give it `model_args`), and so does what Swin does after `prune_intermediate_layers`.
"""
import inspect
from contextlib import nullcontext
from typing import Any, Callable, Dict, List, Optional, Sequence, Tuple

import timm.layers
import timm.models
import torch
from timm.layers import Attention as Attention
from timm.layers import resample_abs_pos_embed as resample_abs_pos_embed
from timm.layers import resample_abs_pos_embed_nhwc, to_2tuple, to_ntuple, trunc_normal_
from timm.layers._fx import register_notrace_function
from timm.models import swin_transformer
from timm.models.vision_transformer import Block as Block
from timm.models.vision_transformer import LayerScale
from timm.models.vision_transformer import VisionTransformer as VisionTransformer
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

SwinTransformer: Any = swin_transformer.SwinTransformer
WindowAttention: Any = swin_transformer.WindowAttention

# Classes are replaced difference by difference, from the newest release to the oldest. Each stand-in is a subclass of
# timm's class, so that `isinstance` holds, and has no annotations, which would hide those of timm from TorchScript.


def _takes(function: Callable[..., Any], name: str) -> bool:
    return name in inspect.signature(function).parameters


# -- 1.0.31: one window for each stage, and how windows follow the image

def _window_sizes(window_size: Any, num_stages: int) -> Tuple[Tuple[int, int], ...]:
    """(rows, columns) of each stage; two integers are one window, as one integer is."""
    per_stage = isinstance(window_size, (tuple, list)) and not (
        len(window_size) == 2 and not isinstance(window_size[0], (tuple, list)))
    windows = tuple(map(to_2tuple, window_size if per_stage else [window_size] * num_stages))
    assert len(windows) == num_stages, f'there are {num_stages} stages, got {len(windows)} windows: {window_size}.'
    assert min(min(window) for window in windows) > 0, f'windows must be positive, got {window_size}.'
    return windows


def _window_ratios(grid: Tuple[int, int], window_ratio: Any, num_stages: int) -> Tuple[Tuple[int, int], ...]:
    """(rows, columns) of each stage: the grid of patches through a ratio, at least 1."""
    ratios = to_ntuple(num_stages)(window_ratio)
    assert len(ratios) == num_stages, f'there are {num_stages} stages, got {len(ratios)} ratios: {window_ratio}.'
    assert min(ratios) > 0, f'ratios must be positive, got {window_ratio}.'
    return tuple((max(1, grid[0] // ratio), max(1, grid[1] // ratio)) for ratio in ratios)


resolve_stage_window_sizes = getattr(swin_transformer, 'resolve_stage_window_sizes', _window_sizes)
window_sizes_from_ratio = getattr(swin_transformer, 'window_sizes_from_ratio', _window_ratios)


class _SwinOfStages(SwinTransformer):
    """Before 1.0.31: `dynamic_img_size` is unknown, and `set_input_size` gives all stages one window, 1/8 of the grid.

    There windows keep their share of the grid unless a window or ratio is given, as in 1.0.31. Grids are rounded up
    where they are halved: the patches of an odd grid are padded, so that is what a stage really has.
    """

    def __init__(
            self, *args: Any, window_size: Sequence[Tuple[int, int]], strict_img_size: bool = True,
            dynamic_img_size: bool = False, **kwargs: Any) -> None:
        strict_img_size = strict_img_size and not dynamic_img_size
        # an iterator, since a list of two is taken for rows and columns, also in a Swin of two stages
        super().__init__(*args, window_size=iter(window_size), strict_img_size=strict_img_size, **kwargs)
        self.dynamic_img_size = not strict_img_size
        self._windows, self._windows_grid = tuple(window_size), tuple(self.patch_embed.grid_size)
        self._set_stages(self._windows, None)

    def set_input_size(
            self, img_size: Any = None, patch_size: Any = None, window_size: Any = None, window_ratio: Any = None,
            always_partition: Optional[bool] = None) -> None:
        if img_size is not None or patch_size is not None:
            self.patch_embed.set_input_size(img_size=img_size, patch_size=patch_size)
        grid = tuple(self.patch_embed.grid_size)
        if window_size is not None:
            windows = resolve_stage_window_sizes(window_size, len(self.layers))
        elif window_ratio is not None:
            windows = window_sizes_from_ratio(grid, window_ratio, len(self.layers))
        else:
            (rows, columns), (old_rows, old_columns) = grid, self._windows_grid
            windows = tuple(
                (max(1, height * rows // old_rows), max(1, width * columns // old_columns))
                for height, width in self._windows)
        if window_size is not None or window_ratio is not None:
            self._windows, self._windows_grid = windows, grid
        self._set_stages(windows, always_partition)

    def _set_stages(self, windows: Sequence[Tuple[int, int]], always_partition: Optional[bool]) -> None:
        rows, columns = self.patch_embed.grid_size
        for index, (stage, window, info) in enumerate(zip(self.layers, windows, self.feature_info)):
            info['reduction'] = max(self.patch_embed.patch_size) * 2 ** index
            halved = 2 ** max(index - 1, 0)  # a stage halves its input itself, but for the first
            stage.set_input_size((-(-rows // halved), -(-columns // halved)), window, always_partition)
            out = 2 ** index
            stage.output_resolution = -(-rows // out), -(-columns // out)
        self._fresh_masks()

    def _fresh_masks(self) -> None:
        """Masks of shifted windows where the weights are; before 1.0.31 a new one is on the CPU."""
        for stage in self.layers:
            for block in stage.blocks:
                if block.attn_mask is not None:
                    weight = block.norm1.weight
                    block.attn_mask = block.get_attn_mask().to(weight.device, weight.dtype)


if not _takes(SwinTransformer.__init__, 'dynamic_img_size'):
    SwinTransformer = _SwinOfStages


def _model_input_args(model_name: str, args: Dict[str, Any], **model_kwargs: Any) -> Dict[str, Any]:
    """Arguments of `create_model` for a registered model, where `args` of a script ask for nothing."""
    return {'model_name': model_name, **{key: value for key, value in model_kwargs.items() if value is not None}}


# how scripts ask for an image size or channels
resolve_model_input_args = getattr(timm.models, 'resolve_model_input_args', _model_input_args)


def record_model_args(model: Any, args: Dict[str, Any]) -> None:
    """Note the arguments that a model is created with where `create_model` does not, for `save_for_hf` below."""
    if not hasattr(timm.models, 'get_model_args'):
        runtime = ('device', 'dtype', 'pretrained_cfg', 'pretrained_cfg_overlay', 'cache_dir')
        model._model_args = {key: value for key, value in args.items() if key not in runtime}


def save_for_hf(model: Any, folder: str, **kwargs: Any) -> None:
    """timm's `save_for_hf`, which writes into config.json by which arguments the model is built again."""
    if not hasattr(timm.models, 'get_model_args'):
        args = {key: value for key, value in model._model_args.items() if not key.endswith('_rate')}
        kwargs['model_args'] = args
    timm.models.save_for_hf(model, folder, **kwargs)


def keep_channels(model: Any, state_dict: Dict[str, Any]) -> None:
    """Leave a stem alone that has the channels of the model; before, timm took all weights for those of RGB images."""
    name = model.pretrained_cfg.get('first_conv')
    if not _takes(timm.models.adapt_input_conv, 'base_chans') and name is not None:
        if state_dict[f'{name}.weight'].shape == model.get_submodule(name).weight.shape:
            model.pretrained_cfg['first_conv'] = None  # what timm reads next; the caller restores it


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


if not _takes(Attention.__init__, 'gated'):
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
    def forward(self, x: Tensor, attn_mask: Optional[Tensor] = None, is_causal: bool = False) -> Tensor:
        return self.forward_head(self.forward_features(x, attn_mask, is_causal))


resolve_self_attn_mask = getattr(timm.layers, 'resolve_self_attn_mask', _self_attn_mask)
if resolve_self_attn_mask is _self_attn_mask:
    register_notrace_function(_self_attn_mask)  # a single node in traced graphs, as timm's own
if not _takes(VisionTransformer.forward, 'is_causal'):
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


class _Initialised:
    """In front of timm's class: `init_weights` as from 1.0.23 on. The constructor is told to skip it."""

    def init_weights(self, mode: str = '', needs_reset: bool = True) -> None:
        mode = mode or self.weight_init_mode  # type: ignore[attr-defined]
        if needs_reset:
            for module in self.modules():  # type: ignore[attr-defined]
                if module is not self and hasattr(module, 'reset_parameters'):
                    module.reset_parameters()
        if mode != 'reset':
            super().init_weights(mode)  # type: ignore[misc]


class _InitialisedVit(_Initialised, VisionTransformer):
    def __init__(self, *args: Any, fix_init: bool = False, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.fix_init = fix_init

    def init_weights(self, mode: str = '', needs_reset: bool = True) -> None:
        super().init_weights(mode, needs_reset)
        if self.fix_init:
            self.fix_init_weight()


class _InitialisedSwin(_Initialised, SwinTransformer):
    def init_weights(self, mode: str = '', needs_reset: bool = True) -> None:
        super().init_weights(mode, needs_reset)
        if needs_reset:
            self._fresh_masks()


class _WindowAttentionReset(WindowAttention):
    def reset_parameters(self) -> None:
        trunc_normal_(self.relative_position_bias_table, std=.02)
        self._init_buffers()

    def _init_buffers(self) -> None:
        self.relative_position_index.copy_(swin_transformer.get_relative_position_index(*self.window_size))


if not _takes(Block.__init__, 'attn_layer'):
    Block = _BlockOfAttention  # type: ignore[assignment, misc]
if not _takes(VisionTransformer.init_weights, 'needs_reset'):
    VisionTransformer, SwinTransformer = _InitialisedVit, _InitialisedSwin  # type: ignore[misc]
if not hasattr(WindowAttention, 'reset_parameters'):
    WindowAttention = _WindowAttentionReset


# -- 1.0.21: modules are built on a device and in a dtype

class _LinspaceOnCpu(TorchFunctionMode):
    """Lets timm read the rates of its stochastic depth while everything else is made on the meta device."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return func(*args, **{**(kwargs or {}), **(dict(device='cpu') if func is torch.linspace else {})})


def _on_device(cls: Any) -> Any:
    """The class with the arguments `device` and `dtype`."""
    class OnDevice(cls):
        def __init__(self, *args: Any, device: Any = None, dtype: Any = None, **kwargs: Any) -> None:
            with nullcontext() if device is None else torch.device(device), _LinspaceOnCpu():
                super().__init__(*args, **kwargs)
            self.to(dtype=dtype)

    return OnDevice


if not _takes(timm.layers.Attention.__init__, 'device'):
    Attention, Block, VisionTransformer, SwinTransformer, WindowAttention = map(  # type: ignore[misc]
        _on_device, (Attention, Block, VisionTransformer, SwinTransformer, WindowAttention))
