"""The name and options of an encoding as text, e.g. 'spherical(coords=cells,order=yx,temperature=100)@00014x00014'.

The text is saved with the weights, and people do arithmetic on weights: they average checkpoints, keep a moving
average, cast to half precision. So it is saved as one floating point number for each bit, 1 or -1, which every dtype
holds exactly. Any average of equal texts is the text again, and an average of different ones is seen: where they
differ, a number lies between -1 and 1. After the '@' stands the reference grid, so
that an average of two grids is seen as well.
"""
import re
from typing import Any, Dict, Optional, Sequence, Tuple

import torch
from torch import Tensor

TOLERANCE = 0.1  # what averaging in low precision may lose; a second text with a weight of 5 % changes a bit by as much
UNKNOWN_GRID = (0, 0)  # any grid of zeros
LATER = dict(offset='0', registers='0', scale='1')  # options that older signatures do not name, and what they were


def format_signature(name: str, options: Dict[str, Any]) -> str:
    """Text of a name and its options; numbers without trailing zeros, so that 100 and 100.0 agree."""
    items = ','.join(
        f'{key}={format(value, ".12g") if isinstance(value, (int, float)) and not isinstance(value, bool) else value}'
        for key, value in sorted(options.items()))
    return f'{name}({items})'


def write_signature(text: str, grid: Sequence[int] = UNKNOWN_GRID, device: Any = 'cpu') -> Tensor:
    """A signature as it is saved, (characters, 8) float32: the bits of its ASCII characters, 1 or -1."""
    sizes = 'x'.join(f'{size:05}' for size in grid)
    codes = torch.tensor(list(f'{text}@{sizes}'.encode('ascii')), device=device)
    bits = codes.unsqueeze(-1).bitwise_right_shift(torch.arange(8, device=device)).bitwise_and(1)
    return bits.float() * 2 - 1


def read_signature(value: Any) -> Optional[str]:
    """Name and options of a saved signature; None if there is none or it has no values yet (on the meta device).

    Raises:
        ValueError: It cannot be read; says what that means for the weights.
    """
    text = _text(value)
    return None if text is None else text.partition('@')[0]


def read_signature_grid(value: Any) -> Optional[Tuple[int, ...]]:
    """The reference grid that a saved signature names, None if it names none.

    Raises:
        ValueError: The signature cannot be read.
    """
    sizes = (_text(value) or '').partition('@')[2]
    grid = tuple(int(size) for size in sizes.split('x')) if sizes else UNKNOWN_GRID
    return grid if any(grid) else None


def _text(value: Any) -> Optional[str]:
    if not isinstance(value, Tensor) or value.is_meta:
        return None
    saved = value.detach().cpu().double()
    if saved.ndim == 2:
        if not bool(((saved.abs() - 1).abs() <= TOLERANCE).all()):
            raise ValueError(
                'rope.signature, the name of the encoding that is saved with the weights, cannot be read: they are an '
                'average of weights of different encodings, options or reference grids, or damaged.')
        codes = ((saved > 0) * 2 ** torch.arange(saved.shape[1], device='cpu')).sum(-1)
    else:  # as bytes, by versions before 0.2
        codes = saved.round()
    text = ''.join(chr(int(code)) if 0 <= code < 128 else '?' for code in codes.flatten().tolist())
    if parse_signature(text) is None:
        raise ValueError(
            f'rope.signature, the name of the encoding that is saved with the weights, cannot be read: it is {text!r}. '
            f'The weights are damaged, or an average of weights of different encodings.')
    return text


def signature_conflicts(saved: str, current: str) -> str:
    """Why two signatures describe different functions, or ''. Options that only one of them names do not count."""
    saved_parts, current_parts = parse_signature(saved), parse_signature(current)
    if saved_parts is None or current_parts is None:
        return ''
    if saved_parts[0] != current_parts[0]:
        return f'{saved_parts[0]!r} is not {current_parts[0]!r}'
    ours, theirs = current_parts[1], {**LATER, **saved_parts[1]}
    return ', '.join(
        f'{key} is {value} there and {ours[key]} here'
        for key, value in theirs.items() if ours.get(key, value) != value)


def parse_signature(text: str) -> Optional[Tuple[str, Dict[str, str]]]:
    """Name and options of a signature, None if it is none."""
    match = re.fullmatch(r'(\w+)\(([^()]*)\)(@\d+(x\d+)*)?', text)
    if match is None:
        return None
    return match[1], dict(item.split('=', 1) for item in match[2].split(',') if '=' in item)
