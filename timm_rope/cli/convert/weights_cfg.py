"""The `pretrained_cfg` of converted weights, which timm keeps beside them in config.json.

It says how images are prepared and whose weights they are, as far as the user, the file or its origin tells.
"""
from typing import Any, Dict, Optional

from timm.models import get_arch_pretrained_cfgs

from ..._checks import check_size
from ...weights.origin import Origin
from .architecture import Architecture, known_models

# what belongs to published weights and not to the architecture
IDENTITY = ('url', 'file', 'state_dict', 'hf_hub_id', 'hf_hub_filename', 'source', 'tag', 'license', 'origin_url',
            'paper_name', 'paper_ids', 'notes', 'description', 'architecture')
KEPT = ('tag', 'license', 'origin_url', 'paper_name', 'paper_ids')


def published_model(origin: Origin, filename: Optional[str]) -> str:
    """Name with tag of the model of which the file is the published one, or ''."""
    for model in known_models() if origin.repo_id else ():
        for name, cfg in get_arch_pretrained_cfgs(model).items():
            if (cfg.hf_hub_id, cfg.hf_hub_filename) == (origin.repo_id, filename):
                return name
    return ''


def pretrained_cfg(
        arch: Architecture, origin: Origin, given: Dict[str, Any], license: Optional[str]) -> Dict[str, Any]:
    """What timm keeps beside the weights, without the identity of weights that these are not.

    Args:
        arch: The model; takes what is assumed.
        origin: With the config.json beside the weights.
        given: What the user says: `mean`, `std`, `crop_pct`, `interpolation`.
        license: What the user says.

    Raises:
        ValueError: An unknown tag, or numbers that cannot be.
    """
    name, _, tag = arch.model.partition('.')
    tags = get_arch_pretrained_cfgs(name)
    known = tags.get(arch.model)
    if tag and known is None:
        raise ValueError(f'{name} has no tag {tag!r}, it has {", ".join(full.partition(".")[2] for full in tags)}.')
    base = next(iter(tags.values())).to_dict()
    cfg = {key: value for key, value in base.items() if key not in IDENTITY}
    if known is not None and known.has_weights:
        cfg.update({key: value for key, value in known.to_dict().items() if key in KEPT})
    else:
        cfg.update(origin.config.data)
        for key in ('mean', 'std', 'crop_pct', 'interpolation'):
            if key not in given and key not in origin.config.data:
                arch.assumed[key] = str(cfg[key]).strip('()')
    channels, size = arch.args['in_chans'], check_size(arch.args['img_size'], 'img_size')
    cfg.update(given, num_classes=arch.args['num_classes'], input_size=(channels, *size))
    for key in ('mean', 'std'):
        values = [float(v) for v in cfg[key]]
        values = values * channels if len(values) == 1 else values
        if len(values) != channels:
            if key in given:
                raise ValueError(f'{key} must have 1 or {channels} numbers, one for each channel, got {cfg[key]}.')
            raise ValueError(f'Images of {channels} channel{"s"[channels == 1:]}: say their {key} with --{key}.')
        if key == 'std' and not all(v > 0 for v in values):
            raise ValueError(f'std must be positive, got {cfg[key]}.')
        cfg[key] = tuple(values)
    if not isinstance(cfg['crop_pct'], (int, float)) or not 0 < cfg['crop_pct'] <= 1:
        raise ValueError(f'crop_pct must be above 0 and at most 1, got {cfg["crop_pct"]}.')
    if license is not None:
        cfg['license'] = license
    return cfg
