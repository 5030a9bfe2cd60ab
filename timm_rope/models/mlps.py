"""MLPs by name: timm's SwiGLU, whose gate has an activation of its own."""
from typing import Any

from timm.layers import SwiGLU
from torch import nn


def swiglu(*args: Any, act_layer: Any = None, **kwargs: Any) -> nn.Module:
    """timm's SwiGLU as a ViT builds the MLP of a block, whose `act_layer` is for others: the gate goes through SiLU."""
    return SwiGLU(*args, **kwargs)


def get_mlp(mlp_layer: Any) -> Any:
    """What makes an MLP, as timm's models take it.

    Args:
        mlp_layer: 'swiglu' (of EVA-02 and the larger DINOv3), or a class or function for timm.

    Raises:
        ValueError: An unknown name.
    """
    if not isinstance(mlp_layer, str):
        return mlp_layer
    if mlp_layer != 'swiglu':
        raise ValueError(f"mlp_layer must be 'swiglu', a class or a function, got {mlp_layer!r}.")
    return swiglu
