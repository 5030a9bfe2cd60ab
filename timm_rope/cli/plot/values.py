"""What each kind of picture shows: values of one model, as plain numbers that JSON can hold.

One function for each kind, from a `Look` at a model to a dict; `KINDS` is their table, in the order of the page.
"""
import math
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Callable, Dict, List

import torch
from torch import Tensor, nn

from ... import analysis

Values = Dict[str, Any]


@dataclass
class Look:
    """A model and the images it is looked at with.

    Attributes:
        model: In evaluation mode.
        images: As the model takes them, (B, C, H, W).
        seen: As one sees them, (B, H, W, 3) from 0 to 1.
    """
    model: nn.Module
    images: Tensor
    seen: Tensor

    @cached_property
    def turns(self) -> List[analysis.Turn]:
        return analysis.rotary_layers(self.model)

    @cached_property
    def generators(self) -> List[Tensor]:
        return [analysis.generators(turn) for turn in self.turns]

    @cached_property
    def maps(self) -> List[analysis.AttentionMap]:
        return analysis.attention_maps(self.model, self.images)


def numbers(values: Tensor) -> Any:
    """Nested lists, with 6 significant digits."""
    return _short(values.detach().cpu().double().tolist())


def _short(value: Any) -> Any:
    return [_short(each) for each in value] if isinstance(value, list) else float(f'{value:.6g}')


def frequencies(look: Look) -> Values:
    """Wave vectors of each block, and the shares that are slow or aliased."""
    blocks = [dict(name=turn.name, waves=numbers(analysis.directed_waves(a)), size=a.shape[-1])
              for turn, a in zip(look.turns, look.generators)]
    return dict(blocks=blocks, summary={k: _short(v) for k, v in analysis.frequency_summary(look.model).items()})


def patterns(look: Look) -> Values:
    """Scores by position alone, of up to three heads of the first, the middle and the last block."""
    turns = look.turns
    out: List[Values] = []
    for index in sorted({0, len(turns) // 2, len(turns) - 1}):
        turn = turns[index]
        grid = tuple(2 * side + 1 for side in turn.grid)
        maps = analysis.pattern_map(turn, (grid[0], grid[1]))
        each = dict(name=turn.name, maps=numbers(maps[:3]), heads=len(maps))
        if out and out[-1]['maps'] == each['maps']:
            out[-1]['name'] = f'{out[-1]["name"].partition(" ")[0]} to {turn.name}'  # all blocks share one rotation
        else:
            out.append(each)
    return dict(blocks=out)


def distance(look: Look) -> Values:
    """Mean attention distance of each head, in pixels."""
    return dict(blocks=[dict(name=m.name, heads=numbers(analysis.mean_distance(m))) for m in look.maps])


def entropy(look: Look) -> Values:
    """Mean attention entropy of each head in nats, and the most there can be."""
    return dict(blocks=[
        dict(name=m.name, heads=numbers(analysis.mean_entropy(m)), most=_short(math.log(m.weights.shape[-1])))
        for m in look.maps])


def fourier(look: Look) -> Values:
    """What the waves of all blocks together can draw."""
    waves = torch.cat([analysis.directed_waves(a) for a in look.generators])
    keep = analysis.encodable_bins(waves)
    out = []
    for kind in ('dot', 'circle'):
        image = analysis.test_pattern(kind)
        drawn, mse, ssim = analysis.reconstruct(image, keep)
        out.append(dict(kind=kind, image=numbers(image), drawn=numbers(drawn), mse=_short(mse), ssim=_short(ssim)))
    return dict(waves=int(keep.sum()), images=out)


def equivariance(look: Look) -> Values:
    """What changes under shifts of up to 6 patches: scores of random queries and keys, and the logits of the images."""
    turns = look.turns
    steps = list(range(1, min(7, *turns[0].grid)))
    canvas = turns[0].grid  # of a Swin, the window
    matrices = [analysis.rotation_matrices(turn, canvas) for turn in turns]
    scores = {
        axis: [_mean([analysis.score_shift_error(each, canvas, unit(axis, n)) for each in matrices]) for n in steps]
        for axis in ('x', 'y')}
    patch = getattr(look.model, 'patch_embed').patch_size  # noqa: B009 (mypy takes attributes of a child for tensors)
    logits = {
        axis: numbers(analysis.logit_shift_error(look.model, look.images, [unit(axis, n) for n in steps], tuple(patch)))
        for axis in ('x', 'y')}
    side = min(5, canvas[0]), min(5, canvas[1])
    errors = [analysis.rotation_error(analysis.rotation_matrices(turn, side), side).mean() for turn in turns]
    return dict(steps=steps, scores=scores, logits=logits, rotations=numbers(torch.stack(errors)))


def _mean(values: List[Tensor]) -> float:
    return _short(float(torch.cat(values).mean()))


def unit(axis: str, n: int) -> Any:
    """A shift by n patches along x or y, as (rows, columns)."""
    return (0, n) if axis == 'x' else (n, 0)


def attention(look: Look) -> Values:
    """What the class token and the patch in the middle attend to in the last block, on up to three images."""
    last = look.maps[-1]
    rows, columns = last.grid
    windows = len(last.weights) // len(look.images)  # of an image; the first of them is shown
    out: Values = dict(name=last.name, window=windows > 1, images=[])
    middle = analysis.query_map(last, rows // 2, columns // 2)
    token = analysis.cls_map(last) if last.prefix else None
    for i, image in enumerate(look.seen[:3]):
        out['images'].append(dict(
            image=numbers(image), middle=numbers(middle[i * windows]),
            token=None if token is None else numbers(token[i])))
    return out


# kind -> what measures it
KINDS: Dict[str, Callable[[Look], Values]] = dict(
    frequencies=frequencies, patterns=patterns, distance=distance, entropy=entropy, fourier=fourier,
    equivariance=equivariance, attention=attention)
