"""Tiny backbones as other libraries ask for them, and what is looked at in all of them."""
import timm
import torch
from timm.layers import set_fused_attn

VIT = dict(img_size=32, patch_size=8, embed_dim=24, depth=3, num_heads=2, init_values=1.0)
SWIN = dict(img_size=64, embed_dim=16, depths=(1, 1, 1, 1), num_heads=(1, 2, 4, 8), window_size=4)
FAMILIES = {'vit': ('vit_tiny_rope_mixed', VIT), 'swin': ('swin_tiny_rope_mixed', SWIN)}


def loud(model):
    """Weights for which attention is far from uniform, so that positions matter; the model itself, in evaluation."""
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if name.endswith('qkv.weight'):
                weight.mul_(20)
    return model.eval()


def build(family, **kwargs):
    torch.manual_seed(0)
    name, options = FAMILIES[family]
    return loud(timm.create_model(name, **{**options, **kwargs}))


def image(*size, batch=2, seed=1):
    return torch.randn(batch, 3, *size, generator=torch.Generator().manual_seed(seed))


def frequencies(model):
    """Parameters of all encodings inside a module, by name."""
    return {name: p for name, p in model.named_parameters() if name.endswith('rope.freqs')}


def assert_learns(model, loss):
    """The loss is finite, and its gradient too, which reaches the frequencies of every block."""
    assert bool(loss.isfinite().all())
    loss.sum().backward()
    found = frequencies(model)
    assert found
    for name, p in found.items():
        assert p.grad is not None and bool(p.grad.isfinite().all()) and float(p.grad.abs().max()) > 0, name


class unfused:
    """Models made inside have plain attention, whose weights can be looked at."""

    def __enter__(self):
        set_fused_attn(False)

    def __exit__(self, *exc):
        set_fused_attn(True)
