"""timm's SwinTransformer and our Swin models, which keep its keys."""
from typing import Any, Dict, List

from torch import Tensor

from ...encodings._signature import read_signature
from .base import Layout, Weights

ROPE = '.attn.rope.'
TABLE = 'a table that is computed from the grid'
SWIN_TABLES = ('attn_mask', 'attn.relative_position_index')
MERGING = 'layers.0.downsample.reduction.weight'


class TimmSwin(Layout):
    """timm's SwinTransformer, with or without its relative position bias, and the original's files; never rotary."""
    name = 'timm SwinTransformer'
    marks = ('patch_embed.proj.weight', 'layers.0.blocks.0.norm1.weight', 'layers.0.blocks.0.attn.qkv.weight')

    def differences(self, tensors: Dict[str, Tensor]) -> List[str]:
        # NAVER's Swin and Swin V2
        foreign = [
            key for key in tensors if '.attn.rope' in key or key == 'layers.0.blocks.0.attn.logit_scale']
        return super().differences(tensors) + [f'unexpected {key}' for key in foreign]

    def convert(self, tensors: Dict[str, Tensor], extra: Dict[str, Any]) -> Weights:
        left_out = {key: TABLE for key in tensors if key.endswith(SWIN_TABLES)}
        out = {key: value for key, value in tensors.items() if key not in left_out}
        return Weights(
            self.name, from_original_swin(out) if MERGING in out else out, encoding='none', left_out=left_out)


class OurSwin(Layout):
    """Swin models of this package: the keys of timm's SwinTransformer and `attn.rope.*` in every block."""
    name = 'timm_rope Swin'
    marks = (*TimmSwin.marks, 'layers.0.blocks.0.attn.rope.signature')

    def convert(self, tensors: Dict[str, Tensor], extra: Dict[str, Any]) -> Weights:
        saved = read_signature(tensors[self.marks[-1]])
        return Weights(self.name, dict(tensors), encoding=saved.partition('(')[0] if saved else None)


def from_original_swin(tensors: Dict[str, Tensor]) -> Dict[str, Tensor]:
    """Keys of Microsoft's Swin -> timm's: patch merging ends a stage there and begins the next one here."""
    out = {}
    for key, value in tensors.items():
        parts = key.split('.')
        if parts[0] == 'layers' and parts[2] == 'downsample':
            parts[1] = str(int(parts[1]) + 1)
        elif parts[0] == 'head':
            parts.insert(1, 'fc')
        out['.'.join(parts)] = value
    return out
