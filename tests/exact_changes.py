"""What the tests of `convert_encoding` share: which changes are exact, by what encodings state, and small examples."""
import itertools

import torch
from tiny import make

import timm_rope
from timm_rope.rotations import AxesRotation, BlockRotation, PairRotation, PlanesRotation, TripletRotation

NAMES = timm_rope.list_ropes()

# encodings that keep fewer numbers than they turn by, and can turn by all that others of a kind may have
HOLD_OTHERS = {'axial_learned': PairRotation, 'string': PairRotation}


def is_exact(source, target):
    """Whether an encoding is a special case of another with default options, by what the two state about themselves."""
    a, b = (timm_rope.create_rope(name, 24, 2, 2) for name in (source, target))
    kinds = [BlockRotation if type(r.rotation) is PlanesRotation else type(r.rotation) for r in (a, b)]
    if not b.learned or a.coords not in b.coords_choices or (a.coords != 'index' and a.centered != b.centered):
        return False
    partly = b.freqs.numel() < b.frequencies().numel()  # it holds some frequencies only, in default only its own
    if partly and kinds[0] is not HOLD_OTHERS.get(target):
        return source == target
    if kinds[0] is kinds[1]:
        return b.oblique or not a.oblique
    if kinds == [TripletRotation, AxesRotation]:
        return True
    return kinds == [PairRotation, BlockRotation] and a.head_dim % b.rotation.size == 0


EXACT = {source: {target for target in NAMES if is_exact(source, target)} for source in NAMES}
PAIRS = [(source, target) for source in NAMES for target in sorted(EXACT.get(source, ()))]
OTHERS = [pair for pair in itertools.product(NAMES, NAMES) if pair not in PAIRS]
WIDE = dict(embed_dim=48)  # heads of 24 channels: blocks of 8 fit


def rope_of(name, head_dim=24, num_heads=2, depth=2, reference_grid=(3, 4), **options):
    torch.manual_seed(0)
    rope = timm_rope.create_rope(name, head_dim, num_heads, depth, reference_grid, **options)
    if rope.learned:
        with torch.no_grad():
            rope.freqs.add_(0.1 * torch.randn_like(rope.freqs))
    return rope


def model_of(name, **kwargs):
    model = make(f'vit_tiny_rope_{name}', **{**WIDE, **kwargs})
    with torch.no_grad():
        for parameter in model.rope.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model


def error(a, b, *size):
    x = torch.randn(2, 3, *size, dtype=next(a.parameters()).dtype, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        return (a(x) - b(x)).abs().max().item()
