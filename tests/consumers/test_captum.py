"""captum: attributions by layers, whose hooks keep what a projection returned before it is turned."""
import pytest
import torch
from backbones import FAMILIES, build, image

attr = pytest.importorskip('captum.attr')

QKV = {'vit': 'blocks.1.attn.qkv', 'swin': 'layers.1.blocks.0.attn.qkv'}


@pytest.mark.parametrize('family', FAMILIES)
def test_activations_of_a_projection_are_not_turned(family):
    model, x = build(family, num_classes=3), image(64, 96)
    layer, inputs = model.get_submodule(QKV[family]), []
    handle = layer.register_forward_pre_hook(lambda module, args: inputs.append(args[0].detach().clone()))
    found = attr.LayerActivation(model, layer).attribute(x)
    handle.remove()
    assert torch.allclose(found, layer(inputs[0]), atol=1e-5)


@pytest.mark.parametrize('family', FAMILIES)
def test_gradients_times_activations_of_a_projection(family):
    model, x = build(family, num_classes=3), image(64, 96)
    layer, kept = model.get_submodule(QKV[family]), []

    def replace(module, args, out):
        kept.append(out.detach().clone().requires_grad_())
        return kept[0]

    handle = layer.register_forward_hook(replace)
    model(x)[:, 1].sum().backward()
    handle.remove()
    found = attr.LayerGradientXActivation(model, layer).attribute(x, target=1)
    assert torch.allclose(found, kept[0].grad * kept[0], atol=1e-6) and float(found.abs().max()) > 1e-6


@pytest.mark.parametrize('family', FAMILIES)
def test_integrated_gradients_are_complete(family):
    model, x = build(family, num_classes=3), image(64, 64, batch=1)
    difference = model(x)[0, 1] - model(torch.zeros_like(x))[0, 1]
    for method, args in (
            (attr.IntegratedGradients(model), {}),
            (attr.LayerIntegratedGradients(model, model.patch_embed), dict(attribute_to_layer_input=False))):
        found = method.attribute(x, torch.zeros_like(x), target=1, n_steps=400, internal_batch_size=40, **args)
        assert abs(float(found.sum() - difference)) < 0.05 * float(difference.abs()) + 1e-3


@pytest.mark.parametrize('family', FAMILIES)
@pytest.mark.parametrize('method', ['Saliency', 'InputXGradient', 'DeepLift', 'Occlusion', 'FeatureAblation'])
def test_attributions_of_pixels(family, method):
    model, x = build(family, num_classes=3), image(32, 64, batch=1)
    expected = model(x).detach()
    kwargs = {}
    if method == 'Occlusion':
        kwargs = dict(sliding_window_shapes=(3, 16, 16), strides=(3, 16, 16))
    if method == 'FeatureAblation':
        kwargs = dict(feature_mask=torch.arange(8).view(1, 1, 2, 4).repeat_interleave(16, 2).repeat_interleave(16, 3))
    found = getattr(attr, method)(model).attribute(x, target=1, **kwargs)
    assert found.shape == x.shape and bool(found.isfinite().all()) and float(found.abs().max()) > 0
    assert torch.equal(model(x), expected), 'no hook is left'
