"""Which of our models weights are for, and with which constructor arguments.

Most of it stands in the shapes of the tensors. What does not (heads, sometimes the encoding) is taken from who says
it: the user, the config.json beside the weights, the layout, a model of the same width. Nothing is guessed beyond that.
"""
import inspect
import math
from dataclasses import dataclass, field
from importlib import import_module
from typing import Any, Dict, List, Optional, Tuple

import timm
from timm.models.vision_transformer import VisionTransformer

from ...encodings._saved import read_encoding
from ...models.vit import RopeVisionTransformer
from ...plugin import MODEL_MODULES
from ...weights.layouts import NaverVit, Ours, SpiralDeit, TimmEva, Weights
from .timm_models import ask_timm
from .weight_shapes import has_ape, positions, read_sizes, staged

# arguments that say how a model is created and not what it computes; no checkpoint may set them
RUNTIME = {*inspect.signature(timm.create_model).parameters, 'device', 'dtype', 'features_only', 'out_indices',
           'feature_cls', 'rope_warm_start', 'pretrained_strict', 'pretrained_filter_fn'}
SAME_KEYS = ('axial', 'none')  # encodings that leave no trace in keys or shapes
HEADS_OF_64 = (NaverVit.name, TimmEva.name, SpiralDeit.name)  # all that these projects published


@dataclass
class Architecture:
    """A registered model and what is different from it.

    Attributes:
        model: Name of the model, with a tag if the user gave one.
        args: Constructor arguments beside those of the model; `in_chans`, `num_classes` and `img_size` always.
        heads: Attention heads.
        assumed: What no source says -> what was taken instead.
    """
    model: str
    args: Dict[str, Any]
    heads: Any
    assumed: Dict[str, str] = field(default_factory=dict)


def known_models() -> Dict[str, Dict[str, Any]]:
    """Model name -> constructor arguments, of all modules of models."""
    return {name: args for module in MODEL_MODULES for name, args in import_module(module).MODEL_ARGS.items()}


def match(
        weights: Weights,
        model: str = '',
        given: Optional[Dict[str, Any]] = None,
        img_size: Optional[Tuple[int, int]] = None,
        config: Optional[Dict[str, Any]] = None,
) -> Architecture:
    """Find the model for weights.

    Args:
        weights: What the checkpoint is.
        model: Name of the model, if the user says it.
        given: Constructor arguments that the user says; they go before everything else.
        img_size: Image size the weights are for, (height, width), if the user says it.
        config: Constructor arguments that were written down, `architecture` and `input_size` among them.

    Raises:
        ValueError: No model of this version computes these weights, or something is left open; says what to add.
    """
    given, config = dict(given or {}), dict(config or {})
    if 'img_size' in given:
        raise ValueError('img_size is no free argument: say it with --img-size.')
    for key in (*given, *config):
        if key in RUNTIME:
            raise ValueError(f'{key} is no argument of a model, it cannot be saved with weights.')
    models = known_models()
    config_size, named = config.pop('input_size', None), config.pop('architecture', '')
    encoding = weights.encoding
    if named in models:
        model = model or named
    else:
        config, told = ask_timm(weights.tensors['patch_embed.proj.weight'].shape[0], named, config)
        encoding = told or encoding
    for key, why in weights.ask.items():
        if key not in given and key not in config:
            raise ValueError(
                f'{key} must be chosen for these {weights.layout} weights: {why}. Add --model-args {key}=...')

    sizes = read_sizes(weights)
    known = {**config, **weights.model_args, **given}
    if 'num_heads' in sizes:
        known.setdefault('num_heads', sizes['num_heads'])
    ape = 'learn' if has_ape(weights) else 'none'
    if not model:
        wanted = {**sizes, 'pos_embed': known.get('pos_embed', ape), 'rope_registers': known.get('rope_registers', 0)}
        model = _choose(weights, given.get('rope_encoding', encoding), wanted, models)
        known.setdefault('pos_embed', ape)
    preset = models.get(model.partition('.')[0])
    if preset is None:
        raise ValueError(f'There is no model {model!r}: `python -m timm_rope list` names all.')

    assumed: Dict[str, str] = {}
    heads = known.get('num_heads')
    try:
        known = {**_rope_args(weights, heads), **known}
    except ValueError:  # fixed frequencies fit any number of heads
        if heads is not None:
            raise
        known = {**_rope_args(weights, _heads(weights, sizes, models, assumed)), **known}
    if 'num_heads' not in known:
        known['num_heads'] = _heads(weights, sizes, models, assumed)
    known.update({key: value for key, value in sizes.items() if key not in given})
    if 'pos_embed' in preset:
        known.setdefault('pos_embed', preset['pos_embed'])
    known.update(positions(weights, known, img_size, config_size, assumed))
    defaults = {**_defaults(), **preset}
    args = {
        key: value for key, value in known.items()
        if key in ('in_chans', 'num_classes', 'img_size') or key not in defaults or defaults[key] != value}
    return Architecture(model, args, known['num_heads'], assumed)


