"""Errors and warnings about weights that do not fit a model, in the same words for ViT and Swin.

In come a model and a state dict or recognised weights; the functions raise, or return the reason as a sentence.
"""
import logging
from typing import Any, Callable, Dict, Iterable, List, Tuple

from torch import Tensor

from ..encodings import RotaryEncoding
from ..encodings._signature import read_signature, signature_conflicts
from .layouts import Weights, first

_logger = logging.getLogger(__name__)

NEVER = ('\0',)  # str.startswith takes an empty tuple for "no", but an empty string for "always"


def other_encoding(weights: Weights, tensors: Dict[str, Tensor], encodings: Dict[str, RotaryEncoding]) -> str:
    """How the encoding of weights differs from a model's, or ''.

    Args:
        weights: What the checkpoint is; its encoding None is not compared by name.
        tensors: In our keys.
        encodings: Those of the model by the prefix of their keys ('rope.'); all have one name and options.
    """
    name = next((rope.name for rope in encodings.values()), 'none')
    if weights.encoding is not None and weights.encoding != name:
        return f'holds {_called(weights.encoding)}, the model has {_called(name)}'
    for prefix, rope in encodings.items():
        saved = read_signature(tensors.get(f'{prefix}signature'))
        conflict = signature_conflicts(saved, rope.signature_of(rope.options, rope.head_dim)) if saved else ''
        if conflict:
            return f'holds the rotary encoding {saved}: {conflict}'
    return ''


def _called(encoding: str) -> str:
    return 'no rotary encoding' if encoding == 'none' else f'the rotary encoding {encoding!r}'


def shape_of(value: Any) -> Any:
    """Shape of a tensor; of anything else the name of its type."""
    return tuple(value.shape) if hasattr(value, 'shape') else type(value).__name__


def refuse_mismatches(
        model: Any,
        state_dict: Dict[str, Any],
        prefix: str,
        strict: bool,
        explain: Callable[[], str],
        adapted: Tuple[str, ...] = (),
        compared: Callable[[str, Any], Any] = lambda key, value: shape_of(value),
        layout: str = 'state_dict',
) -> None:
    """Raise with the first keys that do not match. Signatures may: the encoding replaces them, of any length.

    Args:
        model: Model of ours.
        state_dict: What is to be loaded.
        prefix: Of the model's keys.
        strict: Whether keys must match exactly; shapes always must.
        explain: Gives one sentence on what differs most.
        adapted: Beginnings of keys that may differ, since they are still to be adapted.
        compared: Key and value -> what must agree.
        layout: Of the weights.

    Raises:
        RuntimeError: Some do not match.
    """
    ignored = tuple(prefix + key for key in adapted) or NEVER

    def checked(keys: Dict[str, Any]) -> Dict[str, Any]:
        return {k: v for k, v in keys.items() if not k.startswith(ignored) and not k.endswith('rope.signature')}

    expected = checked({f'{prefix}{k}': v for k, v in model.state_dict().items()})
    given = checked({k: v for k, v in state_dict.items() if k.startswith(prefix)})
    reasons = [
        f'{k} is {shape_of(given[k])}, the model needs {shape_of(v)}' for k, v in expected.items()
        if k in given and compared(k, given[k]) != compared(k, v)]
    if strict:
        reasons += [f'missing {k} {shape_of(v)}' for k, v in expected.items() if k not in given]
        reasons += [f'unexpected {k} {shape_of(v)}' for k, v in given.items() if k not in expected]
    if reasons:
        names = sorted(key[len(prefix):] for key in state_dict if key.startswith(prefix))
        why = explain() if any(f'{prefix}{key}' in state_dict for key in model.state_dict()) else (
            f'there is none of the keys of the model, but {first(names, 3) or "nothing"}: pass the weights themselves, '
            f'without what a trainer puts around them or in front of their keys.')
        raise RuntimeError(
            f'Error(s) in loading {layout} for {type(model).__name__}: {why}\n\t' + '\n\t'.join(reasons[:8])
            + (f'\n\t... and {len(reasons) - 8} more' if len(reasons) > 8 else ''))


