"""`python -m timm_rope plot`: pictures of every kind, their values, and what is refused before anything is written."""
import csv
import json
import math
import re

import pytest
import timm
import tiny
import tiny_swin
import torch
from PIL import Image

from timm_rope import analysis
from timm_rope.__main__ import main
from timm_rope.cli.plot import command
from timm_rope.cli.plot.images import scene
from timm_rope.cli.plot.values import KINDS, Look

pytest.importorskip('matplotlib')

SMALL = ['--model-kwargs', 'depth=2', 'embed_dim=24', 'num_heads=2', 'img_size=64', '--untrained']
SMALL_SWIN = ['--model-kwargs', 'embed_dim=8', 'depths=[1,1,1,1]', 'num_heads=[1,1,1,1]', 'img_size=64',
              'window_size=4', '--untrained']


@pytest.fixture
def plot(capsys):
    """Run the command; exit status, standard output, and the last line of standard error."""
    def run(*args):
        status = main(['plot', *map(str, args)])
        out, err = capsys.readouterr()
        return status, out, err.rstrip('\n').rpartition('\n')[2]
    return run


def values_of(path):
    return [each['values'] for each in json.loads(path.with_suffix('.json').read_text())['models']]


@pytest.mark.parametrize('models,args', [
    (['vit_tiny_rope_mixed'], SMALL), (['vit_tiny_rope_spherical', 'vit_tiny_rope_liere'], SMALL),
    (['swin_tiny_rope_mixed'], SMALL_SWIN), (['vit_small_patch16_rope_mixed_224'], SMALL),
], ids=['mixed', 'two', 'swin', 'timm'])
def test_all_kinds(models, args, plot, tmp_path):
    path = tmp_path / 'page.png'
    status, out, _ = plot('all', *models, '--output', path, *args)
    assert status == 0 and out == f'{path}, with the values in page.json and page.csv\n'
    with Image.open(path) as image:
        pixels = torch.frombuffer(bytearray(image.convert('L').resize((200, 400)).tobytes()), dtype=torch.uint8)
    assert (pixels < 128).float().mean() > 0.01, 'something is drawn'
    for values in values_of(path):
        assert list(values) == list(KINDS) and not any('missing' in each for each in values.values())
    rows = list(csv.DictReader(path.with_suffix('.csv').open()))
    assert {row['model'] for row in rows} == set(models)
    assert {row['kind'] for row in rows} >= {'frequencies', 'distance', 'entropy', 'fourier', 'equivariance'}
    assert all(math.isfinite(float(row['value'])) for row in rows)
    assert sorted(each.name for each in tmp_path.iterdir()) == ['page.csv', 'page.json', 'page.png']


def test_values_are_those_of_the_model(plot, tmp_path):
    torch.manual_seed(0)
    model = tiny.make('vit_tiny_rope_mixed')
    torch.save(model.state_dict(), tmp_path / 'weights.pth')
    for i in range(3):
        Image.new('RGB', (40, 40), (80 * i, 20, 200)).save(tmp_path / f'{i}.png')
    path = tmp_path / 'some.svg'
    kwargs = [f'{key}={value}' for key, value in tiny.TINY.items() if key != 'num_classes']
    status, _, err = plot(
        'frequencies,distance', f'vit_tiny_rope_mixed={tmp_path / "weights.pth"}', '--images', tmp_path, '--limit', 2,
        '--output', path, '--model-kwargs', *kwargs)
    assert status == 0, err
    assert path.read_text().lstrip().startswith('<?xml')
    values, = values_of(path)
    waves = torch.tensor(values['frequencies']['blocks'][1]['waves'])
    torch.testing.assert_close(waves, model.rope.freqs.detach()[:, 1].flatten(1).T, rtol=1e-5, atol=1e-6)
    transform = timm.data.create_transform(**{**timm.data.resolve_model_data_config(model), 'input_size': (3, 32, 32)})
    images = torch.stack([transform(Image.open(tmp_path / f'{i}.png')) for i in range(2)])
    expected = analysis.mean_distance(analysis.attention_maps(model, images)[2])
    torch.testing.assert_close(
        torch.tensor(values['distance']['blocks'][2]['heads']).double(), expected, rtol=1e-5, atol=0)


