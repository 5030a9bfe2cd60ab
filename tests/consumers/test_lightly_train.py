"""lightly-train: an epoch of DINO with crops of two sizes, and the weights that it exports. Not in the extra: it brings
TensorBoard, gRPC and pinned tools for images."""
import numpy as np
import pytest
import torch
from backbones import build, frequencies, image
from PIL import Image

pytest.importorskip('lightly_train')
import lightly_train


@pytest.mark.slow
@pytest.mark.filterwarnings('ignore')
def test_dino_trains_the_model_it_is_given(tmp_path, monkeypatch):
    # as in lightly_train with timm's, a Swin does not work: it pools maps with their channels last
    monkeypatch.setenv('LIGHTLY_TRAIN_EVENTS_DISABLED', '1')
    (tmp_path / 'images').mkdir()
    for i in range(8):
        pixels = np.random.default_rng(i).integers(0, 255, (64, 64, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(tmp_path / 'images' / f'{i}.png')
    model = build('vit', num_classes=0)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    lightly_train.pretrain(
        out=tmp_path / 'out', data=tmp_path / 'images', model=model, method='dino', epochs=1, batch_size=4,
        num_workers=0, accelerator='cpu', devices=1, precision='32', loggers=dict(tensorboard=None),
        transform_args=dict(image_size=(64, 64), local_view=dict(num_views=2, view_size=(32, 32))))
    assert all(not torch.equal(p, before[name]) for name, p in frequencies(model).items())
    loaded, x = build('vit', num_classes=0), image(64, 96)
    loaded.load_state_dict(torch.load(tmp_path / 'out/exported_models/exported_last.pt'))
    assert torch.equal(loaded(x), model.eval()(x))
