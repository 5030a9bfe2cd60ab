"""What happens to a kernel that does not work on a device: one warning and the plain formula, never the end of a run.

A kernel that passes all tests may still fail on a device that nobody has tried it on: another GPU, driver or compiler.
So before a route turns the first tensors of a kind, `may_turn` lets it turn a few random tokens on the same device,
forward and backward, and compares them with the formula in float64. A route that raises an error or returns wrong
values, there or later in the run, is switched off on that device for the rest of the process.

Comes in: a route and the tensors it is to turn. Goes out: whether it may.
"""
import threading
import warnings
from typing import TYPE_CHECKING, Any, Dict, List, Set, Tuple

import torch
from torch import Tensor

from ..rotations import BlockRotation, Rotation

if TYPE_CHECKING:
    from .routes import Route

IMAGES, ROWS, COLUMNS = 2, 2, 3  # of a trial

_passed: Set[Tuple[Any, ...]] = set()  # kinds of input for which a route gave the right values
_off: Dict[Tuple[str, torch.device], str] = {}  # route and device -> what went wrong
_lock = threading.RLock()


def may_turn(route: 'Route', packed: Tensor, payload: Tensor, rotation: Rotation, forced: bool) -> bool:
    """Whether a route works on a device for one kind of input; tried when it is first asked.

    Args:
        route: The route.
        packed: What it is to turn, (B, N, 3, H, D); only shape, dtype and device are looked at.
        payload: The payload, likewise.
        rotation: What the payload belongs to.
        forced: The user named this route: raise an error instead of doing without it.

    Raises:
        RuntimeError: The route is `forced` and does not work.
    """
    device = packed.device
    if (route.NAME, device) in _off and not forced:
        return False
    kind = (
        route.NAME, device, packed.dtype, payload.dtype, type(rotation), rotation.head_dim, rotation.size,
        rotation.groups, getattr(rotation, 'order', ''), packed.shape[3], payload.shape[-3], payload.ndim)
    if kind in _passed:
        return True
    if capturing(device):  # a trial would wait for the device, which a CUDA graph does not allow
        return forced
    with _lock:  # threads that come at the same time wait for one trial
        if kind not in _passed and ((route.NAME, device) not in _off or forced):
            problem = _tried(route, packed, payload, rotation)
            if problem:
                switch_off(route, device, problem, forced)
            else:
                _passed.add(kind)
    return kind in _passed


def switch_off(route: 'Route', device: torch.device, problem: str, forced: bool = False) -> None:
    """Do without a route on a device from now on, with one warning; raise a RuntimeError if it is `forced`."""
    name = torch.cuda.get_device_name(device) if device.type == 'cuda' else device
    text = f'The rotation kernels {route.NAME!r} ({route.MADE_WITH}) do not work on {name}: they {problem}.'
    if forced:
        raise RuntimeError(f'{text} TIMM_ROPE_KERNEL=auto does without them.')
    with _lock:
        if (route.NAME, device) in _off:
            return
        _off[route.NAME, device] = problem
    warnings.warn(
        f'{text} Queries and keys are turned by the plain formula from now on, which is right, but takes longer. '
        f'TIMM_ROPE_KERNEL=formula avoids the attempt; please report it with the output of '
        f'`python -m timm_rope doctor`.', stacklevel=4)


def failed(route: 'Route', device: torch.device, error: Exception, forced: bool) -> None:
    """Switch off a route that raised an error in the middle of a run; raise errors that must not be passed over."""
    if forced or isinstance(error, torch.OutOfMemoryError):
        raise error
    switch_off(route, device, _raised(error))


def is_off(route: 'Route', device: torch.device) -> bool:
    """Whether a route was switched off on a device."""
    return (route.NAME, device) in _off


def switched_off() -> List[str]:
    """One sentence for each route and device that does not work in this process."""
    return [f'{name} is switched off on {device}: kernels {problem}' for (name, device), problem in _off.items()]


def capturing(device: torch.device) -> bool:
    """Whether a CUDA graph records what this thread does."""
    return device.type == 'cuda' and torch.cuda.is_current_stream_capturing()


# -- the trial

