"""What the stand-ins share: is something known to this timm, weights that are initialised again, a device."""
import inspect
from contextlib import nullcontext
from typing import Any, Callable

import timm.layers
import torch
from torch import nn
from torch.overrides import TorchFunctionMode


def takes(function: Callable[..., Any], name: str) -> bool:
    """Whether a function has an argument of this name."""
    return name in inspect.signature(function).parameters


class Initialised:
    """In front of timm's class: `init_weights` as from 1.0.23 on. The constructor is told to skip it."""

    def init_weights(self, mode: str = '', needs_reset: bool = True) -> None:
        mode = mode or self.weight_init_mode  # type: ignore[attr-defined]
        if needs_reset:
            for module in self.modules():  # type: ignore[attr-defined]
                if module is not self and hasattr(module, 'reset_parameters'):
                    module.reset_parameters()
        if mode != 'reset':
            super().init_weights(mode)  # type: ignore[misc]
            return
        for name, std in (('pos_embed', .02), ('cls_token', 1e-6), ('reg_token', 1e-6)):
            if getattr(self, name, None) is not None:
                nn.init.normal_(getattr(self, name), std=std)


class LinspaceOnCpu(TorchFunctionMode):
    """Lets timm read the rates of its stochastic depth while everything else is made on the meta device."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return func(*args, **{**(kwargs or {}), **(dict(device='cpu') if func is torch.linspace else {})})


def on_device(cls: Any) -> Any:
    """The class with the arguments `device` and `dtype`, which all modules of timm have from 1.0.21 on."""
    if takes(timm.layers.Attention.__init__, 'device'):
        return cls

    class OnDevice(cls):
        def __init__(self, *args: Any, device: Any = None, dtype: Any = None, **kwargs: Any) -> None:
            with nullcontext() if device is None else torch.device(device), LinspaceOnCpu():
                super().__init__(*args, **kwargs)
            self.to(dtype=dtype)

    return OnDevice
