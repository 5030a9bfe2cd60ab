"""NAVER's RoPE-ViT (github.com/naver-ai/rope-vit), its DeiT-III baseline, and the same weights in timm's Eva.

LayerScale is `gamma_1`, `gamma_2` here. Mixed frequencies are `freqs` (2, depth, heads * head_dim / 2) at NAVER and
`rope.freqs` (2, depth, heads, head_dim / 2) in timm. Axial weights leave no trace of their encoding.
"""
from typing import Any, Dict, List

import torch
from torch import Tensor

from .base import Layout, Weights, count_blocks, rename, signature

HEAD_DIM = 64  # of every published ViT
SWIN_TEMPERATURE = 50.  # of the axial Swin models; the axial ViTs have 100
TABLE = 'a table that is computed from the grid'


class NaverVit(Layout):
    """NAVER's ViT files: axial, mixed, with and without position embedding, and the baseline without rotation."""
    name = 'NAVER RoPE-ViT'
    marks = ('patch_embed.proj.weight', 'blocks.0.attn.qkv.weight', 'blocks.0.gamma_1', 'blocks.0.norm1.weight')
    prefer_average = False  # the accuracies they publish are those of the raw weights

    def differences(self, tensors: Dict[str, Tensor]) -> List[str]:
        # timm's Eva has models with the same keys and these, whose coordinates are others
        foreign = [key for key in tensors if key.startswith(('rope.', 'reg_token', 'fc_norm.'))]
        return super().differences(tensors) + [f'unexpected {key}' for key in foreign]

    def convert(self, tensors: Dict[str, Tensor], extra: Dict[str, Any]) -> Weights:
        left_out: Dict[str, str] = {key: TABLE for key in ('freqs_t_x', 'freqs_t_y') if key in tensors}
        out = layer_scale({key: value for key, value in tensors.items() if key not in left_out})
        weights = Weights(self.name, out, left_out=left_out)
        if len(left_out) == 2:  # column and row numbers of the tokens: the grid the weights were trained on
            grid = [1 + int(tensors[key].max()) for key in ('freqs_t_y', 'freqs_t_x')]
            out['rope.reference_grid'] = torch.tensor(grid)
        if 'freqs' in out:
            freqs, depth = out.pop('freqs'), count_blocks(tensors)
            width = tensors['patch_embed.proj.weight'].shape[0]
            if freqs.ndim != 3 or freqs.shape[:2] != (2, depth) or freqs.shape[2] * 2 != width or width % HEAD_DIM:
                raise RuntimeError(
                    f'freqs of a {self.name} checkpoint must be (2, {depth} blocks, {width // 2}) with heads of '
                    f'{HEAD_DIM} channels, got {tuple(freqs.shape)}.')
            out['rope.freqs'] = freqs.reshape(2, depth, width // HEAD_DIM, HEAD_DIM // 2)
            out['rope.signature'] = signature('mixed')
            weights.encoding = 'mixed'
        return weights


class TimmEva(Layout):
    """timm's Eva with learned (mixed) frequencies, as timm hosts NAVER's models."""
    name = 'timm Eva'
    marks = ('patch_embed.proj.weight', 'blocks.0.attn.qkv.weight', 'blocks.0.gamma_1', 'rope.freqs')

    def convert(self, tensors: Dict[str, Tensor], extra: Dict[str, Any]) -> Weights:
        left_out = {k: TABLE for k in tensors if k.startswith('rope.') and k != 'rope.freqs'}
        out = layer_scale({key: value for key, value in tensors.items() if key not in left_out})
        if tensors['rope.freqs'].ndim != 4:
            raise RuntimeError(
                f'rope.freqs of a {self.name} checkpoint must be (2, blocks, heads, pairs), got '
                f'{tuple(tensors["rope.freqs"].shape)}.')
        out['rope.signature'] = signature('mixed')
        return Weights(self.name, out, encoding='mixed', left_out=left_out)


class NaverSwin(Layout):
    """NAVER's Swin files, converted to the keys of timm's SwinTransformer and of our encodings.

    Patch merging stands at the end of a stage there and at the start of the next one in timm. Frequencies are
    `attn.rope_freqs` (2, heads, pairs) of each block. Axial models save theirs too but turn by a table of their own,
    which the saved ones need not agree with.
    """
    name = 'NAVER RoPE-Swin'
    marks = ('patch_embed.proj.weight', 'layers.0.blocks.0.attn.qkv.weight', 'layers.0.blocks.0.attn.rope_freqs')
    prefer_average = False

    def convert(self, tensors: Dict[str, Tensor], extra: Dict[str, Any]) -> Weights:
        tables = ('attn_mask', 'attn.relative_position_index', 'attn.rope_t_x', 'attn.rope_t_y')
        weights = Weights(self.name, {}, left_out={key: TABLE for key in tensors if key.endswith(tables)})
        # an axial table is the x half of the channels, then the y half: nothing on the other axis
        freqs = tensors[self.marks[2]]
        half = freqs.shape[-1] // 2
        axial = bool(freqs[0, :, half:].abs().max() < 1e-5 and freqs[1, :, :half].abs().max() < 1e-5)
        weights.encoding = 'axial' if axial else 'mixed'
        for key, value in tensors.items():
            if key in weights.left_out:
                continue
            parts = key.split('.')
            if parts[-1] == 'rope_freqs':
                self._rotation(key, tensors, weights)
                continue
            if parts[0] == 'layers' and parts[2] == 'downsample':
                parts[1] = str(int(parts[1]) + 1)
            elif parts[0] == 'head':
                parts.insert(1, 'fc')
            weights.tensors['.'.join(parts)] = value
        return weights

    def _rotation(self, key: str, tensors: Dict[str, Tensor], weights: Weights) -> None:
        freqs, attention = tensors[key], key.removesuffix('rope_freqs')
        width = tensors[f'{attention}qkv.weight'].shape[0] // 3
        if freqs.ndim != 3 or freqs.shape[0] != 2 or 2 * freqs.shape[1] * freqs.shape[2] != width:
            raise RuntimeError(
                f'{key} of a {self.name} checkpoint must be (2, heads, pairs of a head) for {width} channels, got '
                f'{tuple(freqs.shape)}.')
        if weights.encoding == 'mixed':
            weights.tensors[f'{attention}rope.freqs'] = freqs.unsqueeze(1)
            weights.tensors[f'{attention}rope.signature'] = signature('mixed')
        else:
            weights.left_out[key] = 'frequencies that nothing reads'
            weights.tensors[f'{attention}rope.signature'] = signature('axial', temperature=SWIN_TEMPERATURE)
        # row and column numbers of the tokens of a window: the one the weights were trained with
        places = [tensors.get(f'{attention}{table}') for table in ('rope_t_y', 'rope_t_x')]
        window = [7 if place is None else 1 + int(place.max()) for place in places]
        weights.tensors[f'{attention}rope.reference_grid'] = torch.tensor(window)


def layer_scale(tensors: Dict[str, Tensor]) -> Dict[str, Tensor]:
    """`gamma_1` -> `ls1.gamma`."""
    return rename(tensors, ('.gamma_1', '.ls1.gamma'), ('.gamma_2', '.ls2.gamma'))


def is_trained(pos_embed: Tensor) -> bool:
    """Whether an absolute position embedding (1, N, C) was trained, not left as initialised.

    A published axial file carries an embedding that its model never used. Independent noise has no correlation between
    neighbours (its estimate has a spread of 1 / sqrt(N C), 0.004 for ViT-S); trained embeddings vary smoothly.
    """
    table = pos_embed.detach().float()[0]
    table = table - table.mean(0)
    scale = table.square().mean()
    if not torch.isfinite(scale) or scale == 0:
        return bool(scale != 0)
    return bool((table[1:] * table[:-1]).mean() / scale > 0.1)