def _tried(route: 'Route', packed: Tensor, payload: Tensor, rotation: Rotation) -> str:
    """Turn some random tokens: what the kernels did wrong, '' if nothing.

    In a thread of its own, since all that the caller may have switched on is bound to its thread: autocast, inference
    mode, no_grad, modes that count or fake operations, and hooks on saved tensors, such as those of checkpointing,
    which expect the same number of tensors every time.
    """
    results: List[Any] = []

    def run() -> None:
        try:
            with torch.cuda.device_of(packed):
                results.append(_difference(route, packed, payload, rotation))
        except torch.OutOfMemoryError as error:
            results.append(error)
        except Exception as error:
            results.append(_raised(error))

    thread = threading.Thread(target=run, name='timm_rope kernel trial')
    thread.start()
    thread.join()
    if isinstance(results[0], Exception):
        raise results[0]
    return str(results[0])


def _raised(error: Exception) -> str:
    return f'raised {type(error).__name__}: {" ".join(str(error).split())[:300]}'


def _difference(route: 'Route', packed: Tensor, payload: Tensor, rotation: Rotation) -> str:
    """The first result of a route that is not that of the formula, '' if all are."""
    device, dtype, heads, head_dim = packed.device, packed.dtype, packed.shape[3], rotation.head_dim
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64, device='cpu')

    # A payload that depends on free parameters, since a kernel need not return the gradient of every number in it,
    # only along the rotations. For blocks any orthogonal matrices do; exponentials would take most of the time.
    shared, tokens = payload.shape[-3], ROWS * COLUMNS
    if isinstance(rotation, BlockRotation):
        free = normal(shared, tokens, rotation.groups, rotation.size, rotation.size).requires_grad_()
        matrices = torch.linalg.qr(free)[0]
        # no reflections: where one channel has the other sign, a reflection turns
        sign = matrices.detach().det().sign()[..., None, None]
        table = torch.cat((matrices[..., :1] * sign, matrices[..., 1:]), dim=-1).flatten(-3)
    else:
        free = normal(2, 1, shared, rotation.groups).requires_grad_()
        axes = (torch.arange(n, dtype=torch.float64, device='cpu') + 0.5 for n in (ROWS, COLUMNS))
        table = rotation.table(free, *axes)[0]
    few = table.detach().to(device, payload.dtype)
    if payload.ndim == 4:
        few = few.repeat(IMAGES, 1, 1, 1)
    exact = few.double().requires_grad_()
    given = normal(IMAGES, tokens, 3, heads, head_dim).to(device, dtype)
    dq, dk, dv = normal(3, IMAGES, heads, tokens, head_dim).to(device, dtype).unbind(0)
    if not route.supports(given, few, rotation):
        return ''

    with torch.no_grad():
        made = given.clone()
        route.turn_(made, few, rotation)
        q, k, _ = made.permute(2, 0, 3, 1, 4).unbind(0)
        back, few_grad = route.turn_back(dq, dk, dv, few, rotation, q, k, True)
    wide = given.double().requires_grad_()
    old_q, old_k, old_v = wide.permute(2, 0, 3, 1, 4).unbind(0)
    outputs = rotation(old_q, exact), rotation(old_k, exact), old_v
    expected_back, expected_grad = torch.autograd.grad(
        outputs, (wide, exact), (dq.double(), dk.double(), dv.double()))

    def of_free(grad: Tensor) -> Tensor:
        grad = grad.double().cpu()
        return torch.autograd.grad(table, free, grad.sum(0) if grad.ndim == 4 else grad, retain_graph=True)[0]

    results = [
        ('queries, keys and values', made, torch.stack([x.detach().transpose(1, 2) for x in outputs], dim=2)),
        ('gradients of queries, keys and values', back, expected_back)]
    if few_grad is not None:
        results.append(('gradients of the frequencies', of_free(few_grad), of_free(expected_grad)))
    tolerance = max(2e-3, 4 * torch.finfo(dtype).eps)  # rounding, also where products of float32 are rounded further
    for name, got, expected in results:
        error = float((got.double() - expected).abs().max() / expected.abs().max())
        if not error <= tolerance:  # nan is no less
            return f'return wrong {name} in {str(dtype)[6:]}, off by {error:.2g} of the largest value'
    return ''
