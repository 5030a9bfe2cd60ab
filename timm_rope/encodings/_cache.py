"""The payloads of the grids that were used last, kept while nothing they were computed from has changed."""
from typing import Any, Dict, List, NamedTuple, Optional, Tuple

import torch
from torch import Tensor, nn

from .._tracing import is_exporting, plain
from ..positions.coordinates import Grid, to_grid

BYTES = 2 ** 28  # of payloads that are kept beside those of the last grid: images of a few sizes may take turns


class _Entry(NamedTuple):
    key: Any
    state: Any
    copies: List[Tensor]
    payloads: List[Tensor]


class PayloadCache:
    """`get` returns payloads only if they would be computed again to the same bits.

    A tensor is taken as unchanged if it is at the same address with the same version counter, dtype and device. An
    entry keeps an alias of the storage alive, so an address cannot be reused. Writes through `.data` do not count
    versions: on the CPU the values themselves are compared as well (a few thousand numbers), on an accelerator that
    would wait for the device in every forward. There a parameter is not cached in a distributed run: FSDP2 gathers
    new values into the same storage and hides that from the version counter.

    The last grid is always kept, whatever its size; the ones used before it up to 256 MiB in all.
    """
    __slots__ = ('_entries',)

    def __init__(self) -> None:
        self._entries: Tuple[_Entry, ...] = ()  # last used first; replaced as a whole, since threads may share it

    def get(self, key: Any, *sources: Tensor) -> Optional[List[Tensor]]:
        entries = self._entries
        if not entries or not _is_plain(sources):
            return None
        for entry in entries:
            if entry.key == key:
                if not _is_current(entry, sources):
                    return None
                if entry is not entries[0]:
                    self._entries = (entry, *(e for e in entries if e is not entry))
                return entry.payloads
        return None

    def put(self, key: Any, payloads: List[Tensor], *sources: Tensor) -> None:
        if not _is_plain(sources) or not plain(*payloads):
            return  # what is made inside a transform of torch.func is valid no longer than that
        compare = _can_compare(sources)
        with torch.inference_mode(False), torch.no_grad():
            copies = [s.detach().clone() if compare else s.detach() for s in sources]
        aliases = [s.detach() for s in sources]
        kept, room = [_Entry(key, _state(sources), [*copies, *aliases], payloads)], BYTES - _size(payloads)
        for entry in self._entries:
            if entry.key != key and _is_current(entry, sources):
                room -= _size(entry.payloads)
                if room < 0:
                    break
                kept.append(entry)
        self._entries = tuple(kept)


def _is_current(entry: _Entry, sources: Tuple[Tensor, ...]) -> bool:
    if entry.state != _state(sources):
        return False
    return not _can_compare(sources) or all(torch.equal(s, c) for s, c in zip(sources, entry.copies))


def _size(payloads: List[Tensor]) -> int:
    """Bytes of payloads, of which blocks may share one."""
    return sum({p.untyped_storage().data_ptr(): p.untyped_storage().nbytes() for p in payloads}.values())


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


def _is_traced(grid_size: Any, dims: int) -> bool:
    """Whether FX traces these sizes; refuses what holds none."""
    if not isinstance(grid_size, torch.fx.Proxy) and (
            not isinstance(grid_size, (tuple, list)) or len(grid_size) != dims):
        to_grid(grid_size, 'grid_size', dims)
    return isinstance(grid_size[0], torch.fx.Proxy)


class KeepsPayloads(nn.Module):
    """Part of `RotaryEncoding` that computes payloads once for each grid, where they can be computed once."""
    freqs: Tensor
    reference_grid: Tensor
    depth: int
    dims: int
    scaling: str
    _augmented: bool
    _cache: PayloadCache

    def _payloads(self, grid: List[int], num_prefix_tokens: int) -> List[Tensor]:
        raise NotImplementedError

    @torch.jit.unused
    def _is_recorded(self, grid_size: Grid) -> bool:
        """Whether the graph that is being recorded is meant for another runtime, or is no more than traced."""
        return is_exporting() or torch.jit.is_tracing() or _is_traced(grid_size, self.dims)

    @torch.jit.unused
    def _is_eager(self, grid_size: Grid) -> bool:
        """False where a graph is being recorded (compile, export, FX, jit.trace) and sizes may be symbols."""
        return not (torch.compiler.is_compiling() or torch.jit.is_tracing() or _is_traced(grid_size, self.dims))

    @torch.jit.unused
    def _cached_payloads(self, grid_size: Grid, num_prefix_tokens: int) -> List[Tensor]:
        self.last_grid = grid_size  # for blocks that are run alone
        if (torch.is_grad_enabled() and self.freqs.requires_grad) or (self._augmented and self.training):
            return self._payloads(list(grid_size), num_prefix_tokens)
        key = (grid_size, num_prefix_tokens, self.depth, self.scaling)
        payloads = self._cache.get(key, self.freqs, self.reference_grid)
        if payloads is None:
            # outside inference mode, since what is made inside it could not be used in training later
            with torch.inference_mode(False), torch.no_grad():
                payloads = self._payloads(list(grid_size), num_prefix_tokens)
            self._cache.put(key, payloads, self.freqs, self.reference_grid)
        return list(payloads)

    def __getstate__(self) -> Dict[str, Any]:
        return {**self.__dict__, '_cache': PayloadCache()}

    def _replicate_for_data_parallel(self):
        # replicas hold fresh tensors in every forward and run in threads: they share no cache
        replica = super()._replicate_for_data_parallel()
        replica._cache = PayloadCache()
        return replica
