"""Our models against the authors' own code, with the same random weights.

    git clone https://github.com/naver-ai/rope-vit /tmp/rope-vit
    git clone https://github.com/StanfordMIMI/LieRE /tmp/LieRE
    git clone https://github.com/huajianduzhuo-code/Spiral_RoPE /tmp/Spiral_RoPE
    python benchmarks/originals.py --naver /tmp/rope-vit --liere /tmp/LieRE --spiral /tmp/Spiral_RoPE

Needs einops beside this package. Their models are built with random weights that make attention depend on position,
saved as they save them, and loaded into ours by `timm.create_model(..., pretrained=True)` from that file. Prints the
largest difference of logits (ViT-S, Swin-T, a small LieRE); of Spiral, whose attention needs flash-attn on a GPU, that
of rotated queries.
"""
import argparse
import contextlib
import importlib
import io
import itertools
import sys
import tempfile
import types
import warnings
from pathlib import Path
from typing import Any, Dict, Iterator, Optional, Tuple

import timm
import torch
import torch.nn.functional as F
from torch import nn

import timm_rope

NAVER = {
    'rope_axial_deit_small_patch16_LS': 'vit_small_rope_axial',
    'rope_mixed_deit_small_patch16_LS': 'vit_small_rope_mixed',
    'rope_axial_ape_deit_small_patch16_LS': 'vit_small_rope_axial_ape',
    'rope_mixed_ape_deit_small_patch16_LS': 'vit_small_rope_mixed_ape',
    'deit_small_patch16_LS': 'vit_small_ape',
}
SIZES = ((224, 224), (384, 384), (192, 320), (160, 160))


@contextlib.contextmanager
def imports_from(folder: Path) -> Iterator[None]:
    """Their modules in front, old names of timm's, debuggers stubbed, and no model of theirs registered."""
    timm_registry = importlib.import_module('timm.models._registry')
    registry = types.ModuleType('timm.models.registry')
    registry.register_model = lambda function: function  # type: ignore[attr-defined]
    old = {'timm.models.registry': registry, 'ipdb': types.ModuleType('ipdb'), 'pdb': types.ModuleType('pdb')}
    kept = {name: sys.modules.get(name) for name in old}
    before, original = set(sys.modules), timm_registry.register_model
    sys.modules.update(old)
    sys.path.insert(0, str(folder))
    try:
        with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
            warnings.simplefilter('ignore')
            yield
    finally:
        sys.path.remove(str(folder))
        timm_registry.register_model = original
        for name in set(sys.modules) - before:
            if str(getattr(sys.modules[name], '__file__', '')).startswith(str(folder)):
                del sys.modules[name]
        for name, module in kept.items():
            if module is None:
                sys.modules.pop(name, None)
            else:
                sys.modules[name] = module


@torch.no_grad()
def make_loud(model: nn.Module) -> nn.Module:
    """Weights with which attention is far from uniform, and every bias and embedding counts."""
    for name, parameter in model.named_parameters():
        if 'gamma' in name:
            parameter.uniform_(0.3, 1)
        elif name.endswith(('qkv.weight', 'to_qkv.weight')):
            parameter.mul_(3)
        elif name.endswith(('bias', 'cls_token', 'pos_embed')):
            parameter.normal_(std=0.3)
        elif name.endswith('freqs'):
            parameter.add_(0.2 * torch.randn_like(parameter))
    return model.eval()


def load_ours(name: str, checkpoint: Dict[str, Any], num_classes: int, **kwargs: Any) -> nn.Module:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / 'pytorch_model.bin'
        torch.save(checkpoint, path)
        return timm.create_model(
            name, pretrained=True, pretrained_cfg_overlay=dict(file=str(path), num_classes=num_classes),
            num_classes=num_classes, **kwargs).eval()


@torch.no_grad()
def report(label: str, size: Tuple[int, int], theirs: torch.Tensor, ours: torch.Tensor) -> None:
    difference = (theirs - ours).abs().max().item()
    print(f'{label:<34} {size[0]:>4} x {size[1]:<4} {difference:.1e} of {theirs.abs().max().item():.1f}', flush=True)


