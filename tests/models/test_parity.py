"""Equal to independent implementations with the same weights. The weights are loud (LayerScale 1, queries and keys
large): with the 1e-4 of an untrained model a broken rotation is invisible."""
import pytest
import timm
import torch
from naflex_batch import batch_of, images_of
from timm.models import naflexvit

from timm_rope.weights.fit_vit import checkpoint_filter_fn


def loud(model):
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if 'gamma' in name:
                p.fill_(1.0)
            elif name.endswith('qkv.weight'):
                p.mul_(8)
            elif name.endswith('bias') or 'pos_embed' in name or 'cls_token' in name:
                p.copy_(0.3 * torch.randn(p.shape, generator=generator))
            elif name.endswith('freqs'):
                p.add_(0.2 * torch.randn(p.shape, generator=generator))
            elif name == 'head.weight':  # timm's Eva starts it 1000 times smaller
                p.copy_(0.02 * torch.randn(p.shape, generator=generator))
    return model.eval()


def twin(name, theirs, **kwargs):
    ours = timm.create_model(name, **kwargs).eval()
    ours.load_state_dict(checkpoint_filter_fn(theirs.state_dict(), ours))
    return ours


SIZES = [(224, 224), (384, 384), (192, 320)]


def resized(state, size):
    """With the position embedding as the original resizes it: timm would antialias."""
    if 'pos_embed' not in state:
        return state
    table = state['pos_embed'].unflatten(1, (14, 14)).permute(0, 3, 1, 2)
    table = torch.nn.functional.interpolate(table, (size[0] // 16, size[1] // 16), mode='bicubic', align_corners=False)
    return {**state, 'pos_embed': table.flatten(2).transpose(1, 2)}


@pytest.mark.slow
@pytest.mark.parametrize('ours,theirs', [
    ('vit_small_rope_axial', 'vit_small_patch16_rope_224'),
    ('vit_small_rope_mixed', 'vit_small_patch16_rope_mixed_224'),
    ('vit_small_rope_axial_ape', 'vit_small_patch16_rope_ape_224'),
    ('vit_small_rope_mixed_ape', 'vit_small_patch16_rope_mixed_ape_224'),
])
def test_in_tree_port(ours, theirs):
    torch.manual_seed(0)
    reference = loud(timm.create_model(theirs))
    model = twin(ours, reference)
    assert model.rope.reference_grid.tolist() == [14, 14]
    with torch.no_grad():
        for size in SIZES:
            x = torch.randn(1, 3, *size)
            at_size = timm.create_model(theirs, img_size=size).eval()
            at_size.load_state_dict(resized(reference.state_dict(), size))
            expected = at_size(x)
            assert expected.std() > 0.1, 'the comparison must not be between silent models'
            assert (model(x) - expected).abs().max() < 1e-5, size
        no_rotation = timm.create_model('vit_small_ape', pos_embed='none').eval()
        no_rotation.load_state_dict(
            {k: v for k, v in model.state_dict().items() if not k.startswith(('rope.', 'pos_embed'))})
        x = torch.randn(1, 3, 224, 224)
        assert (no_rotation(x) - model(x)).abs().max() > 1e-2, 'a missing rotation would have been seen'


@pytest.mark.parametrize('ours,theirs', [
    ('vit_small_rope_axial', 'vit_small_patch16_rope_224'),
    ('vit_small_rope_mixed', 'vit_small_patch16_rope_mixed_224'),
])
@torch.no_grad()
def test_in_tree_naflex(ours, theirs):
    """timm's own NaFlexVit on images of several shapes in one batch, for the encodings that it has."""
    torch.manual_seed(0)
    kwargs = dict(embed_dim=96, depth=3, num_heads=2, num_classes=5)
    plain = loud(timm.create_model(theirs, **kwargs))
    reference = timm.create_model(theirs, use_naflex=True, **kwargs).eval()
    reference.load_state_dict(naflexvit.checkpoint_filter_fn(plain.state_dict(), reference))
    batch = batch_of(images_of([(4, 6), (9, 3), (5, 5)], 16), 30, 16, fill=0.)
    batch['patch_coord'][~batch['patch_valid']] = 0  # it reads the grid of an image from its padding, too
    try:
        expected = reference(batch)
    except TypeError as error:
        pytest.skip(f'this timm cannot run it: {error}')
    assert expected.std() > 0.1
    assert (twin(ours, plain, use_naflex=True, **kwargs)(batch) - expected).abs().max() < 1e-5


def test_resized_as_by_timm():
    torch.manual_seed(0)
    kwargs = dict(embed_dim=48, depth=2, num_heads=2)
    reference = loud(timm.create_model('deit3_small_patch16_224', dynamic_img_size=True, **kwargs))
    model = twin('vit_small_ape', reference, pos_embed_antialias=True, **kwargs)
    naver = twin('vit_small_ape', reference, **kwargs)
    for size in ((320, 256), (160, 96)):
        x = torch.randn(1, 3, *size)
        with torch.no_grad():
            expected = reference(x)
            assert (model(x) - expected).abs().max() < 1e-5
            assert (naver(x) - expected).abs().max() > 1e-3
            assert torch.equal(torch.jit.script(model)(x), model(x))


def test_ape_baseline_is_deit3():
    torch.manual_seed(0)
    reference = loud(timm.create_model('deit3_small_patch16_224', init_values=1.0))
    model = twin('vit_small_ape', reference)
    x = torch.randn(2, 3, 224, 224)
    with torch.no_grad():
        assert (model(x) - reference(x)).abs().max() < 1e-5


def test_ape_is_resized_bicubic_without_antialias():
    torch.manual_seed(0)
    kwargs = dict(img_size=64, patch_size=8, embed_dim=32, depth=1, num_heads=2)
    model = timm.create_model('vit_tiny_ape', **kwargs).eval()
    for size in ((128, 128), (32, 32), (40, 72)):
        grid = (size[0] // 8, size[1] // 8)
        table = model.pos_embed.detach().reshape(1, 8, 8, 32).permute(0, 3, 1, 2)
        resized = torch.nn.functional.interpolate(table, grid, mode='bicubic', align_corners=False)
        expected = resized.permute(0, 2, 3, 1).reshape(1, -1, 32)
        patches = model.patch_embed(torch.zeros(1, 3, *size))
        got = model._pos_embed(patches)[:, 1:] - patches.flatten(1, 2)
        assert torch.allclose(got, expected, atol=1e-6)
        other = timm.create_model('vit_tiny_ape', **kwargs).eval()
        other.load_state_dict(model.state_dict())
        other.set_input_size(size)
        assert torch.allclose(other.pos_embed, expected, atol=1e-6)
        assert other.pos_embed_grid.tolist() == list(grid)
        x = torch.randn(1, 3, *size)
        assert torch.allclose(model(x), other(x), atol=1e-6)
