"""Turning queries and keys where they lie: one op in front of every attention, and the table that picks its route.

`rotate` takes the packed output of the projection, turns queries and keys in place and returns views of it. Nothing is
stored for the backward pass that attention does not store already: a rotation is undone by its transpose, and the
gradient of learned angles follows from the turned queries and keys. The backward pass writes the three gradients into
one buffer and turns two of them back on the way.

A route is a module with three functions; what they compute is defined by the plain formula, `Rotation.forward`:

    supports(packed, payload, rotation) -> bool
    turn_(packed, payload, rotation)                                    queries and keys of (B, N, 3, H, D), in place
    turn_back(dq, dk, dv, payload, rotation, q, k, payload_grad)        gradients of `packed` and of the payload

The formula itself serves whatever is recorded (compile, export, TorchScript, FX: Inductor makes one kernel of it),
transforms of torch.func, forward-mode derivatives, and everything the table below does not name.
"""
import functools
import importlib
import os
import warnings
from types import ModuleType
from typing import Any, Callable, List, NamedTuple, Optional, Tuple, Type

import torch
from torch import Tensor, nn
from torch.nn.modules.module import _global_forward_hooks
from torch.utils._python_dispatch import _get_current_dispatch_mode_stack

from .._precision import recording, without_autocast
from ..rotations.formulas import BlockRotation, PairRotation, Rotation, TripletRotation

VARIABLE = 'TIMM_ROPE_KERNEL'
ROUTES = ('auto', 'formula', 'inplace', 'triton')
MODULES = {'inplace': '.cpu.inplace', 'triton': '.triton.kernels'}


def few_rows(qkv: Tensor, payload: Tensor, rotation: Rotation) -> bool:
    """Whether a matrix of a larger block turns the queries and keys of one image only, or of two without a gradient."""
    heads = qkv.shape[-1] // (3 * rotation.head_dim) if payload.shape[-3] == 1 else 1
    return 4 < rotation.size <= 8 and qkv.shape[0] * heads <= (1 if torch.is_grad_enabled() else 2)


class Row(NamedTuple):
    """Which route is the fastest for one kind of input, and how that was found out."""
    device: str
    dtypes: Tuple[torch.dtype, ...]  # of queries and keys
    rotation: Type[Rotation]
    route: str
    measured: str
    only: Optional[Callable[[Tensor, Tensor, Rotation], bool]] = None  # where not all such input is meant


FULL, HALF = (torch.float32, torch.float64), (torch.bfloat16, torch.float16)

# Milliseconds for queries and keys of a block of ViT-S, batch 8, forward: in place, the formula. The fastest of some
# runs on two cores of a Xeon with AVX-512; a copy takes 0.35, in half precision 0.14. `python benchmarks/rotation.py`.
TABLE = (
    Row('cpu', FULL, PairRotation, 'inplace', '0.55, 4.7'),
    Row('cpu', FULL, TripletRotation, 'inplace', '1.6, 6.9'),
    Row('cpu', FULL + HALF, BlockRotation, 'formula', '4096 patches of one image: 94, 21; of two: 98, 69', few_rows),
    Row('cpu', FULL, BlockRotation, 'inplace', 'blocks of 2: 2.0, 9.0; of 8: 3.2, 5.1; of 64: 4.9, 7.8'),
    Row('cpu', HALF, PairRotation, 'inplace', '1.5, 4.8'),
    Row('cpu', HALF, TripletRotation, 'inplace', '2.8, 5.4'),
    Row('cpu', HALF, BlockRotation, 'inplace', 'blocks of 8: 5.2, 5.1; less memory in training'),
    Row('cuda', (torch.float32, *HALF), Rotation, 'triton', 'not measured; a third of the bytes of the formula'),
)


