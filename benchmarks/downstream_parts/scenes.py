"""Scenes with shapes of many scales, drawn at any resolution, with boxes and a label for every pixel.

Triangles, squares, discs and rings, from a fraction of a patch to a third of a training image, of any colour and turned
by any angle: what a pixel inside a large shape belongs to can only be told by looking at its outline, patches away.
"""
import math
from typing import List, NamedTuple, Tuple

import torch
from torch import Tensor

CLASSES = ('triangle', 'square', 'disc', 'ring')
CORNERS = (3, 4, 64, 64)
SLOTS = 6  # tries to place a shape in the area of a training image; those that would cover another one are left out
RADII = (.06, .32)  # of the circle around a shape, parts of the side of a training image
HOLE = .55  # radius of that of a ring
NOISE = .2

# scenes in which classes are a matter of places: in the area of a training image 2 marks, and tries to place discs
COLOURS = {'red': (1.5, -1.5, -1.5), 'green': (-1.5, 1.5, -1.5), 'blue': (-1.5, -1.5, 1.5)}
MARKS, DISCS = 2, 24
MARK, DISC = .1, (.06, .08)  # radii
# of a disc and the nearest mark, and how much further the nearest one of another colour is; `NEAR` is more than the
# convolutions of a detector with a map of stride 4 see of a training image of 96 pixels
NEAR, MARGIN = .4, .15


class Drawn(NamedTuple):
    """Images (N, 3, size, size) around 0, labels (N, size, size): 0 background, 1 + class; and boxes of each image.

    Boxes (K, 4) are x0, y0, x1, y1 in pixels around what is seen of a shape, `classes` (K) count from 0.
    """
    images: Tensor
    labels: Tensor
    boxes: List[Tensor]
    classes: List[Tensor]


def draw_scenes(count: int, extent: float, seed: int) -> Tensor:
    """Random scenes.

    Args:
        count: How many.
        extent: Side of the image, in sides of a training image: shapes are as large as there, and there are more.
        seed: Of everything random; any integer from 0.

    Returns:
        (count, tries, 9): kind, or -1 where nothing was placed; y, x and radius in sides of a training image; angle in
        radians; three colours around 0; class, which is the kind here.
    """
    random = torch.Generator().manual_seed(seed)
    tries = round(SLOTS * extent ** 2)

    def uniform(low: float, high: float, *shape: int) -> Tensor:
        return low + (high - low) * torch.rand(count, tries, *shape, generator=random)

    kind = torch.randint(len(CLASSES), (count, tries), generator=random).float()
    radius = uniform(math.log(RADII[0]), math.log(RADII[1])).exp()
    place = radius[..., None] + (extent - 2 * radius[..., None]) * uniform(0, 1, 2)
    _make_room(kind, place, radius, .8)
    return torch.cat([
        torch.stack([kind, *place.unbind(-1), radius, uniform(0, 2 * math.pi)], -1), uniform(-1.5, 1.5, 3),
        kind[..., None]], -1)


def draw_placed(count: int, extent: float, seed: int) -> Tensor:
    """Random scenes of white discs and of marks, squares in colours; a disc has the class of the nearest mark's colour.

    All lie anywhere and colours are dealt out at random: neither the place of a disc alone nor those of marks say
    anything about the class, nor does what is near. Discs are left out that a mark is nearer to than `NEAR`, or two
    marks of different colours about as near.

    Args and returns as `draw_scenes`; marks come first and have the class -1, and there are at least two colours.
    """
    random = torch.Generator().manual_seed(seed)
    marks, discs = round(MARKS * extent ** 2), round(DISCS * extent ** 2)

    def uniform(low: float, high: float, *shape: int) -> Tensor:
        return low + (high - low) * torch.rand(count, marks + discs, *shape, generator=random)

    radius = uniform(*DISC)
    radius[:, :marks] = MARK
    place = radius[..., None] + (extent - 2 * radius[..., None]) * uniform(0, 1, 2)
    dealt = torch.rand(count, len(COLOURS), generator=random).argsort(1)[:, torch.arange(marks) % len(COLOURS)]
    distance = torch.cdist(place[:, marks:], place[:, :marks])
    of_colours = torch.stack([distance.where(dealt[:, None] == k, math.inf).amin(2) for k in range(len(COLOURS))], 2)
    nearest, colour = of_colours.sort(2)
    kind = torch.full((count, marks + discs), float(CLASSES.index('disc')))
    kind[:, :marks] = CLASSES.index('square')
    kind[:, marks:][(nearest[..., 0] < NEAR) | (nearest[..., 1] - nearest[..., 0] < MARGIN)] = -1
    _make_room(kind, place, radius, 1.1, first=marks)
    paint = torch.cat([torch.tensor(list(COLOURS.values()))[dealt], torch.full((count, discs, 3), 1.5)], 1)
    classes = torch.cat([torch.full((count, marks), -1.), colour[..., 0].where(kind[:, marks:] >= 0, -1.)], 1)
    scenes = torch.cat([
        torch.stack([kind, *place.unbind(-1), radius, torch.zeros_like(radius)], -1), paint, classes[..., None]], -1)
    order = (kind < 0).sort(dim=1, stable=True)[1][:, :int((kind >= 0).sum(1).max())]  # most tries are in vain
    return scenes.gather(1, order[..., None].expand(-1, -1, scenes.shape[2]))