def test_the_first_window_of_each_image_is_shown():
    model = tiny_swin.make('mixed')
    images = torch.randn(3, 3, 32, 32)
    values = KINDS['attention'](Look(model, images, images.permute(0, 2, 3, 1)))
    assert values['window'] is False, 'the last stage has one window of 4 x 4 patches'
    wide = torch.randn(3, 3, 64, 64)
    values = KINDS['attention'](Look(model, wide, wide.permute(0, 2, 3, 1)))
    assert values['window'] is True
    for image, shown in zip(wide, values['images']):
        last = analysis.attention_maps(model, image[None], layers=[-1])[0]
        torch.testing.assert_close(
            torch.tensor(shown['middle']), analysis.query_map(last, 2, 2)[0], rtol=1e-4, atol=1e-6)


def test_what_a_model_lacks_is_said(plot, tmp_path):
    path = tmp_path / 'page.png'
    status, _, _ = plot('all', 'vit_tiny_patch16_224', '--output', path, *SMALL)
    values, = values_of(path)
    assert status == 0 and 'distance' in values and 'missing' not in values['distance']
    assert values['frequencies']['missing'].startswith('VisionTransformer has no rotary encoding')
    status, _, err = plot('patterns', 'vit_tiny_patch16_224', '--output', tmp_path / 'other.png', *SMALL)
    assert status == 2 and 'VisionTransformer has no rotary encoding' in err
    status, _, err = plot('entropy', 'test_resnet', '--output', tmp_path / 'other.png', '--untrained')
    assert status == 2 and 'ResNet has no attention' in err and not (tmp_path / 'other.png').exists()


@pytest.mark.parametrize('args,words', [
    (['all', 'vit_tiny_rope_mixed', '--output', 'page.jpg'], r"must be a file \*.png or \*.svg"),
    (['all', 'vit_tiny_rope_mixed', '--output', 'nowhere/page.png'], 'in a folder that can be written to'),
    (['all', 'vit_tiny_rope_spherical', '--output', 'page.png'], 'no weights of .* are published'),
    (['all', 'vit_tiny_rope_mixd', '--untrained', '--output', 'page.png'], "the nearest name is 'vit_tiny_rope_mixed'"),
    (['all', 'local-dir:x', '--untrained', '--output', 'page.png'], '--untrained takes names of models alone'),
    (['all', 'vit_tiny_rope_mixed', '--untrained', '--use-ema', '--output', 'page.png'], 'contradict each other'),
    (['all', 'vit_tiny_rope_mixed', '--untrained', '--images', '.', '--output', 'page.png'], 'that holds images'),
])
def test_refused(args, words, plot, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    status, out, err = plot(*args)
    assert status == 2 and out == ''
    assert re.search(words, err), err
    assert not list(tmp_path.iterdir())


def test_kinds(capsys):
    with pytest.raises(SystemExit):
        main(['plot', 'frequencies,waves', 'vit_tiny_rope_mixed', '--output', 'x.png'])
    assert 'must be of frequencies, patterns' in capsys.readouterr().err


def test_an_unreadable_image(plot, tmp_path):
    (tmp_path / 'broken.png').write_bytes(b'')
    status, _, err = plot(
        'entropy', 'vit_tiny_rope_mixed', '--images', tmp_path, '--output', tmp_path / 'x.png', *SMALL)
    assert status == 2 and 'broken.png cannot be read as an image' in err and not (tmp_path / 'x.png').exists()


def test_an_interrupted_run_leaves_what_was_there(plot, tmp_path, monkeypatch):
    def interrupt(look):
        raise KeyboardInterrupt

    for name in ('x.png', 'x.json', 'x.csv'):
        (tmp_path / name).write_text('old')
    monkeypatch.setitem(KINDS, 'entropy', interrupt)
    assert plot('all', 'vit_tiny_rope_mixed', '--output', tmp_path / 'x.png', *SMALL)[0] == 130
    monkeypatch.setattr(command.importlib.util, 'find_spec', lambda name: None)
    status, _, err = plot('all', 'vit_tiny_rope_mixed', '--output', tmp_path / 'x.png', *SMALL)
    assert status == 2 and "pip install 'timm_rope[plot]'" in err
    assert {path.read_text() for path in tmp_path.iterdir()} == {'old'}


def test_our_picture():
    image = scene(64)
    assert image.shape == (64, 64, 3) and 0 <= image.min() and image.max() <= 1
    colors = {tuple(pixel) for pixel in (image * 255).round().int().flatten(0, 1).tolist()}
    assert len(colors) > 40, 'a sky that shades, and things in their colours'
