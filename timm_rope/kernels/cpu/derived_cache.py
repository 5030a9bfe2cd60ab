"""Tables that a route derives from a payload, kept as long as the payload itself.

In evaluation the payloads of a grid are made once and kept (`encodings/_cache.py`). A route that needs them in another
form, such as complex numbers or joined matrices, makes that form once as well and looks it up here.
"""
from typing import Any, Callable, Tuple

from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

LARGEST = 2 ** 21  # numbers in a payload; beyond, the tables of all blocks would take more memory than time

_tables = WeakTensorKeyDictionary()


def is_kept(payload: Tensor) -> bool:
    """Whether what is derived from a payload is kept."""
    return not (payload.requires_grad or payload.is_inference() or payload.ndim > 3 or payload.numel() > LARGEST)


def cached_table(payload: Tensor, make: Callable[..., Any], *args: Any) -> Any:
    """make(payload, *args), from an earlier call with the same payload and arguments if there was one."""
    if not is_kept(payload):
        return make(payload, *args)
    key: Tuple[Any, ...] = (make, args, payload._version)
    known = _tables.get(payload)
    if known is None or key not in known:
        # a payload that has changed leaves no table behind; both directions of a rotation are kept
        known = {k: v for k, v in (known or {}).items() if k[-1] == payload._version}
        known[key] = make(payload, *args)
        _tables[payload] = known
    return known[key]
