"""The payloads of one grid, kept while nothing they were computed from has changed."""
from typing import Any, List, Optional, Tuple

import torch
from torch import Tensor

from .._tracing import plain


class PayloadCache:
    """One entry; `get` returns it only if it would be computed again to the same bits.

    A tensor is taken as unchanged if it is at the same address with the same version counter, dtype and device. The
    entry keeps an alias of the storage alive, so an address cannot be reused. Writes through `.data` do not count
    versions: on the CPU the values themselves are compared as well (a few thousand numbers), on an accelerator that
    would wait for the device in every forward. There a parameter is not cached in a distributed run: FSDP2 gathers
    new values into the same storage and hides that from the version counter.
    """
    __slots__ = ('_entry',)

    def __init__(self) -> None:
        self._entry: Optional[Tuple[Any, Any, List[Tensor], List[Tensor]]] = None

    def get(self, key: Any, *sources: Tensor) -> Optional[List[Tensor]]:
        entry = self._entry  # read once: another thread may replace it
        if entry is None or not _is_plain(sources):
            return None
        entry_key, state, copies, payloads = entry
        if entry_key != key or state != _state(sources):
            return None
        if _can_compare(sources) and not all(torch.equal(s, c) for s, c in zip(sources, copies)):
            return None
        return payloads

    def put(self, key: Any, payloads: List[Tensor], *sources: Tensor) -> None:
        if _is_plain(sources):
            compare = _can_compare(sources)
            with torch.inference_mode(False), torch.no_grad():
                copies = [s.detach().clone() if compare else s.detach() for s in sources]
            aliases = [s.detach() for s in sources]
            self._entry = (key, _state(sources), [*copies, *aliases], payloads)


def _state(tensors: Tuple[Tensor, ...]) -> Tuple[Any, ...]:
    return tuple((t.data_ptr(), t._version, t.dtype, t.device, t.shape) for t in tensors)


def _can_compare(tensors: Tuple[Tensor, ...]) -> bool:
    return all(t.device.type == 'cpu' for t in tensors)


def _is_plain(tensors: Tuple[Tensor, ...]) -> bool:
    """Whether the tensors can be followed: real storage, a version counter, no transform or subclass around them."""
    if not _can_compare(tensors) and any(isinstance(t, torch.nn.Parameter) for t in tensors):
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            return False
    return plain(*tensors) and not any(t.is_inference() for t in tensors)
