"""timm's AttentionExtract, by FX and by hooks: the maps are those that the turned queries and keys give."""
import pytest
import torch
from backbones import build, image, unfused
from timm.utils import AttentionExtract


def maps_of(model, x):
    """Attention of every block of a ViT, from the projections and the payloads."""
    payloads, seen, maps = model.rope((x.shape[2] // 8, x.shape[3] // 8), 1), [], []
    handles = [
        block.attn.qkv.register_forward_hook(lambda module, args, out: seen.append(out.clone()))
        for block in model.blocks]
    model(x)
    for handle, qkv, payload in zip(handles, seen, payloads):
        handle.remove()
        q, k, _ = qkv.unflatten(-1, (3, 2, -1)).permute(2, 0, 3, 1, 4)
        q, k = model.rope.rotate(q, payload), model.rope.rotate(k, payload)
        maps.append((q @ k.mT / q.shape[-1] ** 0.5).softmax(-1))
    return maps


@torch.no_grad()
@pytest.mark.parametrize('method', ['fx', 'hook'])
def test_maps_of_a_vit(method):
    with unfused():
        model = build('vit')
    expected = [maps_of(model, image(*size)) for size in ((32, 32), (48, 24))]
    logits = model(image(32, 32))
    extract = AttentionExtract(model, method=method)
    for size, maps in zip(((32, 32), (48, 24)), expected):
        found = list(extract(image(*size)).values())
        assert len(found) == len(maps) == 3
        assert all(torch.allclose(a, b, atol=1e-5) for a, b in zip(found, maps))
    assert torch.equal(model(image(32, 32)), logits)


@torch.no_grad()
@pytest.mark.parametrize('method', ['fx', 'hook'])
def test_maps_of_a_swin(method):
    model = build('swin')
    found = list(AttentionExtract(model, method=method)(image(64, 64)).values())
    # (windows, heads, tokens, tokens): 16 x 16 patches in windows of 4 x 4, then 8 x 8, 4 x 4 and 2 x 2
    assert [tuple(attention.shape) for attention in found] == [
        (32, 1, 16, 16), (8, 2, 16, 16), (2, 4, 16, 16), (2, 8, 4, 4)]
    assert all(torch.allclose(attention.sum(-1), torch.ones(()), atol=1e-5) for attention in found)
    assert all(float(attention.std()) > 1e-3 for attention in found)


def test_fused_attention_has_no_maps():
    # as in timm's own ViT; window attention is not fused unless one asks for it
    with pytest.raises(RuntimeError, match='No node names found'):
        AttentionExtract(build('vit'))
