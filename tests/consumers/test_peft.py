"""peft: LoRA on the projections, with both kinds of checkpointing; merged is what it was unmerged."""
import pytest
import torch
from backbones import FAMILIES, build, frequencies, image
from timm.layers import set_reentrant_ckpt

peft = pytest.importorskip('peft')


def adapted(family, **kwargs):
    base = build(family, num_classes=3)
    config = peft.LoraConfig(**{**dict(r=4, target_modules=['qkv', 'proj'], modules_to_save=['head']), **kwargs})
    model = peft.get_peft_model(base, config)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if 'lora_B' in name:  # zero at first, so that an adapter would do nothing
                p.normal_(0, 0.3, generator=torch.Generator().manual_seed(2))
    return model


def trainable(model):
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


def gradients(model, x):
    model.zero_grad()
    model(x).square().sum().backward()
    return {name: p.grad.clone() for name, p in trainable(model).items()}


def same(a, b):
    return a.keys() == b.keys() and all(torch.allclose(v, b[k], rtol=1e-3, atol=1e-5) for k, v in a.items())


@torch.no_grad()
@pytest.mark.parametrize('family', FAMILIES)
def test_merged_is_unmerged(family):
    model, bare = adapted(family).eval(), build(family, num_classes=3)
    for size in ((64, 64), (96, 128)):
        x = image(*size)
        expected = model(x)
        assert (expected - bare(x)).abs().max() > 1e-2, 'the adapter does something'
        with model.disable_adapter():
            assert torch.allclose(model(x), bare(x), atol=1e-5)
        model.merge_adapter()
        assert torch.allclose(model(x), expected, atol=1e-4)
        model.unmerge_adapter()
        assert torch.allclose(model(x), expected, atol=1e-4)
    assert torch.allclose(model.merge_and_unload()(x), expected, atol=1e-4)


@pytest.mark.parametrize('family', FAMILIES)
def test_gradients_are_those_of_the_merged_weights(family):
    # what LoRA keeps of the projection for its backward is not turned: d(BA) is the gradient of the weight times A, B
    model, x = adapted(family, target_modules=['qkv'], modules_to_save=None).train(), image(64, 64)
    found = gradients(model, x)
    merged = adapted(family, target_modules=['qkv'], modules_to_save=None).merge_and_unload().train()
    merged.requires_grad_(True)(x).square().sum().backward()
    layers = [(name, m) for name, m in model.named_modules() if hasattr(m, 'lora_A') and len(m.lora_A)]
    assert len(layers) == (3 if family == 'vit' else 4)
    for name, layer in layers:
        weight = merged.get_submodule(name.removeprefix('base_model.model.')).weight.grad * layer.scaling['default']
        expected_a, expected_b = layer.lora_B['default'].weight.T @ weight, weight @ layer.lora_A['default'].weight.T
        for part, expected in (('lora_A', expected_a), ('lora_B', expected_b)):
            grad = found[f'{name}.{part}.default.weight']
            assert (grad - expected).abs().max() <= 1e-3 * expected.abs().max(), name


@pytest.mark.parametrize('reentrant', [False, True])
@pytest.mark.parametrize('family', FAMILIES)
def test_checkpointing_changes_no_gradient(family, reentrant):
    model, x = adapted(family).train(), image(64, 64)
    if reentrant:
        x.requires_grad_()  # a reentrant checkpoint has no gradient where no input has one, in any frozen model
    expected = gradients(model, x)
    set_reentrant_ckpt(reentrant)
    try:
        model.base_model.model.set_grad_checkpointing(True)
        assert same(gradients(model, x), expected)
    finally:
        set_reentrant_ckpt(False)


@pytest.mark.parametrize('family', FAMILIES)
def test_frequencies_are_trained_beside_the_adapter_on_request(family, tmp_path):
    assert not any(p.requires_grad for p in frequencies(adapted(family)).values())
    model = adapted(family, modules_to_save=['head', 'rope']).train()
    optimizer = torch.optim.SGD(trainable(model).values(), lr=0.1)
    found = gradients(model, image(64, 64))
    learned = {name for name in found if 'rope' in name}
    assert learned and all(float(found[name].abs().max()) > 0 for name in learned)
    optimizer.step()
    model.save_pretrained(tmp_path)
    loaded = peft.PeftModel.from_pretrained(build(family, num_classes=3), tmp_path).eval()
    with torch.no_grad():
        assert torch.allclose(loaded(image(64, 96)), model.eval()(image(64, 96)), atol=1e-5)


@torch.no_grad()
def test_dora():
    model, x = adapted('vit', use_dora=True).eval(), image(32, 48)
    expected = model(x)
    assert torch.allclose(model.merge_and_unload()(x), expected, atol=1e-4)
