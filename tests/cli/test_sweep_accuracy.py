"""`python -m timm_rope sweep` counts what models built at each size get right, prepared as they were trained."""
import argparse
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import timm
import torch
from sweeping import (
    APE,
    CLASSES,
    KWARGS,
    PER_CLASS,
    SIZES,
    SPHERICAL,
    TEXTS,
    at_sizes,
    count,
    counts_of,
    make,
    rows_of,
    save,
    sweep,
)
from timm.models import save_for_hf

from timm_rope.cli.sweep import evaluate


@pytest.mark.parametrize('name', [SPHERICAL, APE, 'vit_tiny_rope_mixed'])
def test_counts_are_those_of_models_built_at_each_size(name, data, tmp_path):
    source = save(tmp_path / 'last.pth.tar', name, 48)
    assert sweep(data, source, '--sizes', *TEXTS, '--results', tmp_path / 'r.json', '-b', 10) == 0
    rows = rows_of(tmp_path / 'r.json')
    expected = at_sizes(source, SIZES, data)
    assert counts_of(rows) == expected and list(counts_of(rows)) == SIZES
    for row in rows:
        n = CLASSES * PER_CLASS
        assert row['images'] == n and 0 < row['right_top1'] < row['right_top5'] < n
        assert (row['top1'], row['top5']) == (100 * row['right_top1'] / n, 100 * row['right_top5'] / n)
        assert row['model'] == source and row['images_per_second'] == pytest.approx(n / row['seconds'])
        assert row['parameters'] == sum(p.numel() for p in make(name, 48).parameters())
    # the comparison can tell a model with the grid of the size instead of that of its training
    if name == SPHERICAL:
        wrong = make(name, 96)
        assert count(wrong, data, (96, 96)) != expected[96, 96]
    if name == APE:  # and an embedding that was resized twice
        twice = make(name, 48)
        twice.set_input_size(img_size=32)
        twice.set_input_size(img_size=96)
        assert count(twice, data, (96, 96)) != expected[96, 96]


def test_weights_without_a_word_on_their_training(data, tmp_path):
    """Their size is that of the position embedding, which would else be resized twice."""
    model = make(APE, 256, patch_size=32)
    torch.save(model.state_dict(), tmp_path / 'w.pth')
    kwargs = {**KWARGS, 'patch_size': 32}
    assert sweep(data, f'{APE}={tmp_path / "w.pth"}', '--sizes', '256', '--results', tmp_path / 'r.json',
                 '--model-kwargs', *(f'{key}={value}' for key, value in kwargs.items())) == 0
    expected = count(model, data, (256, 256))
    assert counts_of(rows_of(tmp_path / 'r.json')) == {(256, 256): expected}
    model.set_input_size(img_size=224)  # and the comparison can tell
    assert count(model, data, (256, 256)) != expected


def test_crop_is_the_same_share_at_every_size(data, spherical, tmp_path):
    assert sweep(data, spherical, '--sizes', *TEXTS, '--results', tmp_path / 'r.json', '--crop-pct', .7) == 0
    rows = rows_of(tmp_path / 'r.json')
    assert counts_of(rows) == at_sizes(spherical, SIZES, data, crop_pct=.7) != at_sizes(spherical, SIZES, data)
    assert {row['crop_pct'] for row in rows} == {.7}


def test_a_checkpoint_is_evaluated_as_it_was_trained(data, tmp_path):
    """Pooling, pixels and averaged weights; nothing of it is said on the command line."""
    source = save(tmp_path / 'last.pth.tar', 'vit_tiny_rope_mixed', 48, ema=5, gp='avg', mean=(.2, .3, .4),
                  std=(.5, .6, .7), crop_pct=.8, model_kwargs=dict(global_pool='avg'))
    checkpoint = torch.load(source.split('=')[1], weights_only=False)
    del checkpoint['args'].model_kwargs['global_pool']  # where --gp puts it
    torch.save(checkpoint, source.split('=')[1])
    preparation = dict(crop_pct=.8, mean=(.2, .3, .4), std=(.5, .6, .7))
    for option, key in (([], 'state_dict'), (['--use-ema'], 'state_dict_ema')):
        file = tmp_path / f'{key}.json'
        assert sweep(data, source, '--sizes', *TEXTS[:2], '--results', file, *option) == 0
        model = make('vit_tiny_rope_mixed', 48, global_pool='avg')
        model.load_state_dict(checkpoint[key])
        assert counts_of(rows_of(file)) == {size: count(model, data, size, **preparation) for size in SIZES[:2]}
        assert rows_of(file)[0]['mean'] == [.2, .3, .4]
    assert counts_of(rows_of(tmp_path / 'state_dict.json')) != counts_of(rows_of(file))


