"""Training checkpoints of Spiral RoPE (github.com/huajianduzhuo-code/Spiral_RoPE), classification models."""
import math
import re
from typing import Any, Dict

import torch
from torch import Tensor

from .base import Layout, Weights, rename, signature
from .naver import layer_scale

BUFFER = '.attn.rope.freqs'


class SpiralDeit(Layout):
    """DeiT-III with RMSNorm (`scale`), a position embedding on the patches, and Spiral RoPE with clamped coordinates.

    The number of directions stands in no tensor: it is read from the training arguments `args.rotate` (half of it).
    Scale and temperature are those of the stored frequencies.
    """
    name = 'Spiral RoPE'
    marks = ('patch_embed.proj.weight', 'pos_embed', 'blocks.0.norm1.scale', 'blocks.0.attn.qkv.weight',
             'blocks.0.attn.rope.freqs')

    def convert(self, tensors: Dict[str, Tensor], extra: Dict[str, Any]) -> Weights:
        buffers = {key: value for key, value in tensors.items() if key.endswith(BUFFER)}
        out = layer_scale(rename({k: v for k, v in tensors.items() if k not in buffers}, ('.scale', '.weight')))

        freqs = buffers[f'blocks.0{BUFFER}'].double()
        if any(not torch.equal(freqs, other.double()) for other in buffers.values()):
            raise RuntimeError(f'{self.name}: the blocks have different frequencies, which no model here computes.')
        scale, groups = float(freqs[0]), len(freqs)
        temperature = float((freqs[0] / freqs[-1]) ** (groups / max(groups - 1, 1)))
        expected = scale * temperature ** (-torch.arange(groups, dtype=freqs.dtype, device=freqs.device) / groups)
        args = extra.get('args')
        args = args if isinstance(args, dict) else getattr(args, '__dict__', {})
        if not torch.allclose(freqs, expected, rtol=1e-4) or args.get('same_theta') or args.get('truncate_percentage'):
            raise RuntimeError(
                f'{self.name}: frequencies {freqs.tolist()} are no geometric series (same_theta='
                f'{args.get("same_theta")}, truncate_percentage={args.get("truncate_percentage")}): not supported.')
        if re.search(r'_rms\d+h', str(args.get('model', ''))):
            raise RuntimeError(f'{self.name}: {args["model"]} normalises per head, which no model here does.')

        options: Dict[str, Any] = dict(temperature=float(f'{temperature:.4g}'), scale=float(f'{scale:.4g}'), clamp=True)
        side = math.isqrt(tensors['pos_embed'].shape[1])
        patch = tensors['patch_embed.proj.weight'].shape[-1]
        weights = Weights(
            self.name, out, encoding='spiral',
            model_args=dict(
                num_heads=tensors['patch_embed.proj.weight'].shape[0] // (4 * groups), norm_layer='spiral_rms',
                pos_embed='learn', img_size=side * patch,
                **{f'rope_{k}': v for k, v in options.items()}),
            left_out=dict.fromkeys(buffers, 'frequencies, which the encoding computes'))
        out['rope.reference_grid'] = torch.tensor([side, side], device='cpu')
        if 'rotate' not in args:
            weights.ask['rope_directions'] = (
                'the checkpoint holds no training arguments (`args.rotate`); the paper uses 16 directions')
            out['rope.signature'] = signature('spiral', ('directions',), **options)
        else:
            # their angle map is turned in `rotate` steps of less than 90 degrees, rows and columns alike
            if not isinstance(args['rotate'], int):
                raise RuntimeError(f'{self.name}: args.rotate must be an integer, got {args["rotate"]!r}.')
            options['directions'] = 2 * max(args['rotate'], 1)
            weights.model_args['rope_directions'] = options['directions']
            out['rope.signature'] = signature('spiral', **options)
        return weights
