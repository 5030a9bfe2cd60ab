"""From recognised weights to a state dict that fits a ViT, or an error that says why there is none.

Weights that do not fit are refused as a whole before any tensor is copied. `checkpoint_filter_fn` is timm's hook for
pretrained weights; `to_our_keys` and `prepare_state_dict` see every `load_state_dict`.
"""
import dataclasses
import logging
from typing import Any, Dict, Optional, Tuple

import torch
from timm.models.vision_transformer import checkpoint_filter_fn as vit_filter_fn
from torch import Tensor

from ..positions.coordinates import Grid, read_grid, square_grid
from .layouts import Ours, TimmVit, Weights, find_layout, is_trained, recognise, signature
from .mismatches import explain, other_encoding, refuse_mismatches, refuse_other_structure, warm_start_hint
from .warm_start import take_over

_logger = logging.getLogger(__name__)
GRID = 'rope.reference_grid'


def checkpoint_filter_fn(state_dict: Dict[str, Any], model: Any) -> Dict[str, Any]:
    """Bring pretrained weights of any known layout (`layouts/`) into that of the model.

    Raises:
        RuntimeError: They fit no layout, or hold another encoding, width or depth; says which.
    """
    return fit(recognise(state_dict), model)


def to_our_keys(model: Any, state_dict: Dict[str, Any]) -> Dict[str, Any]:
    """The state dict itself, or converted if its keys are those of another project.

    Raises:
        RuntimeError: The weights do not fit the model, which is built already; says how to build it.
    """
    layout = find_layout(state_dict)
    if layout is None or isinstance(layout, (Ours, TimmVit)):
        return state_dict
    weights = recognise(state_dict)
    tensors = fit(weights, model)
    refuse_other_structure(weights, model)
    return tensors


def fit(weights: Weights, model: Any, warm_start: bool = False) -> Dict[str, Tensor]:
    """Weights as a state dict of the model, but for the head and the channels of the image, which timm adapts.

    Args:
        weights: Recognised weights.
        model: Model of ours.
        warm_start: Leave out the rotation where the encoding is another one, and whatever `take_over` says.

    Raises:
        RuntimeError: Another encoding, width or depth; lists the first keys that do not match.
    """
    tensors = dict(weights.tensors)
    reason = _encoding_conflict(weights, tensors, model)
    _fold_class_position(tensors, model)
    pos_embed = tensors.pop('pos_embed', None)  # timm would resize it with antialias, from a guessed grid
    tensors = vit_filter_fn(tensors, model, adapt_layer_scale=True)
    if pos_embed is not None and (warm_start or model.pos_embed is not None or is_trained(pos_embed)):
        tensors['pos_embed'] = pos_embed
    if warm_start:
        tensors = take_over(weights, tensors, model, rotation=not reason)
    elif reason:
        raise warm_start_hint(weights.layout, reason)
    elif 'pos_embed' in tensors and model.pos_embed is None:
        raise RuntimeError(
            f"The checkpoint ({weights.layout}) has a trained position embedding, the model has none: use a model with "
            f"one (pos_embed='learn', names that end in _ape), or say rope_warm_start=True to leave it out.")
    if model.rope is not None:
        if 'rope_share_layers' in weights.ask and model.rope.options.get('share_layers') and 'rope.freqs' in tensors:
            tensors['rope.freqs'] = tensors['rope.freqs'][:, :1]
        _fill_reference_grid(model, tensors, '')
    refuse_mismatches(
        model, tensors, '', True, lambda: _explain(model, tensors, ''),
        adapted=('head.', 'pos_embed', 'patch_embed.proj.weight'), layout=weights.layout)
    return tensors


def _encoding_conflict(weights: Weights, tensors: Dict[str, Tensor], model: Any) -> str:
    """How the encoding of weights differs from the model's, or ''; may say in `tensors` what it must be."""
    name = 'none' if model.rope is None else model.rope.name
    if weights.encoding is None and not any(key.startswith('rope.') for key in tensors):
        # NAVER's axial weights and its baseline have the same keys, and no trace of their encoding
        if name == 'axial':
            tensors['rope.signature'] = signature('axial')
        weights = dataclasses.replace(weights, encoding=name if name in ('none', 'axial') else 'none')
    return other_encoding(weights, tensors, {} if model.rope is None else {'rope.': model.rope})


