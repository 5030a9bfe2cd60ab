"""Encodings as special cases of others: the frequencies of one that make it the same function as another.

Encodings whose channel pairs turn each by one wave vector, axial and uniform, mixed and spiral, can be told in those
vectors; a block of LieRE holds pairs as generators that couple nothing else, or, in another basis of the channels, as
generators that commute. Triplets are told by their frequencies, or by those as axes of rotation.
"""
import copy
import itertools
import math
from typing import Any, Dict, List, Optional, Tuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ..positions.coordinates import format_grid, in_patches, read_grid, unit
from ..rotations import AxesRotation, BlockRotation, PairRotation, PlanesRotation, Rotation, TripletRotation
from ..rotations.axes import about_space
from . import create_rope, list_ropes
from ._base import ENCODINGS, RotaryEncoding
from ._planes import planes


def convert_rope(
        source: RotaryEncoding, name: str, options: Dict[str, Any], any_basis: bool = False, prefix: bool = True,
) -> Tuple[RotaryEncoding, Optional[Tensor]]:
    """The same function as another encoding.

    Args:
        source: An encoding with values.
        name: Of the target.
        options: Of the target.
        any_basis: Whether the channels of queries and keys may get another basis.
        prefix: Whether there may be prefix tokens, which do not turn, so that the origin of the coordinates matters.

    Returns:
        The target, and the orthogonal basis Q (L or 1, H or 1, D, D) where the channels need another: R_source is
        Q R_target Q^T. None where they stay.
    """
    if source.freqs.is_meta:
        raise ValueError('The model is on the meta device, where frequencies have no values: load its weights first.')
    with torch.inference_mode(False), torch.no_grad():
        try:
            target = _create(source, name, options)
            freqs, basis = _freqs(source, target, any_basis, prefix)
        except _NoExactForm as error:
            possible = ', '.join(map(repr, _possible(source))) or 'none'
            raise ValueError(
                f'No exact way from {source.name!r} to {name!r}: {error}. '
                f'Exact for these frequencies, with default options: {possible}.') from None
        target.freqs.copy_(freqs)
        target = target.to(source.freqs.device)
    if source.learned:
        target.freqs.requires_grad_(source.freqs.requires_grad)
    return target.train(source.training), basis


class _NoExactForm(ValueError):
    """Its message is a reason, without a full stop."""


def _create(source: RotaryEncoding, name: str, options: Dict[str, Any]) -> RotaryEncoding:
    """The target on the CPU, with frequencies still to be filled in."""
    given = {key.removeprefix('rope_') for key in options}
    if 'reference_grid' in given:
        raise ValueError('reference_grid belongs to the weights and is carried over; it cannot be given.')
    carried: Dict[str, Any] = {}
    if name in ENCODINGS:
        cls = ENCODINGS[name]
        if not cls.learned:
            raise _NoExactForm('its frequencies are fixed')
        carried = {k: v for k, v in source.options.items() if k in cls.option_defaults() and k not in given}
        carried.update({k: v for k, v in source.usage.items() if k not in given})
    with torch.random.fork_rng(devices=[]):  # the initial frequencies are not used
        return create_rope(
            name, source.head_dim, source.num_heads, source.depth,
            read_grid(source.reference_grid, 'reference_grid', source.dims), 'cpu', source.freqs.dtype, **carried,
            **options)


def _freqs(
        source: RotaryEncoding, target: RotaryEncoding, any_basis: bool = False, prefix: bool = True,
) -> Tuple[Tensor, Optional[Tensor]]:
    """Value of the target's `freqs` that gives the function of the source, and the basis it does so in."""
    # scores of pairs that turn by wave vectors, and of triplets about one axis, depend on differences alone
    of_space, relative = _is_of_space(source), type(target.rotation) is PairRotation
    if of_space and _has_generators(target) and target.rotation.size == 3:
        relative = True  # if it can be done
    scale, basis = _scale(source, target, prefix or not relative), None
    try:
        if type(source) is type(target) and source._signature == target._signature:
            # the same function of the same numbers
            values = source.freqs.cpu().unflatten(2, [_heads(source), -1])
            return _shared(values, target).flatten(2, 3), None
        if of_space and isinstance(target.rotation, BlockRotation) and target.frequencies().ndim == 5:
            values = _in_units(_of_triplets(source, target), scale)
            freqs = target.freqs_for(_shared(values, target))
            if _has_generators(target):
                _check_one_axis(source, target, freqs)
            return freqs, None
        if _form(source.rotation) == _form(target.rotation):
            return target.freqs_for(_shared(_in_units(source.frequencies(), scale), target)), None
        try:
            vectors = wave_vectors(source)
        except ValueError:
            if not _has_generators(source) or type(target.rotation) is not PairRotation:
                raise
            vectors, basis = planes(source.frequencies(), source.head_dim, source.rotation.size)
            if not any_basis:
                raise _NoExactForm(
                    'its generators commute, but in another basis of the channels, which goes into the weights of '
                    'queries and keys: convert the model or its state dict') from None
        return freqs_for_wave_vectors(target, _shared(_in_units(vectors, scale), target)), basis
    except _NoExactForm:
        raise
    except ValueError as error:
        raise _NoExactForm(error) from None


