"""Patch embedding for images of any size."""
from typing import Any, Dict, Tuple

import torch
import torch.nn.functional as F
from timm.layers import PatchEmbed
from torch import Tensor

from .._checks import check_flag, check_size


class GridPatchEmbed(PatchEmbed):
    """timm's `PatchEmbed` whose size check is a ValueError.

    timm's own check formats the size into the message of every call, which makes torch.compile specialise on it and
    compile anew for each size.
    """

    graph_per_size: bool = False  # whether torch.compile makes a graph for each size instead of one for all
    __constants__ = ['graph_per_size']
    __jit_ignored_attributes__ = ['seen']

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        # number of patches -> grid (rows, columns) of an image that came, the last one last: for blocks run alone
        self.seen: Dict[int, Tuple[int, int]] = {}

    def forward(self, x: Tensor) -> Tensor:
        if not torch.jit.is_scripting():
            check_images(x)
        height, width = x.shape[-2], x.shape[-1]
        if self.graph_per_size and not torch.jit.is_scripting():
            specialize(height, width)
        patch_h, patch_w = self.patch_size[0], self.patch_size[1]
        if self.strict_img_size:
            check_exact_size(height, width, self.img_size[0], self.img_size[1])
        elif not self.dynamic_img_pad:
            check_multiple(height, width, patch_h, patch_w)
        if self.dynamic_img_pad:
            x = F.pad(x, [0, (patch_w - width % patch_w) % patch_w, 0, (patch_h - height % patch_h) % patch_h])
        x = self.proj(x)
        if not torch.jit.is_scripting():
            self._remember(x)
        if self.flatten:
            x = x.flatten(2).transpose(1, 2)
        else:
            x = x.permute(0, 2, 3, 1)  # NHWC is the only unflattened format a ViT asks for
        return self.norm(x)

    def set_input_size(self, *args: Any, **kwargs: Any) -> None:
        super().set_input_size(*args, **kwargs)
        self.seen.clear()

    @torch.jit.unused
    def _remember(self, x: Tensor) -> None:
        if isinstance(x, Tensor) and not (torch.compiler.is_compiling() or torch.jit.is_tracing()):
            rows, columns = x.shape[-2:]
            self.seen.pop(rows * columns, None)
            self.seen[rows * columns] = (rows, columns)


class WindowPatchEmbed(GridPatchEmbed):
    """For models that cut images into windows, see `specialize`."""
    graph_per_size = True


@torch.fx.wrap
@torch.jit.ignore
def specialize(height: int, width: int) -> str:
    """Have torch.compile make a graph for each size, which it does where a size is formatted into a string.

    Windows pad and cut an image in every block. With symbols for its size the expressions grow from stage to stage
    until the compiler seems to stand still.

    Raises:
        ValueError: A size is a symbol of torch.export.
    """
    if isinstance(height, torch.SymInt) or isinstance(width, torch.SymInt):
        raise ValueError(
            'Windows cannot be exported for a height and width that vary, got symbols in dynamic_shapes: export one '
            'size (the batch may vary), or use torch.onnx.export(..., dynamo=False, dynamic_axes=...).')
    return f'{height}x{width}'


def check_images(x: Any) -> None:
    if x is None or isinstance(x, (dict, list, tuple)):
        what = f'{type(x).__name__} of {", ".join(map(str, x))}' if isinstance(x, dict) else type(x).__name__
        patches = isinstance(x, dict) and 'patches' in x
        hint = ': a ViT that is created with use_naflex=True takes them' if patches else ''
        raise TypeError(f'The model takes images, one tensor (B, C, H, W), got {what}{hint}.')


@torch.fx.wrap
def check_exact_size(height: int, width: int, expected_height: int, expected_width: int) -> None:
    if height != expected_height or width != expected_width:
        raise ValueError(
            f'Image of {height}x{width} does not match the model, built with dynamic_img_size=False for '
            f'{expected_height}x{expected_width}: use that size, set_input_size() or dynamic_img_size=True.')


@torch.fx.wrap
def check_multiple(height: int, width: int, patch_height: int, patch_width: int) -> None:
    if height < 1 or width < 1 or height % patch_height != 0 or width % patch_width != 0:
        raise ValueError(
            f'Image of {height}x{width} must be a positive multiple of the patch {patch_height}x{patch_width}: '
            f'resize it, or create the model with dynamic_img_pad=True to have it padded.')


def to_image_size(img_size: Any, patch_size: Tuple[int, int], pad: bool) -> Tuple[int, int]:
    """Validate a nominal image size; with `pad` it is raised to the next multiple of the patch."""
    check_flag(pad, 'dynamic_img_pad')
    size = check_size(img_size, 'img_size')
    padded = (-(-size[0] // patch_size[0]) * patch_size[0], -(-size[1] // patch_size[1]) * patch_size[1])
    if size != padded and not pad:
        raise ValueError(
            f'img_size must be a multiple of the patch {patch_size[0]}x{patch_size[1]} (or set dynamic_img_pad=True), '
            f'got {size[0]}x{size[1]}.')
    return padded


def new_sizes(embed: Any, img_size: Any, patch_size: Any) -> Tuple[Tuple[int, int], Tuple[int, int]]:
    """Validate the arguments of `set_input_size`: image and patch size, where None keeps that of the embedding."""
    patch = check_size(embed.patch_size if patch_size is None else patch_size, 'patch_size')
    return to_image_size(embed.img_size if img_size is None else img_size, patch, bool(embed.dynamic_img_pad)), patch