def test_lower_precision(data, spherical, tmp_path):
    options = ['--sizes', '96', '--amp', '--amp-dtype', 'bfloat16', '--channels-last']
    seen = set()

    def spy(module, args, output):
        if isinstance(module, torch.nn.Linear):
            seen.add(output.dtype)

    hook = torch.nn.modules.module.register_module_forward_hook(spy)
    try:
        assert sweep(data, spherical, *options, '--results', tmp_path / 'r.json') == 0
    finally:
        hook.remove()
    assert seen == {torch.bfloat16}
    row, = rows_of(tmp_path / 'r.json')
    assert json.loads((tmp_path / 'r.json').read_text())['arguments']['amp'] == 'bfloat16'
    reference = make(SPHERICAL, 48)
    assert abs(row['right_top1'] - count(reference, data, (96, 96), torch.bfloat16)[0]) <= 2


def test_windows_of_a_swin_grow_with_the_image(data, tmp_path):
    swin = dict(embed_dim=16, depths=(1, 2), num_heads=(2, 2), patch_size=4)
    torch.manual_seed(0)
    model = timm.create_model('swin_tiny_rope_mixed', img_size=64, window_size=4, num_classes=CLASSES, **swin).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.normal_(std=.5)
    args = argparse.Namespace(img_size=64, model_kwargs=dict(swin, window_size=4))
    torch.save(dict(arch='swin_tiny_rope_mixed', state_dict=model.state_dict(), args=args), tmp_path / 'w.pth')
    source = f'swin_tiny_rope_mixed={tmp_path / "w.pth"}'
    assert sweep(data, source, '--sizes', '64', '96', '--results', tmp_path / 'r.json') == 0
    crop = dict(crop_pct=.875)
    expected = {(64, 64): count(model, data, (64, 64), **crop)}
    larger = timm.create_model('swin_tiny_rope_mixed', img_size=96, window_size=6, num_classes=CLASSES, **swin).eval()
    larger.load_state_dict(model.state_dict())
    expected[96, 96] = count(larger, data, (96, 96), **crop)
    assert counts_of(rows_of(tmp_path / 'r.json')) == expected


def test_peers_of_timm_from_a_folder(data, tmp_path):
    torch.manual_seed(0)
    peer = timm.create_model('test_vit', num_classes=CLASSES).eval()
    with torch.no_grad():
        for parameter in peer.parameters():
            if parameter.ndim > 1:
                parameter.normal_(std=.3)
    peer.pretrained_cfg['test_crop_pct'] = .8  # goes before crop_pct
    save_for_hf(peer, str(tmp_path / 'peer'), model_config=dict(num_classes=CLASSES))
    source = f'local-dir:{tmp_path / "peer"}'
    assert sweep(data, source, '--sizes', '160', '96', '--results', tmp_path / 'r.json') == 0
    rows = rows_of(tmp_path / 'r.json')
    cfg = peer.pretrained_cfg
    preparation = dict(crop_pct=.8, mean=cfg['mean'], std=cfg['std'])
    assert counts_of(rows) == {
        (size, size): count(timm.create_model(source, pretrained=True, img_size=size).eval(), data, (size, size),
                            **preparation) for size in (160, 96)}


def test_images_that_are_no_multiple_of_the_patch_can_be_padded(data, spherical, tmp_path):
    assert sweep(data, spherical, '--sizes', '50', '--results', tmp_path / 'r.json', '--model-kwargs',
                 'dynamic_img_pad=True') == 0
    model = make(SPHERICAL, 48, dynamic_img_pad=True)
    assert counts_of(rows_of(tmp_path / 'r.json')) == {(50, 50): count(model, data, (50, 50))}


# -- what it costs

