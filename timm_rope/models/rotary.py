"""What ViT and Swin have in common as models with rotary encodings: their `rope_` arguments, and the scaling rule."""
from typing import Any, Dict, List, Optional

import torch

from ..encodings._base import ENCODINGS, RotaryEncoding
from ..encodings._usage import USAGE
from ..positions.coordinates import to_grid


def take_options(rope_encoding: str, kwargs: Dict[str, Any]) -> Dict[str, Any]:
    """Take the options of the encoding, which start with `rope_`, out of the arguments of a model.

    Raises:
        TypeError: One has no `rope_` in front.
        ValueError: There are some although the model has no encoding, a reference grid of no image, or places for
            registers that the model does not have.
    """
    options = {name: kwargs.pop(name) for name in list(kwargs) if name.startswith('rope_')}
    if rope_encoding == 'none' and options:
        raise ValueError(f'Without an encoding, rope_encoding="none", a model takes no {", ".join(options)}.')
    known = set(USAGE).union(*(encoding.option_defaults() for encoding in ENCODINGS.values()))
    for name in known.intersection(kwargs):  # timm would not know it, and not say how it is called
        raise TypeError(f'{name} is an option of the encoding, which a model takes as rope_{name}.')
    if options.get('rope_reference_grid') is not None:
        to_grid(options['rope_reference_grid'], 'rope_reference_grid')  # encodings have other dimensions as well
    placed, registers = options.get('rope_registers', 0), kwargs.get('reg_tokens', 0)
    if placed not in (0, registers):
        raise ValueError(
            f'rope_registers must be 0 or reg_tokens, the registers of the model ({registers}), got {placed}.')
    return options


class RotaryModel:
    """Base of models whose encodings take a rule for grids larger than the reference grid."""

    def _encodings(self) -> List[Optional[RotaryEncoding]]:
        """All encodings of the model; they have one name and the same options."""
        raise NotImplementedError

    @torch.jit.ignore
    def set_rope_scaling(self, scaling: str, log_n: Optional[bool] = None) -> None:
        """Change what happens on grids larger than the reference grid, see `positions/scaling.py`. No weight changes.

        In a Swin, the grid is that of a window.

        Args:
            scaling: 'extrapolate', 'interpolate', 'ntk' or 'yarn'.
            log_n: Whether attention scores are multiplied by ln(n) / ln(n_ref) on more tokens; None keeps it.

        Raises:
            ValueError: No encoding, or a rule that there is not or that has no meaning for it. Nothing is changed.
        """
        for rope in self._ropes():  # what the first refuses has changed none
            rope.set_scaling(scaling, log_n)

    @torch.jit.ignore
    def _check_rope_scaling(self, scaling: Optional[str]) -> None:
        """Refuse a rule that `set_rope_scaling` would refuse; None is no rule."""
        if scaling is not None:
            for rope in self._ropes():
                rope.check_scaling(scaling)

    @torch.jit.ignore
    def _ropes(self) -> List[RotaryEncoding]:
        ropes = [rope for rope in self._encodings() if rope is not None]
        if not ropes:
            raise ValueError("rope_scaling needs a rotary encoding, this model has rope_encoding='none'.")
        return ropes
