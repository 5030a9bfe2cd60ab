"""grad-cam: class activation maps of a ViT at any size, with any prefix tokens, and of a Swin."""
import numpy as np
import pytest
import torch
from backbones import build, image

pytest.importorskip('pytorch_grad_cam')
from pytorch_grad_cam import EigenCAM, GradCAM, HiResCAM, LayerCAM, XGradCAM
from pytorch_grad_cam.utils.model_targets import ClassifierOutputTarget

METHODS = [GradCAM, HiResCAM, LayerCAM, XGradCAM, EigenCAM]
TARGETS = [ClassifierOutputTarget(1), ClassifierOutputTarget(2)]


def to_map(model, rows, columns):
    """Tokens -> a map; that of the library takes one prefix token and a square for granted."""
    def reshape(tokens):
        return tokens[:, model.num_prefix_tokens:].unflatten(1, (rows, columns)).permute(0, 3, 1, 2)
    return reshape


def last_to_first(tokens):
    return tokens.permute(0, 3, 1, 2)


def found(method, model, layer, reshape, x):
    with method(model=model, target_layers=[layer], reshape_transform=reshape) as cam:
        return cam(input_tensor=x, targets=TARGETS)


@pytest.mark.parametrize('method', METHODS)
@pytest.mark.parametrize('options', [{}, dict(reg_tokens=4), dict(class_token=False, global_pool='avg')])
def test_maps_of_a_vit(method, options):
    model, x = build('vit', num_classes=3, **options), image(32, 64)
    expected = model(x).detach()
    maps = found(method, model, model.blocks[-1].norm1, to_map(model, 4, 8), x)
    assert maps.shape == (2, 32, 64) and np.isfinite(maps).all() and maps.max() > 0.5
    assert torch.equal(model(x), expected)


@pytest.mark.parametrize('method', METHODS)
def test_maps_of_a_swin(method):
    model, x = build('swin', num_classes=3), image(64, 128)
    maps = found(method, model, model.layers[-2].blocks[-1].norm1, last_to_first, x)
    assert maps.shape == (2, 64, 128) and np.isfinite(maps).all() and maps.max() > 0.5


@pytest.mark.parametrize('family', ['vit', 'swin'])
def test_the_projection_is_seen_before_it_is_turned(family):
    # a gradient of the turned queries and keys would give another map
    model, x = build(family, num_classes=3), image(64, 64)
    block = model.blocks[1] if family == 'vit' else model.layers[1].blocks[0]
    kept = []

    def replace(module, args, out):
        kept.append(out.detach().clone().requires_grad_())
        return kept[0]

    handle = block.attn.qkv.register_forward_hook(replace)
    sum(target(out) for target, out in zip(TARGETS, model(x))).backward()
    handle.remove()
    reshape = to_map(model, 8, 8) if family == 'vit' else windows_to_map
    expected = (reshape(kept[0]) * reshape(kept[0].grad)).sum(1).clamp(min=0).detach().numpy()
    with HiResCAM(model=model, target_layers=[block.attn.qkv], reshape_transform=reshape) as cam:
        cam(input_tensor=x, targets=TARGETS)
        activations, gradients = cam.activations_and_grads.activations[0], cam.activations_and_grads.gradients[0]
    assert np.allclose((activations * gradients).sum(1).clamp(min=0).numpy(), expected, atol=1e-6)
    assert expected.max() > 1e-6


def windows_to_map(tokens):
    return tokens.unflatten(0, (2, -1)).flatten(1, 2).unflatten(1, (8, 8)).permute(0, 3, 1, 2)
