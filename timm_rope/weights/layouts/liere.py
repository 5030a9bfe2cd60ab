"""Lightning checkpoints of LieRE (github.com/StanfordMIMI/LieRE): LieRE, its RoPE-Mixed, its learned positions."""
import math
import re
from typing import Any, Dict

import torch
from torch import Tensor

from .base import Layout, Weights, signature

HEAD_DIM = 64  # the only one their attention takes
GENERATORS = 'position_encoder.generator_raw_params'
KEYS = (
    (r'transformer\.layers\.(\d+)\.0\.norm\.', r'blocks.\1.norm1.'),
    (r'transformer\.layers\.(\d+)\.0\.fn\.to_qkv\.', r'blocks.\1.attn.qkv.'),
    (r'transformer\.layers\.(\d+)\.0\.fn\.to_out\.0\.', r'blocks.\1.attn.proj.'),
    (r'transformer\.layers\.(\d+)\.1\.norm\.', r'blocks.\1.norm2.'),
    (r'transformer\.layers\.(\d+)\.1\.fn\.net\.0\.', r'blocks.\1.mlp.fc1.'),
    (r'transformer\.layers\.(\d+)\.1\.fn\.net\.3\.', r'blocks.\1.mlp.fc2.'),
    (r'to_patch_embedding\.1\.', 'patch_embed.proj.'),
    (r'mlp_head\.0\.', 'norm.'),
    (r'mlp_head\.1\.', 'head.'),
)


class LieREVit(Layout):
    """ViT with a linear patch embedding, no LayerScale, no bias in qkv, and LayerNorms of epsilon 1e-5.

    Their transformer overwrites the rotations of all layers with those of the layer at hand, which are then the first
    one's in every layer; the generators of the others never get a gradient. So weights with generators for every layer
    mean, as their code computes them, `rope_share_layers=True`; that choice is the user's to state.
    """
    name = 'LieRE'
    marks = ('to_patch_embedding.1.weight', 'cls_token', 'pos_embedding', 'transformer.layers.0.0.fn.to_qkv.weight',
             'transformer.layers.0.1.fn.net.0.weight', 'mlp_head.1.weight')

    def convert(self, tensors: Dict[str, Tensor], extra: Dict[str, Any]) -> Weights:
        out = {}
        for key, value in tensors.items():
            for pattern, ours in KEYS:
                key = re.sub(f'^{pattern}', ours, key)
            out[key] = value
        stem, pos_embed = out['patch_embed.proj.weight'], out.pop('pos_embedding')
        width, generators = stem.shape[0], out.pop(GENERATORS, None)
        patch = math.isqrt(stem.shape[1] // 3)
        if 3 * patch * patch != stem.shape[1] or (generators is not None and generators.shape[0] != 2):
            raise RuntimeError(
                f'{self.name}: only models of square RGB patches are supported, not of volumes or videos.')
        side = math.isqrt(pos_embed.shape[1] - 1)
        if side * side != pos_embed.shape[1] - 1 or width % HEAD_DIM:
            raise RuntimeError(
                f'{self.name}: expected a square grid and heads of {HEAD_DIM} channels, got a pos_embedding of '
                f'{tuple(pos_embed.shape)}.')
        # their patches are (row, column, channel), a convolution's are (channel, row, column)
        out['patch_embed.proj.weight'] = stem.reshape(width, patch, patch, 3).permute(0, 3, 1, 2)
        weights = Weights(self.name, out, model_args=dict(
            patch_size=patch, img_size=side * patch, num_heads=width // HEAD_DIM, qkv_bias=False, init_values=0,
            mlp_ratio=out['blocks.0.mlp.fc1.weight'].shape[0] / width, norm_eps=1e-5))
        if generators is None:
            if not pos_embed.any():
                raise RuntimeError(
                    f'{self.name}: neither generators nor a position embedding: its "visionllama" baseline, which is '
                    f'not supported.')
            out['pos_embed'] = pos_embed
            weights.encoding = 'none'
            weights.model_args.update(pos_embed='learn', no_embed_class=False)
            return weights
        if pos_embed.any():
            raise RuntimeError(
                f'{self.name}: generators and a pos_embedding that is not zero: whether it was added cannot be told.')
        weights.left_out['pos_embedding'] = 'zero, and not trained'
        self._rotation(generators, side, weights)
        return weights

    def _rotation(self, raw: Tensor, side: int, weights: Weights) -> None:
        """Generators (axes row and column, layers or 1, [heads *] blocks of a head, b, b), of which the strict upper
        triangle counts -> `rope.freqs`, x first."""
        block, heads = raw.shape[-1], weights.model_args['num_heads']
        per_head = HEAD_DIM // block
        if raw.shape[2] not in (per_head, per_head * heads):
            raise RuntimeError(
                f'{self.name}: {GENERATORS} of {tuple(raw.shape)} fits neither {per_head} blocks nor {heads} heads of '
                f'them.')
        upper = torch.triu_indices(block, block, 1, device=raw.device)
        weights.encoding = 'liere'
        weights.tensors['rope.freqs'] = raw.flip(0)[..., upper[0], upper[1]]
        weights.tensors['rope.signature'] = signature('liere', block=block, coords='ends')
        weights.tensors['rope.reference_grid'] = torch.tensor([side, side], device='cpu')
        weights.model_args.update(
            rope_block=block, rope_coords='ends', rope_share_heads=raw.shape[2] == per_head and heads > 1)
        if raw.shape[1] == 1:
            weights.model_args['rope_share_layers'] = True
        else:
            later = weights.tensors['rope.freqs'][:, 1:]
            weights.ask['rope_share_layers'] = (
                f'True uses the generators of the first layer in every layer, as the published code computes (by an '
                f'oversight), False those of each layer. Those of layers 1 to {raw.shape[1] - 1} range from '
                f'{later.min():.2f} to {later.max():.2f} with mean {later.mean():.2f} and standard deviation '
                f'{later.std():.2f}; untrained ones are uniform from 0 to 6.28, mean 3.14, deviation 1.81')
