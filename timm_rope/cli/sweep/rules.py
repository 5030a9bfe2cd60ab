"""A rule for larger grids as sweep names it: `yarn`, or `yarn+log_n` for set_rope_scaling('yarn', log_n=True)."""
import argparse
from typing import Any, Optional

from torch import nn

from ...positions.scaling import RULES

LOG_N = '+log_n'


def parse_rule(text: str) -> str:
    """The rule in the spelling of results; `+log-n` is understood too.

    Raises:
        argparse.ArgumentTypeError: There is no such rule.
    """
    rule = text.replace('-', '_')
    if rule.removesuffix(LOG_N) not in RULES:
        raise argparse.ArgumentTypeError(f'must be one of {", ".join(RULES)}, with or without {LOG_N}, got {text!r}')
    return rule


def takes_rules(model: nn.Module) -> bool:
    """Whether the model has a rotation of this package; rules mean nothing to any other."""
    return hasattr(model, 'set_rope_scaling') and getattr(model, 'rope', None) is not None


def set_rule(model: Any, rule: str) -> None:
    """Make a model that `takes_rules` follow `rule`, whatever it was built with.

    Raises:
        ValueError: The rule has no meaning for its encoding.
    """
    model.set_rope_scaling(rule.removesuffix(LOG_N), log_n=rule.endswith(LOG_N))


def label_of(model: str, rule: Optional[str]) -> str:
    """How people are told of a model under a rule."""
    return model if rule is None else f'{model} [{rule}]'
