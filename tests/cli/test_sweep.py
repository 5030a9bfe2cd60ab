"""`python -m timm_rope sweep`, against an evaluation of its own: models built at each size, images cropped by hand."""
import argparse
import csv
import io
import json
import math
import os
import pickle
import re
import shutil
import subprocess
import sys
from contextlib import redirect_stdout
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from timm.models import load_checkpoint, save_for_hf

from timm_rope.__main__ import main
from timm_rope.cli._models import load, parse_source
from timm_rope.cli.sweep import evaluate
from timm_rope.cli.sweep.views import write_plot

CLASSES, PER_CLASS = 7, 8
KWARGS = dict(patch_size=8, embed_dim=24, depth=2, num_heads=2, init_values=1.)
SPHERICAL, APE = 'vit_tiny_rope_spherical', 'vit_tiny_rope_spherical_ape'
MEAN, STD = (.485, .456, .406), (.229, .224, .225)


@pytest.fixture(scope='module')
def data(tmp_path_factory):
    """Noise with structure, twice as wide as high, so that crops and sizes matter. Only the split is looked for."""
    folder, random = tmp_path_factory.mktemp('images'), np.random.default_rng(0)
    for label in range(CLASSES):
        (folder / 'val' / f'n{label}').mkdir(parents=True)
        for i in range(PER_CLASS):
            pixels = random.integers(0, 256, (9, 18, 3), np.uint8)
            Image.fromarray(pixels).resize((112, 56), Image.Resampling.NEAREST).save(
                folder / 'val' / f'n{label}' / f'{i}.png')
    return folder


def make(name, size, seed=0, **kwargs):
    """A model whose answers differ from image to image, and depend on positions."""
    torch.manual_seed(seed)
    model = timm.create_model(name, img_size=size, num_classes=CLASSES, **{**KWARGS, **kwargs}).eval()
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            if parameter.ndim > 1 and 'rope' not in key:
                parameter.normal_(std=.4 if 'qkv' not in key else 1.)
    return model


def save(path, name, size, seed=0, ema=None, **args):
    """A checkpoint as train.py writes it, of a model that was trained at `size`."""
    kwargs = args.pop('model_kwargs', {})
    model = make(name, size, seed, **kwargs)
    checkpoint = dict(
        arch=name, epoch=1, state_dict=model.state_dict(),
        args=argparse.Namespace(model=name, img_size=size, model_kwargs={**KWARGS, **kwargs}, num_classes=None, **args))
    if ema is not None:
        checkpoint['state_dict_ema'] = make(name, size, ema, **kwargs).state_dict()
    torch.save(checkpoint, path)
    return f'{name}={path}'


@pytest.fixture(scope='module')
def spherical(tmp_path_factory):
    return save(tmp_path_factory.mktemp('weights') / 'last.pth.tar', SPHERICAL, 48)


def sweep(*args):
    return main(['sweep', '-j', '0', '--device', 'cpu', *map(str, args)])


def rows_of(path):
    return json.loads(path.read_text())['results']


def images_at(folder, size, crop_pct=1., mean=MEAN, std=STD):
    """Images (N, 3, height, width) and labels: enlarged to cover size / crop_pct, the middle of it, normalised."""
    images, labels = [], []
    resampling = Image.Resampling.BICUBIC
    if size[0] != size[1]:  # before 1.0.31, timm takes the default of a class of its own there
        resize = timm.data.create_transform((3, *size), interpolation='bicubic').transforms[0]
        resampling = Image.Resampling[getattr(resize.interpolation, 'value', resize.interpolation).upper()]
    target = [math.floor(side / crop_pct) for side in size]
    for path in sorted((folder / 'val').glob('*/*.png')):
        image = Image.open(path).convert('RGB')
        factor = max(target[0] / image.height, target[1] / image.width)
        # torchvision truncates the longer side, timm rounds
        longer = math.floor if size[0] == size[1] else round
        image = image.resize([longer(side * factor + 1e-9) for side in image.size], resampling)
        top, left = round((image.height - size[0]) / 2), round((image.width - size[1]) / 2)
        pixels = torch.from_numpy(np.array(image)[top:top + size[0], left:left + size[1]]).permute(2, 0, 1) / 255
        images.append((pixels - torch.tensor(mean)[:, None, None]) / torch.tensor(std)[:, None, None])
        labels.append(int(path.parent.name[1:]))
    return torch.stack(images), torch.tensor(labels)


