"""timm's SwinTransformer and our Swin models, which keep its keys."""
from typing import Any, Dict, List

from torch import Tensor

from ..signature import read_signature
from .base import Layout, Weights

ROPE = '.attn.rope.'


class TimmSwin(Layout):
    """timm's SwinTransformer, with or without its relative position bias; never rotary."""
    name = 'timm SwinTransformer'
    marks = ('patch_embed.proj.weight', 'layers.0.blocks.0.norm1.weight', 'layers.0.blocks.0.attn.qkv.weight')

    def differences(self, tensors: Dict[str, Tensor]) -> List[str]:
        # NAVER's Swin, Swin V2, and files of Microsoft's code, where the first stage ends with a patch merging
        foreign = [key for key in tensors if '.attn.rope' in key or key in (
            'layers.0.blocks.0.attn.logit_scale', 'layers.0.downsample.reduction.weight')]
        return super().differences(tensors) + [f'unexpected {key}' for key in foreign]

    def convert(self, tensors: Dict[str, Tensor], extra: Dict[str, Any]) -> Weights:
        return Weights(self.name, dict(tensors), encoding='none')


class OurSwin(Layout):
    """Swin models of this package: the keys of timm's SwinTransformer and `attn.rope.*` in every block."""
    name = 'timm_rope Swin'
    marks = (*TimmSwin.marks, 'layers.0.blocks.0.attn.rope.signature')

    def convert(self, tensors: Dict[str, Tensor], extra: Dict[str, Any]) -> Weights:
        saved = read_signature(tensors[self.marks[-1]])
        return Weights(self.name, dict(tensors), encoding=saved.partition('(')[0] if saved else None)
