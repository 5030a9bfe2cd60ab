"""Which route turns a given input: the table of routes, with the measurement beside each row, and the choice by it.

A route is a module that turns queries and keys in place. Comes in: a packed projection, a payload and its rotation.
Goes out: the route to take, or None for the plain formula, `Rotation.forward`, which defines what routes compute. The
formula serves whatever is recorded (compile, export, TorchScript, FX: Inductor makes one kernel of it), transforms of
torch.func, forward-mode derivatives, and everything the table does not name.
"""
import functools
import importlib
import os
import warnings
from typing import Callable, NamedTuple, Optional, Protocol, Tuple, Type, cast

import torch
from torch import Tensor

from .._tracing import writable
from ..rotations import BlockRotation, PairRotation, Rotation, TripletRotation
from . import guard
from .cpu import derived_cache

VARIABLE = 'TIMM_ROPE_KERNEL'
ROUTES = ('auto', 'formula', 'inplace', 'triton')
MODULES = {'inplace': '.cpu.inplace', 'triton': '.triton.kernels'}


class Engine(Protocol):
    """What turns queries and keys and their gradients."""

    def supports(self, packed: Tensor, payload: Tensor, rotation: Rotation) -> bool:
        """Whether the other two functions take such tensors."""

    def turn_(self, packed: Tensor, payload: Tensor, rotation: Rotation) -> None:
        """Turn queries and keys in place.

        Args:
            packed: Queries, keys and values, (B, N, 3, H, D).
            payload: (H or 1, N, W), or (B, H or 1, N, W) where every image has its own positions.
            rotation: How the payload turns.
        """

    def turn_back(
            self, dq: Tensor, dk: Tensor, dv: Tensor, payload: Tensor, rotation: Rotation,
            q: Optional[Tensor], k: Optional[Tensor], payload_grad: bool,
    ) -> Tuple[Tensor, Optional[Tensor]]:
        """Gradient of what `turn_` was given, from the gradients of what it made. Nothing that is given is changed.

        Args:
            dq: Gradient of the turned queries, (B, H, N, D).
            dk: Gradient of the turned keys.
            dv: Gradient of the values.
            payload: As in the forward pass.
            rotation: As in the forward pass.
            q: Turned queries (B, H, N, D), needed for the gradient of the payload.
            k: Turned keys.
            payload_grad: Whether the payload needs a gradient.

        Returns:
            Gradients of `packed`, (B, N, 3, H, D), and of the payload or None.
        """


class Route(Engine, Protocol):
    """An engine that the table can name."""
    NAME: str
    MADE_WITH: str  # and its version, for warnings
    ALL_OR_NOTHING: bool  # whether a `turn_` that raises an error has left its input as it was

    def turned_copy(self, packed: Tensor, payload: Tensor, rotation: Rotation) -> Tuple[Tensor, Tensor, Tensor]:
        """Turned queries and keys and a copy of the values, (B, H, N, D) each, in three memories (B, N, H, D).

        Arguments are those of `turn_`; nothing that is given is changed.
        """


def few_rows(qkv: Tensor, payload: Tensor, rotation: Rotation) -> bool:
    """Whether there is little to turn by each matrix, so that what a route does first costs more than it gains.

    That is: blocks of 5 to 8, and queries and keys of one image only, or of two where no gradient is needed; blocks of
    3, one head of one image, and matrices whose turns are not kept.
    """
    heads = qkv.shape[-1] // (3 * rotation.head_dim) if payload.shape[-3] == 1 else 1
    if rotation.size == 3:
        one = payload.ndim == 4 or qkv.shape[0] == 1
        return heads == 1 and one and not derived_cache.is_kept(payload)
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
    Row('cpu', FULL, TripletRotation, 'inplace', '1.6, 6.9'),  # an odd head_dim takes the formula
    Row('cpu', FULL + HALF, BlockRotation, 'formula',
        'blocks of 8, 4096 patches instead of 196: one image 94, 21; two images 98, 69', few_rows),
    Row('cpu', FULL, BlockRotation, 'inplace',
        'blocks of 2: 2.0, 9.0; of 8: 3.2, 5.1; of 64: 4.9, 7.8; of 3, one core of an EPYC: 0.66, 6.9'),
    Row('cpu', HALF, PairRotation, 'inplace', '1.5, 4.8'),
    Row('cpu', HALF, TripletRotation, 'inplace', '2.8, 5.4'),
    Row('cpu', HALF, BlockRotation, 'inplace', 'blocks of 8: 5.2, 5.1; less memory in training'),
    Row('cuda', (torch.float32, *HALF), Rotation, 'triton',
        'an H100, batch 256, bf16: pairs 0.061, 0.97; triplets 0.081, 1.5; blocks of 8: 0.065, 0.76; a copy 0.055'),
)


def find_route(qkv: Tensor, payload: Tensor, rotation: Rotation, num_heads: int) -> Optional[Route]:
    """The module that turns this input, None for the plain formula.

    Raises:
        ValueError: TIMM_ROPE_KERNEL names no route.
        RuntimeError: TIMM_ROPE_KERNEL names a route that cannot take this input or does not work on its device.
    """
    if not writable(qkv, payload) or (qkv.is_leaf and qkv.requires_grad):
        return None
    forced = kernel_choice()
    name = listed_route(qkv, payload, rotation) if forced == 'auto' else forced
    if name == 'formula':
        return None
    route = load_route(name)
    packed = packed_view(qkv, num_heads)
    if route is not None and route.supports(packed, payload, rotation):
        return route if guard.may_turn(route, packed, payload, rotation, forced != 'auto') else None
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
def load_route(name: str) -> Optional[Route]:
    """Module of a route, None where its file or a package it needs is missing or broken."""
    try:
        route = importlib.import_module(MODULES[name], __package__)
    except ImportError:
        return None
    except Exception as error:
        warnings.warn(
            f'The rotation kernels {name!r} cannot be imported, so that rotations take longer than they need to: '
            f'{type(error).__name__}: {error}', stacklevel=2)
        return None
    return cast(Route, route)


def listed_route(qkv: Tensor, payload: Tensor, rotation: Rotation) -> str:
    """Name of the route in the first row of the table that fits."""
    for row in TABLE:
        if row.device == qkv.device.type and qkv.dtype in row.dtypes and isinstance(rotation, row.rotation):
            if row.only is None or row.only(qkv, payload, rotation):
                return row.route
    return 'formula'


def packed_view(qkv: Tensor, num_heads: int) -> Tensor:
    """(B, N, 3 * H * D) -> (B, N, 3, H, D)."""
    B, N, C = qkv.shape
    return qkv.view(B, N, 3, num_heads, C // (3 * num_heads))