def explain(
        model: Any,
        state_dict: Dict[str, Any],
        prefix: str,
        part: Tuple[str, bool, bool],
        depth: Tuple[str, Any, Any],
) -> str:
    """One sentence on what differs most between a checkpoint and a model: encoding, another part, width or depth.

    Args:
        model: Model of ours.
        state_dict: What is to be loaded.
        prefix: Of the model's keys.
        part: What may be there beside the encoding, in words; whether the checkpoint has it; whether the model has it.
        depth: What is counted, in words; how many the checkpoint has; how many the model has.
    """
    rotary = any(key.startswith(prefix) and 'rope.' in key for key in state_dict)
    if rotary != (model.rope is not None):
        here = 'none' if model.rope is None else repr(model.rope.name)
        return f'the checkpoint holds {"a" if rotary else "no"} rotary encoding, the model has {here}.'
    what, theirs, ours = part
    if theirs != ours:
        return f'the checkpoint has {"a" if theirs else "no"} {what}, the model has {"one" if ours else "none"}.'
    stem = state_dict.get(f'{prefix}patch_embed.proj.weight')
    if isinstance(stem, Tensor) and stem.shape[0] != model.embed_dim:
        return f'the checkpoint is {stem.shape[0]} wide, the model {model.embed_dim}.'
    what, theirs, ours = depth
    return 'the keys do not match.' if theirs == ours else f'the checkpoint has {theirs} {what}, the model {ours}.'


def refuse_other_structure(weights: Weights, model: Any) -> None:
    """Compare what stands in no key or shape with a ViT that was built before its weights were seen.

    `create_model` builds a model as its weights need it; `load_state_dict` can only refuse.

    Raises:
        RuntimeError: Another number of heads or another norm; says with which arguments to build the model.
    """
    block, args = model.blocks[0], weights.model_args
    wrong = []
    if args.get('num_heads', block.attn.num_heads) != block.attn.num_heads:
        wrong.append('num_heads')
    if (getattr(block.norm1, 'name', '') == 'spiral_rms') != (args.get('norm_layer') == 'spiral_rms'):
        wrong.append('norm_layer')  # of any RMS norm the keys are the same
    if 'norm_eps' in args and args['norm_eps'] != getattr(block.norm1, 'eps', None):
        wrong.append('norm_eps')
    if wrong:
        needed = ', '.join(f'{key}={args.get(key)!r}' for key in wrong)
        raise RuntimeError(f'{weights.layout} weights need a model that is built with {needed}.')
    for key, why in weights.ask.items():
        value = model.rope.options[key.removeprefix('rope_')]
        _logger.warning(f'{weights.layout} weights do not tell {key}, the model has {value!r}: {why}.')


def report_left(missing: List[str], unexpected: List[str]) -> None:
    """Say which keys a load with strict=False left as they were, and which it did not use."""
    if missing or unexpected:
        # a head of another number of classes is what is usually meant
        level = logging.INFO if all(key.startswith('head.') for key in missing + unexpected) else logging.WARNING
        _logger.log(
            level, f'Loaded with strict=False. Left as they were: {", ".join(missing) or "none"}. Not used: '
            f'{", ".join(unexpected) or "none"}.')


def warm_start_hint(layout: str, reason: str) -> RuntimeError:
    """What to raise for weights of another encoding."""
    return RuntimeError(
        f'The checkpoint ({layout}) {reason}: build the model with the encoding and options of the checkpoint, or say '
        f'rope_warm_start=True to take over everything but the rotation.')


def names_of(keys: Iterable[str]) -> str:
    """All keys, those of blocks that differ only in their numbers once; not signatures, which come with others."""
    seen: List[str] = []
    for key in keys:
        short = '.'.join('*' if part.isdigit() else part for part in key.split('.'))
        if short not in seen and not short.endswith(('rope.signature', 'pos_embed_grid')):
            seen.append(short)
    return ', '.join(seen) or 'nothing'
