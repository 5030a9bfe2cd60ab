"""The `--check` of `convert`: are the logits of a converted model those of the model its checkpoint was made for?

In come recognised weights and our model of them. Where timm has an implementation of the original, it is built with the
tensors of the checkpoint as they are, and out comes the difference of the logits on random images.
"""
from dataclasses import dataclass
from functools import partial
from typing import Any, Dict, Optional, Tuple

import timm
import torch
import torch.nn.functional as F
from timm.models.eva import Eva
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from ...models.norms import get_norm
from ...weights.layouts import NaverVit, TimmEva, TimmVit, Weights


@dataclass
class Original:
    """A checkpoint in the model class of timm it can be compared with.

    Attributes:
        name: What it is, for people.
        independent: Whether the class shares no more with our model than timm's layers.
        tensors: In the keys of the class.
        args: Constructor arguments of the class.
        grid: Grid of the position embedding.
        prefix: Tokens in front of the position embedding.
        antialias: How the position embedding is resized.
    """
    name: str
    independent: bool
    cls: Any
    tensors: Dict[str, Tensor]
    args: Dict[str, Any]
    grid: Tuple[int, int]
    prefix: int
    antialias: bool

    @torch.inference_mode()
    def logits(self, x: Tensor) -> Tensor:
        """Logits of images (B, C, H, W), for which a model of their size is built."""
        size = (int(x.shape[-2]), int(x.shape[-1]))
        model = self.cls(**self.args, img_size=size).float().eval()
        tensors = dict(self.tensors)
        target = model.patch_embed.grid_size
        if 'pos_embed' in tensors and target != self.grid:
            tensors['pos_embed'] = _resized(
                tensors['pos_embed'], self.grid, target, self.prefix, self.antialias)
        model.load_state_dict(tensors)
        return model(x)


def find_original(weights: Weights, model: nn.Module) -> Optional[Original]:
    """The model class of timm for a checkpoint.

    Args:
        weights: What the checkpoint is.
        model: Our model of it, which tells what stands in no key.

    Returns:
        None where no implementation but ours is at hand.
    """
    ours: Any = model
    if weights.timm_model is None and weights.layout not in (NaverVit.name, TimmEva.name, TimmVit.name):
        return None
    out = {key: value.float() for key, value in weights.originals.items() if key not in weights.left_out}
    common = (tuple(ours.patch_embed.grid_size), 0 if ours.no_embed_class else ours.num_prefix_tokens,
              ours.pos_embed_antialias)
    args: Dict[str, Any] = dict(
        patch_size=ours.patch_embed.patch_size, in_chans=ours.patch_embed.proj.in_channels,
        num_classes=ours.num_classes)
    if weights.timm_model is not None:
        name, given = weights.timm_model
        args = {**{key: value for key, value in given.items() if key != 'img_size'}, **args}
        return Original(f"timm's {name}", True, partial(timm.create_model, name), out, args, *common)
    block, known = ours.blocks[0], ours._model_args
    args.update(
        embed_dim=ours.embed_dim, depth=len(ours.blocks), num_heads=block.attn.num_heads,
        mlp_ratio=block.mlp.fc1.out_features / ours.embed_dim, qkv_bias=block.attn.qkv.bias is not None,
        class_token=ours.cls_token is not None, no_embed_class=ours.no_embed_class, global_pool=ours.global_pool)
    for key in ('pos_embed_grid', *(['pos_embed'] if ours.pos_embed is None else [])):
        out.pop(key, None)
    if weights.layout in (NaverVit.name, TimmEva.name):
        encoding = 'none' if ours.rope is None else ours.rope.name
        if encoding not in ('axial', 'mixed', 'none'):
            return None
        if 'freqs' in out:
            out['rope.freqs'] = out.pop('freqs').reshape(2, args['depth'], args['num_heads'], -1)
        args.update(
            attn_type='rope', init_values=1e-4, use_abs_pos_emb=ours.pos_embed is not None,
            use_rot_pos_emb=encoding != 'none', rope_type='mixed' if encoding == 'mixed' else 'cat',
            rope_grid_indexing='xy', rope_temperature=10. if encoding == 'mixed' else 100.)
        return Original("timm's Eva", True, Eva, out, args, *common)
    args.update(
        qk_norm=known.get('qk_norm', False), pre_norm=known.get('pre_norm', False),
        reg_tokens=known.get('reg_tokens', 0), init_values=1e-4 if 'blocks.0.ls1.gamma' in out else None,
        pos_embed='none' if ours.pos_embed is None else 'learn', act_layer=known.get('act_layer'),
        norm_layer=get_norm(known.get('norm_layer'), known.get('norm_eps')))
    return Original("timm's VisionTransformer", False, VisionTransformer, out, args, *common)


def compare(original: Original, model: nn.Module, img_size: Tuple[int, int]) -> Dict[Tuple[int, int], float]:
    """Difference of the logits on random images, at the training size and at one that is no square.

    Args:
        original: The checkpoint in its own model.
        model: Ours, in eval mode, on the CPU, float32.
        img_size: (height, width) of training.

    Returns:
        Image size -> largest difference over the largest logit.
    """
    patch = original.args['patch_size']
    other = (img_size[0] + 2 * patch[0], img_size[1] + patch[1])
    other = other if other[0] != other[1] else (other[0] + patch[0], other[1])
    out = {}
    for size in (img_size, other):
        x = torch.randn(2, original.args['in_chans'], *size, generator=torch.Generator().manual_seed(0))
        expected = original.logits(x)
        with torch.inference_mode():
            difference = (model(x) - expected).abs().max()
        # a NaN on either side must not pass for agreement
        relative = float(difference / expected.abs().max()) if difference else 0.
        out[size] = float('inf') if relative != relative else relative
    return out


def _resized(
        pos_embed: Tensor, grid: Tuple[int, int], target: Tuple[int, int], prefix: int, antialias: bool) -> Tensor:
    """Bicubic; without antialias as RoPE-ViT resizes it, while timm's classes always antialias."""
    table = pos_embed[:, prefix:].transpose(1, 2).unflatten(2, grid)
    table = F.interpolate(table, target, mode='bicubic', align_corners=False, antialias=antialias)
    return torch.cat((pos_embed[:, :prefix], table.flatten(2).transpose(1, 2)), 1)
