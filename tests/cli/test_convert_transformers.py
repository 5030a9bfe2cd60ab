"""A converted folder in transformers."""
import json

import pytest
import torch
from tiny import make

from timm_rope.cli.convert import convert


@pytest.fixture
def converted(tmp_path):
    model = make('vit_tiny_rope_spherical')
    torch.save(model.state_dict(), tmp_path / 'weights.pth')
    convert(str(tmp_path / 'weights.pth'), tmp_path / 'out', model='vit_tiny_rope_spherical',
            model_args=dict(num_heads=2))
    return model, tmp_path / 'out'


def test_the_number_of_classes_is_written_once(converted):
    config = json.loads((converted[1] / 'config.json').read_text())
    assert config['num_classes'] == 5 and 'num_classes' not in config['model_args']


def test_transformers_computes_the_same(converted):
    transformers = pytest.importorskip('transformers', reason='transformers is not installed')
    model, folder = converted
    x = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        logits = transformers.AutoModelForImageClassification.from_pretrained(folder).eval()(x).logits
        assert (logits - model(x)).abs().max() < 1e-5
        features = transformers.AutoModel.from_pretrained(folder).eval()(x).last_hidden_state
        assert (features - model.forward_features(x)).abs().max() < 1e-5
    processor = transformers.AutoImageProcessor.from_pretrained(folder)
    assert list(processor.data_config['input_size']) == [3, 32, 32]
