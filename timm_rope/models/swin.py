"""Swin Transformer with any rotary encoding inside its windows, the second model of arXiv 2403.13298.

timm's SwinTransformer whose window attention is replaced. Every block has an encoding of its own, since the number of
heads changes from stage to stage; it lies inside the attention, so that pruning, layer-wise lr decay, sharding and
checkpointing of blocks take it along.
"""
from functools import partial
from typing import Any, Callable, Dict, List, Optional, Sequence, Set, Tuple, Union

import torch

from .._checks import check_choice, check_flags, check_integer, check_size
from .._timm import SwinTransformer, resolve_stage_window_sizes, window_sizes_from_ratio
from ..encodings import RotaryEncoding, create_rope
from ..weights import fit_swin
from ..weights.fit_swin import checkpoint_filter_fn as checkpoint_filter_fn  # timm expects it beside the class
from ..weights.load_hooks import Checkpointed
from .patch_embed import WindowPatchEmbed, new_sizes, to_image_size
from .rotary import RotaryModel, take_options
from .window_attention import AnySizeWindowBlock, NaverWindowBlock, RopeWindowAttention

WINDOW = 7
WEIGHT_INITS = ('', 'jax', 'jax_nlhb', 'moco', 'reset', 'skip')
# NAVER's Swin starts from other frequencies than its ViT; those of other encodings are the same in both
DEFAULTS: Dict[str, Dict[str, Any]] = {'axial': dict(temperature=50.), 'axial_learned': dict(temperature=50.)}

Size = Union[int, Tuple[int, int]]


