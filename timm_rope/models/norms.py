"""Normalisation layers by name: timm's, and one of published weights that timm does not have."""
import functools
import inspect
from types import FunctionType
from typing import Any, Callable, Dict, Optional, Type

import torch
from timm.layers import LayerNorm, create_norm, get_norm_layer
from torch import Tensor, nn

from .._checks import check_integer, check_positive


class SpiralRmsNorm(nn.Module):
    """RMS norm of the published weights of Spiral RoPE (arXiv 2602.03227): weight * x / (rms(x) + eps).

    rms(x)^2 = sum x^2 / C. The epsilon is outside the root, elsewhere it is inside; no mean is subtracted and nothing
    added. Computed in float32 at least, also under autocast. A token of zeros stays zero and its gradient finite.

    Args:
        dim: Channels, C, on the last axis.
        eps: Added to the root mean square.
        device: Device of the weight.
        dtype: Dtype of the weight.

    Raises:
        ValueError: `dim` is no positive integer, or `eps` no positive finite number.
    """
    name = 'spiral_rms'  # as `norm_layer` calls it; by this the loading of weights knows the norm

    def __init__(self, dim: int, eps: float = 1e-6, device=None, dtype=None) -> None:
        super().__init__()
        self.dim = check_integer(dim, 'dim')
        self.eps = check_positive(eps, 'eps')
        self.weight = nn.Parameter(torch.empty(dim, device=device, dtype=dtype))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        nn.init.ones_(self.weight)

    def forward(self, x: Tensor) -> Tensor:
        """(..., C) -> the same shape and dtype."""
        return rms_norm_outer_eps(x, self.weight, self.dim, self.eps)

    def extra_repr(self) -> str:
        return f'{self.dim}, eps={self.eps}'


@torch.fx.wrap
def rms_norm_outer_eps(x: Tensor, weight: Tensor, dim: int, eps: float) -> Tensor:
    wide = x.float() if x.dtype == torch.float16 or x.dtype == torch.bfloat16 else x
    # unlike a root of the mean square, a vector norm has a gradient at zero
    rms = torch.linalg.vector_norm(wide, dim=[-1], keepdim=True) / dim ** 0.5
    return (wide / (rms + eps) * weight.to(wide.dtype)).to(x.dtype)


OURS: Dict[str, Type[nn.Module]] = {SpiralRmsNorm.name: SpiralRmsNorm}


def get_norm(norm_layer: Any = None, norm_eps: Optional[float] = None) -> Optional[Callable[..., nn.Module]]:
    """The constructor of a norm, as timm's models take it.

    Args:
        norm_layer: 'spiral_rms', a name that timm knows ('layernorm', 'rmsnorm'; underscores and case do not count), a
            class or function; None for timm's default, a LayerNorm.
        norm_eps: Epsilon of the norm; None keeps that of `norm_layer` (timm's LayerNorm: 1e-6).

    Returns:
        Called with the number of channels, `device` and `dtype`; None if both arguments are.

    Raises:
        ValueError: An unknown name, an epsilon that is not positive and finite, or one for a norm that takes none.
        TypeError: `norm_layer` is nothing that makes a norm.
    """
    if norm_eps is not None:
        norm_eps = check_positive(norm_eps, 'norm_eps')
    layer: Any = norm_layer
    if isinstance(norm_layer, str):
        name = norm_layer.replace('_', '').lower()
        ours = {key.replace('_', ''): value for key, value in OURS.items()}
        try:
            layer = ours[name] if name in ours else get_norm_layer(norm_layer)
        except KeyError:
            known = sorted([*OURS, *getattr(create_norm, '_NORM_MAP', {})])
            raise ValueError(f'norm_layer must be one of {", ".join(known)}, got {norm_layer!r}.') from None
    elif norm_layer is not None and not isinstance(norm_layer, (type, FunctionType, functools.partial)):
        raise TypeError(f'norm_layer must be a name, a class or a function, got {norm_layer!r}.')
    if norm_eps is None:
        return layer
    layer = layer or LayerNorm
    if not any(p.name == 'eps' or p.kind == p.VAR_KEYWORD for p in inspect.signature(layer).parameters.values()):
        raise ValueError(f'norm_eps={norm_eps} cannot be set: norm_layer={norm_layer!r} takes no eps.')
    return functools.partial(layer, eps=norm_eps)
