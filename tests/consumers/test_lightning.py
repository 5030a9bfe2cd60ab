"""lightning: two steps in mixed precision, and what its checkpoint holds."""
import pytest
import torch
from backbones import FAMILIES, build, frequencies, image
from torch import nn

pytest.importorskip('lightning')
import lightning
from lightning.pytorch.callbacks import ModelCheckpoint, WeightAveraging

SIZES = {'vit': (32, 48), 'swin': (64, 96)}


class Classifier(lightning.LightningModule):
    def __init__(self, family):
        super().__init__()
        self.model = build(family, num_classes=3)

    def training_step(self, batch, index):
        return nn.functional.cross_entropy(self.model(batch[0]), batch[1])

    def configure_optimizers(self):
        return torch.optim.AdamW(self.model.parameters(), lr=1e-2)


@pytest.mark.filterwarnings('ignore')
@pytest.mark.parametrize('family', FAMILIES)
@pytest.mark.parametrize('precision', ['32-true', 'bf16-mixed'])
def test_two_steps_and_a_checkpoint(family, precision, tmp_path):
    module = Classifier(family)
    before = {name: p.detach().clone() for name, p in frequencies(module).items()}
    data = torch.utils.data.TensorDataset(image(*SIZES[family], batch=8), torch.arange(8) % 3)
    average = WeightAveraging(avg_fn=lambda old, new, count: 0.5 * old + 0.5 * new)
    trainer = lightning.Trainer(
        max_steps=2, precision=precision, accelerator='cpu', logger=False, enable_progress_bar=False,
        enable_model_summary=False, callbacks=[ModelCheckpoint(tmp_path, save_last=True), average],
        default_root_dir=tmp_path)
    trainer.fit(module, torch.utils.data.DataLoader(data, batch_size=4))
    after = frequencies(module)
    assert after and all(p.dtype == torch.float32 and not torch.equal(p, before[name]) for name, p in after.items())
    trainer.save_checkpoint(tmp_path / 'end.ckpt')
    loaded = Classifier.load_from_checkpoint(tmp_path / 'end.ckpt', family=family).eval()
    x = image(64, 64)
    assert torch.equal(loaded.model(x), module.eval().model(x))