def _has_generators(rope: RotaryEncoding) -> bool:
    """Whether its frequencies are generators of blocks, one for each axis of the image."""
    return type(rope.rotation) in (BlockRotation, PlanesRotation)


def _is_of_space(rope: RotaryEncoding) -> bool:
    """Whether triplets turn in sequence, about axes of space."""
    return isinstance(rope.rotation, (TripletRotation, AxesRotation))


def _of_triplets(source: RotaryEncoding, target: RotaryEncoding) -> Tensor:
    """Turns of triplets in sequence as axes of rotation, or as generators of blocks."""
    axes = source.frequencies().cpu()
    axes = about_space(axes) if axes.ndim == 4 else axes
    if isinstance(target.rotation, AxesRotation):
        orders = [getattr(rope.rotation, 'order', '') for rope in (source, target)]
        if orders[0] != orders[1]:
            raise ValueError(f'the axes act in the order {orders[0]!r} here and {orders[1]!r} there')
        return axes
    if target.rotation.size != 3:
        raise ValueError(f'its triplets are blocks of 3, not of {target.rotation.size}')
    return torch.stack((-axes[..., 2], axes[..., 1], -axes[..., 0]), -1)  # places (0, 1), (0, 2), (1, 2)


def _check_one_axis(source: RotaryEncoding, target: RotaryEncoding, freqs: Tensor) -> None:
    """Refuse turns in sequence that are not one exponential: those about axes that are not parallel."""
    axes = _of_triplets(source, target).double()
    for one, other in itertools.combinations(axes, 2):
        size = torch.linalg.cross(one, other).norm(dim=-1)
        if bool((size > 1e-6 * one.norm(dim=-1) * other.norm(dim=-1)).any()):
            break
    else:
        return
    target.freqs.copy_(freqs)
    grid = read_grid(source.reference_grid, 'reference_grid', source.dims)
    x = torch.eye(source.head_dim, dtype=freqs.dtype)[:, None, None]
    x = x.expand(-1, source.num_heads, math.prod(grid), -1)
    here = copy.deepcopy(source).cpu().eval()
    most = max(float((here.rotate(x, a) - target.rotate(x, b)).abs().max()) for a, b in zip(here(grid), target(grid)))
    raise ValueError(
        f'a triplet turns about one axis after the other, which is one exponential only where a single one turns; on '
        f'the reference grid of {format_grid(grid)} the rotations would differ by up to {most:.2g}')


def _heads(rope: RotaryEncoding) -> int:
    """For how many heads an encoding that learns keeps frequencies, all on axis 2."""
    return 1 if rope.options['share_heads'] else rope.num_heads


def _form(rotation: Rotation) -> Any:
    """What two rotations share that make the same of the same frequencies."""
    kind = BlockRotation if type(rotation) is PlanesRotation else type(rotation)
    how = ('training', 'planes', 'commuting')  # how the same is made
    return kind, {k: v for k, v in vars(rotation).items() if k[0] != '_' and k not in how}


def _scale(source: RotaryEncoding, target: RotaryEncoding, origin_matters: bool) -> Tensor:
    """The source's coordinates in units of the target's, x first, (D,)."""
    if source.register_side != target.register_side:
        raise _NoExactForm('its registers lie on a grid of their own, which prefix tokens do not in the other')
    if source.offset != target.offset and origin_matters:
        raise _NoExactForm(
            f'the offset of its patches from the prefix tokens is {source.offset:g} here and {target.offset:g} there')
    same_steps = {source.coords, target.coords} <= {'index', 'cells'} or source.coords == target.coords
    if source.coords != target.coords and (origin_matters or not same_steps):
        raise _NoExactForm(
            f'coordinates {source.coords!r} and {target.coords!r} differ in origin or step' + (
                ', and prefix tokens, which do not turn, see the origin' if origin_matters else ''))
    normalised = source.coords == target.coords and not in_patches(source.coords)
    if normalised and source.centered != target.centered and origin_matters:
        places = ['the middle' if rope.centered else 'the corner' for rope in (source, target)]
        raise _NoExactForm(
            f'the coordinates {source.coords!r} have their origin in {places[0]} of the image here and in {places[1]} '
            f'there, and prefix tokens, which do not turn, see the origin')
    return _unit(source) / _unit(target)


