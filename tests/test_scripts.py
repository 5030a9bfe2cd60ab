"""timm's own scripts, unmodified and in processes of their own, train, evaluate and export our models.

TIMM_SCRIPTS names the folder that holds them, a checkout of timm without its timm/ folder (which would hide the
installed timm). Written for the scripts of timm 1.0.29 and later.
"""
import csv
import json
import os
import random
import re
import subprocess
import sys
from pathlib import Path

import pytest
import timm
import torch
from timm.data import create_dataset, create_loader, resolve_data_config
from timm.models import load_checkpoint

SCRIPTS = Path(os.environ.get('TIMM_SCRIPTS') or 'not set')
pytestmark = [
    pytest.mark.scripts,
    pytest.mark.skipif(
        not (SCRIPTS / 'train.py').is_file(),
        reason=f'TIMM_SCRIPTS must name a folder with the scripts of timm (train.py ...), it is: {SCRIPTS}'),
]

SPHERICAL = 'vit_tiny_rope_spherical_learned'
MODELS = (SPHERICAL, 'vit_tiny_rope_mixed', 'vit_tiny_rope_spherical_ape')
# LayerScale starts at 1: at the 1e-4 of the full models positions would not matter after a few steps
TINY = dict(embed_dim=48, depth=3, num_heads=2, patch_size=8, init_values=1.)
STEPS_PER_EPOCH = 20  # 240 images in batches of 12


def run(script, *args):
    """Output of a script. Warnings of ours are errors."""
    done = subprocess.run(
        [sys.executable, '-W', 'error::UserWarning:timm_rope', str(SCRIPTS / script), *map(str, args)],
        capture_output=True, text=True, timeout=300, cwd=SCRIPTS, env={**os.environ, 'TIMM_ROPE_AUTOLOAD': '1'})
    output = done.stdout + done.stderr
    assert done.returncode == 0, output[-6000:]
    return output


def model_args(name, size, **kwargs):
    # scripts before 1.0.31 do not build the model at --img-size; later ones take the same size twice
    kwargs = [f'{k}={v}' for k, v in dict(TINY, img_size=size, **kwargs).items()]
    return ['--model', name, '--num-classes', 10, '--img-size', size, '--model-kwargs', *kwargs]


def train(name, data, output, *args):
    """Train at 48 px and return the folder with what the script wrote."""
    experiment = f'{name}-{len(list(output.iterdir()))}'
    run('train.py', '--data-dir', data, *model_args(name, 48), '--gp', 'avg', '--device', 'cpu', '--workers', 0,
        '--batch-size', 12, '--opt', 'adamw', '--lr', 8e-3, '--weight-decay', 0.05, '--layer-decay', 0.75,
        '--drop-path', 0.1, '--warmup-epochs', 0, '--sched', 'step', '--no-aug', '--smoothing', 0,
        '--amp', '--amp-dtype', 'bfloat16', '--model-ema', '--model-ema-decay', 0.8, '--output', output,
        '--experiment', experiment, *args)
    return output / experiment


def new_model(name, size):
    return timm.create_model(name, num_classes=10, global_pool='avg', **TINY, img_size=size)


def logits_of(model, data, size):
    """Our own evaluation of what validate.py and inference.py evaluate."""
    dataset = create_dataset('', root=str(data / 'val'), split='')
    config = resolve_data_config({'img_size': size}, model=model)
    loader = create_loader(dataset, batch_size=40, use_prefetcher=False, num_workers=0, **config)
    model.eval()
    with torch.inference_mode():
        outputs, targets = zip(*((model(images), targets) for images, targets in loader))
    return torch.cat(outputs), torch.cat(targets)


def accuracy(model, data, size):
    logits, targets = logits_of(model, data, size)
    return pytest.approx(100 * (logits.argmax(1) == targets).float().mean().item(), abs=1e-3)


def validate(name, data, checkpoint, size, *args):
    """Accuracy that validate.py prints."""
    output = run(
        'validate.py', '--data-dir', data, *model_args(name, size), '--gp', 'avg', '--checkpoint', checkpoint,
        '--device', 'cpu', '--workers', 0, '--batch-size', 40, *args)
    return float(re.search(r'\* Acc@1 ([\d.]+)', output)[1])


@pytest.fixture(scope='module')
def output(tmp_path_factory):
    return tmp_path_factory.mktemp('scripts')


@pytest.fixture(scope='module', params=MODELS)
def trained(request, digits_folder, output):
    """(name, folder with last.pth.tar) of a model that train.py has trained for two epochs."""
    return request.param, train(request.param, digits_folder, output, '--epochs', 2)


def summary(folder):
    with open(folder / 'summary.csv') as file:
        return list(csv.DictReader(file))


