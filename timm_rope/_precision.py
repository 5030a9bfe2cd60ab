"""In which dtype positions, angles and exponentials are computed, whatever autocast says."""
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor

from ._tracing import constant_in_graphs, recording


def widest(tensor: Tensor) -> Tensor:
    """The tensor in float64, where the device has it and the graph is not recorded for another runtime.

    At 64x64 patches angles reach 90 rad, where float32 is 4e-6 apart. Sines are taken per row and per column, so the
    wide part is small: (rows + columns) instead of rows * columns positions.
    """
    if tensor.device.type == 'mps':
        return tensor
    if not torch.jit.is_scripting():
        if recording():
            return tensor
    return tensor.double()


def without_autocast(tensor: Tensor) -> AbstractContextManager:
    """Context in which matrix products keep the dtype of their operands."""
    device = tensor.device.type
    return torch.autocast(device, enabled=False) if _has_autocast(device) else nullcontext()


@constant_in_graphs  # dynamo of torch 2.11 cannot ask this itself
def _has_autocast(device: str) -> bool:
    return torch.amp.is_autocast_available(device)