def _in_units(freqs: Tensor, scale: Tensor) -> Tensor:
    return freqs.cpu() * scale.to(freqs.dtype).view(-1, *[1] * (freqs.ndim - 1))


def _unit(rope: RotaryEncoding) -> Tensor:
    """Step from patch to patch in the encoding's coordinates, x first; on 'ends' it depends on the grid likewise."""
    grid = read_grid(rope.reference_grid, 'reference_grid', rope.dims)
    sides = torch.tensor(grid, dtype=torch.float64, device='cpu')
    return torch.ones_like(sides) if in_patches(rope.coords) else rope.span / unit(sides, rope.coords).flip(0)


def _shared(values: Tensor, target: RotaryEncoding) -> Tensor:
    """Values (D, L or 1, H or 1, ...) for as many layers and heads as the target keeps."""
    for axis, option, count in ((1, 'share_layers', target.depth), (2, 'share_heads', target.num_heads)):
        if not target.options[option]:
            values = values.expand(*(count if i == axis else -1 for i in range(values.ndim)))
        else:
            first = values.narrow(axis, 0, 1)
            spread = (values - first).abs().max().item()
            if spread:
                raise _NoExactForm(f'{option}=True needs equal frequencies, these differ by up to {spread:.3g}')
            values = first
    return values


def _possible(source: RotaryEncoding) -> List[str]:
    names = []
    for name in list_ropes():
        try:
            _freqs(source, _create(source, name, {}))
        except ValueError:
            continue
        if name != source.name:
            names.append(name)
    return names


# -- wave vectors of the pairs (2k, 2k+1), which turn counter-clockwise

def wave_vectors(rope: RotaryEncoding) -> Tensor:
    """Wave vectors of the pairs, (D, L or 1, H or 1, P), x first, in radians per unit of coordinate.

    Raises:
        ValueError: The rotation is not described by wave vectors of pairs; the message is a reason.
    """
    if type(rope.rotation) is PairRotation:  # its subclasses turn by other angles
        return rope.frequencies()
    if not _has_generators(rope):
        raise ValueError(f'{rope._signature} does not turn each channel pair by one wave vector')
    generators = rope.frequencies()
    held, block, entry = _pairs_in_blocks(rope, rope.head_dim // 2)
    coupling = generators.clone()
    coupling[..., block, entry] = 0
    if bool(coupling.any()):
        raise ValueError(
            f'the generators of {rope.name!r} with block {rope.rotation.size} couple more than channel pairs')
    vectors = generators.new_zeros(*generators.shape[:3], rope.head_dim // 2)
    vectors[..., held] = -generators[..., block, entry]
    return vectors


def freqs_for_wave_vectors(rope: RotaryEncoding, vectors: Tensor) -> Tensor:
    """What `freqs` must hold to turn the pairs by (D, L, H, P) wave vectors; pairs beyond P stay unrotated.

    Raises:
        ValueError: No `freqs` do; the message is a reason.
    """
    if type(rope.rotation) is PairRotation:
        groups = rope.rotation.groups
        if bool(vectors[..., groups:].any()):
            raise ValueError(f'{rope.name!r} leaves the pairs beyond the first {groups} of a head unrotated')
        return rope.freqs_for(F.pad(vectors[..., :groups], [0, max(0, groups - vectors.shape[-1])]))
    if not _has_generators(rope):
        raise ValueError(f'{rope.name!r} does not turn channel pairs')
    held, block, entry = _pairs_in_blocks(rope, vectors.shape[-1])
    size = rope.rotation.size
    if bool(vectors[..., ~held].any()):
        even = [n for n in range(2, rope.head_dim + 1, 2) if rope.head_dim // 2 * 2 % n == 0]
        raise ValueError(
            f'{rope.name!r} with block {size} leaves pairs of head_dim {rope.head_dim} unrotated or splits them '
            f'between blocks; block {", ".join(map(str, even))} would hold them')
    generators = vectors.new_zeros(*vectors.shape[:3], rope.rotation.groups, size * (size - 1) // 2)
    generators[..., block, entry] = -vectors[..., held]
    return rope.freqs_for(generators)


def _pairs_in_blocks(rope: RotaryEncoding, count: int) -> Tuple[Tensor, Tensor, Tensor]:
    """Which of the first pairs of a head lie inside one block (count,), and for those their block and their entry.

    The entry is that of (row, row + 1) in the strict upper triangle. Its exponential turns the pair clockwise.
    """
    size = rope.rotation.size
    channel = 2 * torch.arange(count, device=rope.freqs.device)
    held = (channel % size + 1 < size) & (channel // size < rope.rotation.groups)
    row = channel[held] % size
    return held, channel[held] // size, row * (2 * size - row - 1) // 2
