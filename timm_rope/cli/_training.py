"""How the small trainings of this project are set up: AdamW, a linear warm-up and a cosine, per step, all by timm."""
from typing import Any, Tuple

from timm.optim import create_optimizer_v2
from timm.scheduler import CosineLRScheduler
from torch import nn, optim

WEIGHT_DECAY = 0.05


def set_up(model: nn.Module, steps: int, learning_rate: float, **kwargs: Any) -> Tuple[optim.Optimizer, Any]:
    """Optimizer and schedule of a short training.

    Args:
        model: Model whose `no_weight_decay` timm asks, so that learned frequencies are not decayed.
        steps: Steps of the whole training; the first tenth warms up from a hundredth of the learning rate.
        learning_rate: Highest learning rate.
        **kwargs: Further arguments of `timm.optim.create_optimizer_v2`.

    Returns:
        The optimizer, and a schedule whose `step_update(number of steps done)` is called after each step.
    """
    optimizer = create_optimizer_v2(
        model, **{**dict(opt='adamw', lr=learning_rate, weight_decay=WEIGHT_DECAY), **kwargs})
    schedule = CosineLRScheduler(
        optimizer, t_initial=max(2, steps), warmup_t=steps // 10, warmup_lr_init=learning_rate / 100,
        t_in_epochs=False)
    return optimizer, schedule
