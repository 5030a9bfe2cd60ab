"""timm's Eva with fixed frequencies: DINOv3, EUPE, LingBot, EVA-02, PE, SBB.

Their keys tell neither where patches are nor how channels are ordered; the model of timm does, which a config.json or
the user names. It is built without memory and looked at, so that what it is called does not matter.
"""
from typing import Any, Dict, List, Optional, Tuple

import timm
import torch
from timm.layers import LayerNorm, RmsNorm, RotaryEmbeddingCat, RotaryEmbeddingDinoV3
from timm.models.eva import Eva
from torch import Tensor, nn

from ..._timm import create_without_memory
from ...encodings import ENCODINGS
from .base import Layout, Weights, count_blocks, interleaved, reorder_heads, signature
from .naver import layer_scale

TABLE = 'a table that is computed from the grid'
UNFUSED = tuple(f'.attn.{part}{end}' for part in 'qkv' for end in ('_bias', '_proj.weight', '_proj.bias'))


class TimmEvaAxial(Layout):
    """Axial in another order of the channels, with what a Vision Transformer of timm can have beside it.

    Args:
        name: Of the model in timm.
        args: Its constructor arguments.
        model: The model, on the meta device.
    """
    name = 'timm Eva, fixed frequencies'
    marks = ('patch_embed.proj.weight', 'blocks.0.norm1.weight', 'blocks.0.attn.proj.weight')

    def __init__(self, name: str, args: Dict[str, Any], model: Any) -> None:
        self.timm_model, self.theirs = (name, args), model

    def convert(self, tensors: Dict[str, Tensor], extra: Dict[str, Any]) -> Weights:
        theirs = self.theirs
        width, depth = tensors['patch_embed.proj.weight'].shape[0], count_blocks(tensors)
        if (theirs.embed_dim, len(theirs.blocks)) != (width, depth):
            raise RuntimeError(
                f'{self.timm_model[0]} of timm is {theirs.embed_dim} wide with {len(theirs.blocks)} blocks, the '
                f'weights are {width} wide with {depth}: name their model, and arguments in a config.json beside them.')
        reasons = refusals(theirs)
        if reasons:
            raise RuntimeError(f'{self.timm_model[0]} of timm has {", ".join(reasons)}: no model here computes it.')
        options, order, grid = rotation_of(theirs)
        left_out = {key: TABLE for key in tensors if key.startswith('rope.')}
        out = layer_scale(fused({key: value for key, value in tensors.items() if key not in left_out}))
        out = reorder_heads(split_gates(out, theirs), order)
        out['rope.signature'] = signature('axial', **options)
        if grid is not None:
            out['rope.reference_grid'] = torch.tensor(grid, device='cpu')
        return Weights(
            self.name, out, encoding='axial', left_out=left_out, timm_model=self.timm_model,
            model_args={**structure_of(theirs), **{f'rope_{key}': value for key, value in options.items()}})


def find_eva(name: str, args: Dict[str, Any]) -> Optional[TimmEvaAxial]:
    """The layout of a model of timm, if it is an Eva with fixed frequencies other than those of NAVER's layout."""
    if not timm.is_model(name):
        return None
    try:
        theirs = create_without_memory(name, **args)
    except Exception:  # whoever needs the model will say what is wrong
        return None
    rope = getattr(theirs, 'rope', None)
    if not isinstance(theirs, Eva) or not isinstance(rope, (RotaryEmbeddingCat, RotaryEmbeddingDinoV3)):
        return None
    naver = dict(grid_indexing='xy', in_pixels=False, temperature=100., grid_offset=0., rotate_half=False,
                 ref_feat_shape=None)
    plain = theirs.reg_token is None and isinstance(theirs.fc_norm, nn.Identity) and theirs.cls_token is not None
    plain = plain and not _halves(theirs.blocks[0].attn)
    if plain and type(rope) is RotaryEmbeddingCat and all(getattr(rope, k, v) == v for k, v in naver.items()):
        return None
    return TimmEvaAxial(name, args, theirs)


def refusals(theirs: Any) -> List[str]:
    """What a model has that ours cannot have."""
    rope, found = theirs.rope, []
    block = theirs.blocks[0]
    if type(rope) is RotaryEmbeddingDinoV3:
        if rope.min_period is not None or rope.max_period is not None or rope.grid_offset:
            found.append('frequencies by periods, or coordinates with an offset')
    elif type(rope) is not RotaryEmbeddingCat or getattr(rope, 'grid_type', 'index') != 'index' or rope.in_pixels:
        found.append(f'the rotation {type(rope).__name__} in pixels')
    if type(block).__name__ != 'EvaBlock':
        return [*found, 'norms behind attention and MLP (post-norm)']
    if (block.gamma_1 is None) != (getattr(block, 'gamma_2', None) is None):
        found.append('LayerScale of the attention alone')
    for each in theirs.blocks:
        if getattr(each.attn, 'num_kv_heads', each.attn.num_heads) != each.attn.num_heads:
            found.append('grouped-query attention')
            break
    if getattr(block.attn, 'gate', None) is not None:
        found.append('gated attention')
    if _halves(block.attn) != _halves(rope):  # before timm 1.0.31, where the rotation was always interleaved
        found.append('pairs of channels in the attention that are none of the rotation')
    if block.attn.proj.in_features != theirs.embed_dim:
        found.append(f'heads of {block.attn.head_dim} channels in a width of {theirs.embed_dim}')
    if type(block.norm1) not in (LayerNorm, nn.LayerNorm, RmsNorm):
        found.append(f'the norm {type(block.norm1).__name__}')
    gated = not hasattr(block.mlp, 'fc1') or block.mlp.fc1.out_features != block.mlp.fc2.in_features
    if type(block.mlp.act) is not (nn.SiLU if gated else nn.GELU):
        found.append(f'the activation {type(block.mlp.act).__name__}')
    if theirs.attn_pool is not None:
        found.append('attention pooling')
    if not isinstance(theirs.norm, nn.Identity) and not isinstance(theirs.fc_norm, nn.Identity):
        found.append('a norm before and a norm after pooling')
    return found