class RopeSwinTransformer(RotaryModel, Checkpointed, SwinTransformer):
    """timm's SwinTransformer with a rotary position encoding inside its windows.

    Coordinates are those in the window, after shift and partition: x is the column, y the row, both from 0. The
    encodings are at `layers[i].blocks[j].attn.rope`; `rope` is the first of them.

    A larger window extrapolates: index coordinates run on to higher numbers, normalised ones reach beyond the window
    of training, their reference grid, with the step between two patches unchanged. A larger image in windows of the
    old size changes no coordinate; each window then sees less of the image.

    Args:
        img_size: Image size.
        patch_size: Patch size.
        embed_dim: Width of the first stage; it doubles from stage to stage.
        depths: Blocks of each stage.
        num_heads: Attention heads of each stage.
        head_dim: Channels per head, one number or one for each stage; None for width / heads.
        window_size: Window in patches: one size or (rows, columns) for all stages, or one of these for each stage;
            cut to the image where it is smaller. None is 7, unless `window_ratio` is given.
        window_ratio: Window as a part of the grid of patches: 8 is the paper's protocol, a window of `img_size` / 32
            pixels. One number or one for each stage. `window_size` goes first.
        window_rule: Which windows are shifted on images that are not square: 'timm' decides for each axis apart,
            'naver' shifts nothing where the shorter side fits in a window. See `NaverWindowBlock`.
        rope_encoding: Name of a rotary encoding (`timm_rope.list_ropes()`), or 'none'.
        rel_pos_bias: Keep Swin's relative position bias beside the rotation.
        strict_img_size: Take only images of `img_size`. If not, as by default, images of any multiple of the patch
            are taken, with the windows and shifts of `img_size`, padded to whole windows as in timm's Swin.
        dynamic_img_size: False is the same as `strict_img_size=True`.
        dynamic_img_pad: Pad images to a multiple of the patch, at the right and the bottom; takes images of any size.
        weight_init: timm's schemes.
        device: Device of all tensors.
        dtype: Dtype of all tensors but the encodings', which stay float32 or float64.
        **kwargs: Options of the encoding with the prefix `rope_`, and all other arguments of timm's SwinTransformer.
            `rope_scaling` and `rope_log_n` say what happens in larger windows; an augmentation by `rope_shift`,
            `rope_jitter` and `rope_rescale` draws anew in every block, since each has an encoding of its own.
            `rope_temperature` is 50 by default for 'axial' and 'axial_learned'; `rope_reference_grid` is (rows,
            columns) of a window, by default the window of each block.

    Raises:
        ValueError: A size or option that cannot work; names the argument and what would be right.
        TypeError: An argument that neither timm nor any encoding knows.
    """
    _fitting = fit_swin
    __jit_unused_properties__ = [*Checkpointed.__jit_unused_properties__, 'rope']

    def __init__(
            self,
            img_size: Size = 224,
            patch_size: Size = 4,
            embed_dim: int = 96,
            depths: Sequence[int] = (2, 2, 6, 2),
            num_heads: Sequence[int] = (3, 6, 12, 24),
            head_dim: Optional[Union[int, Sequence[int]]] = None,
            window_size: Optional[Any] = None,
            window_ratio: Optional[Union[int, Sequence[int]]] = None,
            window_rule: str = 'timm',
            rope_encoding: str = 'axial',
            rel_pos_bias: bool = False,
            strict_img_size: bool = False,
            dynamic_img_size: bool = True,
            dynamic_img_pad: bool = False,
            weight_init: str = '',
            device=None,
            dtype=None,
            **kwargs: Any,
    ) -> None:
        check_choice(window_rule, ('timm', 'naver'), 'window_rule')
        check_flags(rel_pos_bias=rel_pos_bias, strict_img_size=strict_img_size)
        check_choice(weight_init, WEIGHT_INITS, 'weight_init')
        depths, num_heads = _per_stage(depths, 'depths'), _per_stage(num_heads, 'num_heads')
        head_dims = _head_dims(check_integer(embed_dim, 'embed_dim'), num_heads, head_dim)
        for name, values in (('num_heads', num_heads), ('head_dim', head_dims)):
            if len(values) != len(depths):
                raise ValueError(f'depths and {name} must be as many, got {depths} and {values}.')
        patch = check_size(patch_size, 'patch_size')
        img_size = to_image_size(img_size, patch, dynamic_img_pad)
        grid = img_size[0] // patch[0], img_size[1] // patch[1]
        try:
            windows = _windows(window_size, window_ratio, grid, len(depths))
        except AssertionError as error:  # set_input_size() leaves timm's own errors as they are
            raise ValueError(f'window_size or window_ratio: {error}') from None
        make_rope = _rope_maker(rope_encoding, take_options(rope_encoding, kwargs))
        for channels, heads in zip(head_dims, num_heads):  # refuses what does not fit before anything is built
            make_rope(channels, heads, (WINDOW, WINDOW), 'meta', dtype)

        kwargs.setdefault('embed_layer', partial(WindowPatchEmbed, dynamic_img_pad=dynamic_img_pad))
        super().__init__(
            img_size=img_size, patch_size=patch_size, embed_dim=embed_dim, depths=depths,  # type: ignore[arg-type]
            num_heads=num_heads, head_dim=head_dims, window_size=windows,  # type: ignore[arg-type]
            strict_img_size=(strict_img_size or not dynamic_img_size) and not dynamic_img_pad,
            weight_init='skip', device=device, dtype=dtype, **kwargs)

        self.rel_pos_bias = rel_pos_bias
        # timm names the classes of block and attention in the middle of its constructors and takes no other ones, so
        # they are changed here: these blocks differ in methods and no state, so their class is enough
        for layer, window, heads, channels in zip(self._stages(), windows, num_heads, head_dims):
            for block in layer.blocks:
                block.__class__ = NaverWindowBlock if window_rule == 'naver' else AnySizeWindowBlock
                with torch.device('cpu'):  # where timm interpolates a bias, whatever the default is
                    block.set_input_size(block.input_resolution, window)
                rope = make_rope(channels, heads, block.window_size, device, dtype)
                block.attn = RopeWindowAttention.of(block.attn, rope, rel_pos_bias)
        self.weight_init_mode = 'reset' if weight_init == 'skip' else weight_init  # type: ignore[assignment]
        if weight_init != 'skip':
            self.init_weights(needs_reset=False)

    @property
    def rope(self) -> Optional[RotaryEncoding]:
        """Encoding of the first block, None without one; those of all blocks have its name and options."""
        return self._stages()[0].blocks[0].attn.rope

    def _stages(self) -> Any:
        return self.layers  # Any, since mypy takes attributes of a child for tensors

    @torch.jit.ignore
    def no_weight_decay(self) -> Set[str]:
        """Names of parameters without weight decay: learned frequencies and relative position biases."""
        names = {name for name, _ in self.named_parameters() if name.endswith('.rope.freqs')}
        return SwinTransformer.no_weight_decay(self) | names  # super() refuses a scripted model

    def set_input_size(
            self,
            img_size: Optional[Size] = None,
            patch_size: Optional[Size] = None,
            window_size: Optional[Any] = None,
            window_ratio: Optional[Union[int, Sequence[int]]] = None,
            always_partition: Optional[bool] = None,
            rope_scaling: Optional[str] = None,
    ) -> None:
        """Change image size, patch size or window. The reference grid stays: it belongs to the weights.

        Args:
            img_size: New image size; None keeps the current one.
            patch_size: New patch size, to which the patch embedding is resampled; None keeps the current one.
            window_size: New window, as in the constructor; the current one keeps it. Goes before `window_ratio`.
            window_ratio: New window as a part of the grid of patches. Without either, windows grow with the grid,
                which is the paper's protocol: 7 at 224 becomes 12 at 384.
            always_partition: Shift also where the image fits in a window; None keeps the current choice.
            rope_scaling: New rule for windows larger than the reference grid; None keeps the current one.
        """
        self._check_rope_scaling(rope_scaling)
        size, patch = new_sizes(self.patch_embed, img_size, patch_size)
        _windows(window_size, window_ratio, (size[0] // patch[0], size[1] // patch[1]), len(self._stages()))
        super().set_input_size(
            size if img_size is not None or patch_size is not None else None, None if patch_size is None else patch,
            window_size, window_ratio, always_partition)
        if rope_scaling is not None:
            self.set_rope_scaling(rope_scaling)

    @torch.jit.ignore
    def _encodings(self) -> List[Optional[RotaryEncoding]]:
        return [block.attn.rope for layer in self._stages() for block in layer.blocks]


def _per_stage(value: Any, name: str) -> Tuple[int, ...]:
    if not isinstance(value, (tuple, list)) or not value:
        raise ValueError(f'{name} must be a list with one integer for each stage, got {value!r}.')
    return tuple(check_integer(each, name) for each in value)


def _head_dims(width: int, num_heads: Tuple[int, ...], head_dim: Any) -> Tuple[int, ...]:
    """Channels per head of each stage."""
    if isinstance(head_dim, (tuple, list)):
        return _per_stage(head_dim, 'head_dim')
    if head_dim is not None:
        return (check_integer(head_dim, 'head_dim'),) * len(num_heads)
    widths = [width * 2 ** stage for stage in range(len(num_heads))]
    for stage, (channels, heads) in enumerate(zip(widths, num_heads)):
        if channels % heads:
            raise ValueError(
                f'num_heads of stage {stage} must divide its width {channels}, got {heads}; or give head_dim.')
    return tuple(channels // heads for channels, heads in zip(widths, num_heads))


def _windows(window_size: Any, window_ratio: Any, grid: Tuple[int, int], stages: int) -> Tuple[Tuple[int, int], ...]:
    """Window of each stage as a model is asked for it, before it is cut to the image.

    Raises:
        ValueError: Something is no integer.
        AssertionError: What timm refuses.
    """
    try:
        if window_size is None and window_ratio is not None:
            windows = window_sizes_from_ratio(grid, window_ratio, stages)
        else:
            windows = resolve_stage_window_sizes(WINDOW if window_size is None else window_size, stages)
    except TypeError as error:
        raise ValueError(f'window_size or window_ratio: {error}') from None
    return tuple(check_size(window, 'window_size') for window in windows)


def _rope_maker(encoding: str, options: Dict[str, Any]) -> Callable[..., Optional[RotaryEncoding]]:
    """What makes the encoding of one block of head_dim, heads, window, device and dtype; None without an encoding."""
    if encoding == 'none':
        return lambda *args: None
    if 'rope_share_layers' in options:
        raise ValueError(
            'rope_share_layers is not for Swin: its stages differ in heads, so every block has frequencies of its own.')
    options = {**{f'rope_{k}': v for k, v in DEFAULTS.get(encoding, {}).items()}, **options}
    reference_grid = options.pop('rope_reference_grid', None)

    def make(head_dim: int, num_heads: int, window: Tuple[int, int], device: Any, dtype: Any) -> RotaryEncoding:
        grid = window if reference_grid is None else reference_grid
        return create_rope(encoding, head_dim, num_heads, 1, grid, device, dtype, **options)

    return make
