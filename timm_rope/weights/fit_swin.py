"""From recognised weights to a state dict that fits a Swin model, or an error that says why there is none.

The same functions as in `fit_vit`; here every block has an encoding, and a relative position bias may be there too.
"""
import logging
import re
from typing import Any, Dict, Iterable, List, Tuple

import torch
from torch import Tensor

from .._timm import swin_filter_fn
from ..encodings import RotaryEncoding
from .layouts import NaverSwin, Weights, find_layout, recognise
from .layouts.timm_swin import ROPE
from .mismatches import explain, names_of, other_encoding, refuse_mismatches, shape_of, warm_start_hint

_logger = logging.getLogger(__name__)

BIAS = '.relative_position_bias_table'
ADAPTED = ('head.', 'patch_embed.proj.weight')  # by timm, once it knows the number of classes and channels


def checkpoint_filter_fn(state_dict: Dict[str, Any], model: Any) -> Dict[str, Any]:
    """Bring pretrained weights of any known layout (`layouts/`) into that of the model.

    Raises:
        RuntimeError: They fit no layout, or hold another encoding, width or depth; says which.
    """
    return fit(recognise(state_dict), model)


def to_our_keys(model: Any, state_dict: Dict[str, Any]) -> Dict[str, Any]:
    """The state dict itself, or converted if its keys are NAVER's."""
    return fit(recognise(state_dict), model) if isinstance(find_layout(state_dict), NaverSwin) else state_dict


def fit(weights: Weights, model: Any, warm_start: bool = False) -> Dict[str, Tensor]:
    """Weights as a state dict of the model, but for the head and the channels of the image, which timm adapts.

    Patch embedding and relative position bias are resampled to the patch and window of the model, as timm does.

    Args:
        weights: Recognised weights.
        model: Swin model of ours.
        warm_start: Take over everything but what the other one lacks: the rotation where the encoding is another one,
            the relative position bias where the model has none. Every such key is named in a warning.

    Raises:
        RuntimeError: Another encoding, width or depth, or a bias that the model has no place for; lists the first keys
            that do not match.
    """
    tensors = dict(weights.tensors)
    ropes = {f'{name}.': rope for name, rope in encodings(model).items()}
    reason = other_encoding(weights, tensors, ropes)
    tables = [key for key in tensors if key.endswith(BIAS)]
    if warm_start:
        _take_over(weights, tensors, model, ROPE if reason else '')
    elif reason:
        raise warm_start_hint(weights.layout, reason)
    elif tables and not model.rel_pos_bias:
        raise RuntimeError(
            f'The checkpoint ({weights.layout}) has a trained relative position bias, the model has none: use a model '
            f'with one (rel_pos_bias=True, names that end in _rpb), or say rope_warm_start=True to leave it out.')
    refuse_mismatches(
        model, tensors, '', True, lambda: _explain(model, tensors, ''), adapted=ADAPTED,
        compared=lambda key, value: shape_of(value)[1:] if key.endswith(BIAS) else shape_of(value),  # heads alone
        layout=weights.layout)
    heads = tuple(stage.blocks[0].attn.num_heads for stage in model.layers)
    told = weights.model_args.get('num_heads', heads)
    if told != heads:  # which stands in no shape where frequencies are fixed
        raise RuntimeError(f'The checkpoint ({weights.layout}) has {told} heads in its stages, the model {heads}.')
    with torch.device('cpu'):  # where timm interpolates a bias, whatever the default is
        return swin_filter_fn(tensors, model)


def prepare_state_dict(model: Any, state_dict: Dict[str, Any], prefix: str, strict: bool) -> None:
    """Check a state dict before anything is copied.

    Args:
        model: Swin model of ours.
        state_dict: Not changed.
        prefix: Of the model's keys.
        strict: Whether keys must match exactly; shapes always must.

    Raises:
        RuntimeError: Another encoding, width or depth; lists the first keys that do not match.
        ValueError: Non-finite frequencies, malformed grids.
    """
    for name, rope in encodings(model).items():
        rope.check_state_dict(state_dict, f'{prefix}{name}.')
    refuse_mismatches(model, state_dict, prefix, strict, lambda: _explain(model, state_dict, prefix))


def encodings(model: Any) -> Dict[str, RotaryEncoding]:
    """Name -> encoding of every block."""
    return {name: module for name, module in model.named_modules() if isinstance(module, RotaryEncoding)}


def _take_over(weights: Weights, tensors: Dict[str, Tensor], model: Any, rotation: str) -> None:
    """Drop what the model lacks, fill in what the checkpoint lacks with the model's own values, and say so.

    `rotation` is a part of the keys that are of another encoding, '' if the rotation is taken over.
    """
    expected = model.state_dict()
    dropped = [
        key for key in tensors
        if (rotation and rotation in key) or (key.endswith(BIAS) and not model.rel_pos_bias)]
    for key in dropped:
        del tensors[key]
    kept = [
        key for key in expected
        if key not in tensors and ((rotation and rotation in key) or key.endswith(BIAS))]
    tensors.update({key: expected[key] for key in kept})
    if dropped or kept:
        _logger.warning(
            f'Warm start of {type(model).__name__} from {weights.layout} weights with the encoding '
            f'{weights.encoding or "unknown"}. Not taken over: {names_of(dropped)}. Left as initialised: '
            f'{names_of(kept)}.')


def _explain(model: Any, state_dict: Dict[str, Any], prefix: str) -> str:
    return explain(
        model, state_dict, prefix,
        ('relative position bias', any(key.endswith(BIAS) for key in state_dict), model.rel_pos_bias),
        ('blocks in its stages', _depths(state_dict, prefix), _depths(model.state_dict(), '')))


def _depths(keys: Iterable[str], prefix: str) -> Tuple[int, ...]:
    blocks = {re.match(rf'{re.escape(prefix)}layers\.(\d+)\.blocks\.(\d+)\.', key) for key in keys}
    stages: List[str] = [match[1] for match in {m[0]: m for m in blocks if m}.values()]
    return tuple(stages.count(stage) for stage in sorted(set(stages), key=int))
