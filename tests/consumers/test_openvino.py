"""OpenVINO, from a traced model and from an exported program."""
import pytest
import torch
from tiny import make
from tiny_swin import make as make_swin

from timm_rope import list_ropes

openvino = pytest.importorskip('openvino', reason='openvino is not installed (extra consumers)')


@pytest.mark.filterwarnings('ignore')
@pytest.mark.parametrize('how', ['traced', 'exported'])
@pytest.mark.parametrize('name', [*list_ropes(), 'swin'])
def test_the_same_logits(name, how):
    if (name, how) == ('string', 'traced'):
        pytest.skip('its solver fails in torch.jit.trace as OpenVINO calls it; export the program instead')
    model = make_swin() if name == 'swin' else make(rope_encoding=name)
    x = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        expected = model(x)
    given = (model,) if how == 'traced' else (torch.export.export(model, (x,)),)
    converted = openvino.convert_model(*given, **(dict(example_input=x) if how == 'traced' else {}))
    compiled = openvino.Core().compile_model(converted, 'CPU', {'INFERENCE_PRECISION_HINT': 'f32'})
    got = torch.from_numpy(compiled(x.numpy())[0])
    assert expected.std() > 0.05
    assert torch.allclose(got, expected, atol=1e-4), float((got - expected).abs().max())
