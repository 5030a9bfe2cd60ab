"""What a checkpoint of another project is called here: recognised by its keys, converted to the keys of our models.

A layout is one file with one class and one line in `__init__.py`. It sees plain tensors: `unwrap` has taken them out of
the dicts and prefixes that trainers put around them.
"""
from dataclasses import dataclass, field
from typing import Any, ClassVar, Dict, List, Optional, Tuple

import torch
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
        originals: The tensors as they are called in the checkpoint, without what a trainer put around them.
        averaged: Whether these are the averaged (EMA) ones; None where the checkpoint holds one kind alone.
        timm_model: Name and arguments of timm's model of the same function, where it was named.
    """
    layout: str
    tensors: Dict[str, Tensor]
    encoding: Optional[str] = None
    model_args: Dict[str, Any] = field(default_factory=dict)
    ask: Dict[str, str] = field(default_factory=dict)
    left_out: Dict[str, str] = field(default_factory=dict)
    originals: Dict[str, Tensor] = field(default_factory=dict)
    averaged: Optional[bool] = None
    timm_model: Optional[Tuple[str, Dict[str, Any]]] = None


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


def series_of(freqs: Tensor) -> Tuple[float, float]:
    """Scale and temperature of frequencies scale * temperature^(-g / G), g = 0 .. G - 1.

    Raises:
        RuntimeError: They are no such series.
    """
    freqs = freqs.double()
    scale, groups = float(freqs[0]), len(freqs)
    temperature = float((freqs[0] / freqs[-1]) ** (groups / max(groups - 1, 1)))
    expected = scale * temperature ** (-torch.arange(groups, dtype=freqs.dtype, device=freqs.device) / groups)
    if not torch.allclose(freqs, expected, rtol=1e-4):
        raise RuntimeError(f'Frequencies {freqs.tolist()} are no geometric series, no model here computes them.')
    return float(f'{scale:.4g}'), float(f'{temperature:.4g}')


def interleaved(head_dim: int, half: bool, y_first: bool) -> Tensor:
    """Where the channels of a head of `axial` are in one of another project.

    Args:
        head_dim: Channels of a head, a multiple of 4.
        half: Whether a pair there is channels k and k + head_dim / 2, instead of 2 k and 2 k + 1.
        y_first: Whether the first pairs there turn with y.
    """
    if head_dim % 4:
        raise RuntimeError(f'Heads of {head_dim} channels, no multiple of 4, are divided otherwise there than here.')
    channels = torch.arange(head_dim)
    pairs = channels.view(2, -1).T if half else channels.view(-1, 2)
    return (pairs.roll(head_dim // 4, 0) if y_first else pairs).flatten()


def reorder_heads(tensors: Dict[str, Tensor], order: Tensor) -> Dict[str, Tensor]:
    """Another order of the channels of each head, of queries and keys alike: their products stay the same."""
    out, head_dim = dict(tensors), len(order)
    for key, value in tensors.items():
        if key.endswith(('.attn.qkv.weight', '.attn.qkv.bias')):
            q, k, v = (part.unflatten(0, (-1, head_dim)) for part in value.chunk(3))
            out[key] = torch.cat((q[:, order], k[:, order], v)).flatten(0, 1)
        elif key.endswith(('.attn.q_norm.weight', '.attn.k_norm.weight', '.attn.q_norm.bias', '.attn.k_norm.bias')):
            out[key] = value[order]
    return out


def count_blocks(tensors: Dict[str, Tensor], prefix: str = 'blocks.') -> int:
    """Number of different n in keys that start with `prefix`n."""
    return len({key[len(prefix):].split('.')[0] for key in tensors if key.startswith(prefix)})


def first(names: List[str], count: int = 6) -> str:
    """The first names of a list, and how many more there are."""
    return ', '.join(names[:count]) + (f' and {len(names) - count} more' if len(names) > count else '')
