"""The stem of a ViT for patches that are cut already: what it makes of each as a part of an image."""
import functools
from typing import Any, Tuple

import torch
import torch.nn.functional as F
from timm.layers import PatchEmbed, PatchEmbedInterpolator
from torch import Tensor, nn

from .patch_embed import GridPatchEmbed


def embed_patches(embed: Any, patches: Tensor, colours: int, last: bool) -> Tensor:
    """Patches -> tokens (B, N, width).

    They are computed from the weights of the projection, on a CPU in half the time of a convolution of every patch. Of
    a stem that somebody looks at, or has put something into, each patch is an image.

    Args:
        embed: A `PatchEmbed`.
        patches: (B, N, P * P * C), or (B, N, P, P, C) of any size P.
        colours: C.
        last: Whether the colours come last in a patch, or first.

    Raises:
        ValueError: Patches of another shape, or of another size where the weights of the projection are not all that
            the stem computes from.
    """
    size, own, flat = tuple(embed.patch_size), tuple(embed.patch_size), patches.flatten(2)
    if patches.ndim == 5:
        size = (patches.shape[2], patches.shape[3]) if last else (patches.shape[3], patches.shape[4])
    shape = (*size, colours) if last else (colours, *size)
    if patches.ndim == 5 and patches.shape[4 if last else 2] != colours:
        raise ValueError(
            f'patches must be (batch, patches, {"height, width, colours" if last else "colours, height, width"}) with '
            f'patchify_channels_last={last}, got {tuple(patches.shape)} for {colours} colours.')
    if flat.shape[2] != size[0] * size[1] * colours:
        raise ValueError(
            f'patches must be (batch, patches, {" * ".join(map(str, shape))}), or of other sizes if they are not '
            f'flattened, got {tuple(patches.shape)}.')
    stem, proj = _is_stock(embed, GridPatchEmbed, PatchEmbed), embed.proj
    if stem and _is_stock(proj, nn.Conv2d):
        weight = proj.weight if size == own else _interpolator(own).resample_conv_weight(proj.weight, size)
        return embed.norm(F.linear(flat, (weight.permute(0, 2, 3, 1) if last else weight).flatten(1), proj.bias))
    if size != own:
        raise ValueError(
            f'patches of {size[0]} x {size[1]} pixels need the stem as it was built, of which the weights for '
            f'{own[0]} x {own[1]} are resampled: this one has hooks or another forward. Remove or merge what was put '
            f'into it, or give patches of {own[0]} x {own[1]}.')
    images = flat.reshape(-1, *shape)
    images = images.permute(0, 3, 1, 2) if last else images
    if stem:
        tokens = embed.norm(proj(images).flatten(1))
    else:
        seen = getattr(embed, 'seen', {}).copy()
        tokens = embed(images).flatten(1)
        if hasattr(embed, 'seen') and not torch.compiler.is_compiling():
            embed.seen = seen  # which grids images had
    return tokens.unflatten(0, patches.shape[:2])


@functools.cache
def _interpolator(patch_size: Tuple[int, int]) -> PatchEmbedInterpolator:
    # no child of the model, whose state dict would have its tables with older releases of timm
    return PatchEmbedInterpolator(patch_size)


def _is_stock(module: nn.Module, *classes: Any) -> bool:
    """Whether a module computes what its class does: nobody looks on, or has put another function in its place."""
    hooks = (module._forward_hooks or module._forward_pre_hooks or module._backward_hooks
             or module._backward_pre_hooks)
    # dynamo of torch 2.8 cannot follow `vars`; a parametrised module has a class of its own, with the same forward
    return not hooks and 'forward' not in module.__dict__ and any(
        type(module).forward is cls.forward for cls in classes)