@torch.no_grad()
def count(model, folder, size, autocast=None, **preparation):
    """(right by the first answer, among the first five) of all images at (height, width)."""
    images, labels = images_at(folder, size, **preparation)
    with torch.autocast('cpu', autocast or torch.bfloat16, enabled=autocast is not None):
        order = model(images).float().argsort(1, descending=True)
    return int((order[:, 0] == labels).sum()), int((order[:, :5] == labels[:, None]).any(1).sum())


def counts_of(rows):
    return {(row['height'], row['width']): (row['right_top1'], row['right_top5']) for row in rows}


def at_sizes(source, sizes, folder, use_ema=False, options=(), **preparation):
    """The route of validate.py: a model built at each size with these options, the checkpoint loaded into it."""
    name, path = source.split('=')
    out = {}
    for size in sizes:
        model = timm.create_model(name, img_size=size, num_classes=CLASSES, **KWARGS, **dict(options)).eval()
        load_checkpoint(model, path, use_ema=use_ema)
        out[size] = count(model, folder, size, **preparation)
    return out


# -- the numbers

SIZES = [(48, 48), (32, 32), (96, 96), (40, 72)]
TEXTS = ['48', '32', '96', '40x72']


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


# -- rules for larger grids

RULES = {
    'extrapolate': {}, 'interpolate+log_n': dict(rope_scaling='interpolate', rope_log_n=True),
    'yarn': dict(rope_scaling='yarn')}


def by_rule(rows):
    """Counts by (model, rule), then by size."""
    found = {}
    for row in rows:
        found.setdefault((row['model'], row['rope_scaling']), []).append(row)
    return {key: counts_of(some) for key, some in found.items()}


@pytest.fixture(scope='module')
def compared(data, tmp_path_factory):
    """A run with a model that has rules and its baseline, which has none: sources, folder, what it printed."""
    folder = tmp_path_factory.mktemp('compared')
    mixed, ape = (save(folder / f'{name}.pth', name, 48) for name in ('vit_tiny_rope_mixed', 'vit_tiny_ape'))
    with redirect_stdout(io.StringIO()) as out:
        assert sweep(
            data, mixed, ape, '--sizes', '48', '96', '40x72', '--rope-scaling', 'extrapolate', 'interpolate+log-n',
            'yarn', 'yarn', '--results', folder / 'r.json', '--csv', folder / 'r.csv') == 0
    return mixed, ape, folder, out.getvalue()


def test_counts_are_those_of_models_built_with_each_rule(compared, data):
    mixed, ape, folder, _ = compared
    found, sizes = by_rule(rows_of(folder / 'r.json')), [(48, 48), (96, 96), (40, 72)]
    expected = {(mixed, rule): at_sizes(mixed, sizes, data, options=options) for rule, options in RULES.items()}
    assert found == {**expected, (ape, None): at_sizes(ape, sizes, data)}
    counts = [expected[mixed, rule] for rule in RULES]
    for size in sizes[1:]:
        assert len({each[size] for each in counts}) == 3, 'rules differ on larger grids'
    assert len({each[48, 48] for each in counts}) == 1, 'and not on that of training'


