"""What a checkpoint of another project is called here: recognised by its keys, converted to the keys of our models.

A layout is one file with one class and one line in `__init__.py`. It sees plain tensors: `unwrap` has taken them out of
the dicts and prefixes that trainers put around them.
"""
from dataclasses import dataclass, field
from typing import Any, ClassVar, Dict, List, Optional, Tuple

from torch import Tensor

from ...encodings import ENCODINGS
from ...encodings._signature import format_signature, parse_signature, write_signature

# what trainers call the weights in their checkpoints: (raw, averaged)
CONTAINERS = (('state_dict', 'state_dict_ema'), ('model', 'model_ema'), ('module', 'module_ema'))
PREFIXES = ('module.', '_orig_mod.', 'model.')


@dataclass
class Weights:
    """What a checkpoint holds, in the keys of our models.

    Attributes:
        layout: Name of the layout it was recognised as.
        tensors: Key of ours -> tensor. Rotary weights carry `rope.signature` where the layout tells their encoding.
        encoding: Name of the rotary encoding, 'none' without one, None if these keys cannot tell.
        model_args: Constructor arguments that differ from those of our models of the same size.
        ask: Constructor argument that must be chosen -> why the checkpoint leaves it open.
        left_out: Key of the checkpoint -> why no model needs it.
    """
    layout: str
    tensors: Dict[str, Tensor]
    encoding: Optional[str] = None
    model_args: Dict[str, Any] = field(default_factory=dict)
    ask: Dict[str, str] = field(default_factory=dict)
    left_out: Dict[str, str] = field(default_factory=dict)


class Layout:
    """How one project names its weights.

    Attributes:
        name: As users know it.
        marks: Keys that every checkpoint of it holds.
        prefer_average: Whether its authors report the averaged (EMA) weights where a file holds both.
    """
    name: ClassVar[str] = ''
    marks: ClassVar[Tuple[str, ...]] = ()
    prefer_average: ClassVar[bool] = True

    def differences(self, tensors: Dict[str, Tensor]) -> List[str]:
        """What keeps these keys from being of this layout; empty if they are."""
        return [f'missing {mark}' for mark in self.marks if mark not in tensors]

    def convert(self, tensors: Dict[str, Tensor], extra: Dict[str, Any]) -> Weights:
        """Rename and reshape.

        Args:
            tensors: All tensors of the checkpoint; not changed.
            extra: Everything else that stood beside them, such as the training arguments `args`.

        Raises:
            RuntimeError: They are of this layout but of a kind that no model of ours computes; says which.
        """
        raise NotImplementedError


def unwrap(checkpoint: Any) -> Tuple[Dict[str, Tensor], Dict[str, Tensor], Dict[str, Any]]:
    """Take the tensors out of a checkpoint.

    Args:
        checkpoint: A state dict, or what a trainer saved around one.

    Returns:
        The tensors without the prefixes of wrappers, the averaged (EMA) ones if there are any, and the rest.

    Raises:
        RuntimeError: No dict, no tensors in it, or one that holds itself.
    """
    extra: Dict[str, Any] = {}
    average: Dict[str, Tensor] = {}
    seen: List[int] = []
    while isinstance(checkpoint, dict):
        if id(checkpoint) in seen:
            raise RuntimeError('The checkpoint holds itself.')
        seen.append(id(checkpoint))
        for raw, averaged in CONTAINERS:
            inner = checkpoint.get(raw, checkpoint.get(averaged))
            if isinstance(inner, dict):
                if isinstance(checkpoint.get(averaged), dict):
                    average = _plain(checkpoint[averaged])
                extra.update({k: v for k, v in checkpoint.items() if k not in (raw, averaged)})
                checkpoint = inner
                break
        else:
            tensors = _plain(checkpoint)
            if not tensors:
                found = ', '.join(map(str, list(checkpoint)[:8])) or 'nothing'
                raise RuntimeError(
                    f'The checkpoint holds no tensors under {", ".join(name for name, _ in CONTAINERS)} or at its top, '
                    f'where it has: {found}.')
            extra.update({k: v for k, v in checkpoint.items() if not isinstance(v, Tensor)})
            return tensors, average, extra
    raise RuntimeError(f'A checkpoint is a dict of tensors, or holds one; this one is a {type(checkpoint).__name__}.')


def _plain(state_dict: Dict[str, Any]) -> Dict[str, Tensor]:
    tensors = {str(k): v for k, v in state_dict.items() if isinstance(v, Tensor) and k != 'n_averaged'}
    stripped = True
    while stripped and tensors:
        stripped = False
        for prefix in PREFIXES:
            if all(key.startswith(prefix) for key in tensors):
                tensors = {key[len(prefix):]: value for key, value in tensors.items()}
                stripped = True
    return tensors


def signature(encoding: str, unknown: Tuple[str, ...] = (), **options: Any) -> Tensor:
    """`rope.signature` of converted weights; it does not name `unknown` options, which then agree with any."""
    text = ENCODINGS[encoding].signature_of(options)
    if unknown:
        _, named = parse_signature(text) or (encoding, {})
        text = format_signature(encoding, {k: v for k, v in named.items() if k not in unknown})
    return write_signature(text)


def rename(tensors: Dict[str, Tensor], *pairs: Tuple[str, str]) -> Dict[str, Tensor]:
    """Replace parts of keys, all pairs in turn."""
    out = {}
    for key, value in tensors.items():
        for old, new in pairs:
            key = key.replace(old, new)
        out[key] = value
    return out


def count_blocks(tensors: Dict[str, Tensor], prefix: str = 'blocks.') -> int:
    """Number of different n in keys that start with `prefix`n."""
    return len({key[len(prefix):].split('.')[0] for key in tensors if key.startswith(prefix)})


def first(names: List[str], count: int = 6) -> str:
    """The first names of a list, and how many more there are."""
    return ', '.join(names[:count]) + (f' and {len(names) - count} more' if len(names) > count else '')
