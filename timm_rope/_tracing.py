"""Who is looking on: recorders, transforms and hooks. The only module that asks torch through private names.

Comes in: nothing, or the tensors or the module in question. Goes out: a yes or no by which the package chooses between
an operation that is fast and the plain formula, which everybody understands.
"""
from types import ModuleType
from typing import Any, Callable, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.module import _global_forward_hooks
from torch.utils._device import DeviceContext
from torch.utils._python_dispatch import _get_current_dispatch_mode_stack

T = TypeVar('T')
_tracer = torch.fx._symbolic_trace
fx_tracing = getattr(_tracer, 'is_fx_symbolic_tracing', _tracer.is_fx_tracing)  # the older one warns by now


def constant_in_graphs(function: Callable[..., T]) -> Callable[..., T]:
    """Dynamo calls this function when it makes a graph, and takes what it returns for a constant.

    As `torch.compiler.assume_constant_result`, which imports dynamo and with it Triton: seconds for everybody.
    """
    function._dynamo_marked_constant = True  # type: ignore[attr-defined]
    return function


def is_exporting() -> bool:
    """Whether `torch.export` is recording."""
    if hasattr(torch.compiler, 'is_exporting'):  # torch 2.7
        return _is_exporting()
    if torch.compiler.is_dynamo_compiling():
        return _dynamo_exports()
    return torch.compiler.is_compiling()


@constant_in_graphs  # dynamo of torch 2.11 takes every compilation for an export
def _is_exporting() -> bool:
    return torch.compiler.is_exporting()


def sdpa_takes_proxies() -> bool:
    """Whether FX can trace attention whose `is_causal` is an argument of the model; torch 2.8 cannot."""
    proxy = torch.fx.Proxy(torch.fx.Graph().placeholder('x'))
    try:
        F.scaled_dot_product_attention(proxy, proxy, proxy, is_causal=proxy)  # type: ignore[arg-type]
    except TypeError:
        return False
    return True


@constant_in_graphs
def _dynamo_exports() -> bool:
    """Whether dynamo is at work for an export: a strict one, which was the default up to torch 2.6."""
    from torch._dynamo.symbolic_convert import InstructionTranslator
    return bool(InstructionTranslator.current_tx().output.export)


@torch.jit.unused
def recording() -> bool:
    """Whether a graph is being recorded for another runtime (export, ONNX), which may know fewer operators."""
    return torch.jit.is_tracing() or is_exporting()


@torch.jit.unused
def transformed() -> bool:
    """Whether a transform of torch.func or forward-mode AD is active; may be asked in compiled code, too."""
    return _in_a_transform() or forward_mode()


@constant_in_graphs  # dynamo enters transforms for real while it traces, and guards on them
def _in_a_transform() -> bool:
    return torch._C._functorch.peek_interpreter_stack() is not None


@torch.jit.unused
def forward_mode() -> bool:
    """Whether forward-mode AD is active."""
    return torch.autograd.forward_ad._current_level >= 0


def legacy_batched(tensor: Tensor) -> bool:
    """Whether it is a batch of gradients, as torch.autograd.grad(is_grads_batched=True) passes them to a backward."""
    return torch._C._functorch.is_legacy_batchedtensor(tensor)


def plain(*tensors: Tensor) -> bool:
    """Whether all tensors have a storage of their own class: no meta tensor, no subclass, no wrapper of torch.func."""
    return all(
        type(t) in (Tensor, nn.Parameter)
        and not t.is_meta
        and not torch._C._functorch.is_functorch_wrapped_tensor(t)
        for t in tensors)


def writable(*tensors: Tensor) -> bool:
    """Whether the tensors are memory that may be written to now: nothing is recorded, compiled or transformed."""
    if torch.compiler.is_compiling() or recording() or forward_mode():
        return False
    if not all(getattr(mode, 'only_counts', False) for mode in _get_current_dispatch_mode_stack()):
        return False  # a mode may keep what it saw, as selective activation checkpointing does
    modes = torch._C._len_torch_function_stack()  # of functions; `with torch.device(...)` is one that keeps nothing
    if modes and any(type(torch._C._get_function_stack_at(i)) is not DeviceContext for i in range(modes)):
        return False
    return plain(*tensors)


def unobserved(module: nn.Module) -> bool:
    """Whether nobody sees what a linear layer or an identity returns.

    That is: no forward hook, and no `forward` put into this module or into its class, for the whole process. What is
    compiled or traced is never written to; there only the first is asked, since a tracer patches classes itself.
    """
    # dynamo of torch 2.8 cannot follow `vars`
    if 'forward' in module.__dict__ or module._forward_hooks or _global_forward_hooks:
        return False
    if torch.compiler.is_compiling():
        return True
    cls = type(module)
    stock = (
        _defined_in(cls.forward, torch.nn.modules.linear) and F.linear is torch._C._nn.linear
        and _defined_in(cls.__call__, torch.nn.modules.module) and _defined_in(cls._call_impl, torch.nn.modules.module))
    return stock or fx_tracing()


def _defined_in(function: Any, module: ModuleType) -> bool:
    # what was put in its place may carry its name, and may have been put there before this package was imported
    return getattr(function, '__globals__', None) is module.__dict__
