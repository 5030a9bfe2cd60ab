"""fastai: a vision learner by the name of the model, frozen and unfrozen, at two sizes."""
import pytest
import torch
from backbones import FAMILIES, frequencies, image
from torch import nn

pytest.importorskip('fastai')
from fastai.callback import progress  # noqa: F401 (gives a learner `no_bar`)
from fastai.data.core import DataLoaders
from fastai.vision.learner import vision_learner

# fastai pools maps (B, C, H, W) of every model whose cfg has a pool_size; those of any Swin have their channels last
POOLED = {'vit': {}, 'swin': dict(pretrained_cfg_overlay=dict(pool_size=None))}
SIZES = {'vit': [(32, 48), (48, 48)], 'swin': [(64, 96), (96, 96)]}


def loaders(size):
    data = torch.utils.data.TensorDataset(image(*size, batch=8), torch.arange(8) % 3)
    return DataLoaders.from_dsets(data, data, bs=4, device=torch.device('cpu'))


@pytest.mark.filterwarnings('ignore')
@pytest.mark.parametrize('family', FAMILIES)
def test_fine_tuning(family, tmp_path):
    torch.manual_seed(0)
    name, options = FAMILIES[family]
    learner = vision_learner(
        loaders(SIZES[family][0]), name, n_out=3, pretrained=False, normalize=False,
        loss_func=nn.CrossEntropyLoss(), path=tmp_path,
        **POOLED[family], **options)
    before = {k: p.detach().clone() for k, p in frequencies(learner.model).items()}
    assert before
    learner.freeze()
    with learner.no_bar(), learner.no_logging():
        learner.fit(1)
        assert all(torch.equal(p, before[k]) for k, p in frequencies(learner.model).items()), 'the body is frozen'
        learner.unfreeze()
        learner.dls = loaders(SIZES[family][1])
        learner.fit(1, lr=slice(1e-3, 1e-2))
        assert all(not torch.equal(p, before[k]) for k, p in frequencies(learner.model).items())
        saved, x = learner.save('model'), image(64, 96)
        expected = learner.model.eval()(x)
        with torch.no_grad():
            for p in learner.model.parameters():
                p.mul_(2)
        learner.load('model')
    assert saved.exists() and torch.equal(learner.model.eval()(x), expected)