def test_every_rule_is_a_line(compared):
    mixed, ape, folder, out = compared
    rows = {(row['model'], row['rope_scaling'], row['height']): row for row in rows_of(folder / 'r.json')}
    lines = [(mixed, rule) for rule in RULES] + [(ape, None)]
    table = out.splitlines()
    assert len(table) == 5 and table[0].split() == ['top-1,', '%', '48', '96', '40x72']
    for text, (model, rule) in zip(table[1:], lines):
        label = f'{model} [{rule}]' if rule else model
        assert text.startswith(f'{label}  ')
        assert text[len(label):].split() == [f'{rows[model, rule, height]["top1"]:.2f}' for height in (48, 96, 40)]
    with open(folder / 'r.csv') as file:
        found = [(row['model'], row['rope_scaling'], row['height'], row['right_top1']) for row in csv.DictReader(file)]
    assert found == [
        (model, rule or '', str(height), str(rows[model, rule, height]['right_top1']))
        for model, rule in lines for height in (48, 96, 40)]


def test_rules_in_windows(data, tmp_path):
    swin = dict(embed_dim=16, depths=(1, 2), num_heads=(2, 2), patch_size=4)
    torch.manual_seed(0)
    model = timm.create_model('swin_tiny_rope_axial', img_size=64, window_size=4, num_classes=CLASSES, **swin).eval()
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            if parameter.ndim > 1:
                parameter.normal_(std=.5 if 'qkv' not in key else 1.)
    args = argparse.Namespace(img_size=64, model_kwargs=dict(swin, window_size=4))
    torch.save(dict(arch='swin_tiny_rope_axial', state_dict=model.state_dict(), args=args), tmp_path / 'w.pth')
    source = f'swin_tiny_rope_axial={tmp_path / "w.pth"}'
    assert sweep(data, source, '--sizes', '128', '--results', tmp_path / 'r.json', '--rope-scaling', *RULES) == 0
    expected = {}
    for rule, options in RULES.items():
        larger = timm.create_model(
            'swin_tiny_rope_axial', img_size=128, window_size=8, num_classes=CLASSES, **swin, **options).eval()
        larger.load_state_dict(model.state_dict())
        expected[source, rule] = {(128, 128): count(larger, data, (128, 128), crop_pct=.875)}
    assert by_rule(rows_of(tmp_path / 'r.json')) == expected
    assert len({str(counts) for counts in expected.values()}) == 3


def test_a_rule_goes_before_that_of_the_checkpoint(data, tmp_path):
    built = dict(rope_scaling='interpolate', rope_log_n=True)
    source = save(tmp_path / 'w.pth', 'vit_tiny_rope_mixed', 48, 1, model_kwargs=built)
    for given, rule, options in (([], None, built), (['--rope-scaling', 'yarn'], 'yarn', RULES['yarn'])):
        file = tmp_path / f'{rule}.json'
        assert sweep(data, source, '--sizes', '96', '--results', file, *given) == 0
        assert by_rule(rows_of(file)) == {(source, rule): at_sizes(source, [(96, 96)], data, options=options)}
    other = at_sizes(source, [(96, 96)], data, options=dict(rope_scaling='yarn', rope_log_n=True))
    assert counts_of(rows_of(file)) != other, 'and the comparison can tell a temperature that stayed'


@pytest.mark.parametrize('name, kwargs', [
    ('test_vit', {}), ('vit_small_patch16_rope_224', dict(img_size=160, embed_dim=48, depth=1, num_heads=2)),
    ('vit_tiny_rope_mixed', dict(KWARGS, img_size=160, rope_encoding='none')),
    ('swin_tiny_rope_axial', dict(img_size=128, embed_dim=16, depths=(1,), num_heads=(1,), rope_encoding='none'))])
def test_what_has_no_rotation_of_ours_is_evaluated_once(name, kwargs, data, tmp_path, capsys):
    model = timm.create_model(name, num_classes=CLASSES, **kwargs)
    save_for_hf(model, str(tmp_path / 'peer'), model_config=dict(num_classes=CLASSES, model_args=kwargs))
    source = f'local-dir:{tmp_path / "peer"}'
    assert sweep(data, source, '--sizes', '160', '--results', tmp_path / 'r.json', '--rope-scaling', *RULES) == 0
    row, = rows_of(tmp_path / 'r.json')
    assert row['rope_scaling'] is None
    assert capsys.readouterr().out.splitlines()[1:] == [f'{source}  {row["top1"]:.2f}']


