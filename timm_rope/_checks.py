"""Checks of user input. Every message names the argument, the value given and what would be right."""
import math
from numbers import Integral, Real
from typing import Any, Sequence, Tuple


def check_integer(value: Any, name: str, minimum: int = 1) -> int:
    """A plain integer of at least `minimum`."""
    if isinstance(value, bool) or not isinstance(value, Integral) or value < minimum:
        raise ValueError(f'{name} must be an integer of at least {minimum}, got {value!r}.')
    return int(value)


def check_size(value: Any, name: str) -> Tuple[int, int]:
    """(height, width) of positive integers; one integer, alone or in a list, is both."""
    items = list(value) if isinstance(value, (tuple, list)) else [value]
    if len(items) not in (1, 2):
        raise ValueError(f'{name} must be an integer or (height, width), got {value!r}.')
    return check_integer(items[0], name), check_integer(items[-1], name)


def check_positive(value: Any, name: str) -> float:
    """A finite number above zero."""
    if isinstance(value, bool) or not isinstance(value, Real) or not math.isfinite(value) or value <= 0:
        raise ValueError(f'{name} must be a positive finite number, got {value!r}.')
    return float(value)


def check_real(value: Any, name: str) -> float:
    """A finite number."""
    if isinstance(value, bool) or not isinstance(value, Real) or not math.isfinite(value):
        raise ValueError(f'{name} must be a finite number, got {value!r}.')
    return float(value)


def check_choice(value: Any, choices: Sequence[str], name: str) -> str:
    """One of `choices`."""
    if value not in choices:
        raise ValueError(f'{name} must be one of {", ".join(map(repr, choices))}, got {value!r}.')
    return value


def check_flag(value: Any, name: str) -> bool:
    """True or False."""
    if not isinstance(value, bool):
        raise ValueError(f'{name} must be True or False, got {value!r}.')
    return value


def check_flags(**flags: Any) -> None:
    """Each True or False: of `false` on a command line timm makes a word, which would be true."""
    for name, value in flags.items():
        check_flag(value, name)


def check_group(head_dim: Any, size: int, encoding: str) -> int:
    """How many groups of `size` channels fit into a head; at least one must."""
    if check_integer(head_dim, 'head_dim') < size:
        raise ValueError(f'head_dim must be at least {size} for {encoding!r}, got {head_dim}.')
    return head_dim // size


def check_share(value: Any, name: str) -> float:
    """A number from 0 to 1."""
    if isinstance(value, bool) or not isinstance(value, Real) or not 0 <= float(value) <= 1:
        raise ValueError(f'{name} must be a number from 0 to 1, got {value!r}.')
    return float(value)
