"""torchao: linear layers in int8, weights only and with dynamic activations."""
import pytest
import torch
from backbones import FAMILIES, build, image

pytest.importorskip('torchao')
from torchao.quantization import Int8DynamicActivationInt8WeightConfig, Int8WeightOnlyConfig, quantize_

CONFIGS = {'weights': Int8WeightOnlyConfig, 'dynamic': Int8DynamicActivationInt8WeightConfig}


def rounded(model, bare):
    """A model with the rounded weights of a quantised one as floating point numbers."""
    for layer, other in zip(model.modules(), bare.modules()):
        if isinstance(layer, torch.nn.Linear):
            other.weight.copy_(layer.weight.dequantize())
    return bare


@torch.no_grad()
@pytest.mark.parametrize('family', FAMILIES)
@pytest.mark.parametrize('kind', CONFIGS)
def test_quantised(family, kind):
    model = build(family, num_classes=3)
    config = CONFIGS[kind]()
    quantize_(model, config)
    expected = rounded(model, build(family, num_classes=3))
    assert type(dict(model.named_modules())[
        'blocks.0.attn.qkv' if family == 'vit' else 'layers.0.blocks.0.attn.qkv'].weight) is not torch.nn.Parameter
    for size in ((64, 64), (96, 128)):
        x = image(*size)
        a, b = model(x), expected(x)
        assert (a - b).norm() < (1e-4 if kind == 'weights' else 0.3) * b.norm()
        assert torch.equal(model(x), a), 'nothing that is kept was turned'
    loaded = build(family, num_classes=3)
    quantize_(loaded, config)
    loaded.load_state_dict(model.state_dict(), assign=True)
    assert torch.equal(loaded(x), a)


@pytest.mark.slow
@torch.no_grad()
def test_compiled():
    torch._dynamo.reset()
    model = build('vit', num_classes=3)
    quantize_(model, Int8WeightOnlyConfig())
    compiled = torch.compile(model, backend='aot_eager', fullgraph=True, dynamic=True)
    for size in ((32, 48), (64, 64)):
        assert torch.allclose(compiled(image(*size)), model(image(*size)), atol=1e-5)


@pytest.mark.parametrize('family', FAMILIES)
def test_lora_on_rounded_weights(family):
    peft = pytest.importorskip('peft')
    base, x = build(family, num_classes=3), image(64, 96)
    quantize_(base, Int8WeightOnlyConfig())
    with torch.no_grad():
        expected = base(x)
    model = peft.get_peft_model(base, peft.LoraConfig(r=2, target_modules=['qkv', 'proj']))
    out = model(x)
    assert torch.allclose(out, expected, atol=1e-4)
    out.square().sum().backward()
    grads = [p.grad for name, p in model.named_parameters() if 'lora_B' in name]
    assert grads and all(float(grad.abs().max()) > 0 for grad in grads)