def test_other_weights_are_asked_anew_for_rules(data, tmp_path):
    file = tmp_path / 'r.json'
    for size, kwargs in (('96', dict(rope_encoding='none')), ('72', {})):
        source = save(tmp_path / 'w.pth', 'vit_tiny_rope_mixed', 48, model_kwargs=kwargs)
        assert sweep(data, source, '--sizes', size, '--results', file, '--rope-scaling', 'yarn') == 0
    assert [(row['height'], row['rope_scaling']) for row in rows_of(file)] == [(96, None), (72, 'yarn')]


def test_a_complete_run_with_rules_loads_nothing(compared, data, monkeypatch, capsys):
    mixed, ape, folder, out = compared
    before = (folder / 'r.json').read_bytes()
    monkeypatch.setattr(timm, 'create_model', None)
    assert sweep(data, ape, mixed, '--sizes', '96', '--results', folder / 'r.json', '--rope-scaling', 'yarn') == 0
    words = [line.rsplit(maxsplit=1)[0] for line in capsys.readouterr().out.splitlines()]
    assert words == ['top-1, %', ape, f'{mixed} [yarn]']
    assert (folder / 'r.json').read_bytes() == before


def test_a_rerun_adds_rules_to_results_of_before_there_were_any(data, tmp_path, monkeypatch):
    file, table, built = tmp_path / 'r.json', tmp_path / 'r.csv', []
    mixed, ape = (save(tmp_path / f'{name}.pth', name, 48) for name in ('vit_tiny_rope_mixed', 'vit_tiny_ape'))
    assert sweep(data, mixed, ape, '--sizes', '96', '--results', file) == 0
    content = json.loads(file.read_text())
    for row in content['results']:
        del row['rope_scaling'], row['takes_rules']
    assert content['format'] == 'timm_rope sweep 1', 'as before'
    file.write_text(json.dumps(content))
    table.write_text('model,height,width,top1,top5,right_top1,right_top5,images,images_per_second,crop_pct,'
                     'interpolation,parameters\n')
    create = timm.create_model
    monkeypatch.setattr(timm, 'create_model', lambda *args, **kwargs: built.append(1) or create(*args, **kwargs))
    args = (data, mixed, ape, '--sizes', '96', '--results', file, '--csv', table)
    assert sweep(*args) == 0
    assert json.loads(file.read_text()) == content and not built
    assert sweep(*args, '--rope-scaling', 'yarn') == 0
    after = json.loads(file.read_text())
    assert after['results'][:2] == content['results'], 'the baseline is not evaluated again'
    row, = after['results'][2:]
    assert (row['model'], row['rope_scaling']) == (mixed, 'yarn')
    # versions of before there were rules tell rows by model and size alone, and refuse another format
    assert after['format'] == 'timm_rope sweep 2'
    assert len(table.read_text().splitlines()) == 3


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


# -- interrupted and continued

def test_a_rerun_skips_what_is_done(data, spherical, tmp_path, monkeypatch, capsys):
    file = tmp_path / 'r.json'
    assert sweep(data, spherical, '--sizes', '48', '48x48', '--results', file) == 0
    first, = rows_of(file)
    assert sweep(data, spherical, '--sizes', '32', '48', '--results', file, '-b', 7) == 0
    rows = rows_of(file)
    assert rows[0] == first and [row['height'] for row in rows] == [48, 32]
    before = file.read_bytes()
    monkeypatch.setattr(evaluate.Images, '__getitem__', None)
    monkeypatch.setattr(timm, 'create_model', None)
    capsys.readouterr()
    assert sweep(data, spherical, '--sizes', '32', '48', '--results', file, '--csv', tmp_path / 'r.csv') == 0
    assert file.read_bytes() == before
    table = capsys.readouterr().out.splitlines()
    assert table[0].split() == ['top-1,', '%', '32', '48']
    assert table[1].split() == [spherical, f'{rows[1]["top1"]:.2f}', f'{rows[0]["top1"]:.2f}']
    with open(tmp_path / 'r.csv') as lines:
        found = list(csv.DictReader(lines))
    assert [(row['height'], row['model']) for row in found] == [('32', spherical), ('48', spherical)]
    assert [float(row['top1']) for row in found] == [rows[1]['top1'], rows[0]['top1']]


