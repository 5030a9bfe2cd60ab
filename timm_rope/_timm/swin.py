"""timm's Swin Transformer, its window attention and the filter of its checkpoints, as in the newest release."""
import inspect
from typing import Any, Dict, Optional, Sequence, Tuple

from timm.layers import resize_rel_pos_bias_table, to_2tuple, to_ntuple, trunc_normal_
from timm.models import swin_transformer
from torch import nn

from ._common import Initialised, on_device, takes

SwinTransformer: Any = swin_transformer.SwinTransformer
WindowAttention: Any = swin_transformer.WindowAttention


# -- 1.0.31: one window for each stage, and how windows follow the image

def _window_sizes(window_size: Any, num_stages: int) -> Tuple[Tuple[int, int], ...]:
    """(rows, columns) of each stage; two integers are one window, as one integer is."""
    per_stage = isinstance(window_size, (tuple, list)) and not (
        len(window_size) == 2 and not isinstance(window_size[0], (tuple, list)))
    windows = tuple(map(to_2tuple, window_size if per_stage else [window_size] * num_stages))
    assert len(windows) == num_stages, f'there are {num_stages} stages, but {len(windows)} windows: {window_size}.'
    assert min(min(window) for window in windows) > 0, f'windows must be positive, got {window_size}.'
    return windows


def _window_ratios(grid: Tuple[int, int], window_ratio: Any, num_stages: int) -> Tuple[Tuple[int, int], ...]:
    """(rows, columns) of each stage: the grid of patches through a ratio, at least 1."""
    ratios = to_ntuple(num_stages)(window_ratio)
    assert len(ratios) == num_stages, f'there are {num_stages} stages, but {len(ratios)} ratios: {window_ratio}.'
    assert min(ratios) > 0, f'ratios must be positive, got {window_ratio}.'
    return tuple((max(1, grid[0] // ratio), max(1, grid[1] // ratio)) for ratio in ratios)


resolve_stage_window_sizes = getattr(swin_transformer, 'resolve_stage_window_sizes', _window_sizes)
window_sizes_from_ratio = getattr(swin_transformer, 'window_sizes_from_ratio', _window_ratios)


class _WindowAttentionResized(WindowAttention):
    """A bias is resized from the window it has: before, timm took every window for a square one."""

    def set_window_size(self, window_size: Tuple[int, int]) -> None:
        old: Tuple[int, int] = getattr(self, 'window_size')  # noqa: B009 (mypy does not see timm's)
        window = rows, columns = to_2tuple(window_size)
        if window == old:
            return
        self.window_size, self.window_area = window, rows * columns
        table: Any = getattr(self, 'relative_position_bias_table')  # noqa: B009
        shape = (self.num_heads, 2 * rows - 1, 2 * columns - 1)
        if table.is_meta:
            resized = table.new_empty(shape[1] * shape[2], self.num_heads)
        else:
            # one picture for each head, whose sides timm can see
            pictures = table.detach().t().reshape(self.num_heads, 2 * old[0] - 1, 2 * old[1] - 1)
            resized = resize_rel_pos_bias_table(pictures.float().cpu(), window, shape)
            resized = resized.reshape(self.num_heads, -1).t().contiguous().to(table)
        self.relative_position_bias_table = nn.Parameter(resized, requires_grad=table.requires_grad)
        index = swin_transformer.get_relative_position_index(rows, columns).to(table.device)
        self.register_buffer('relative_position_index', index, persistent=False)


def _filter_swin(state_dict: Dict[str, Any], model: Any) -> Dict[str, Any]:
    """timm's filter, which before could not read biases of other windows than squares, nor weights without a head."""
    kept = {
        key: value for key, value in state_dict.items() if key.endswith('relative_position_bias_table')
        and value.shape == model.get_parameter(key).shape}
    rest = {key: value for key, value in state_dict.items() if key not in kept}
    headless = 'head.fc.weight' not in rest and 'layers.0.downsample.reduction.weight' not in rest
    rest = swin_transformer.checkpoint_filter_fn({**rest, **({'head.fc.weight': None} if headless else {})}, model)
    return {**{key: value for key, value in rest.items() if value is not None}, **kept}


class _SwinOfStages(SwinTransformer):
    """Before 1.0.31: `dynamic_img_size` is unknown, and `set_input_size` gives all stages one window, 1/8 of the grid.

    There windows keep their share of the grid unless a window or ratio is given, as in 1.0.31. Grids are rounded up
    where they are halved: the patches of an odd grid are padded, so that is what a stage really has.
    """

    def __init__(
            self, *args: Any, window_size: Sequence[Tuple[int, int]], strict_img_size: bool = True,
            dynamic_img_size: bool = False, **kwargs: Any) -> None:
        unknown = set(kwargs) - set(inspect.signature(swin_transformer.SwinTransformer.__init__).parameters)
        if unknown:
            raise TypeError(f'SwinTransformer got unexpected arguments: {", ".join(sorted(unknown))}.')
        strict_img_size = strict_img_size and not dynamic_img_size
        # an iterator, since a list of two is taken for rows and columns, also in a Swin of two stages
        super().__init__(*args, window_size=iter(window_size), strict_img_size=strict_img_size, **kwargs)
        self.dynamic_img_size, self.in_chans = not strict_img_size, kwargs.get('in_chans', 3)
        self._windows, self._windows_grid = tuple(window_size), tuple(self.patch_embed.grid_size)
        for stage in self.layers:
            for block in stage.blocks:
                block.attn.__class__ = _WindowAttentionResized
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
        kept = {} if always_partition is None else dict(always_partition=always_partition)
        setattr(self, '_model_args', {**getattr(self, '_model_args', {}), 'window_size': windows, **kept})  # noqa: B010

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


swin_filter_fn = swin_transformer.checkpoint_filter_fn
if not takes(SwinTransformer.__init__, 'dynamic_img_size'):
    SwinTransformer, WindowAttention = _SwinOfStages, _WindowAttentionResized
    swin_filter_fn = _filter_swin


# -- 1.0.23: `init_weights` at any time

class _InitialisedSwin(Initialised, SwinTransformer):
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


if not takes(SwinTransformer.init_weights, 'needs_reset'):
    SwinTransformer = _InitialisedSwin
if not hasattr(WindowAttention, 'reset_parameters'):
    WindowAttention = _WindowAttentionReset

SwinTransformer, WindowAttention = on_device(SwinTransformer), on_device(WindowAttention)
