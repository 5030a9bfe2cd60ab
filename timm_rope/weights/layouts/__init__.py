"""The layouts: how this and other projects name the weights in their checkpoints.

In comes a checkpoint of any of them, out come `Weights`, the tensors in our keys and what is known about their model.
`recognise` goes through the list `LAYOUTS`, so a new layout is a class in a file of its own and a line there.
"""
import logging
import re
from typing import Any, Dict, Optional, Sequence

from .base import Layout as Layout
from .base import Weights as Weights
from .base import first as first
from .base import signature as signature
from .base import unwrap as unwrap
from .liere import LieREVit
from .naver import NaverSwin as NaverSwin
from .naver import NaverVit as NaverVit
from .naver import TimmEva as TimmEva
from .naver import is_trained as is_trained
from .spiral import SpiralDeit
from .timm_eva import find_eva as find_eva
from .timm_swin import OurSwin, TimmSwin
from .timm_vit import Ours as Ours
from .timm_vit import TimmVit as TimmVit
from .vit5 import ViT5

_logger = logging.getLogger(__name__)

LAYOUTS: Sequence[Layout] = [
    Ours(), TimmEva(), NaverVit(), NaverSwin(), OurSwin(), TimmSwin(), SpiralDeit(), ViT5(), LieREVit(),
    TimmVit()]


def find_layout(tensors: Dict[str, Any], layouts: Sequence[Layout] = LAYOUTS) -> Optional[Layout]:
    """The layout whose keys these are."""
    return next((layout for layout in layouts if not layout.differences(tensors)), None)


def recognise(checkpoint: Any, known: Optional[Layout] = None) -> Weights:
    """Say what a checkpoint is and bring it into our keys. Tensors are shared, not copied, where they keep their shape.

    Args:
        checkpoint: State dict of any known layout, or what a trainer saved around one.
        known: The layout, where somebody named the model.

    Returns:
        The weights, what they are, and what was left out.

    Raises:
        RuntimeError: It fits no layout; lists how it differs from the nearest ones.
    """
    tensors, average, extra = unwrap(checkpoint)
    layouts = LAYOUTS if known is None else [known]
    layout = find_layout(tensors, layouts)
    if layout is None:
        differences = {other.name: other.differences(tensors) for other in layouts}
        fewest = min(map(len, differences.values()))
        nearest = '; '.join(f'{name} ({first(d)})' for name, d in differences.items() if len(d) == fewest)
        hint = '' if 'blocks.0.attn.proj.weight' not in tensors else (
            " Keys of timm's DINOv3, EVA-02, PE or SBB tell neither coordinates nor the order of channels: convert "
            'them by python -m timm_rope convert FILE OUT --model NAME, or with timm:NAME.TAG for FILE.')
        raise RuntimeError(
            f'The checkpoint fits none of the known layouts ({", ".join(differences)}). {_inside(tensors)}Nearest: '
            f'{nearest}. It has {len(tensors)} tensors: {first(sorted(tensors))}.{hint}')
    if average:
        used = 'averaged (EMA)' if layout.prefer_average else 'raw'
        _logger.info(f'{layout.name} checkpoint with raw and averaged weights: the {used} ones are used.')
        tensors = average if layout.prefer_average else tensors
    try:
        weights = layout.convert(tensors, extra)
    except (ArithmeticError, AttributeError, LookupError, TypeError, ValueError) as e:
        raise RuntimeError(
            f'The checkpoint has keys of {layout.name}, but is damaged or of no model that project published '
            f'({type(e).__name__}: {e}).') from e
    weights.originals, weights.averaged = tensors, layout.prefer_average if average else None
    if weights.left_out:
        _logger.info(f'{layout.name} checkpoint: left out {first(sorted(weights.left_out))}.')
    return weights


def _inside(tensors: Dict[str, Any]) -> str:
    """A sentence on weights that stand under a prefix, which only the user can know to be the ones that are meant."""
    found = (re.fullmatch(r'(.+\.)(to_)?patch_embed(ding)?\..*', key) for key in sorted(tensors))
    prefixes = {}
    for prefix in dict.fromkeys(match[1] for match in found if match):
        part = {key.removeprefix(prefix): value for key, value in tensors.items() if key.startswith(prefix)}
        layout = find_layout(part)
        if layout is not None:
            prefixes[prefix] = layout.name
    if not prefixes:
        return ''
    names = ', '.join(f'those that begin with {prefix!r} are {name}' for prefix, name in prefixes.items())
    return f'Of its keys {names}: save these alone, without the prefix. '