@pytest.mark.parametrize('error, status', [(KeyboardInterrupt, 130), (MemoryError, None), (RuntimeError('boom'), 1)])
def test_what_was_done_before_an_interruption_is_kept(error, status, data, spherical, tmp_path, monkeypatch, capsys):
    file, n, calls = tmp_path / 'r.json', CLASSES * PER_CLASS, []
    item = evaluate.Images.__getitem__

    def interrupted(self, index):
        calls.append(index)
        if len(calls) > n + 10:
            raise error
        return item(self, index)

    args = (data, spherical, '--sizes', *TEXTS[:3], '--results', file)
    with monkeypatch.context() as patch:
        patch.setattr(evaluate.Images, '__getitem__', interrupted)
        if status is None:
            with pytest.raises(error):
                sweep(*args)
        else:
            assert sweep(*args) == status
            assert f'1 of 3 evaluations are done and in {file}, a rerun continues' in capsys.readouterr().err
    first, = rows_of(file)
    assert os.listdir(tmp_path) == ['r.json']
    assert sweep(*args) == 0
    assert rows_of(file)[0] == first
    assert counts_of(rows_of(file)) == at_sizes(spherical, SIZES[:3], data)


def test_a_failed_write_leaves_the_results_before(data, spherical, tmp_path, monkeypatch, capsys):
    file = tmp_path / 'r.json'
    assert sweep(data, spherical, '--sizes', '48', '--results', file) == 0
    before = file.read_bytes()

    def full(*args):
        raise OSError(28, 'No space left on device')

    with monkeypatch.context() as patch:
        patch.setattr(os, 'replace', full)
        assert sweep(data, spherical, '--sizes', '48', '32', '--results', file) == 1
    assert 'No space left' in capsys.readouterr().err
    assert file.read_bytes() == before and os.listdir(tmp_path) == ['r.json']


def test_results_of_another_run_at_the_same_time_are_not_overwritten(data, spherical, tmp_path, monkeypatch, capsys):
    file, item = tmp_path / 'r.json', evaluate.Images.__getitem__

    def meddling(self, index):
        file.write_text('theirs')
        return item(self, index)

    monkeypatch.setattr(evaluate.Images, '__getitem__', meddling)
    assert sweep(data, spherical, '--sizes', '48', '--results', file) == 1
    assert file.read_text() == 'theirs'
    err = capsys.readouterr().err
    assert 'changed by another program' in err and '"right_top1"' in err


@pytest.mark.parametrize('content', [
    '', '{"epoch": 1}', '[]', '{"format": "timm_rope sweep 1", "arguments": {}, "results": [{"model": "x"}]}',
    '{"format": "another", "arguments": {}, "results": []}', '\x00\xff',
    '{"format": "timm_rope sweep 2", "arguments": {}, "results": [{"model": "x", "rope_scaling": ["yarn"], '
    '"height": 1, "width": 1, "top1": 1, "top5": 1, "right_top1": 1, "right_top5": 1, "images": 1, '
    '"images_per_second": 1}]}'])
def test_a_foreign_results_file_is_refused(content, data, spherical, tmp_path, capsys):
    file = tmp_path / 'r.json'
    file.write_bytes(content.encode('latin-1'))
    assert sweep(data, spherical, '--sizes', '48', '--results', file) == 2
    assert 'is no results file' in capsys.readouterr().err
    assert file.read_bytes() == content.encode('latin-1')


@pytest.mark.parametrize('change, said', [
    (['--crop-pct', '.9'], 'crop_pct None, now 0.9'), (['--amp'], "amp None, now 'float16'"),
    (['--model-kwargs', 'rope_order=xy'], "model_kwargs {}, now {'rope_order': 'xy'}"),
    ('data', 'data '), ('images', 'images 56, now 57'), ('weights', 'the weights have changed')])