def test_train_and_resume(trained, digits_folder, output):
    name, folder = trained
    rows = summary(folder)
    assert [int(row['epoch']) for row in rows] == [0, 1]
    losses = [float(row['train_loss']) for row in rows]
    assert losses[1] < losses[0]
    checkpoint = torch.load(folder / 'last.pth.tar', weights_only=False)
    assert checkpoint['arch'] == name and checkpoint['epoch'] == 1
    check_state(name, checkpoint)
    if name != SPHERICAL:
        return

    resumed = train(name, digits_folder, output, '--epochs', 3, '--resume', folder / 'last.pth.tar')
    rows = summary(resumed)
    assert [int(row['epoch']) for row in rows] == [2], 'resumes after the last epoch'
    later = torch.load(resumed / 'last.pth.tar', weights_only=False)
    assert later['epoch'] == 2
    check_state(name, later)
    steps = {int(state['step']) for state in later['optimizer']['state'].values()}
    assert steps == {3 * STEPS_PER_EPOCH}, 'the optimizer continues'
    before, after = checkpoint['state_dict']['rope.freqs'], later['state_dict']['rope.freqs']
    assert 0 < (after - before).abs().max() < 0.5
    # it started from the weights of the checkpoint, not from new ones
    weights = [c['state_dict']['blocks.0.mlp.fc1.weight'].flatten() for c in (checkpoint, later)]
    assert torch.corrcoef(torch.stack(weights))[0, 1] > 0.9
    assert float(rows[0]['train_loss']) < losses[1]


def check_state(name, checkpoint):
    fresh = new_model(name, 48)
    initial = fresh.state_dict()
    for key in ('state_dict', 'state_dict_ema'):
        state = checkpoint[key]
        assert list(state) == list(initial)
        assert torch.equal(state['rope.reference_grid'], torch.tensor([6, 6]))
        assert torch.equal(state['rope.signature'], initial['rope.signature'])
        assert all(torch.isfinite(v).all() for v in state.values())
        if fresh.rope.learned:
            assert state['rope.freqs'].dtype == torch.float32
            if name == SPHERICAL:  # starts the same in every model
                assert not torch.equal(state['rope.freqs'], initial['rope.freqs'])
    if fresh.rope.learned:
        assert not torch.equal(checkpoint['state_dict']['rope.freqs'], checkpoint['state_dict_ema']['rope.freqs'])


def test_trained_at_48_validated_at_96(trained, digits_folder):
    name, folder = trained
    checkpoint = str(folder / 'last.pth.tar')
    model = new_model(name, 96)  # as validate.py builds and loads it
    assert model.rope.reference_grid.tolist() == [12, 12]
    load_checkpoint(model, checkpoint, use_ema=False)
    assert model.rope.reference_grid.tolist() == [6, 6]
    assert validate(name, digits_folder, checkpoint, 96) == accuracy(model, digits_folder, 96)


def test_validated_at_the_size_of_training(trained, digits_folder):
    name, folder = trained
    checkpoint = str(folder / 'last.pth.tar')
    model = new_model(name, 48)
    load_checkpoint(model, checkpoint, use_ema=True)
    expected = accuracy(model, digits_folder, 48)
    # train.py evaluated the averaged weights too, in bfloat16: one image of 80 may differ
    assert abs(expected.expected - float(summary(folder)[-1]['eval_top1'])) < 1.3
    if name == SPHERICAL:  # one is enough: a larger size says more
        assert validate(name, digits_folder, checkpoint, 48, '--use-ema') == expected


def test_inference_at_96_takes_the_grid_of_training(trained, digits_folder, tmp_path):
    """Accuracies of 80 images say little; inference.py writes the logits."""
    name, folder = trained
    checkpoint = folder / 'last.pth.tar'
    run('inference.py', '--data-dir', digits_folder / 'val', '--split', '', '--device', 'cpu', '--workers', 0,
        *model_args(name, 96, global_pool='avg'),  # it takes no --gp
        '--batch-size', 40, '--checkpoint', checkpoint, '--results-dir', tmp_path,
        '--results-file', 'logits.csv', '--results-format', 'csv', '--topk', 0, '--output-type', 'logit',
        '--results-separate-col', '--label-type', 'none', '--fullname', '--no-console-results')
    with open(tmp_path / 'logits.csv') as file:
        rows = list(csv.DictReader(file))
    written = torch.tensor([[float(row[f'logit_{i}']) for i in range(10)] for row in rows])

    model = new_model(name, 48)  # the model of the training run itself, given larger images
    load_checkpoint(model, str(checkpoint), use_ema=True)
    expected, targets = logits_of(model, digits_folder, 96)
    assert [Path(row['filename']).parent.name for row in rows] == [str(t) for t in targets.tolist()]
    torch.testing.assert_close(written, expected, rtol=0, atol=1e-4)

    # and the comparison can tell: with the grid of the larger images the logits are others
    model.rope.reference_grid.copy_(torch.tensor([12, 12]))
    change = (logits_of(model, digits_folder, 96)[0] - expected).abs().max()
    assert (change > 1e-3) == (model.rope.coords != 'index'), change


