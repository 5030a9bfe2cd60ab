"""What happens to weights between a checkpoint and a model: nothing wrong is loaded, and nothing loaded in part.

`checkpoint_filter_fn` is timm's hook for pretrained weights, `prepare_state_dict` sees every `load_state_dict`.
"""
import math
from typing import Any, Dict, List, Optional, Tuple

import torch
from timm.models.vision_transformer import checkpoint_filter_fn as vit_filter_fn
from torch import Tensor

from .coordinates import to_grid

GRID = 'rope.reference_grid'


def checkpoint_filter_fn(state_dict: Dict[str, Any], model: Any) -> Dict[str, Any]:
    """Bring pretrained weights into our layout: ours, timm's VisionTransformer and DeiT-III, timm's rotary Eva.

    Raises:
        RuntimeError: Nothing in the weights says that they rotate, and it makes a difference.
    """
    state_dict = state_dict.get('model', state_dict)
    state_dict = dict(state_dict.get('state_dict', state_dict))
    pos_embed = state_dict.pop('pos_embed', None)  # timm would resize it with antialias, from a guessed grid
    out = vit_filter_fn(state_dict, model, adapt_layer_scale=True)
    if pos_embed is not None:
        out['pos_embed'] = pos_embed
    rope = getattr(model, 'rope', None)
    if rope is not None:
        if rope.learned and 'rope.freqs' not in out:
            raise RuntimeError(f'The checkpoint has no rope.freqs: it does not hold the rotary encoding {rope.name!r}.')
        if rope.coords == 'index':
            # NAVER's axial weights hold no trace of their encoding; the grid does not enter its function
            _fill_reference_grid(model, out, '')
        elif not any(key.startswith('rope.') for key in out):
            raise RuntimeError(f'The checkpoint holds no rotary encoding, the model has {rope.name!r}.')
    return out


def prepare_state_dict(model: Any, state_dict: Dict[str, Any], prefix: str, strict: bool) -> None:
    """Check a state dict before anything is copied; fill its reference grid and resize its position embedding in place.

    Args:
        model: Model with `rope` and `pos_embed`, either may be None.
        state_dict: Dict that torch's load_state_dict passes on; its own copy, not the caller's.
        prefix: Of the model's keys.
        strict: Whether keys must match exactly; shapes always must.

    Raises:
        RuntimeError: Another encoding, width or depth; lists the first keys that do not match.
        ValueError: Non-finite frequencies, malformed grids.
    """
    if model.rope is not None:
        model.rope.check_state_dict(state_dict, f'{prefix}rope.')
        if f'{prefix}rope.freqs' in state_dict or f'{prefix}rope.signature' in state_dict:
            _fill_reference_grid(model, state_dict, prefix)
    _resize_pos_embed(model, state_dict, prefix)
    reasons = _mismatches(model, state_dict, prefix, strict)
    if reasons:
        raise RuntimeError(
            f'Error(s) in loading state_dict for {type(model).__name__}: {_explain(model, state_dict, prefix)}\n\t'
            + '\n\t'.join(reasons[:8]) + (f'\n\t... and {len(reasons) - 8} more' if len(reasons) > 8 else ''))


def _fill_reference_grid(model: Any, state_dict: Dict[str, Any], prefix: str) -> None:
    """Rotary weights without a reference grid get the one of their pretrained_cfg, not of the model being built."""
    input_size = getattr(model, 'pretrained_cfg', {}).get('input_size')
    if f'{prefix}{GRID}' not in state_dict and input_size is not None:
        patch = model.patch_embed.patch_size
        state_dict[f'{prefix}{GRID}'] = torch.tensor([input_size[-2] // patch[0], input_size[-1] // patch[1]])


def _resize_pos_embed(model: Any, state_dict: Dict[str, Any], prefix: str) -> None:
    key, grid_key = f'{prefix}pos_embed', f'{prefix}pos_embed_grid'
    pos_embed = state_dict.get(key)
    if not isinstance(pos_embed, Tensor) or model.pos_embed is None or pos_embed.ndim != 3:
        return
    tokens = pos_embed.shape[1] - (0 if model.no_embed_class else model.num_prefix_tokens)
    grid = _pos_embed_grid(state_dict.get(grid_key), state_dict.get(f'{prefix}{GRID}'), tokens)
    target = tuple(model.patch_embed.grid_size)
    if grid is None:
        if pos_embed.shape[1] != model.pos_embed.shape[1]:
            raise RuntimeError(
                f'{key} of the checkpoint has {tokens} positions, which form no square grid: '
                f'add its grid as the integer tensor {grid_key}.')
        grid = target
    if grid != target and not pos_embed.is_meta:
        state_dict[key] = model._resize_pos_embed(pos_embed, grid, target)
    state_dict[grid_key] = torch.tensor(target)


def _pos_embed_grid(saved: Any, reference: Any, tokens: int) -> Optional[Tuple[int, int]]:
    """Grid of an embedding: as saved with it, else the reference grid if it fits, else square."""
    for value in (saved, reference):
        if isinstance(value, Tensor) and not value.is_meta:
            grid = to_grid(value.tolist(), 'pos_embed_grid of the checkpoint')
            if grid[0] * grid[1] == tokens:
                return grid
    side = math.isqrt(max(tokens, 0))
    return (side, side) if side * side == tokens and side else None


def _mismatches(model: Any, state_dict: Dict[str, Any], prefix: str, strict: bool) -> List[str]:
    expected = {f'{prefix}{k}': v for k, v in model.state_dict().items() if k != 'rope.signature'}
    given = {k: v for k, v in state_dict.items() if k.startswith(prefix) and k != f'{prefix}rope.signature'}
    missing = [f'missing {k} {_shape(v)}' for k, v in expected.items() if k not in given]
    unexpected = [f'unexpected {k} {_shape(v)}' for k, v in given.items() if k not in expected]
    shapes = [
        f'{k} is {_shape(given[k])}, the model needs {_shape(v)}' for k, v in expected.items()
        if k in given and _shape(given[k]) != _shape(v)]
    return shapes + missing + unexpected if strict else shapes


def _explain(model: Any, state_dict: Dict[str, Any], prefix: str) -> str:
    """One sentence on what differs most: encoding, width or depth."""
    if model.rope is None and any(k.startswith(f'{prefix}rope.') for k in state_dict):
        return 'the checkpoint holds a rotary encoding, the model has none.'
    if model.rope is not None and not any(k.startswith(f'{prefix}rope.') for k in state_dict):
        return f'the checkpoint holds no rotary encoding, the model has {model.rope.name!r}.'
    stem = state_dict.get(f'{prefix}patch_embed.proj.weight')
    if isinstance(stem, Tensor) and stem.shape[0] != model.embed_dim:
        return f'the checkpoint is {stem.shape[0]} wide, the model {model.embed_dim}.'
    blocks = {k[len(prefix):].split('.')[1] for k in state_dict if k.startswith(f'{prefix}blocks.')}
    if len(blocks) != len(model.blocks):
        return f'the checkpoint has {len(blocks)} blocks, the model {len(model.blocks)}.'
    return 'the keys do not match.'


def _shape(value: Any) -> Any:
    return tuple(value.shape) if hasattr(value, 'shape') else type(value).__name__
