"""NAVER's RoPE-ViT (github.com/naver-ai/rope-vit), its DeiT-III baseline, and the same weights in timm's Eva.

LayerScale is `gamma_1`, `gamma_2` here. Mixed frequencies are `freqs` (2, depth, heads * head_dim / 2) at NAVER and
`rope.freqs` (2, depth, heads, head_dim / 2) in timm. Axial weights leave no trace of their encoding.
"""
from typing import Any, Dict, List

import torch
from torch import Tensor

from .base import Layout, Weights, count_blocks, rename, signature
from .timm_swin import SWIN_TABLES, TABLE, from_original_swin

HEAD_DIM = 64  # of every published ViT
SWIN_TEMPERATURE = 50.  # of the axial Swin models; the axial ViTs have 100
# models with the same keys and these are others: timm's Evas of other coordinates (DINOv3, PE), CaiT
FOREIGN = ('rope.', 'reg_token', 'fc_norm.', 'norm_pre.', 'attn_pool.', 'blocks_token_only.')


class NaverVit(Layout):
    """NAVER's ViT files: axial, mixed, with and without position embedding, and the baseline without rotation."""
    name = 'NAVER RoPE-ViT'
    marks = ('patch_embed.proj.weight', 'blocks.0.attn.qkv.weight', 'blocks.0.gamma_1', 'blocks.0.norm1.weight')
    prefer_average = False  # the accuracies they publish are those of the raw weights

    def differences(self, tensors: Dict[str, Tensor]) -> List[str]:
        foreign = [key for key in tensors if key.startswith(FOREIGN)]
        return super().differences(tensors) + [f'unexpected {key}' for key in foreign]

    def convert(self, tensors: Dict[str, Tensor], extra: Dict[str, Any]) -> Weights:
        left_out: Dict[str, str] = {key: TABLE for key in ('freqs_t_x', 'freqs_t_y') if key in tensors}
        out = layer_scale({key: value for key, value in tensors.items() if key not in left_out})
        weights = Weights(self.name, out, left_out=left_out)
        if len(left_out) == 2:  # column and row numbers of the tokens: the grid the weights were trained on
            out['rope.reference_grid'] = grid_of_tables(tensors, 'freqs_t_y', 'freqs_t_x')
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

    Frequencies are `attn.rope_freqs` (2, heads, pairs) of each block. Axial models save theirs too, but turn by a table
    that is made with them and not saved. If they are a geometric series they tell the temperature.
    """
    name = 'NAVER RoPE-Swin'
    marks = ('patch_embed.proj.weight', 'layers.0.blocks.0.attn.qkv.weight', 'layers.0.blocks.0.attn.rope_freqs')
    prefer_average = False

    def convert(self, tensors: Dict[str, Tensor], extra: Dict[str, Any]) -> Weights:
        tables = (*SWIN_TABLES, 'attn.rope_t_x', 'attn.rope_t_y')
        weights = Weights(self.name, {}, left_out={key: TABLE for key in tensors if key.endswith(tables)})
        freqs = [value for key, value in tensors.items() if key.endswith('.attn.rope_freqs')]
        weights.encoding = 'axial' if all(map(_is_axial, freqs)) else 'mixed'
        stages = count_blocks(tensors, 'layers.')
        first_blocks = [tensors.get(f'layers.{i}.blocks.0.attn.rope_freqs') for i in range(stages)]
        weights.model_args['num_heads'] = tuple(int(each.shape[1]) for each in first_blocks if each is not None)
        temperature = _temperature(freqs[0]) if weights.encoding == 'axial' else SWIN_TEMPERATURE
        if temperature != SWIN_TEMPERATURE:
            weights.model_args['rope_temperature'] = temperature
        rest = {}
        for key, value in tensors.items():
            if key.endswith('.attn.rope_freqs'):
                self._rotation(key, tensors, weights, temperature)
            elif key not in weights.left_out:
                rest[key] = value
        weights.tensors.update(from_original_swin(rest))
        return weights

    def _rotation(self, key: str, tensors: Dict[str, Tensor], weights: Weights, temperature: float) -> None:
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
            weights.left_out[key] = 'frequencies, which the encoding computes'
            weights.tensors[f'{attention}rope.signature'] = signature('axial', temperature=temperature)
        # row and column numbers of the tokens of a window: the one the weights were trained with
        tables = f'{attention}rope_t_y', f'{attention}rope_t_x'
        window = grid_of_tables(tensors, *tables) if set(tables) <= set(tensors) else torch.tensor([7, 7], device='cpu')
        weights.tensors[f'{attention}rope.reference_grid'] = window


def _is_axial(freqs: Tensor) -> bool:
    """The x half of the pairs, then the y half: nothing on the other axis but the cosine of pi / 2 in float32."""
    half = freqs.shape[-1] // 2
    return freqs.ndim == 3 and bool(max(freqs[0, :, half:].abs().max(), freqs[1, :, :half].abs().max()) < 1e-5)


def _temperature(freqs: Tensor) -> float:
    """Of axial frequencies (2, heads, pairs), temperature^(-k / groups); the published one if they are of no series."""
    groups = freqs.shape[-1] // 2
    x = freqs[0, :, :groups].double()
    if groups < 2 or not bool((x > 0).all()):
        return SWIN_TEMPERATURE
    temperature = float((x[0, 0] / x[0, -1]) ** (groups / (groups - 1)))
    series = temperature ** (-torch.arange(groups, dtype=x.dtype, device=x.device) / groups)
    same = all(torch.allclose(each.double(), series.expand_as(x), rtol=1e-3) for each in (x, freqs[1, :, groups:]))
    return float(f'{temperature:.3g}') if same else SWIN_TEMPERATURE


def grid_of_tables(tensors: Dict[str, Tensor], rows: str, columns: str) -> Tensor:
    """(rows, columns) of patches whose row and column numbers, in any order, stand under these two keys.

    Raises:
        RuntimeError: They are not the places of a whole grid.
    """
    y, x = (tensors[key].detach().double().flatten() for key in (rows, columns))
    if 0 < len(y) == len(x) and bool((y + x).isfinite().all()):
        grid = [int(1 + y.max()), int(1 + x.max())]
        numbers = (y * grid[1] + x).sort().values
        if grid[0] * grid[1] == len(x) and torch.equal(numbers, torch.arange(len(x), dtype=x.dtype, device=x.device)):
            return torch.tensor(grid, device='cpu')
    raise RuntimeError(
        f'{rows} and {columns} must hold the row and column numbers of all patches of a grid; these are of none.')


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
