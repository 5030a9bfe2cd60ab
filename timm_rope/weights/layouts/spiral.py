"""Training checkpoints of Spiral RoPE (github.com/huajianduzhuo-code/Spiral_RoPE), classification models."""
import math
import re
from typing import Any, Dict

import torch
from torch import Tensor

from .base import Layout, Weights, rename, series_of, signature
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

        freqs = buffers[f'blocks.0{BUFFER}']
        if any(not torch.equal(freqs, other) for other in buffers.values()):
            raise RuntimeError(f'{self.name}: the blocks have different frequencies, which no model here computes.')
        args = extra.get('args')
        args = args if isinstance(args, dict) else getattr(args, '__dict__', {})
        scale, temperature = series_of(freqs)
        if args.get('same_theta') or args.get('truncate_percentage'):
            raise RuntimeError(
                f'{self.name}: frequencies with same_theta={args.get("same_theta")}, truncate_percentage='
                f'{args.get("truncate_percentage")} are no geometric series: not supported.')
        if re.search(r'_rms\d+h', str(args.get('model', ''))):
            raise RuntimeError(f'{self.name}: {args["model"]} normalises per head, which no model here does.')

        options: Dict[str, Any] = dict(temperature=temperature, scale=scale, clamp=True)
        side = math.isqrt(tensors['pos_embed'].shape[1])
        patch = tensors['patch_embed.proj.weight'].shape[-1]
        weights = Weights(
            self.name, out, encoding='spiral',
            model_args=dict(
                num_heads=tensors['patch_embed.proj.weight'].shape[0] // (4 * len(freqs)), norm_layer='spiral_rms',
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