@torch.no_grad()
def compare_naver(folder: Path) -> None:
    with imports_from(folder / 'deit'):
        modules = [importlib.import_module(name) for name in ('models_v2_rope', 'models_v2')]
    for theirs_name, name in NAVER.items():
        build = next(getattr(module, theirs_name) for module in modules if hasattr(module, theirs_name))
        theirs = make_loud(build())
        ours = load_ours(name, {'model': theirs.state_dict()}, 1000)
        theirs.patch_embed.strict_img_size = False  # type: ignore[union-attr]
        trained: Optional[nn.Parameter] = theirs._parameters.get('pos_embed')
        for size in SIZES:
            if trained is not None:  # as their main.py does for another size
                table = trained.unflatten(1, (14, 14)).permute(0, 3, 1, 2)
                table = F.interpolate(table, (size[0] // 16, size[1] // 16), mode='bicubic', align_corners=False)
                theirs.pos_embed = nn.Parameter(table.flatten(2).transpose(1, 2))
            x = torch.randn(1, 3, *size)
            report(f'NAVER {name}', size, theirs(x), ours(x))
        theirs.pos_embed = trained


@torch.no_grad()
def compare_swin(folder: Path) -> None:
    with imports_from(folder):
        module = importlib.import_module('models.swin_transformer_rope')
    for encoding, size in itertools.product(('axial', 'mixed'), (160, 224, 384)):
        build = getattr(module, f'swin_rope_{encoding}_tiny_patch4_window7_224')
        with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
            warnings.simplefilter('ignore')
            theirs = make_loud(build(img_size=size))
        ours = load_ours(
            f'swin_tiny_rope_{encoding}', {'model': theirs.state_dict()}, 1000, img_size=size, window_ratio=8)
        x = torch.randn(1, 3, size, size)
        report(f'NAVER swin_tiny_rope_{encoding}', (size, size), theirs(x), ours(x))


@torch.no_grad()
def compare_liere(folder: Path) -> None:
    sizes = dict(image_size=32, patch_size=4, num_classes=100, dim=384, depth=3, heads=6, mlp_dim=768)
    with imports_from(folder):
        vit = importlib.import_module('models.rope_vit').RoPEViT
        models = {'absolute': vit(positional_encoding_type='absolute', **sizes)}
        for block in (2, 5, 8, 64):
            models[f'block {block}'] = vit(
                positional_encoding_type='liere', phase_type='naver', generator_dim=block, enable_ape=False,
                rotary_embedding_per_layer=True, rotary_embedding_per_head=True, **sizes)
    for kind, theirs in models.items():
        make_loud(theirs)
        checkpoint = {'state_dict': {f'model.{key}': value for key, value in theirs.state_dict().items()}}
        name, choice = ('vit_small_ape', {}) if kind == 'absolute' else (
            'vit_small_rope_liere', dict(rope_share_layers=True))
        ours = load_ours(name, checkpoint, 100, depth=3, **choice)
        for size in ((32, 32), (48, 48), (32, 64)):
            x = torch.randn(2, 3, *size)
            report(f'LieRE {kind}', size, theirs(x), ours(x))


@torch.no_grad()
def compare_spiral(folder: Path) -> None:
    with imports_from(folder / 'RoPE_DeiT'):
        module = importlib.import_module('rope')
    for rotate in (1, 2, 4, 8):
        for side in (14, 24):
            theirs = module.VisionRotaryEmbedding(32, side, rotate=rotate, max_freq_lang=1.5, same_theta=False)
            ours = timm_rope.create_rope('spiral', 64, 6, 1, (side, side), directions=2 * rotate, clamp=True)
            q = torch.randn(2, side * side, 6, 64)
            turned = ours.rotate(q.transpose(1, 2), ours((side, side))[0]).transpose(1, 2)
            report(f'Spiral, {2 * rotate} directions', (16 * side, 16 * side), theirs(q), turned)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    compare = dict(naver=(compare_naver, compare_swin), liere=(compare_liere,), spiral=(compare_spiral,))
    for name in compare:
        parser.add_argument(f'--{name}', type=Path, metavar='DIR', help='checkout of that repository')
    args = vars(parser.parse_args())
    if not any(args.values()):
        parser.error(f'name at least one checkout: {", ".join(f"--{name} DIR" for name in compare)}')
    warnings.simplefilter('ignore', FutureWarning)  # of old names that their code uses
    print(f'torch {torch.__version__}, timm {timm.__version__}, float32, {torch.get_num_threads()} threads')
    for name, folder in args.items():
        if folder:
            torch.manual_seed(0)
            for one in compare[name]:
                one(folder)


if __name__ == '__main__':
    main()
