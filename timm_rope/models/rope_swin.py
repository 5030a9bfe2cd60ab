"""`swin_{tiny,small,base}_rope_{axial,mixed}[_rpb]`.

The same table and the same care about half-loaded modules as in `rope_vit.py`: modules that need timm are imported
when a model is built.
"""
import itertools
from typing import TYPE_CHECKING, Any, Dict, List

from timm.models import generate_default_cfgs

from ..encodings import ENCODINGS
from .entrypoints import NAVER, imagenet_cfg, register

if TYPE_CHECKING:
    from .swin import RopeSwinTransformer

__all__: List[str] = []  # register_model adds each entry point

# Swin Transformer (arXiv 2103.14030): patch 4, window 7, heads of 32 channels
SIZES: Dict[str, Dict[str, Any]] = {
    'tiny': dict(embed_dim=96, depths=(2, 2, 6, 2), num_heads=(3, 6, 12, 24)),
    'small': dict(embed_dim=96, depths=(2, 2, 18, 2), num_heads=(3, 6, 12, 24)),
    'base': dict(embed_dim=128, depths=(2, 2, 18, 2), num_heads=(4, 8, 16, 32)),
}


def _cfg(**kwargs: Any) -> Dict[str, Any]:
    # crop 0.875 is 224 of 256, 384 of 438: NAVER's evaluation at every size
    return imagenet_cfg(**{'pool_size': (7, 7), 'crop_pct': 0.875, 'classifier': 'head.fc', **kwargs})


def _model_args() -> Dict[str, Dict[str, Any]]:
    """Model name -> constructor arguments."""
    return {
        f'swin_{size}_rope_{encoding}{"_rpb" if bias else ""}': dict(
            dims, patch_size=4, rope_encoding=encoding, rel_pos_bias=bias)
        for (size, dims), encoding, bias in itertools.product(SIZES.items(), ('axial', 'mixed'), (False, True))}


MODEL_ARGS = _model_args()

PUBLISHED = {
    f'swin_{size}_rope_{encoding}.naver_in1k': _cfg(
        hf_hub_id=f'naver-ai/swin_rope_{encoding}_{size}_patch4_window7_224',
        license='bsd-3-clause',  # as the cards of these repositories say
        **NAVER,
    ) for size in SIZES for encoding in ('axial', 'mixed')}

default_cfgs = generate_default_cfgs({
    **PUBLISHED, **{f'{name}.untrained': _cfg() for name in MODEL_ARGS if f'{name}.naver_in1k' not in PUBLISHED}})


def _create(name: str, pretrained: bool = False, **kwargs: Any) -> 'RopeSwinTransformer':
    from ..weights.fit_swin import fit
    from ..weights.pretrained import build
    from .swin import RopeSwinTransformer

    if kwargs.pop('use_naflex', None):
        raise TypeError('use_naflex=True is for ViTs: the windows of a Swin need all images of a batch in one shape.')
    depths = kwargs.get('depths')
    stages = len(depths) if isinstance(depths, (tuple, list)) else len(MODEL_ARGS[name]['depths'])
    feature_cfg = dict(flatten_sequential=True, out_indices=kwargs.pop('out_indices', tuple(range(stages))))
    return build(RopeSwinTransformer, fit, name, MODEL_ARGS[name], feature_cfg, pretrained, **kwargs)


def _describe(name: str) -> str:
    args = MODEL_ARGS[name]
    encoding = ENCODINGS[args['rope_encoding']]
    bias = ' and a relative position bias' if args['rel_pos_bias'] else ''
    return (
        f'Swin-{name.split("_")[1].capitalize()} with the rotary encoding {encoding.name!r} ({encoding.source}){bias} '
        f'in its windows.\n\n'
        f'{args["embed_dim"]} wide in the first stage, {", ".join(map(str, args["depths"]))} blocks, '
        f'{", ".join(map(str, args["num_heads"]))} heads, patch 4, window 7, built for 224 x 224.')


for _name in MODEL_ARGS:
    register(__name__, _name, _create, 'RopeSwinTransformer', _describe(_name))