def _fold_class_position(tensors: Dict[str, Tensor], model: Any) -> None:
    """Split a position embedding that begins with the class token's, if the model has none for that token.

    It is added to the class token, as the model it comes from did in every forward.
    """
    pos_embed, cls_token = tensors.get('pos_embed'), tensors.get('cls_token')
    if model.no_embed_class and pos_embed is not None and cls_token is not None and pos_embed.ndim == 3:
        if not square_grid(pos_embed.shape[1]) and square_grid(pos_embed.shape[1] - 1):
            tensors['cls_token'] = cls_token + pos_embed[:, :1]
            tensors['pos_embed'] = pos_embed[:, 1:]


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
    # without a reference grid these are the parameters of a model like this one, as optimizers and averages keep them;
    # pretrained weights have been given a grid by `fit`
    alone = not strict and model.rope is not None and f'{prefix}{GRID}' not in state_dict
    if model.rope is not None:
        model.rope.check_state_dict(state_dict, f'{prefix}rope.')
        # such parameters do not change a grid that the model knows. For a model inside another one torch does not tell
        # whether the load is strict, so that a missing grid is filled in there
        wanted = strict or prefix or model.rope.undecided
        if wanted and (f'{prefix}rope.freqs' in state_dict or f'{prefix}rope.signature' in state_dict):
            grid = _fill_reference_grid(model, state_dict, prefix)
            if grid and not strict and model.rope.undecided:
                _logger.warning(
                    f'The weights have no {prefix}{GRID}: they count as trained on {grid[0]} x {grid[1]} patches, by '
                    f'the input_size of pretrained_cfg. If that is wrong, put the right grid there as a tensor (rows, '
                    f'columns), or say rope_reference_grid=(rows, columns) when the model is built.')
    _resize_pos_embed(model, state_dict, prefix, alone)
    refuse_mismatches(model, state_dict, prefix, strict, lambda: _explain(model, state_dict, prefix))


def _fill_reference_grid(model: Any, state_dict: Dict[str, Any], prefix: str) -> Optional[Tuple[int, int]]:
    """Add the reference grid to rotary weights that have none, by the image size in pretrained_cfg.

    The model may be built for another size, so its own grid says nothing about the weights.

    Returns:
        The grid that was added, or None if there is one already or no image size is known.
    """
    input_size = getattr(model, 'pretrained_cfg', {}).get('input_size')
    if f'{prefix}{GRID}' in state_dict or input_size is None:
        return None
    patch = model.patch_embed.patch_size
    grid = input_size[-2] // patch[0], input_size[-1] // patch[1]
    state_dict[f'{prefix}{GRID}'] = torch.tensor(grid, device='cpu')
    return grid


def _resize_pos_embed(model: Any, state_dict: Dict[str, Any], prefix: str, alone: bool) -> None:
    key, grid_key = f'{prefix}pos_embed', f'{prefix}pos_embed_grid'
    pos_embed = state_dict.get(key)
    if not isinstance(pos_embed, Tensor) or model.pos_embed is None or pos_embed.ndim != 3:
        return
    tokens = pos_embed.shape[1] - (0 if model.no_embed_class else model.num_prefix_tokens)
    grid = _pos_embed_grid(state_dict.get(grid_key), state_dict.get(f'{prefix}{GRID}'), tokens)
    target = tuple(model.patch_embed.grid_size)
    if alone and grid_key not in state_dict and pos_embed.shape == model.pos_embed.shape:
        grid = target
    if grid is None:
        if pos_embed.shape[1] != model.pos_embed.shape[1]:
            raise RuntimeError(
                f'{key} of the checkpoint has {tokens} positions, which form no square grid: '
                f'add its grid as the integer tensor {grid_key}.')
        grid = target
    if grid != target and not pos_embed.is_meta:
        state_dict[key] = model._resize_pos_embed(pos_embed, grid, target)
    state_dict[grid_key] = torch.tensor(target, dtype=torch.float32, device='cpu')


def _pos_embed_grid(saved: Any, reference: Any, tokens: int) -> Optional[Grid]:
    """Grid of an embedding: as saved with it, else the reference grid if it fits, else square."""
    for value in (saved, reference):
        if isinstance(value, Tensor) and not value.is_meta:
            grid = read_grid(value, 'pos_embed_grid of the checkpoint')
            if grid[0] * grid[1] == tokens:
                return grid
    return square_grid(tokens)


def _explain(model: Any, state_dict: Dict[str, Any], prefix: str) -> str:
    blocks = {k[len(prefix):].split('.')[1] for k in state_dict if k.startswith(f'{prefix}blocks.')}
    return explain(
        model, state_dict, prefix,
        ('position embedding', f'{prefix}pos_embed' in state_dict, model.pos_embed is not None),
        ('blocks', len(blocks), len(model.blocks)))
