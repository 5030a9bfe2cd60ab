"""What a model of timm, named in the config.json beside the weights of another project, tells about them.

Heads, pooling and epsilons stand in no tensor. The model is built on the meta device, and out come the arguments that
our model needs and the name that the encoding has here.
"""
from typing import Any, Dict, Tuple

import timm
from timm.layers import RotaryEmbeddingCat, RotaryEmbeddingMixed
from torch import nn

from ..._timm import create_without_memory


def ask_timm(width: int, name: str, args: Dict[str, Any]) -> Tuple[Dict[str, Any], str]:
    """Build a model of timm without memory and look at it.

    Args:
        width: Of the weights.
        name: Architecture that a config.json names.
        args: Its constructor arguments there.

    Returns:
        Arguments of our models that stand in no tensor, and the name of the encoding here; nothing for unknown names.

    Raises:
        ValueError: It is no ViT of this width, or computes what no model here does.
    """
    if not timm.is_model(name):
        return {}, ''
    try:
        theirs = create_without_memory(name, **args)
        found: Dict[str, Any] = dict(
            num_heads=theirs.blocks[0].attn.num_heads, global_pool=theirs.global_pool,
            pos_embed='none' if theirs.pos_embed is None else 'learn')
    except Exception as e:
        raise ValueError(f'config.json: no ViT is built by {name} with {args} ({type(e).__name__}: {e}).') from None
    if theirs.embed_dim != width:
        raise ValueError(f'config.json says {name}, {theirs.embed_dim} wide, but the weights are {width} wide.')
    if type(getattr(theirs.blocks[0].mlp, 'act', None)) is not nn.GELU:
        raise ValueError(f'config.json says {name}, whose activation is not the GELU of all models here.')
    eps = getattr(theirs.blocks[0].norm1, 'eps', 1e-6)
    if eps != 1e-6:
        found['norm_eps'] = eps
    return found, _encoding_of(name, getattr(theirs, 'rope', None))


def _encoding_of(name: str, rope: Any) -> str:
    """What the rotation of a timm model is called here."""
    if rope is None:
        return 'none'
    if isinstance(rope, RotaryEmbeddingMixed) and rope.grid_indexing == 'xy':
        return 'mixed'
    expected = dict(grid_indexing='xy', in_pixels=False, temperature=100., grid_offset=0., rotate_half=False,
                    ref_feat_shape=None)
    if type(rope) is RotaryEmbeddingCat and all(getattr(rope, k, v) == v for k, v in expected.items()):
        return 'axial'
    raise ValueError(f'config.json says {name}, whose rotation no model of this version computes.')
