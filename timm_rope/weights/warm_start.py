"""Warm start (`rope_warm_start=True`): a ViT takes over the weights of a model with another encoding.

In come recognised weights and a model, out comes a state dict of the model with all but the rotation. What was left
out, filled in or folded is named in a warning.
"""
import logging
from typing import Any, Dict, List

import torch
from torch import Tensor

from .layouts import Weights
from .mismatches import names_of

_logger = logging.getLogger(__name__)


def take_over(weights: Weights, tensors: Dict[str, Tensor], model: Any, rotation: bool) -> Dict[str, Tensor]:
    """Weights for a model of the same width and depth, whatever its encoding.

    What one of the two lacks is filled in or folded where that does not change the function: LayerScale (1), the bias
    of qkv (0). A position embedding that only one of them has is left out or left as initialised. Every such key is
    named in a warning.

    Args:
        weights: What the checkpoint is.
        tensors: Its tensors, in our keys.
        model: Model of ours.
        rotation: Whether the rotation is taken over too; it keeps its initial values otherwise.

    Returns:
        A state dict of the model; what else does not fit is left for the caller to refuse.
    """
    out = {key: value for key, value in tensors.items() if rotation or not key.startswith('rope.')}
    left_out = [key for key in tensors if key not in out]
    expected = model.state_dict()
    if model.pos_embed is None:
        left_out += [key for key in ('pos_embed', 'pos_embed_grid') if out.pop(key, None) is not None]
    changed = _fill(out, expected) + _fold(out, expected)
    initial = ('pos_embed',) if rotation else ('rope.', 'pos_embed')
    kept = [key for key in expected if key not in out and key.startswith(initial)]
    out.update({key: expected[key] for key in kept})
    if left_out or kept or changed:
        _logger.warning(
            f'Warm start of {type(model).__name__} from {weights.layout} weights with the encoding '
            f'{weights.encoding or "axial or none"}. Not taken over: {names_of(left_out)}. Left as initialised: '
            f'{names_of(kept)}. Filled in or folded, the function unchanged: {names_of(changed)}.')
    return out


def _fill(out: Dict[str, Tensor], expected: Dict[str, Tensor]) -> List[str]:
    neutral = {'.ls1.gamma': 1., '.ls2.gamma': 1., '.attn.qkv.bias': 0.}
    keys = [key for key in expected if key not in out and key.endswith(tuple(neutral))]
    for key in keys:
        value = next(v for suffix, v in neutral.items() if key.endswith(suffix))
        out[key] = torch.full_like(expected[key], value, device='cpu')
    return keys


def _fold(out: Dict[str, Tensor], expected: Dict[str, Tensor]) -> List[str]:
    """LayerScale of the checkpoint goes into the linear layer in front of it."""
    layers = {'.ls1.gamma': '.attn.proj', '.ls2.gamma': '.mlp.fc2'}
    keys = [key for key in out if key not in expected and key.endswith(tuple(layers))]
    for key in keys:
        gamma, suffix = out.pop(key), key[-len('.ls1.gamma'):]
        layer = key[:-len(suffix)] + layers[suffix]
        out[f'{layer}.weight'] = gamma[:, None] * out[f'{layer}.weight']
        if f'{layer}.bias' in out:
            out[f'{layer}.bias'] = gamma * out[f'{layer}.bias']
    return keys