def rotate(
        qkv: Tensor,
        payload: Tensor,
        rotation: Rotation,
        num_heads: int,
) -> Tuple[Tensor, Tensor, Tensor]:
    """Rotate the queries and keys of a packed projection and split it.

    The result shares memory with `qkv` where a route turns in place; `qkv` must not be used afterwards.

    Args:
        qkv: (B, N, 3 * H * D), not a leaf that requires a gradient.
        payload: (H or 1, N, W), or (B, H or 1, N, W) where every image has its own positions.
        rotation: How a payload turns.
        num_heads: H.

    Returns:
        Queries, keys and values, (B, H, N, D) each.

    Raises:
        ValueError: TIMM_ROPE_KERNEL names no route.
        RuntimeError: TIMM_ROPE_KERNEL names a route that cannot take this input.
    """
    route = find_route(qkv, payload, rotation, num_heads)
    if route is None:
        q, k, v = unpack(qkv, num_heads)
        return rotation(q, payload), rotation(k, payload), v
    if torch.is_grad_enabled() and (qkv.requires_grad or payload.requires_grad):
        return _Rotate.apply(qkv, payload, rotation, num_heads, route)  # type: ignore[no-any-return]
    return _turned(qkv, payload, rotation, num_heads, route)


def unpack(qkv: Tensor, num_heads: int) -> Tuple[Tensor, Tensor, Tensor]:
    """Queries, keys and values (B, H, N, D) of a packed projection (B, N, 3 * H * D), as views."""
    B, N, C = qkv.shape
    q, k, v = qkv.reshape(B, N, 3, num_heads, C // (3 * num_heads)).permute(2, 0, 3, 1, 4).unbind(0)
    return q, k, v


def owned(output: Tensor, projection: nn.Module) -> Tensor:
    """The output of a projection if nobody else sees it, so that it may be written to; a copy otherwise.

    A hook may keep it, and a wrapped, patched or parametrised projection may need it in its backward pass.
    """
    patched = 'forward' in vars(projection) or '__call__' in vars(projection)  # on this layer alone
    if type(projection) is nn.Linear and not (patched or projection._forward_hooks or _global_forward_hooks):
        return output
    return output.clone()


def does_nothing(module: nn.Module) -> bool:
    """Whether a norm may be left out: no norm at all, and nobody looks at what comes out."""
    return type(module) is nn.Identity and not module._forward_hooks and not _global_forward_hooks


# -- choice

def find_route(qkv: Tensor, payload: Tensor, rotation: Rotation, num_heads: int) -> Optional[ModuleType]:
    """The module that turns this input, None for the plain formula."""
    if not _is_eager(qkv, payload) or (qkv.is_leaf and qkv.requires_grad):
        return None
    forced = kernel_choice()
    name = _listed(qkv, payload, rotation) if forced == 'auto' else forced
    if name == 'formula':
        return None
    route = load_route(name)
    if route is not None and route.supports(_packed(qkv, num_heads), payload, rotation):
        return route
    if forced == 'auto':
        return None
    raise RuntimeError(
        f'{VARIABLE}={forced} cannot rotate {str(qkv.dtype)[6:]} queries on {qkv.device.type} with '
        f'{type(rotation).__name__} and a head_dim of {rotation.head_dim}; {VARIABLE}=auto takes what can.')


def kernel_choice() -> str:
    """The value of the environment variable TIMM_ROPE_KERNEL, 'auto' if it is not set."""
    choice = os.environ.get(VARIABLE) or 'auto'
    if choice not in ROUTES:
        raise ValueError(f'{VARIABLE} must be one of {", ".join(ROUTES)}, got {choice!r}.')
    return choice


@functools.cache
def load_route(name: str) -> Optional[ModuleType]:
    """Module of a route, None where its file or a package it needs is missing, or where it does not run."""
    try:
        route = importlib.import_module(MODULES[name], __name__)
        if hasattr(route, 'probe'):
            route.probe()
    except ImportError:
        return None
    except Exception as error:
        warnings.warn(
            f'The {name} kernels do not run here, so that rotations take longer than they need to: '
            f'{type(error).__name__}: {error}', stacklevel=2)
        return None
    return route


def _listed(qkv: Tensor, payload: Tensor, rotation: Rotation) -> str:
    for row in TABLE:
        if row.device == qkv.device.type and qkv.dtype in row.dtypes and isinstance(rotation, row.rotation):
            if row.only is None or row.only(qkv, payload, rotation):
                return row.route
    return 'formula'


def _is_eager(*tensors: Tensor) -> bool:
    """Whether the tensors are memory that may be written to now: no graph is recorded, nothing is transformed."""
    if torch.compiler.is_compiling() or recording():
        return False
    if torch.autograd.forward_ad._current_level >= 0:
        return False
    if not all(getattr(mode, 'only_counts', False) for mode in _get_current_dispatch_mode_stack()):
        return False  # a mode may keep what it saw, as selective activation checkpointing does
    return all(
        type(t) in (Tensor, nn.Parameter)
        and not t.is_meta
        and not torch._C._functorch.is_functorch_wrapped_tensor(t)
        for t in tensors)


# -- forward and backward

def _packed(qkv: Tensor, num_heads: int) -> Tensor:
    B, N, C = qkv.shape
    return qkv.view(B, N, 3, num_heads, C // (3 * num_heads))


def _turned(
        qkv: Tensor, payload: Tensor, rotation: Rotation, num_heads: int, route: ModuleType,
) -> Tuple[Tensor, Tensor, Tensor]:
    # a product of matrices, or a view of bfloat16 as complex numbers, is not what it says under autocast
    with without_autocast(qkv):
        route.turn_(_packed(qkv, num_heads), payload, rotation)
    return unpack(qkv, num_heads)


class _Rotate(torch.autograd.Function):
    """Forward in place, backward into one fresh buffer."""

    @staticmethod
    def forward(
            ctx: Any, qkv: Tensor, payload: Tensor, rotation: Rotation, num_heads: int, route: ModuleType,
    ) -> Tuple[Tensor, Tensor, Tensor]:
        # views of the detached tensor: what is returned is new to autograd, though the memory is the same
        q, k, v = _turned(qkv.detach(), payload, rotation, num_heads, route)
        ctx.rotation, ctx.route = rotation, route
        # attention keeps the turned queries and keys too, so that they cost nothing here
        ctx.save_for_backward(payload, *((q, k) if ctx.needs_input_grad[1] else ()))
        return q, k, v

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tuple[Optional[Tensor], ...]:
        payload, *turned = ctx.saved_tensors
        dq, dk, dv = grads
        if torch.is_grad_enabled():
            dqkv, dpayload = _differentiable_backward(dq, dk, dv, payload, ctx.rotation, turned)
        else:
            q, k = turned or (None, None)
            with without_autocast(dq):
                dqkv, dpayload = ctx.route.turn_back(
                    dq, dk, dv, payload, ctx.rotation, q, k, ctx.needs_input_grad[1])
        return dqkv.flatten(2), dpayload, None, None, None


def _differentiable_backward(
        dq: Tensor, dk: Tensor, dv: Tensor, payload: Tensor, rotation: Rotation, turned: List[Tensor],
) -> Tuple[Tensor, Optional[Tensor]]:
    """The same gradients by the derivative of the formula, for derivatives of derivatives."""
    def turned_back(y: Tensor) -> Tensor:
        # a rotation is linear and its inverse is its transpose: the derivative at any point
        x = torch.zeros_like(y, requires_grad=True)
        return torch.autograd.grad(rotation(x, payload), x, y, create_graph=True)[0]  # type: ignore[no-any-return]

    dpayload = None
    if turned:
        inputs = [turned_back(y) for y in turned]
        direct = payload.view_as(payload)  # the inputs depend on the payload, too, by way of this very function
        outputs = [rotation(x, direct) for x in inputs]
        dpayload = torch.autograd.grad(outputs, direct, (dq, dk), create_graph=True)[0]
    grads = (turned_back(dq), turned_back(dk), dv)
    return torch.stack([g.transpose(1, 2) for g in grads], dim=2), dpayload
