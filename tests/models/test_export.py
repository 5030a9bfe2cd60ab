"""Graphs for other runtimes: ONNX by both exporters, checked against torch by onnxruntime; TorchScript; FX."""
import warnings

import pytest
import torch
from tiny import make

from timm_rope import create_rope, list_ropes
from timm_rope.rotations import PairRotation, TripletRotation

CASES = [(f'vit_tiny_rope_{name}', {}) for name in list_ropes()] + [
    ('vit_tiny_rope_mixed_ape', {}), ('vit_tiny_rope_liere', {'rope_block': 3}),
    ('vit_tiny_rope_comrope', {'rope_variant': 'ap', 'rope_block': 4}), ('vit_tiny_rope_quatro', {'rope_order': 'xy'}),
    ('vit_tiny_rope_string', {'rope_basis': 'circulant'})]
# those whose graph has more than sines and cosines; the newer exporter takes seconds for each
MATRICES = [name for name in list_ropes() if type(
    create_rope(name, 24, 2, 1).rotation) not in (PairRotation, TripletRotation)]


@pytest.mark.parametrize('name,options,dynamo', [
    *[(name, options, False) for name, options in CASES],
    *[(f'vit_tiny_rope_{name}', {}, True) for name in MATRICES]])
@pytest.mark.filterwarnings('ignore')
def test_onnx(name, options, dynamo, tmp_path):
    onnxruntime = pytest.importorskip('onnxruntime', reason='onnxruntime is not installed (extra dev)')
    pytest.importorskip('onnxscript', reason='onnxscript is not installed (extra dev)')
    model = make(name, depth=2, exportable=True, **options)
    x = torch.randn(2, 3, 32, 32)
    model(x)  # a payload in the cache must not be frozen into the graph in another form
    torch.onnx.export(model, (x,), str(tmp_path / 'model.onnx'), dynamo=dynamo, input_names=['x'])
    session = onnxruntime.InferenceSession(str(tmp_path / 'model.onnx'))
    y = torch.randn(2, 3, 32, 32)
    assert abs(session.run(None, {'x': y.numpy()})[0] - model(y).detach().numpy()).max() < 2e-5


@pytest.mark.parametrize('name', ['vit_tiny_rope_mixed', 'vit_tiny_rope_spherical_learned', 'vit_tiny_rope_liere'])
@pytest.mark.filterwarnings('ignore')
def test_onnx_in_half_precision(name, tmp_path):
    onnxruntime = pytest.importorskip('onnxruntime', reason='onnxruntime is not installed (extra dev)')
    pytest.importorskip('onnxscript', reason='onnxscript is not installed (extra dev)')
    model = make(name, depth=2, exportable=True)
    x = torch.randn(2, 3, 32, 32)
    expected = model(x)
    torch.onnx.export(model.half(), (x.half(),), str(tmp_path / 'model.onnx'), dynamo=False, input_names=['x'])
    session = onnxruntime.InferenceSession(str(tmp_path / 'model.onnx'))
    got = torch.from_numpy(session.run(None, {'x': x.half().numpy()})[0])
    assert got.dtype == torch.float16 and (got - expected).abs().max() < 5e-3 * expected.abs().max()


@pytest.mark.parametrize('name,options', CASES)
def test_torchscript_and_fx_take_any_size(name, options, tmp_path):
    model = make(name, depth=2, **options)
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')
        scripted = torch.jit.script(model)
        scripted.save(str(tmp_path / 'model.pt'))
        scripted = torch.jit.load(str(tmp_path / 'model.pt'))
    traced = torch.fx.symbolic_trace(model)
    for size in ((32, 32), (16, 48)):
        x = torch.randn(1, 3, *size)
        assert torch.allclose(scripted(x), model(x), atol=1e-6)
        assert torch.allclose(traced(x), model(x), atol=1e-6)


def test_taylor_series_of_the_export_is_the_exponential():
    from timm_rope.rotations.exponential import _exp_taylor
    from timm_rope.rotations.grid_exponentials import skew
    torch.manual_seed(0)
    for size, norm in ((8, 1.), (8, 100.), (64, 800.)):
        matrix = skew(torch.randn(5, size * (size - 1) // 2, dtype=torch.float64), size)
        matrix = matrix * (norm / torch.linalg.matrix_norm(matrix, 2))[:, None, None]
        assert (_exp_taylor(matrix) - torch.linalg.matrix_exp(matrix)).abs().max() < 1e-8


@pytest.mark.parametrize('opset', [17, 20])
@pytest.mark.parametrize('name', ['vit_tiny_rope_spherical', 'vit_tiny_rope_liere', 'vit_tiny_ape'])
def test_the_older_exporter_to_onnx(name, opset, tmp_path):
    pytest.importorskip('onnx')
    runtime = pytest.importorskip('onnxruntime')
    model, path = make(name), str(tmp_path / 'model.onnx')
    sizes = {2: 'height', 3: 'width'} if model.pos_embed is None else {}  # a position embedding has one size in a trace
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')
        torch.onnx.export(
            model, (torch.randn(2, 3, 32, 32),), path, dynamo=False, opset_version=opset, input_names=['x'],
            output_names=['y'], dynamic_axes={'x': {0: 'batch', **sizes}, 'y': {0: 'batch'}})
    session = runtime.InferenceSession(path)
    for shape in ((3, 3, 32, 32), *([(1, 3, 48, 64)] if sizes else [])):
        x = torch.randn(*shape)
        y = session.run(None, {'x': x.numpy()})[0]
        with torch.no_grad():
            assert (torch.from_numpy(y) - model(x)).abs().max() < 1e-5