def _make_room(kind: Tensor, place: Tensor, radius: Tensor, apart: float, first: int = 0) -> None:
    """Set to -1 from `first` on what is nearer to one placed before it than `apart` times the radii together."""
    for i in range(first + 1, kind.shape[1]):
        distance = (place[:, first:i] - place[:, i:i + 1]).norm(dim=-1)
        taken = (distance < apart * (radius[:, first:i] + radius[:, i:i + 1])) & (kind[:, first:i] >= 0)
        kind[:, i] = torch.where(taken.any(1), -1., kind[:, i])


def render(scenes: Tensor, size: int, extent: float, seed: int, shaded: bool = True) -> Drawn:
    """Draw scenes.

    Args:
        scenes: (N, tries, 9), of `draw_scenes` or `draw_placed`.
        size: Of the images, in pixels.
        extent: As in `draw_scenes`; an image twice as large of the same extent has the content enlarged.
        seed: Of background and noise.
        shaded: Whether the background changes across the image, by which a patch could tell where it is.
    """
    random = torch.Generator().manual_seed(seed)
    count, unit = len(scenes), size / extent
    at = (torch.arange(size) + .5) / unit
    slopes, levels = (torch.rand(2, count, 3, 1, 1, generator=random) - .5).unbind()
    images = levels + shaded * slopes * at / extent + NOISE * torch.randn(count, 3, size, size, generator=random)
    top = torch.zeros(count, size, size, dtype=torch.long)
    corners = torch.tensor(CORNERS)
    for number, shape in enumerate(scenes.unbind(1), 1):
        kind = shape[:, 0].long()
        y, x, radius, angle = (value[:, None, None] for value in shape[:, 1:5].unbind(1))
        down, right = at[:, None] - y, at - x
        away = (down.square() + right.square()).sqrt()
        sector = (2 * math.pi / corners[kind.clamp(min=0)])[:, None, None]
        # distance to the nearest side of a regular polygon
        inside = away * ((torch.atan2(down, right) - angle) % sector - sector / 2).cos() - radius * (sector / 2).cos()
        ring = (kind == CLASSES.index('ring'))[:, None, None]
        inside = torch.where(ring, inside.maximum(HOLE * radius - away), inside)
        cover = (.5 - inside * unit).clamp(0, 1) * (kind >= 0)[:, None, None]
        images = torch.lerp(images, shape[:, 5:8, None, None].expand_as(images), cover[:, None])
        top = torch.where(cover > .5, number, top)
    found = [_boxes(one, scene) for one, scene in zip(top, scenes)]
    classes = torch.cat([torch.full((count, 1), -1.), scenes[..., 8]], 1).long() + 1
    labels = classes.gather(1, top.flatten(1)).view_as(top)
    return Drawn(images, labels, *map(list, zip(*found)))


def _boxes(top: Tensor, scene: Tensor) -> Tuple[Tensor, Tensor]:
    """Boxes and classes of the shapes of one image, of which `top` (size, size) has the number from 1 of each pixel."""
    numbers = [number for number in top.unique().tolist() if number and scene[number - 1, 8] >= 0]
    boxes = torch.zeros(len(numbers), 4)
    for row, number in zip(boxes, numbers):
        y, x = (top == number).nonzero(as_tuple=True)
        row.copy_(torch.stack([x.min(), y.min(), x.max() + 1, y.max() + 1]))
    return boxes, scene[[number - 1 for number in numbers], 8].long()
