"""onnxruntime: what timm's exporter writes takes other batches and sizes, also with weights in int8."""
import numpy as np
import pytest
import torch
from backbones import build, image
from timm.utils.onnx import onnx_export

pytest.importorskip('onnxruntime')
pytest.importorskip('onnx')
pytest.importorskip('onnxscript')
import onnxruntime
from onnxruntime.quantization import QuantType, quantize_dynamic


def run(path, x):
    session = onnxruntime.InferenceSession(path, providers=['CPUExecutionProvider'])
    return session.run(None, {session.get_inputs()[0].name: x.numpy()})[0]


@torch.no_grad()
@pytest.mark.slow
@pytest.mark.parametrize('family,options', [
    ('vit', {}), ('swin', dict(depths=(1, 1), num_heads=(1, 2)))])
def test_exported_by_timm(family, options, tmp_path):
    model, path = build(family, num_classes=3, **options), str(tmp_path / 'model.onnx')
    sizes = [(64, 64), (48, 80)] if family == 'vit' else [(64, 64)]  # dynamo exports a Swin for one size
    onnx_export(
        model, path, example_input=image(*sizes[0]), dynamic_size=family == 'vit', use_dynamo=True,
        external_data=False, check_forward=True)
    small = str(tmp_path / 'int8.onnx')
    quantize_dynamic(path, small, weight_type=QuantType.QInt8)
    for size in sizes:
        for batch in (2, 5):
            x = image(*size, batch=batch)
            expected = model(x).numpy()
            assert np.abs(run(path, x) - expected).max() < 1e-4
            assert np.linalg.norm(run(small, x) - expected) < 0.3 * np.linalg.norm(expected)
