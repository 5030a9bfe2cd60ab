"""`vit_{tiny,small,base,large}_rope_{encoding}[_ape]` and the baseline `vit_{size}_ape`.

The table SIZES x encodings below is all there is; `_define` makes each cell a function that timm can register, pickle
can find and help() can show. A new encoding gets its models from the registry.

timm's import runs this module, and may itself be run by the first line of one of ours that needs timm (vit,
attention, checkpoints): such a module is half loaded then, so it is only imported here when a model is built.
"""
import sys
from typing import TYPE_CHECKING, Any, Callable, Dict, List

from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from timm.models import build_model_with_cfg, generate_default_cfgs, register_model

from ..encoding import ENCODINGS
from ..encodings import list_ropes

if TYPE_CHECKING:
    from ..vit import RopeVisionTransformer

__all__: List[str] = []  # register_model adds each entry point

# DeiT-III / RoPE-ViT: patch 16, 12 or 24 pre-norm blocks, heads of 64 channels, LayerScale, class token
SIZES: Dict[str, Dict[str, int]] = {
    'tiny': dict(embed_dim=192, depth=12, num_heads=3),
    'small': dict(embed_dim=384, depth=12, num_heads=6),
    'base': dict(embed_dim=768, depth=12, num_heads=12),
    'large': dict(embed_dim=1024, depth=24, num_heads=16),
}


def _cfg(**kwargs: Any) -> Dict[str, Any]:
    return {
        'num_classes': 1000,
        'input_size': (3, 224, 224),
        'pool_size': None,
        'crop_pct': 1.0,
        'interpolation': 'bicubic',
        # makes timm's scripts build the model at --img-size, so that its grid becomes the reference grid;
        # the model itself takes any size
        'fixed_input_size': True,
        'mean': IMAGENET_DEFAULT_MEAN,
        'std': IMAGENET_DEFAULT_STD,
        'first_conv': 'patch_embed.proj',
        'classifier': 'head',
        'license': 'apache-2.0',
        **kwargs,
    }


def _model_args() -> Dict[str, Dict[str, Any]]:
    """Model name -> constructor arguments."""
    args = {}
    for size, dims in SIZES.items():
        common = dict(dims, patch_size=16, init_values=1e-4, no_embed_class=True)
        for encoding in list_ropes():
            args[f'vit_{size}_rope_{encoding}'] = dict(common, rope_encoding=encoding, pos_embed='none')
            args[f'vit_{size}_rope_{encoding}_ape'] = dict(common, rope_encoding=encoding, pos_embed='learn')
        args[f'vit_{size}_ape'] = dict(common, rope_encoding='none', pos_embed='learn')
    return args


MODEL_ARGS = _model_args()

default_cfgs = generate_default_cfgs({f'{name}.untrained': _cfg() for name in MODEL_ARGS})


def _create(name: str, pretrained: bool = False, **kwargs: Any) -> 'RopeVisionTransformer':
    from ..checkpoints import checkpoint_filter_fn
    from ..vit import RopeVisionTransformer

    out_indices = kwargs.pop('out_indices', 3)
    return build_model_with_cfg(
        RopeVisionTransformer,
        name,
        pretrained,
        pretrained_filter_fn=checkpoint_filter_fn,
        feature_cfg=dict(out_indices=out_indices, feature_cls='getter'),
        **dict(MODEL_ARGS[name], **kwargs),
    )


def _define(name: str) -> Callable[..., 'RopeVisionTransformer']:
    def entrypoint(pretrained: bool = False, **kwargs: Any) -> 'RopeVisionTransformer':
        return _create(name, pretrained, **kwargs)

    args = MODEL_ARGS[name]
    size = name.split('_')[1]
    ape = ' and a learned absolute position embedding' if args['pos_embed'] == 'learn' else ''
    if args['rope_encoding'] == 'none':
        what = 'a learned absolute position embedding only, the baseline of both papers (DeiT-III)'
    else:
        encoding = ENCODINGS[args['rope_encoding']]
        what = f'the rotary encoding {encoding.name!r} ({encoding.source}){ape}'
    entrypoint.__name__ = entrypoint.__qualname__ = name
    entrypoint.__doc__ = (
        f'ViT-{size.capitalize()}/16 with {what}.\n\n'
        f'{args["embed_dim"]} wide, {args["depth"]} blocks, {args["num_heads"]} heads, built for 224 x 224, takes any '
        f'multiple of 16.\n\nArgs:\n'
        f'    pretrained: Load the weights of the default tag.\n'
        f'    **kwargs: Arguments of RopeVisionTransformer, of timm.create_model and `out_indices`.')
    return entrypoint


for _name in MODEL_ARGS:
    setattr(sys.modules[__name__], _name, register_model(_define(_name)))
