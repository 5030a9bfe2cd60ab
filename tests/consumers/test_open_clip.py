"""open_clip: our models as the tower of images, at any size."""
import pytest
import torch
from backbones import FAMILIES, assert_learns, frequencies, image, loud

open_clip = pytest.importorskip('open_clip')

TEXT = dict(context_length=8, vocab_size=50, width=16, heads=2, layers=1)


def clip(family, **vision):
    torch.manual_seed(0)
    vision = dict(timm_model_name=FAMILIES[family][0], timm_proj='linear', image_size=64, **vision)
    return loud(open_clip.model.CustomTextCLIP(16, vision, TEXT))


@pytest.mark.parametrize('family', FAMILIES)
def test_a_step_and_other_sizes(family):
    model = clip(family)
    tower = model.visual.trunk
    with torch.no_grad():
        for size in ((64, 64), (96, 128)):
            x = image(*size)
            assert torch.equal(model.encode_image(x), model.visual.head(tower(x)))
    assert tower.num_classes == 0
    model.train()
    pictures, words, scale = model(image(64, 96), torch.randint(1, 50, (2, 8)))
    assert_learns(model, open_clip.ClipLoss()(pictures, words, scale))


@pytest.mark.parametrize('family', FAMILIES)
def test_checkpointing_and_locking(family):
    model, x = clip(family), image(64, 64)
    expected = model.encode_image(x)
    model.set_grad_checkpointing(True)
    model.lock_image_tower()
    assert torch.allclose(model.encode_image(x), expected, atol=1e-5)
    assert frequencies(model) and not any(p.requires_grad for p in frequencies(model).values())


@torch.no_grad()
@pytest.mark.parametrize('pool,expected', [('token', 'token'), ('avg', 'avg'), ('', 'token')])
def test_pooling(pool, expected):
    model = clip('vit', timm_pool=pool)
    assert model.visual.trunk.global_pool == expected  # none given leaves the model's own
    assert bool(model.encode_image(image(64, 96)).isfinite().all())
