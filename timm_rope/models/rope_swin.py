"""`swin_{tiny,small,base}_rope_{axial,mixed}[_rpb]`.

The same table and the same care about half-loaded modules as in `rope_vit.py`: modules that need timm are imported
when a model is built.
"""
import itertools
import sys
from typing import TYPE_CHECKING, Any, Callable, Dict, List

from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from timm.models import generate_default_cfgs, register_model

from ..encoding import ENCODINGS

if TYPE_CHECKING:
    from ..swin import RopeSwinTransformer

__all__: List[str] = []  # register_model adds each entry point

# Swin Transformer (arXiv 2103.14030): patch 4, window 7, heads of 32 channels
SIZES: Dict[str, Dict[str, Any]] = {
    'tiny': dict(embed_dim=96, depths=(2, 2, 6, 2), num_heads=(3, 6, 12, 24)),
    'small': dict(embed_dim=96, depths=(2, 2, 18, 2), num_heads=(3, 6, 12, 24)),
    'base': dict(embed_dim=128, depths=(2, 2, 18, 2), num_heads=(4, 8, 16, 32)),
}


def _cfg(**kwargs: Any) -> Dict[str, Any]:
    return {
        'num_classes': 1000,
        'input_size': (3, 224, 224),
        'pool_size': (7, 7),
        'crop_pct': 0.875,  # 224 of 256, 384 of 438: NAVER's evaluation at every size
        'interpolation': 'bicubic',
        'fixed_input_size': True,
        'mean': IMAGENET_DEFAULT_MEAN,
        'std': IMAGENET_DEFAULT_STD,
        'first_conv': 'patch_embed.proj',
        'classifier': 'head.fc',
        'license': 'apache-2.0',
        **kwargs,
    }


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
        origin_url='https://github.com/naver-ai/rope-vit',
        paper_name='Rotary Position Embedding for Vision Transformer',
        paper_ids='arXiv:2403.13298',
    ) for size in SIZES for encoding in ('axial', 'mixed')}

default_cfgs = generate_default_cfgs({
    **PUBLISHED, **{f'{name}.untrained': _cfg() for name in MODEL_ARGS if f'{name}.naver_in1k' not in PUBLISHED}})


def _create(name: str, pretrained: bool = False, **kwargs: Any) -> 'RopeSwinTransformer':
    from ..pretrained import build
    from ..swin import RopeSwinTransformer
    from ..swin_checkpoints import fit

    depths = kwargs.get('depths')
    stages = len(depths) if isinstance(depths, (tuple, list)) else len(MODEL_ARGS[name]['depths'])
    feature_cfg = dict(flatten_sequential=True, out_indices=kwargs.pop('out_indices', tuple(range(stages))))
    return build(RopeSwinTransformer, fit, name, MODEL_ARGS[name], feature_cfg, pretrained, **kwargs)


def _define(name: str) -> Callable[..., 'RopeSwinTransformer']:
    def entrypoint(pretrained: bool = False, **kwargs: Any) -> 'RopeSwinTransformer':
        return _create(name, pretrained, **kwargs)

    args = MODEL_ARGS[name]
    encoding = ENCODINGS[args['rope_encoding']]
    bias = ' and a relative position bias' if args['rel_pos_bias'] else ''
    entrypoint.__name__ = entrypoint.__qualname__ = name
    entrypoint.__doc__ = (
        f'Swin-{name.split("_")[1].capitalize()} with the rotary encoding {encoding.name!r} ({encoding.source}){bias} '
        f'in its windows.\n\n'
        f'{args["embed_dim"]} wide in the first stage, {", ".join(map(str, args["depths"]))} blocks, '
        f'{", ".join(map(str, args["num_heads"]))} heads, patch 4, window 7, built for 224 x 224.\n\nArgs:\n'
        f'    pretrained: Load the weights of the default tag.\n'
        f'    **kwargs: Arguments of RopeSwinTransformer, of timm.create_model and `out_indices`.')
    return entrypoint


for _name in MODEL_ARGS:
    setattr(sys.modules[__name__], _name, register_model(_define(_name)))
