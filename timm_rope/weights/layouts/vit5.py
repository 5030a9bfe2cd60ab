"""ViT-5 (github.com/wangf3014/ViT-5, arXiv 2602.08071): axial with registers, RMSNorm, normed queries and keys."""
import math
from typing import Any, Dict

import torch
from torch import Tensor

from .base import Layout, Weights, interleaved, reorder_heads, series_of, signature
from .naver import layer_scale

BUFFERS = ('.attn.rope.freqs', '.attn.rope_reg.freqs')


class ViT5(Layout):
    """Patches by row and column number, the row in the first half of the pairs; registers on a square of their own.

    Its code has registers behind the patches, here they are in front of them: attention and the class token see no
    difference.
    """
    name = 'ViT-5'
    marks = ('patch_embed.proj.weight', 'reg_token', 'blocks.0.gamma_1', 'blocks.0.attn.q_norm.weight',
             *(f'blocks.0{buffer}' for buffer in BUFFERS))
    prefer_average = False  # its train.py reports the accuracy of the raw weights

    def convert(self, tensors: Dict[str, Tensor], extra: Dict[str, Any]) -> Weights:
        buffers = {key: value for key, value in tensors.items() if key.endswith(BUFFERS)}
        head_dim, registers = len(tensors['blocks.0.attn.q_norm.weight']), tensors['reg_token'].shape[1]
        options: Dict[str, Any] = dict(registers=registers)
        for option, buffer in zip(('temperature', 'register_temperature'), BUFFERS):
            freqs = [value for key, value in buffers.items() if key.endswith(buffer)]
            scale, options[option] = series_of(freqs[0])
            if scale != 1 or any(not torch.equal(freqs[0], other) for other in freqs):
                raise RuntimeError(f'{self.name}: frequencies that no model here computes, {freqs[0].tolist()}.')
        out = layer_scale({key: value for key, value in tensors.items() if key not in buffers})
        out = reorder_heads(out, interleaved(head_dim, half=False, y_first=True))
        args = dict(
            num_heads=tensors['patch_embed.proj.weight'].shape[0] // head_dim, norm_layer='rmsnorm', qk_norm=True,
            qkv_bias='blocks.0.attn.qkv.bias' in tensors, reg_tokens=registers, pos_embed='none')
        if 'pos_embed' in tensors:
            side, patch = math.isqrt(tensors['pos_embed'].shape[1]), tensors['patch_embed.proj.weight'].shape[-1]
            args.update(pos_embed='learn', img_size=side * patch)
            out['rope.reference_grid'] = torch.tensor([side, side], device='cpu')
        out['rope.signature'] = signature('axial', **options)
        return Weights(
            self.name, out, encoding='axial', model_args={**args, **{f'rope_{k}': v for k, v in options.items()}},
            left_out=dict.fromkeys(buffers, 'frequencies, which the encoding computes'))
