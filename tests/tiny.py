"""A small model that several test modules use."""
import timm
import torch

TINY = dict(img_size=32, patch_size=8, embed_dim=24, depth=3, num_heads=2, num_classes=5, init_values=1.0)


def make(name='vit_tiny_rope_mixed', **kwargs):
    """A tiny model whose attention is not uniform, so that positions matter."""
    torch.manual_seed(0)
    model = timm.create_model(name, **{**TINY, **kwargs}).eval()
    with torch.no_grad():
        for block in model.blocks:
            block.attn.qkv.weight.mul_(20)
    return model
