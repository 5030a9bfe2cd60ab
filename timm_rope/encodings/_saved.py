"""The encoding that the state dict of a model holds, without the model."""
from itertools import product
from typing import Any, Dict, Optional

import torch
from torch import Tensor

from . import create_rope, list_ropes
from ._base import ENCODINGS, SHARING, RotaryEncoding
from ._signature import parse_signature, read_signature


def encoding_prefix(state_dict: Dict[str, Any]) -> str:
    """Prefix of the keys of the encoding: 'rope.', after whatever a wrapper put in front ('module.rope.').

    Raises:
        ValueError: No signature of an encoding, or several.
    """
    keys = [k for k in state_dict if isinstance(k, str) and f'.{k}'.endswith('.rope.signature')]
    if len(keys) == 1:
        return keys[0].removesuffix('signature')
    message = 'A state dict needs the key rope.signature, which says what its encoding is'
    if any(key.endswith('.attn.rope.signature') for key in keys):
        raise ValueError(f'{message}; here every block of a Swin has one: load these weights and pass the model.')
    if keys:
        raise ValueError(f'{message}; this one has {", ".join(keys)}: pass the keys of one model.')
    for key, value in state_dict.items():
        if isinstance(value, dict) and any(str(k).endswith('rope.signature') for k in value):
            raise ValueError(f'{message}: pass what this one has under {key!r}.')
    raise ValueError(f'{message}: load these weights into a model of their encoding first and pass the model.')


def read_encoding(state_dict: Dict[str, Any], prefix: str, num_heads: Optional[int]) -> RotaryEncoding:
    """Build the encoding from its signature and the shapes around it, on the CPU.

    Args:
        state_dict: Of a model with `blocks.*.attn.qkv`.
        prefix: What `encoding_prefix` found.
        num_heads: Attention heads; None where the shape of the frequencies tells them.

    Raises:
        ValueError: An unknown or unreadable signature, a missing key, non-finite frequencies, or `num_heads` that does
            not fit or cannot be told.
    """
    text = read_signature(state_dict[f'{prefix}signature'])
    parsed = parse_signature(text or '')
    if parsed is None:
        raise ValueError(f'{prefix}signature cannot be read (meta device?): load the weights into a model first.')
    name, saved = parsed
    head_dim = saved.pop('head_dim', '')
    defaults = ENCODINGS[name].option_defaults() if name in ENCODINGS else {}
    if not defaults or not set(saved) <= set(defaults):
        raise ValueError(
            f'{prefix}signature is {text}, which this version does not know; it knows {", ".join(list_ropes())}.')
    try:
        options = {key: _value(value, defaults[key]) for key, value in saved.items()}
    except (KeyError, ValueError):
        raise ValueError(f'{prefix}signature is {text}, with values that no option takes.') from None

    learned = ENCODINGS[name].learned
    blocks = f'{prefix.removesuffix("rope.")}blocks.'
    qkv, q_norm, freqs = f'{blocks}0.attn.qkv.weight', f'{blocks}0.attn.q_norm.weight', f'{prefix}freqs'
    needed = [qkv, f'{prefix}reference_grid', *([freqs] if learned else [])]
    missing = [key for key in needed if not isinstance(state_dict.get(key), Tensor)]
    if missing:
        raise ValueError(f'The state dict of {name!r} has no {", ".join(missing)}.')
    width = state_dict[qkv].shape[0] // 3
    depth = len({key[len(blocks):].split('.')[0] for key in state_dict if key.startswith(blocks)})
    ones = (1,) * state_dict[needed[1]].numel()  # the sizes are loaded
    shapes = {key: tuple(state_dict[key].shape) for key in (q_norm, *needed[2:]) if key in state_dict}
    wide = state_dict[needed[2] if learned else qkv].dtype == torch.float64

    fitting: Dict[int, RotaryEncoding] = {}
    possible = [h for h in range(1, width + 1) if width % h == 0 and num_heads in (None, h)]
    for heads in [h for h in possible if head_dim in ('', str(width // h))]:
        for shared in product((False, True), repeat=2 if learned else 0):
            try:
                rope = create_rope(
                    name, width // heads, heads, depth, ones, 'meta', torch.float64 if wide else torch.float32,
                    **options, **dict(zip(SHARING, shared)))
            except ValueError:
                continue  # the heads are too small for the encoding
            expected = {q_norm: (rope.head_dim,), freqs: tuple(rope.freqs.shape)}
            if all(expected[key] == shape for key, shape in shapes.items()):
                fitting.setdefault(heads, rope)
    if len(fitting) != 1:
        described = f', head_dim {head_dim}' if head_dim else ''
        described += ''.join(f', {key} {shape}' for key, shape in shapes.items())
        raise ValueError(
            f'num_heads={num_heads} does not fit the state dict of {name!r} (width {width}{described}).' if not fitting
            else f'num_heads must be given: {name!r} of width {width}{described} fits '
                 f'{", ".join(map(str, fitting))} heads.')
    rope = next(iter(fitting.values())).to_empty(device='cpu')
    rope.load_state_dict({key: state_dict[f'{prefix}{key}'] for key in rope.state_dict()})
    rope.init_non_persistent_buffers()
    return rope


def _value(text: str, default: Any) -> Any:
    """The value of an option as `signature.format_signature` wrote it."""
    if isinstance(default, bool):
        return {'True': True, 'False': False}[text]
    return type(default)(text)