def test_results_with_other_arguments_are_refused(change, said, data, tmp_path, capsys):
    file, folder = tmp_path / 'r.json', tmp_path / 'images'
    subprocess.run(['cp', '-r', str(data), str(folder)], check=True)
    source = save(tmp_path / 'w.pth', SPHERICAL, 48)
    assert sweep(folder, source, '--sizes', '48', '--results', file) == 0
    before = file.read_bytes()
    if change == 'data':
        folder = data
    if change == 'images':
        Image.new('RGB', (50, 50)).save(folder / 'val' / 'n0' / 'x.png')
    if change == 'weights':
        save(tmp_path / 'w.pth', SPHERICAL, 48, seed=3)
    options = change if isinstance(change, list) else []
    assert sweep(folder, source, '--sizes', '48', '--results', file, *options) == 2
    assert said in capsys.readouterr().err
    assert file.read_bytes() == before


# -- bad input: nothing is evaluated, nothing written

class Trap:
    def __reduce__(self):
        return os.system, ('touch trapped',)


@pytest.fixture
def bad(data, tmp_path, monkeypatch):
    """A folder with all kinds of things that do not fit; also the working directory."""
    monkeypatch.chdir(tmp_path)
    with_images = ('one/n0', 'three/n0', 'three/n1', 'three/n2', 'trained/train/n0', 'trained/train/n1')
    for folder in ('empty', 'bare', *with_images):
        Path(folder).mkdir(parents=True)
    for folder in with_images:
        Image.new('RGB', (50, 50)).save(f'{folder}/0.png')
    save('good.pth', SPHERICAL, 48)
    save('liere.pth', 'vit_tiny_rope_liere', 48)
    Path('trap.pth').write_bytes(pickle.dumps({'state_dict': Trap()}))
    Path('text.pth').write_text('no weights')
    torch.save({'state_dict': make(SPHERICAL, 48, rope_order='xy').state_dict()}, 'order.pth')
    Path('there.csv').write_text('a,b\n')
    Image.new('RGB', (5, 5)).save('there.png')
    return data


