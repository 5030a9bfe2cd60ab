"""timm's VisionTransformer (DeiT-III among its models) and our own models, which keep its keys."""
from typing import Any, Dict, List

from torch import Tensor

from ...encodings._signature import read_signature
from .base import Layout, Weights


class TimmVit(Layout):
    """timm's VisionTransformer: `blocks.0.ls1.gamma`, or no LayerScale at all; never rotary."""
    name = 'timm VisionTransformer'
    marks = ('patch_embed.proj.weight', 'blocks.0.norm1.weight', 'blocks.0.attn.qkv.weight')

    def differences(self, tensors: Dict[str, Tensor]) -> List[str]:
        foreign = [key for key in tensors if key in ('blocks.0.gamma_1', 'freqs') or key.startswith('rope.')]
        # rotary models of timm that leave no trace of it (PE) have no last norm
        normed = any(key in tensors for key in ('norm.weight', 'fc_norm.weight'))
        return super().differences(tensors) + [f'unexpected {key}' for key in foreign] + (
            [] if normed else ['missing norm.weight'])

    def convert(self, tensors: Dict[str, Tensor], extra: Dict[str, Any]) -> Weights:
        return Weights(self.name, dict(tensors), encoding='none')


class Ours(Layout):
    """Models of this package: the keys of timm's VisionTransformer and `rope.*`."""
    name = 'timm_rope'
    # without its signature an encoding of fixed frequencies is any other one
    marks = (*TimmVit.marks, 'rope.signature')

    def differences(self, tensors: Dict[str, Tensor]) -> List[str]:
        foreign = ['unexpected blocks.0.gamma_1'] if 'blocks.0.gamma_1' in tensors else []
        return super().differences(tensors) + foreign

    def convert(self, tensors: Dict[str, Tensor], extra: Dict[str, Any]) -> Weights:
        saved = read_signature(tensors.get('rope.signature'))
        return Weights(self.name, dict(tensors), encoding=saved.partition('(')[0] if saved else None)
