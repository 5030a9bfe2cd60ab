"""Counts that do not depend on the clock: bytes moved by operations, bytes kept for the backward pass."""
import contextlib
from typing import Any, Callable, Dict, Iterable, Iterator, List, Set

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

ALLOCATE = {'empty', 'empty_like', 'empty_strided', 'new_empty', 'new_empty_strided'}  # memory, but nothing moved
OVERWRITE = {'copy_', 'fill_', 'zero_'}  # the first argument is written without being read


class Traffic(TorchDispatchMode):
    """Sums the bytes that every operation below it reads and writes: its input and output tensors, views left out.

    A tensor that is changed in place counts twice, broadcast axes count once. Caches are not modelled, and kernels that
    are launched past torch's dispatcher (Triton, code made by Inductor) are not seen.
    """
    only_counts = True  # it keeps no tensor, so that ours may be changed in place as without it

    def __init__(self) -> None:
        super().__init__()
        self.bytes = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        self.bytes += moved_bytes(func, args, kwargs, out)
        return out


def moved_bytes(func: Any, args: Any, kwargs: Dict[str, Any], out: Any) -> int:
    """Bytes that one operation reads and writes."""
    name = func._schema.name.removeprefix('aten::')
    read = _tensors((args, kwargs))
    written = _tensors(out)
    if name in ALLOCATE or not written:
        return 0
    if not func._schema.is_mutable:
        memory = {_storage(t) for t in read}
        written = [t for t in written if _storage(t) not in memory]
        if not written:
            return 0  # a view
    elif name in OVERWRITE:
        read = read[1:]
    elif 'out' in kwargs:
        read = _tensors((args, {k: v for k, v in kwargs.items() if k != 'out'}))
    return sum(map(_bytes, read)) + sum(map(_bytes, written))


def _tensors(tree: Any) -> List[Tensor]:
    return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, Tensor)]


def _storage(tensor: Tensor) -> int:
    return tensor.untyped_storage().data_ptr()


def _bytes(tensor: Tensor) -> int:
    elements = 1
    for size, stride in zip(tensor.shape, tensor.stride()):
        elements *= size if stride or not size else 1
    return elements * tensor.element_size()


@contextlib.contextmanager
def saved_for_backward(parameters: Iterable[Tensor]) -> Iterator[Callable[[], int]]:
    """Count the memory that autograd keeps from the forward pass inside this context, parameters left out.

    Whole storages count, each once: what is kept alive by a view is all of it.
    """
    known: Set[int] = {_storage(parameter) for parameter in parameters}
    kept: Dict[int, Tensor] = {}  # holds them, so that no address is used twice

    def pack(tensor: Tensor) -> Tensor:
        if _storage(tensor) not in known:
            kept.setdefault(_storage(tensor), tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        yield lambda: sum(tensor.untyped_storage().nbytes() for tensor in kept.values())


def per_block(make: Callable[[int], nn.Module], count: Callable[[nn.Module], int]) -> int:
    """What one block adds to a count: that of a model with two blocks less that of a model with one."""
    one, two = count(make(1)), count(make(2))
    return two - one