@pytest.mark.parametrize('args, said', [
    (['nowhere', 'GOOD'], 'nowhere is no folder'),
    (['empty', 'GOOD'], 'empty holds no images'),
    (['one', 'GOOD'], "a single class, 'n0'"),
    (['three', 'GOOD'], 'has 7 classes, three has 3'),
    (['trained', 'GOOD'], 'trained holds train and no val or validation: name the folder'),
    (['DATA', 'GOOD', '--sizes', '48', '50'], 'at 50x50: img_size must be a multiple of the patch 8x8'),
    (['DATA', 'GOOD', 'vit_tiny_rope_sferical=good.pth'], "nearest name is 'vit_tiny_rope_spherical'"),
    (['DATA', 'GOOD', 'vit_tiny_rope_spherical.best=good.pth'], 'best'),
    (['DATA', 'GOOD', 'vit_tiny_rope_spherical'], "no weights of 'vit_tiny_rope_spherical' are published"),
    (['DATA', 'GOOD', 'vit_tiny_rope_spherical=none.pth'], "there is no file 'none.pth'"),
    (['DATA', 'GOOD', 'vit_tiny_rope_mixed=good.pth'], "weights of 'vit_tiny_rope_spherical', not of"),
    (['DATA', 'GOOD', 'good.pth'], 'NAME=good.pth'),
    (['DATA', 'GOOD', 'local-dir:bare'], 'bare must hold one weight file'),
    (['DATA', 'GOOD', 'vit_tiny_rope_spherical=trap.pth'], 'trap.pth is refused'),
    (['DATA', 'GOOD', 'vit_tiny_rope_spherical=text.pth'], 'is no weight file'),
    (['DATA', 'GOOD', 'vit_tiny_rope_spherical=order.pth', '--model-kwargs', 'patch_size=8', 'embed_dim=24', 'depth=2',
      'num_heads=2'], 'order'),
    (['DATA', 'GOOD', '--use-ema'], 'holds no averaged (EMA) weights'),
    (['DATA', 'GOOD', '--crop-pct', '0'], '--crop-pct must be above 0 and at most 1, got 0.0'),
    (['DATA', 'GOOD', '--crop-pct', 'nan'], '--crop-pct must be'),
    (['DATA', 'GOOD', '--model-kwargs', 'num_classes=3'], 'it is that of the weights'),
    (['DATA', 'GOOD', '--model-kwargs', 'rope_wings=3'], "takes no option 'wings'"),
    (['DATA', 'GOOD', 'vit_tiny_rope_liere=liere.pth', '--rope-scaling', 'extrapolate', 'ntk+log_n'],
     "vit_tiny_rope_liere=liere.pth [ntk+log_n] at 48x48: scaling must be one of 'extrapolate', 'interpolate' for"),
    (['DATA', 'GOOD', '--rope-scaling', 'yarn', '--model-kwargs', 'rope_scaling=yarn'],
     '--rope-scaling and --model-kwargs rope_scaling contradict each other'),
    (['DATA', 'GOOD', '--rope-scaling', 'yarn', '--model-kwargs', 'rope_log_n=True'],
     '--rope-scaling and --model-kwargs rope_log_n contradict each other'),
    (['DATA', 'GOOD', '--device', 'toaster'], 'toaster'),
    (['DATA', 'GOOD', '--csv', 'there.csv'], 'there.csv is no table of sweep'),
    (['DATA', 'GOOD', '--csv', 'no/r.csv'], '--csv must be a file *.csv in a folder'),
    (['DATA', 'GOOD', '--plot', 'r.jpg'], '--plot must be a file *.png'),
    (['DATA', 'GOOD', '--plot', 'there.png'], 'there.png is no plot of sweep'),
])
def test_refused(args, said, bad, capsys):
    before = {path: path.stat().st_mtime_ns for path in Path().rglob('*')}
    replaced = [{'DATA': str(bad), 'GOOD': f'{SPHERICAL}=good.pth'}.get(arg, arg) for arg in args]
    if '--sizes' not in args:
        replaced += ['--sizes', '48']
    assert sweep(*replaced, '--results', 'r.json') == 2
    out, err = capsys.readouterr()
    assert said in err and out == '' and 'img/s' not in err, err
    assert {path: path.stat().st_mtime_ns for path in Path().rglob('*')} == before


@pytest.mark.parametrize('args, said', [
    (['--sizes', '48', '0'], "N or HEIGHTxWIDTH in pixels, got '0'"), (['--sizes', '48,64'], "got '48,64'"),
    (['--sizes', '-48'], '--sizes'), (['-b', '0'], 'integer of at least 1'), (['-b', 'x'], "got 'x'"),
    (['--amp-dtype', 'float8'], 'float8'), (['--rope-scaling'], 'expected at least one argument'),
    (['--rope-scaling', 'yarn', 'linear'], "one of extrapolate, interpolate, ntk, yarn, with or without +log_n, got "),
    (['--rope-scaling', 'yarn+log_n+log_n'], "got 'yarn+log_n+log_n'"), (['--rope-scaling', '+log_n'], "got '+log_n'")])
def test_refused_by_the_parser(args, said, data, spherical, capsys):
    with pytest.raises(SystemExit, match='2'):
        sweep(data, spherical, *args)
    assert said in capsys.readouterr().err


def test_logits_that_are_not_finite_are_no_result(data, tmp_path, capsys):
    source = save(tmp_path / 'w.pth', SPHERICAL, 48)
    checkpoint = torch.load(tmp_path / 'w.pth', weights_only=False)
    checkpoint['state_dict']['head.bias'][0] = float('nan')
    torch.save(checkpoint, tmp_path / 'w.pth')
    assert sweep(data, source, '--sizes', '48', '--results', tmp_path / 'r.json') == 1
    assert '56 logits are not finite' in capsys.readouterr().err
    assert not (tmp_path / 'r.json').exists()


