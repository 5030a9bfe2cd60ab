"""The name and options of an encoding as text, e.g. 'spherical(coords=cells,order=yx,temperature=100)'.

Saved with the weights as a uint8 tensor, which every checkpoint format can hold.
"""
import re
from typing import Any, Dict, Optional, Tuple

from torch import Tensor


def format_signature(name: str, options: Dict[str, Any]) -> str:
    """Text of a name and its options; numbers without trailing zeros, so that 100 and 100.0 agree."""
    items = ','.join(
        f'{key}={format(value, ".12g") if isinstance(value, (int, float)) and not isinstance(value, bool) else value}'
        for key, value in sorted(options.items()))
    return f'{name}({items})'


def read_signature(value: Any) -> Optional[str]:
    """Text of a saved signature; None if there is none or it cannot be read (meta device, uninitialised bytes)."""
    if not isinstance(value, Tensor) or value.is_meta:
        return None
    text = bytes(value.detach().cpu().tolist()).decode('ascii', errors='replace')
    return text if parse_signature(text) is not None else None


def signature_conflicts(saved: str, current: str) -> str:
    """Why two signatures describe different functions, or ''. Options that only one of them names do not count."""
    saved_parts, current_parts = parse_signature(saved), parse_signature(current)
    if saved_parts is None or current_parts is None:
        return ''
    if saved_parts[0] != current_parts[0]:
        return f'{saved_parts[0]!r} is not {current_parts[0]!r}'
    ours = current_parts[1]
    return ', '.join(
        f'{key} is {value} there and {ours[key]} here'
        for key, value in saved_parts[1].items() if ours.get(key, value) != value)


def parse_signature(text: str) -> Optional[Tuple[str, Dict[str, str]]]:
    """Name and options of a signature, None if it is none."""
    match = re.fullmatch(r'(\w+)\(([^()]*)\)', text)
    if match is None:
        return None
    return match[1], dict(item.split('=', 1) for item in match[2].split(',') if '=' in item)
