"""accelerate: two steps, models without memory, and models whose weights come block by block."""
import pytest
import torch
from backbones import FAMILIES, assert_learns, build, frequencies, image
from timm.models._manipulate import reinit_non_persistent_buffers
from torch import nn

accelerate = pytest.importorskip('accelerate')

SIZES = {'vit': (32, 48), 'swin': (64, 96)}


@pytest.mark.parametrize('family', FAMILIES)
def test_two_steps(family, tmp_path):
    accelerator = accelerate.Accelerator(cpu=True, mixed_precision='bf16', gradient_accumulation_steps=2)
    model = build(family, num_classes=3).train()
    before = {name: p.detach().clone() for name, p in frequencies(model).items()}
    data = torch.utils.data.TensorDataset(image(*SIZES[family], batch=8), torch.arange(8) % 3)
    model, optimizer, loader = accelerator.prepare(
        model, torch.optim.AdamW(model.parameters(), lr=1e-2), torch.utils.data.DataLoader(data, batch_size=2))
    for images, labels in loader:
        with accelerator.accumulate(model):
            loss = nn.functional.cross_entropy(model(images), labels)
            assert bool(loss.isfinite())
            accelerator.backward(loss)
            optimizer.step()
            optimizer.zero_grad()
    bare = accelerator.unwrap_model(model, keep_fp32_wrapper=False).eval()
    assert all(not torch.equal(p, before[name]) for name, p in frequencies(bare).items())
    accelerator.save_model(bare, tmp_path)
    loaded = build(family, num_classes=3)
    accelerate.load_checkpoint_in_model(loaded, str(tmp_path / 'model.safetensors'))
    x = image(64, 64)
    assert torch.equal(loaded(x), bare(x))


@torch.no_grad()
@pytest.mark.parametrize('family', FAMILIES)
@pytest.mark.parametrize('buffers', [False, True])
def test_a_model_without_memory_is_filled(family, buffers, tmp_path):
    source, x = build(family, num_classes=3), image(*SIZES[family])
    accelerate.Accelerator(cpu=True).save_model(source, tmp_path)
    with accelerate.init_empty_weights(include_buffers=buffers):
        model = build(family, num_classes=3)
    if buffers:
        model.to_empty(device='cpu')
        reinit_non_persistent_buffers(model)
    model = accelerate.load_checkpoint_and_dispatch(model, str(tmp_path / 'model.safetensors'), device_map={'': 'cpu'})
    assert torch.equal(model(x), source(x))


@torch.no_grad()
@pytest.mark.parametrize('family', FAMILIES)
@pytest.mark.parametrize('where', ['cpu', 'disk'])
def test_weights_that_come_block_by_block(family, where, tmp_path):
    model, x = build(family, num_classes=3), image(*SIZES[family])
    expected = model(x).clone()
    if where == 'cpu':
        accelerate.cpu_offload(model, execution_device='cpu')
    else:
        accelerate.disk_offload(model, tmp_path, execution_device='cpu')
    for _ in range(2):
        assert torch.allclose(model(x), expected, atol=1e-5)
    accelerate.hooks.remove_hook_from_submodules(model)


def test_the_loss_reaches_the_frequencies():
    model = accelerate.Accelerator(cpu=True).prepare(build('vit', num_classes=3).train())
    assert_learns(model, model(image(32, 48)).square().mean())