def _defaults() -> Dict[str, Any]:
    return {
        name: p.default for cls in (VisionTransformer, RopeVisionTransformer)
        for name, p in inspect.signature(cls).parameters.items() if p.default is not p.empty}


# -- the model

def _choose(
        weights: Weights, encoding: Optional[str], wanted: Dict[str, Any], models: Dict[str, Dict[str, Any]]) -> str:
    """The model of the encoding that is nearest in position embedding or bias, width and depth, in this order."""
    stages = staged(weights)
    family = {name: args for name, args in models.items() if ('depths' in args) == stages}
    if not family:
        raise ValueError(
            f'These are {weights.layout} weights ({encoding}): there is no {"Swin" if stages else "ViT"} model in this '
            f'version yet.')

    def distance(name: str) -> Tuple[float, ...]:
        args = family[name]
        depth = 'depths' if stages else 'depth'
        return (
            args.get('pos_embed', 'none') != wanted['pos_embed'],
            args.get('rope_registers', 0) != wanted['rope_registers'],
            args.get('rel_pos_bias', False) != wanted.get('rel_pos_bias', False),
            abs(math.log(args['embed_dim'] / wanted['embed_dim'])),
            abs(sum(_tuple(args[depth])) - sum(_tuple(wanted[depth]))))

    possible = [encoding] if encoding is not None else list(SAME_KEYS)
    found: List[str] = []
    for one in possible:
        names = [name for name, args in family.items() if args['rope_encoding'] == one]
        if names:
            found.append(min(names, key=distance))
    if encoding is None:
        found = [name for name in found if not distance(name)[0]]
        if len(found) != 1:
            raise ValueError(
                f'These {weights.layout} weights hold no trace of their encoding: say which model they are of with '
                f'--model, {" or ".join(found) or "a name of `python -m timm_rope list`"}.')
    if not found:
        have = sorted({args['rope_encoding'] for args in family.values()})
        raise ValueError(f'No model of this version has the encoding {encoding!r}, they have {", ".join(have)}.')
    return found[0]


def _tuple(value: Any) -> Tuple[int, ...]:
    return tuple(value) if isinstance(value, (tuple, list)) else (value,)


# -- what the shapes leave open

def _rope_args(weights: Weights, heads: Optional[int]) -> Dict[str, Any]:
    """What the frequencies, and in weights of ours the signature, tell: heads and options of the encoding."""
    tensors = weights.tensors
    if weights.layout == Ours.name and 'rope.signature' in tensors:
        rope = read_encoding(tensors, 'rope.', heads)
        options = {f'rope_{k}': v for k, v in rope.options.items() if rope.option_defaults()[k] != v}
        return {'num_heads': rope.num_heads, **options}
    freqs = tensors.get('rope.freqs')
    return dict(num_heads=freqs.shape[2]) if weights.encoding == 'mixed' and freqs is not None else {}


def _heads(
        weights: Weights, sizes: Dict[str, Any], models: Dict[str, Dict[str, Any]], assumed: Dict[str, str]) -> Any:
    width = sizes['embed_dim']
    if weights.layout in HEADS_OF_64 and width % 64 == 0:
        assumed['heads'] = f'{width // 64} of 64 channels, as in all published models of {weights.layout}'
        return width // 64
    stages = len(sizes.get('depths', ()))
    for args in models.values():
        if args['embed_dim'] == width and len(args.get('depths', ())) == stages:
            assumed['heads'] = f'{args["num_heads"]}, as in the models here that are {width} wide'
            return args['num_heads']
    raise ValueError(
        f'These {weights.layout} weights, {width} wide, do not tell their heads: add --model-args num_heads=...')