def rotation_of(theirs: Any) -> Tuple[Dict[str, Any], Tensor, Optional[Tuple[int, int]]]:
    """Options of `axial`, the order of its channels there, and the grid that coordinates are squeezed onto, if any."""
    rope = theirs.rope
    options: Dict[str, Any] = dict(temperature=float(rope.temperature))
    grid = None
    if type(rope) is RotaryEmbeddingDinoV3:
        kind = rope.normalize_coords
        options.update(scale=2., coords='dinov3' if kind == 'separate' else f'dinov3_{kind}')
    else:
        options.update(offset=float(rope.grid_offset), coords='index' if rope.ref_feat_shape is None else 'eva')
        if rope.ref_feat_shape is not None:
            grid = int(rope.ref_feat_shape[0]), int(rope.ref_feat_shape[1])
    head_dim = theirs.embed_dim // theirs.blocks[0].attn.num_heads
    defaults = ENCODINGS['axial'].defaults
    options = {key: value for key, value in options.items() if value != defaults[key]}
    return options, interleaved(head_dim, _halves(rope), y_first=rope.grid_indexing == 'ij'), grid


def _halves(module: Any) -> bool:
    """Whether a pair of channels is one of the first and one of the second half of a head."""
    return bool(getattr(module, 'rotate_half', False))


def structure_of(theirs: Any) -> Dict[str, Any]:
    """Constructor arguments of our ViT beside those of the rotation."""
    block, dim = theirs.blocks[0], theirs.embed_dim
    hidden, norm = block.mlp.fc2.in_features, block.norm1
    args: Dict[str, Any] = dict(
        num_heads=block.attn.num_heads, global_pool=theirs.global_pool,
        pos_embed='none' if theirs.pos_embed is None else 'learn',
        mlp_ratio=hidden / dim if int(dim * (hidden / dim)) == hidden else (hidden + 0.5) / dim,
        qkv_bias=_has_bias(block.attn))
    if theirs.pos_embed is not None:
        args.update(no_embed_class=theirs.no_embed_class, pos_embed_antialias=True)
    if not isinstance(theirs.norm_pre, nn.Identity):
        args['pre_norm'] = True
    if isinstance(theirs.norm, nn.Identity) and isinstance(theirs.fc_norm, nn.Identity):
        args['final_norm'] = False
    elif isinstance(theirs.norm, nn.Identity) != (theirs.global_pool in ('avg', 'avgmax', 'max')):
        args['fc_norm'] = isinstance(theirs.norm, nn.Identity)  # by default these poolings have it
    if isinstance(norm, RmsNorm):
        args['norm_layer'] = 'rmsnorm'
    if norm.eps != 1e-6:
        args['norm_eps'] = norm.eps
    if not isinstance(block.attn.norm, nn.Identity):
        args['scale_attn_norm'] = True
    if not isinstance(block.mlp.norm, nn.Identity):
        args['scale_mlp_norm'] = True
    if type(block.mlp.act) is nn.SiLU:
        args['mlp_layer'] = 'swiglu'
    return args


def _has_bias(attention: Any) -> bool:
    layer = attention.qkv if attention.qkv is not None else attention.q_proj
    return layer.bias is not None or getattr(attention, 'q_bias', None) is not None


def fused(tensors: Dict[str, Tensor]) -> Dict[str, Tensor]:
    """Queries, keys and values in one projection; keys that have no bias get one of zeros."""
    out = {key: value for key, value in tensors.items() if not key.endswith(UNFUSED)}
    for key in tensors:
        attention = key.removesuffix('proj.weight')
        if not key.endswith('.attn.proj.weight'):
            continue
        projections = [tensors.get(f'{attention}{part}_proj.weight') for part in 'qkv']
        if projections[0] is not None:
            out[f'{attention}qkv.weight'] = torch.cat(projections)  # type: ignore[arg-type]
        biases = [tensors.get(f'{attention}{part}_bias', tensors.get(f'{attention}{part}_proj.bias')) for part in 'qkv']
        if biases[0] is not None:
            zeros = torch.zeros_like(biases[0])
            out[f'{attention}qkv.bias'] = torch.cat([zeros if bias is None else bias for bias in biases])
    return out


def split_gates(tensors: Dict[str, Tensor], theirs: Any) -> Dict[str, Tensor]:
    """The two halves of a packed SwiGLU, gate first, as two layers."""
    if type(theirs.blocks[0].mlp.act) is not nn.SiLU:
        return tensors
    out = {}
    for key, value in tensors.items():
        if '.mlp.fc1.' in key:
            out[key.replace('.fc1.', '.fc1_g.')], out[key.replace('.fc1.', '.fc1_x.')] = value.chunk(2)
        else:
            out[key] = value
    return out