def test_a_checkpoint_cannot_ask_for_other_weights(data, tmp_path):
    source = save(tmp_path / 'w.pth', SPHERICAL, 48, model_kwargs={})
    checkpoint = torch.load(tmp_path / 'w.pth', weights_only=False)
    checkpoint['args'].model_kwargs.update(
        pretrained=True, pretrained_cfg=dict(file='/etc/passwd'), checkpoint_path='/etc/passwd', rope_warm_start=True)
    torch.save(checkpoint, tmp_path / 'w.pth')
    loaded = load(parse_source(source), {}, False).model
    assert torch.equal(loaded.head.weight, checkpoint['state_dict']['head.weight'])


# -- the plot

def test_plot(data, spherical, tmp_path, monkeypatch):
    figures = pytest.importorskip('matplotlib.figure')
    drawn, savefig = [], figures.Figure.savefig
    monkeypatch.setattr(
        figures.Figure, 'savefig', lambda self, *args, **kwargs: drawn.append(self) or savefig(self, *args, **kwargs))
    second = save(tmp_path / 'b.pth', 'vit_tiny_rope_mixed', 48)
    args = (data, spherical, second, '--sizes', '96', '48', '32x72', '--results', tmp_path / 'r.json', '--plot',
            tmp_path / 'r.png')
    assert sweep(*args) == 0
    axes, = drawn[0].axes
    rows = rows_of(tmp_path / 'r.json')
    for line, source in zip(axes.lines, (spherical, second)):
        top1 = {(row['height'], row['width']): row['top1'] for row in rows if row['model'] == source}
        assert line.get_label() == source
        assert line.get_xdata().tolist() == [48, 48, 96]  # 32x72 has as many pixels as 48x48
        assert line.get_ydata()[2] == top1[96, 96]
        assert sorted(line.get_ydata()[:2]) == sorted([top1[48, 48], top1[32, 72]])
    assert sorted(label.get_text() for label in axes.get_xticklabels()) == ['32x72\n48', '96'] or sorted(
        label.get_text() for label in axes.get_xticklabels()) == ['48\n32x72', '96']
    assert sweep(*args, '--rope-scaling', 'yarn', 'ntk') == 0
    axes, = drawn[1].axes
    assert [line.get_label() for line in axes.lines] == [
        f'{source} [{rule}]' for source in (spherical, second) for rule in ('yarn', 'ntk')]
    for line, rule in zip(axes.lines, ('yarn', 'ntk')):
        assert line.get_ydata()[2] == next(
            row['top1'] for row in rows_of(tmp_path / 'r.json')
            if (row['model'], row['rope_scaling'], row['height']) == (spherical, rule, 96))
    with Image.open(tmp_path / 'r.png') as image:
        assert image.format == 'PNG' and len(np.unique(np.array(image))) > 10
    assert sweep(*args) == 0, 'our own plot is replaced'


def test_lines_of_a_plot_can_be_told_apart(tmp_path, monkeypatch):
    figures = pytest.importorskip('matplotlib.figure')
    drawn = []
    monkeypatch.setattr(figures.Figure, 'savefig', lambda self, *args, **kwargs: drawn.append(self))
    rows = [dict(model=model, rope_scaling=rule + log_n, height=48, width=48, top1=50.)
            for model in 'abc' for rule in ('extrapolate', 'interpolate', 'ntk', 'yarn') for log_n in ('', '+log_n')]
    write_plot(tmp_path / 'r.png', rows)
    axes, = drawn[0].axes
    assert len({(line.get_color(), line.get_linestyle()) for line in axes.lines}) == len(rows) == 24


def test_a_plot_needs_matplotlib(data, spherical, tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, 'matplotlib', None)
    monkeypatch.setattr(evaluate, 'create_dataset', None)
    assert sweep(data, spherical, '--plot', tmp_path / 'r.png') == 2
    assert "pip install 'timm_rope[bench]'" in capsys.readouterr().err


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
