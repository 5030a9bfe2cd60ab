"""Cosine and sine of every position times every frequency.

Where layers or heads have frequencies of their own, a compiled graph gets them from the operator `timm_rope::cos_sin`.
Left to itself, Inductor would not keep these small tables but evaluate the functions anew, in float64, for every
channel of every patch that reads them.
"""
from typing import Tuple

import torch
from torch import Tensor

from .._precision import widest
from .._tracing import recording, transformed


def cos_sin(position: Tensor, freqs: Tensor) -> Tuple[Tensor, Tensor]:
    """cos and sin of position * frequency: (...) and (L, H, G) -> two (L, H, ..., G) in the dtype of `freqs`."""
    if not torch.jit.is_scripting():
        if torch.compiler.is_compiling() and not recording() and not transformed() and freqs.numel() > freqs.shape[-1]:
            out = operator(position.flatten(), freqs)
            return out[0].unflatten(2, position.shape), out[1].unflatten(2, position.shape)
    cos, sin = _cos_sin(position.flatten(), freqs)
    return cos.unflatten(2, position.shape), sin.unflatten(2, position.shape)


def _cos_sin(position: Tensor, freqs: Tensor) -> Tuple[Tensor, Tensor]:
    angle = widest(position).unsqueeze(-1) * widest(freqs).unsqueeze(-2)
    return angle.cos().to(freqs.dtype), angle.sin().to(freqs.dtype)


@torch.library.custom_op('timm_rope::cos_sin', mutates_args=())
def operator(position: Tensor, freqs: Tensor) -> Tuple[Tensor, Tensor]:
    """`cos_sin` of positions (n,)."""
    return _cos_sin(position, freqs)


@operator.register_fake
def _(position: Tensor, freqs: Tensor) -> Tuple[Tensor, Tensor]:
    shape = (*freqs.shape[:-1], position.shape[0], freqs.shape[-1])
    return freqs.new_empty(shape), freqs.new_empty(shape)


def _keep(ctx, inputs, output: Tuple[Tensor, Tensor]) -> None:
    ctx.save_for_backward(*inputs, *output)


def _gradient(ctx, of_cos: Tensor, of_sin: Tensor):
    position, freqs, cos, sin = ctx.saved_tensors
    of_angle = widest(of_sin * cos - of_cos * sin)
    of_position = None
    if ctx.needs_input_grad[0]:
        of_position = (of_angle * widest(freqs).unsqueeze(-2)).sum((0, 1, 3)).to(position.dtype)
    return of_position, (of_angle * widest(position).unsqueeze(-1)).sum(-2).to(cos.dtype)


operator.register_autograd(_gradient, setup_context=_keep)