def test_benchmark(tmp_path):
    output = run(
        'benchmark.py', '--bench', 'both', *model_args(SPHERICAL, 48), '--device', 'cpu', '--batch-size', 4,
        '--num-warm-iter', 1, '--num-bench-iter', 5, '--results-file', tmp_path / 'out.json',
        '--results-format', 'json', '--no-retry')
    result = json.loads((tmp_path / 'out.json').read_text())
    result = result[0] if isinstance(result, list) else result
    assert result['model'] == SPHERICAL and 'error' not in result, output[-2000:]
    assert result['infer_samples_per_sec'] > 0 and result['train_samples_per_sec'] > 0
    assert result['infer_img_size'] == 48


@pytest.mark.parametrize('exporter, name', [('torchscript', SPHERICAL), ('dynamo', 'vit_tiny_rope_spherical')])
def test_onnx_export(exporter, name, tmp_path):
    """A full vit_tiny (the script takes no model arguments), compared by onnxruntime at other batch sizes."""
    pytest.importorskip('onnx')
    onnxruntime = pytest.importorskip('onnxruntime')
    if exporter == 'dynamo':
        pytest.importorskip('onnxscript')
    torch.manual_seed(0)
    model = timm.create_model(name, num_classes=10)
    with torch.no_grad():
        for block in model.blocks:
            block.ls1.gamma.fill_(1.)
            block.attn.qkv.weight.mul_(5)
        if model.rope.learned:
            model.rope.freqs.mul_(1 + 0.1 * torch.randn_like(model.rope.freqs))
        model.rope.reference_grid.copy_(torch.tensor([7, 7]))
    torch.save(model.state_dict(), tmp_path / 'weights.pth')
    file = tmp_path / 'model.onnx'
    run('onnx_export.py', file, '--model', name, '--num-classes', 10, '--checkpoint', tmp_path / 'weights.pth',
        '--img-size', 96, '--batch-size', 2, '--check-forward', *(['--dynamo'] * (exporter == 'dynamo')))

    session = onnxruntime.InferenceSession(str(file))
    model.eval()
    for batch in (2, 3):
        images = torch.randn(batch, 3, 96, 96)
        with torch.no_grad():
            expected = model(images)
        got = torch.from_numpy(session.run(None, {session.get_inputs()[0].name: images.numpy()})[0])
        torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4)
    # positions matter in what was compared
    model.rope.reference_grid.copy_(torch.tensor([14, 14]))
    with torch.no_grad():
        assert (model(images) - expected).abs().max() > 1e-2


@pytest.fixture(scope='module')
def stripes(tmp_path_factory):
    """Image folder of stripes across and along, of all shapes: train/ and val/, two classes."""
    image = pytest.importorskip('PIL.Image')
    folder, draw = tmp_path_factory.mktemp('stripes'), random.Random(0)
    for split, count in dict(train=32, val=12).items():
        for label in range(2):
            (folder / split / str(label)).mkdir(parents=True)
            for i in range(count):
                height, width = draw.randint(40, 130), draw.randint(40, 130)
                line = (torch.arange((height, width)[label]) % 8 < 4) * 200
                pixels = line.reshape((-1, 1) if label == 0 else (1, -1)).expand(height, width)
                picture = image.fromarray(pixels.to(torch.uint8).numpy()).convert('RGB')
                picture.save(folder / split / str(label) / f'{i}.png')
    return folder


@pytest.mark.parametrize('name', [SPHERICAL, 'vit_tiny_rope_mixed_ape'])
def test_naflex_loader(name, stripes, output):
    """Images of all shapes in one batch, in training and in evaluation; the weights are the plain model's."""
    own = ['--gp', 'avg', '--device', 'cpu', '--workers', 0, '--naflex-loader', '--naflex-max-seq-len', 64]
    args = ['--data-dir', stripes, *model_args(name, 64, use_naflex=True), *own]
    args[args.index('--num-classes') + 1] = 2
    experiment = f'naflex-{name}'
    run('train.py', *args, '--naflex-train-seq-lens', 36, 64, '--batch-size', 8, '--opt', 'adamw', '--lr', 4e-3,
        '--warmup-epochs', 0, '--sched', 'step', '--no-aug', '--smoothing', 0, '--epochs', 4, '--model-ema',
        '--model-ema-decay', 0.8, '--amp', '--amp-dtype', 'bfloat16', '--output', output, '--experiment', experiment)
    losses = [float(row['train_loss']) for row in summary(output / experiment)]
    assert losses[-1] < 0.5 * losses[0]
    checkpoint = output / experiment / 'last.pth.tar'
    printed = run('validate.py', *args, '--batch-size', 8, '--checkpoint', checkpoint)
    assert float(re.search(r'\* Acc@1 ([\d.]+)', printed)[1]) > 80
    plain = timm.create_model(name, num_classes=2, global_pool='avg', **TINY, img_size=64)
    load_checkpoint(plain, str(checkpoint))
    assert plain.rope.reference_grid.tolist() == [8, 8]
