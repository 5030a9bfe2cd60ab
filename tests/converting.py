"""What the tests of `convert` share: sizes, made-up checkpoints, and what a refusal is."""
from pathlib import Path

import foreign
import timm
import torch

SIZES = dict(embed_dim=128, depth=2, num_heads=2, patch_size=8, img_size=32, num_classes=5)


def refused(convert, words, *args, status=2):
    """The command fails with these words and leaves everything as it was."""
    before = snapshot()
    got, _, err = convert(*args)
    assert got == status, err
    for word in words:
        assert word in err, err
    assert snapshot() == before


def snapshot():
    return {str(p): p.read_bytes() if p.is_file() else None for p in sorted(Path('.').rglob('*'))}


def save_torch(checkpoint, name='weights.pth'):
    torch.save(checkpoint, name)
    return name


def load(out='out', **kwargs):
    return timm.create_model(f'local-dir:{out}', pretrained=True, **kwargs).eval()


def agree(model, x, expected):
    with torch.no_grad():
        got = model(x)
    assert expected.std() > 0.1, 'the comparison must not be between silent models'
    return (got - expected).abs().max() < 2e-5 * expected.abs().max()


def naver(ape=False, **kwargs):
    return foreign.naver_vit(ape=ape, **kwargs)


def stray(checkpoint):
    """With an embedding that was never trained, as one published file has."""
    return {'model': {**checkpoint['model'], 'pos_embed': .02 * torch.randn(1, 16, 128)}}


def axial(checkpoint, x):
    unused = {key: value for key, value in checkpoint['model'].items() if key != 'pos_embed'}
    return foreign.forward_naver({'model': unused}, x, axial=True)


SHARED, OWN = ('--model-args', 'rope_share_layers=True'), ('--model-args', 'rope_share_layers=False')


CASES = {
    'mixed': (naver(), (), foreign.forward_naver, (32, 48)),
    'mixed_ape': (naver(True), (), foreign.forward_naver, (32, 32)),
    'axial': (naver(mixed=False), ('--img-size', '32'), axial, (48, 32)),
    'axial with a stray embedding': (stray(naver(mixed=False)), (), axial, (32, 40)),
    'axial_ape': (
        naver(True, mixed=False), ('--model', 'vit_tiny_rope_axial_ape'),
        lambda c, x: foreign.forward_naver(c, x, axial=True), (32, 32)),
    'ape': (naver(True, mixed=False), ('--model', 'vit_tiny_ape'), foreign.forward_naver, (32, 32)),
    'spiral': (foreign.spiral_deit(), (), foreign.forward_spiral, (32, 32)),
    'liere, as computed': (foreign.liere_lightning(), SHARED, foreign.forward_liere, (24, 16)),
    'liere, per layer': (
        foreign.liere_lightning(4), OWN, lambda c, x: foreign.forward_liere(c, x, first_layer=False), (16, 24)),
    'liere, one layer': (foreign.liere_lightning(layers=1), (), foreign.forward_liere, (16, 16)),
    'liere, absolute': (foreign.liere_lightning(None), (), foreign.forward_liere, (16, 16)),
}
