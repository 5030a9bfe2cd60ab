"""The direction task: in which of 16 directions lies the dark disc, as seen from the bright one?

How large the two are says nothing about the answer, where one of them is says little (both must be inside the image).
Their offset does: what a relative encoding computes, and an absolute one has to learn for every pair of places. 4 of
the directions are along the axes, 12 are oblique. Scenes are made of numbers and drawn at any resolution.
"""
import math
import sys
from typing import Iterator, Tuple

import torch
from torch import Tensor

from .training import Classification

DIRECTIONS = 16
BATCH = 250  # test scenes drawn at a time


def draw_scenes(count: int, seed: int) -> Tuple[Tensor, Tensor]:
    """Random scenes.

    Args:
        count: How many.
        seed: Of everything random; any integer from 0.

    Returns:
        (count, 7), parts of the image's side: y and x of the bright disc, y and x of the dark one, the radius of both,
        the contrasts (no part of the side). And the directions (count), 0 .. 15: from the bright disc to the dark one,
        0 is to the right, 4 is down, within a quarter of the angle between two directions.
    """
    random = torch.Generator().manual_seed(seed)

    def uniform(low: float, high: float) -> Tensor:
        return low + (high - low) * torch.rand(count, 1, generator=random)

    direction = torch.randint(DIRECTIONS, (count, 1), generator=random)
    angle = (direction + uniform(-.25, .25)) * (2 * math.pi / DIRECTIONS)
    scale = uniform(.5, 1.2)
    radius = .09 * scale
    offset = .36 * scale * torch.cat([angle.sin(), angle.cos()], 1)
    # anywhere, as long as both discs are inside
    low, high = radius + (-offset).clamp(min=0), 1 - radius - offset.clamp(min=0)
    bright = low + (high - low) * torch.rand(count, 2, generator=random)
    scenes = torch.cat([bright, bright + offset, radius, uniform(.6, 1), uniform(.6, 1)], 1)
    return scenes, direction[:, 0]


def render(scenes: Tensor, size: int) -> Tensor:
    """Scenes (N, 7) -> images (N, 1, size, size) around 0, with smooth edges one pixel wide."""
    place = (torch.arange(size, device=scenes.device) + .5) / size
    y, x, radius, contrast = (scenes[:, columns, None, None] for columns in ([0, 2], [1, 3], [4, 4], [5, 6]))
    distance = ((place[:, None] - y).square() + (place - x).square()).sqrt()
    discs = contrast * (.5 - (distance - radius) * size).clamp(0, 1)
    return 3 * (discs[:, :1] - discs[:, 1:])


class Direction(Classification):
    """The task for `training.run`."""

    num_classes = DIRECTIONS
    in_chans = 1
    turnable = False  # the answer would turn, too
    train_count = sys.maxsize
    groups = {
        'along an axis': tuple(range(0, DIRECTIONS, DIRECTIONS // 4)),
        'oblique': tuple(k for k in range(DIRECTIONS) if k % (DIRECTIONS // 4)),
    }

    def __init__(self, device: torch.device) -> None:
        self.device = device

    def describe(self) -> str:
        return f'scenes with two discs, {DIRECTIONS} directions, new ones in every step'

    def train_batches(self, seed: int, first: int, steps: int, batch_size: int, size: int) -> Iterator[
            Tuple[Tensor, Tensor]]:
        for step in range(first, steps):
            scenes, labels = draw_scenes(batch_size, 1_000_003 * (seed + 1) + step)
            yield render(scenes.to(self.device), size), labels.to(self.device)

    def test_batches(self, size: int, limit: int) -> Iterator[Tuple[Tensor, Tensor]]:
        scenes, labels = draw_scenes(limit, 0)  # a seed that no step of training has
        for some, right in zip(scenes.split(BATCH), labels.split(BATCH)):
            yield render(some.to(self.device), size), right.to(self.device)