@pytest.mark.parametrize('rules', [[], ['--rope-scaling', 'yarn', 'ntk']])
def test_a_model_is_loaded_once_and_an_image_once_for_each_evaluation(rules, data, spherical, monkeypatch, tmp_path):
    built, read, seen = [], [], []
    create, item = timm.create_model, evaluate.Images.__getitem__
    monkeypatch.setattr(timm, 'create_model', lambda *args, **kwargs: built.append(1) or create(*args, **kwargs))
    monkeypatch.setattr(evaluate.Images, '__getitem__', lambda self, i: read.append(i) or item(self, i))

    def spy(module, args, output):
        if type(module).__name__ == 'RopeVisionTransformer':
            seen.append(len(args[0]))
            assert torch.is_inference_mode_enabled() and not module.training

    hook = torch.nn.modules.module.register_module_forward_hook(spy)
    try:
        second = save(tmp_path / 'b.pth', 'vit_tiny_rope_mixed', 48)
        built.clear()
        assert sweep(data, spherical, second, '--sizes', *TEXTS[:3], '-b', 16, *rules) == 0
    finally:
        hook.remove()
    n, evaluations = CLASSES * PER_CLASS, 12 if rules else 6
    assert len(built) == 2
    assert sorted(read) == sorted(list(range(n)) * evaluations)
    assert sum(seen) == evaluations * (n + 1), 'one blank image for each'


# -- images that cannot be read

@pytest.mark.parametrize('workers', [0, 2])
def test_what_cannot_be_read_is_left_out_and_no_other_image_counted_for_it(workers, data, spherical, tmp_path, capsys):
    damaged, kept = tmp_path / 'damaged', tmp_path / 'kept'
    for folder in (damaged, kept):
        shutil.copytree(data, folder)
    lost = ['n0/3.png', 'n3/0.png', 'n6/7.png']
    for number, name in enumerate(lost):
        content = (data / 'val' / name).read_bytes()
        (damaged / 'val' / name).write_bytes([b'', content[:len(content) // 2], b'no image'][number])
        (kept / 'val' / name).unlink()
    file, n = tmp_path / 'r.json', CLASSES * PER_CLASS
    args = damaged, spherical, '--sizes', *TEXTS[:2], '--results', file, '-b', 10, '-j', workers
    assert sweep(*args) == 0
    rows, shown = rows_of(file), capsys.readouterr()
    assert counts_of(rows) == at_sizes(spherical, SIZES[:2], kept)
    for row in rows:
        assert (row['images'], row['unreadable']) == (n - 3, 3)
        assert row['top1'] == pytest.approx(100 * row['right_top1'] / (n - 3))
    assert shown.err.count(f'3 of {n} images cannot be read and are left out: {", ".join(lost)}.') == 1
    assert '(without 3 images that cannot be read)' in shown.out
    assert sweep(*args) == 0
    assert '(without 3 images that cannot be read)' in capsys.readouterr().out, 'a rerun says it, too'


def test_a_folder_of_which_no_image_can_be_read(data, spherical, tmp_path, capsys):
    shutil.copytree(data, tmp_path / 'all')
    for path in (tmp_path / 'all').rglob('*.png'):
        path.write_bytes(b'no image')
    assert sweep(tmp_path / 'all', spherical, '--sizes', '48') == 1
    err = capsys.readouterr().err
    assert 'n0/0.png, n0/1.png, n0/2.png, n0/3.png, n0/4.png and 51 more' in err and 'no image can be read' in err


# -- timm's script

SCRIPTS = Path(os.environ.get('TIMM_SCRIPTS') or 'not set')


@pytest.mark.scripts
@pytest.mark.skipif(
    not (SCRIPTS / 'validate.py').is_file(),
    reason=f'TIMM_SCRIPTS must name a folder with the scripts of timm (train.py ...), it is: {SCRIPTS}')
@pytest.mark.parametrize('crop', [[], ['--crop-pct', '.7']])
def test_validate_says_the_same(crop, data, tmp_path):
    source = save(tmp_path / 'w.pth', APE, 48)
    assert sweep(data, source, '--sizes', '48', '96', '--results', tmp_path / 'r.json', *crop) == 0
    for row in rows_of(tmp_path / 'r.json'):
        done = subprocess.run(
            [sys.executable, str(SCRIPTS / 'validate.py'), *map(str, [
                '--data-dir', data, '--model', APE, '--checkpoint', tmp_path / 'w.pth', '--num-classes', CLASSES,
                '--img-size', row['height'], '--device', 'cpu', '--workers', 0, *crop,
                '--model-kwargs', *(f'{key}={value}' for key, value in KWARGS.items())])],
            capture_output=True, text=True, timeout=300, env={**os.environ, 'TIMM_ROPE_AUTOLOAD': '1'})
        assert done.returncode == 0, (done.stdout + done.stderr)[-4000:]
        accuracies = re.search(r'\* Acc@1 ([\d.]+) \([\d.]+\) Acc@5 ([\d.]+)', done.stdout + done.stderr).groups()
        assert [float(x) for x in accuracies] == pytest.approx([row['top1'], row['top5']], abs=1e-3)
