"""How an encoding is used: the rule for larger grids, log-n and random coordinates in training.

None of this is part of the function that weights were trained for, so nothing of it is saved with them.
"""
from typing import Any, ClassVar, Dict, Optional, Tuple

import torch
from torch import nn

from .._checks import check_choice, check_flag
from ..positions.augmentation import check_amount
from ..positions.scaling import RULES, own_rule
from ._cache import PayloadCache

# what every encoding takes besides its own options, with defaults; models take it with the prefix rope_. A scaling of
# None is the rule of the coordinates
USAGE: Dict[str, Any] = dict(scaling=None, log_n=False, shift=None, jitter=None, rescale=None)


class HasUsage(nn.Module):
    """Part of `RotaryEncoding` that holds its usage."""
    name: ClassVar[str]
    coords: str
    scalings: ClassVar[Tuple[str, ...]] = RULES

    @torch.jit.unused
    def set_usage(
            self, scaling: Optional[str], log_n: bool, shift: Optional[float], jitter: Optional[float],
            rescale: Optional[float],
    ) -> None:
        """Set everything at once; the arguments are those of `RotaryEncoding`."""
        self.set_scaling(own_rule(self.coords) if scaling is None else scaling, log_n)
        self._shift = check_amount(shift, 'shift', 0.)
        self._jitter = check_amount(jitter, 'jitter', 1.)
        self._rescale = check_amount(rescale, 'rescale', 1.)
        self._augmented = (self._shift, self._jitter, self._rescale) != (0., 1., 1.)

    def check_scaling(self, scaling: str) -> str:
        """The rule, if this encoding can follow it.

        Raises:
            ValueError: No rule of `scaling.py`, or one that has no meaning here; says why.
        """
        check_choice(scaling, RULES, 'scaling')
        if scaling not in self.scalings:
            raise ValueError(
                f'scaling must be one of {", ".join(map(repr, self.scalings))} for {self.name!r}, got {scaling!r}: '
                f'{self.no_scaling()}.')
        return scaling

    def no_scaling(self) -> str:
        """Why other rules than `scalings` have no meaning; overridden with it."""
        return ''

    def set_scaling(self, scaling: str, log_n: Optional[bool] = None) -> None:
        """Change what happens on grids larger than the reference grid; nothing is learned or saved with the weights.

        Args:
            scaling: 'extrapolate', 'interpolate', 'ntk' or 'yarn', see `scaling.py`.
            log_n: Whether attention scores are multiplied by `score_scale`; None keeps it.

        Raises:
            ValueError: A rule that there is not, or that has no meaning for this encoding. Nothing is changed.
        """
        self.check_scaling(scaling)
        if log_n is not None:
            self.log_n = check_flag(log_n, 'log_n')
        self.scaling = scaling
        self._cache = PayloadCache()

    @property
    def usage(self) -> Dict[str, Any]:
        """What is no part of the function that the weights were trained for, as the constructor takes it."""
        scaling = None if self.scaling == own_rule(self.coords) else self.scaling
        return dict(
            scaling=scaling, log_n=self.log_n, shift=self._shift or None,
            jitter=None if self._jitter == 1 else self._jitter, rescale=None if self._rescale == 1 else self._rescale)
