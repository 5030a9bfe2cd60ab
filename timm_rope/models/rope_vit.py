"""`vit_{tiny,small,base,large}_rope_{encoding}[_ape]`, the baseline `vit_{size}_ape`, and `vit_{size}_rope_vit5`.

The table SIZES x encodings below is all there is; `register` makes each cell a function that timm can register, pickle
can find and help() can show. A new encoding gets its models from the registry.

timm's import runs this module, and may itself be run by the first line of one of ours that needs timm (vit,
attention, checkpoints): such a module is half loaded then, so it is only imported here when a model is built.
"""
import itertools
from typing import TYPE_CHECKING, Any, Dict, List

from timm.models import generate_default_cfgs

from .._checks import check_flag
from ..encodings import ENCODINGS, list_ropes
from .entrypoints import NAVER, imagenet_cfg, naflex_by_default, register

if TYPE_CHECKING:
    from .vit import RopeVisionTransformer

__all__: List[str] = []  # register_model adds each entry point

# DeiT-III / RoPE-ViT: patch 16, 12 or 24 pre-norm blocks, heads of 64 channels, LayerScale, class token
SIZES: Dict[str, Dict[str, int]] = {
    'tiny': dict(embed_dim=192, depth=12, num_heads=3),
    'small': dict(embed_dim=384, depth=12, num_heads=6),
    'base': dict(embed_dim=768, depth=12, num_heads=12),
    'large': dict(embed_dim=1024, depth=24, num_heads=16),
}
# what ViT-5 changes: normed queries and keys, four registers with places of their own, no qkv bias
VIT5: Dict[str, Any] = dict(
    rope_encoding='axial', rope_temperature=1e4, rope_registers=4, reg_tokens=4, pos_embed='learn', qkv_bias=False,
    qk_norm=True, norm_layer='rmsnorm', drop_path_uniform=True)


def _cfg(**kwargs: Any) -> Dict[str, Any]:
    return imagenet_cfg(**{'pool_size': None, 'crop_pct': 1.0, 'classifier': 'head', **kwargs})


def _model_args() -> Dict[str, Dict[str, Any]]:
    """Model name -> constructor arguments."""
    args = {}
    for size, dims in SIZES.items():
        common = dict(dims, patch_size=16, init_values=1e-4, no_embed_class=True)
        for encoding in list_ropes():
            args[f'vit_{size}_rope_{encoding}'] = dict(common, rope_encoding=encoding, pos_embed='none')
            args[f'vit_{size}_rope_{encoding}_ape'] = dict(common, rope_encoding=encoding, pos_embed='learn')
        if size != 'tiny':
            args[f'vit_{size}_rope_vit5'] = dict(common, **VIT5)
        args[f'vit_{size}_ape'] = dict(common, rope_encoding='none', pos_embed='learn')
    return args


MODEL_ARGS = _model_args()

SPIRAL = dict(
    hf_hub_id='haoyuliu00/Spiral_RoPE',
    license='mit',  # as their README says; there is no licence file
    origin_url='https://github.com/huajianduzhuo-code/Spiral_RoPE',
    paper_name='Spiral RoPE: Rotate Your Rotary Positional Embeddings in the 2D Plane',
    paper_ids='arXiv:2602.03227',
)
VIT5_CFG = dict(
    hf_hub_id='FengWang3211/ViT-5',
    license='apache-2.0',  # of the repository that links the weights; their own card could not be read
    origin_url='https://github.com/wangf3014/ViT-5',
    paper_name='ViT-5: Vision Transformers for The Mid-2020s',
    paper_ids='arXiv:2602.08071',
)


def _published() -> Dict[str, Dict[str, Any]]:
    """Model name with tag -> cfg of published weights. All are evaluated without a margin (crop_pct 1.0)."""
    cfgs = {}
    for size in ('small', 'base', 'large'):
        for encoding, ape in itertools.product(('axial', 'mixed'), ('', '_ape')):
            theirs = f'rope{"_mixed" if encoding == "mixed" else ""}{ape}'
            cfgs[f'vit_{size}_rope_{encoding}{ape}.naver_in1k'] = _cfg(
                hf_hub_id=f'timm/vit_{size}_patch16_{theirs}_224.naver_in1k', **NAVER)
        # timm hosts no copy of the baseline; the card of the original names another licence
        cfgs[f'vit_{size}_ape.naver_in1k'] = _cfg(
            hf_hub_id=f'naver-ai/deit_{size}_patch16_LS', **NAVER, license='bsd-3-clause')
        cfgs[f'vit_{size}_rope_spiral.spiral_in1k'] = _cfg(
            hf_hub_filename=f'deit_{size}_patch16_LS_rms_rope/checkpoint.pth', **SPIRAL)
        for pixels, tag in ((224, 'vit5_in1k'), (384, 'vit5_in1k_384'))[:1 + (size != 'small')]:
            cfgs[f'vit_{size}_rope_vit5.{tag}'] = _cfg(
                hf_hub_filename=f'vit5_{size}_patch16_{pixels}.pth', input_size=(3, pixels, pixels), **VIT5_CFG)
    return cfgs


PUBLISHED = _published()

default_cfgs = generate_default_cfgs({
    **PUBLISHED, **{f'{name}.untrained': _cfg() for name in MODEL_ARGS if not any(
        tagged.startswith(f'{name}.') for tagged in PUBLISHED)}})


def _create(name: str, pretrained: bool = False, **kwargs: Any) -> 'RopeVisionTransformer':
    from ..weights.fit_vit import fit
    from ..weights.pretrained import build
    from .vit import RopeVisionTransformer

    model_cls = RopeVisionTransformer
    use_naflex = kwargs.pop('use_naflex', None)
    if check_flag(naflex_by_default() if use_naflex is None else use_naflex, 'use_naflex'):
        from .naflex import RopeNaFlexVit as model_cls
        kwargs['use_naflex'] = True  # noted with the weights
    else:
        kwargs.pop('patchify_channels_last', None)  # a folder of a NaFlex model may note it
    feature_cfg = dict(out_indices=kwargs.pop('out_indices', 3), feature_cls='getter')
    return build(model_cls, fit, name, MODEL_ARGS[name], feature_cfg, pretrained, **kwargs)


def _describe(name: str) -> str:
    args = MODEL_ARGS[name]
    ape = ' and a learned absolute position embedding' if args['pos_embed'] == 'learn' else ''
    if args['rope_encoding'] == 'none':
        what = 'a learned absolute position embedding only, the baseline of both papers (DeiT-III)'
    else:
        encoding = ENCODINGS[args['rope_encoding']]
        what = f'the rotary encoding {encoding.name!r} ({encoding.source}){ape}'
        if name.endswith('_vit5'):
            what += ', registers and normed queries and keys as ViT-5 (arXiv 2602.08071)'
    return (
        f'ViT-{name.split("_")[1].capitalize()}/16 with {what}.\n\n'
        f'{args["embed_dim"]} wide, {args["depth"]} blocks, {args["num_heads"]} heads, built for 224 x 224, takes any '
        f'multiple of 16.')


for _name in MODEL_ARGS:
    register(__name__, _name, _create, 'RopeVisionTransformer', _describe(_name))
