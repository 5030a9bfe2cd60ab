"""`python -m timm_rope demo` and where its images come from. No test uses the network."""
import argparse
import gzip
import json
import struct
import sys
from dataclasses import replace

import numpy as np
import pytest
import timm
import torch
from torch import nn

from timm_rope import list_ropes
from timm_rope.cli.demo import command as demo
from timm_rope.cli.demo import images as small_data
from timm_rope.cli.demo import picture as drawing

STEMS = ('train-images-idx3-ubyte', 'train-labels-idx1-ubyte', 't10k-images-idx3-ubyte', 't10k-labels-idx1-ubyte')


@pytest.fixture(autouse=True)
def no_images_on_this_machine(monkeypatch, tmp_path):
    monkeypatch.setattr(small_data, 'DEBIAN_FOLDER', tmp_path / 'no' / 'package')
    monkeypatch.setattr(small_data, 'DOWNLOAD', 'raise SystemExit("no network in tests")')
    monkeypatch.setenv('XDG_CACHE_HOME', str(tmp_path / 'cache'))


def write_idx(path, values):
    """The format as its authors describe it; compressed if `path` says so."""
    content = struct.pack(f'>BBBB{values.ndim}I', 0, 0, 8, values.ndim, *values.shape) + values.tobytes()
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(gzip.compress(content) if path.suffix == '.gz' else content)


def write_fashion_mnist(folder, suffix, train=40, test=20, seed=0):
    """A small Fashion-MNIST of noise; returns its four arrays."""
    random = np.random.default_rng(seed)
    arrays = []
    for count in (train, test):
        arrays += [random.integers(0, 256, (count, 28, 28), np.uint8), random.integers(0, 10, count, np.uint8)]
    for stem, values in zip(STEMS, arrays):
        write_idx(folder / f'{stem}{suffix}', values)
    return arrays


def assert_holds(images, arrays):
    loaded = (images.train_images[:, 0], images.train_labels, images.test_images[:, 0], images.test_labels)
    for found, written in zip(loaded, arrays):
        assert np.array_equal(found.numpy(), written)
    assert images.train_labels.dtype == torch.int64


def parse(*arguments):
    parser = argparse.ArgumentParser(prog='demo')
    demo.add_arguments(parser)
    return parser.parse_args(arguments)


# -- the file format

@pytest.mark.parametrize('name', ['values', 'values.gz'])
@pytest.mark.parametrize('shape', [(300,), (3, 5, 7), (2, 0, 4)], ids=str)
def test_idx_files_are_read(tmp_path, name, shape):
    values = (np.arange(np.prod(shape)) % 251).astype(np.uint8).reshape(shape)
    write_idx(tmp_path / name, values)
    found = small_data.read_idx(tmp_path / name)
    assert found.dtype == torch.uint8 and np.array_equal(found.numpy(), values)


@pytest.mark.parametrize('suffix', ['', '.gz'])
@pytest.mark.parametrize('keep', [0, 3, 10, 60, -1])
def test_a_truncated_file_is_named(tmp_path, suffix, keep):
    path = tmp_path / f'values{suffix}'
    write_idx(path, np.random.default_rng(0).integers(0, 256, (20, 28, 28), np.uint8))
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(ValueError, match=str(path)):
        small_data.read_idx(path)


@pytest.mark.parametrize('content', [
    b'\0\0\x0d\x01\0\0\0\x01\0\0\0\0', b'<html>not found</html>', b'\0\0\x08\x01\0\0\0\x01ab',
], ids=['floats', 'page', 'too long'])
def test_other_files_are_refused(tmp_path, content):
    (tmp_path / 'values').write_bytes(content)
    with pytest.raises(ValueError, match=str(tmp_path / 'values')):
        small_data.read_idx(tmp_path / 'values')
    (tmp_path / 'values.gz').write_bytes(content)
    with pytest.raises(ValueError, match='damaged'):
        small_data.read_idx(tmp_path / 'values.gz')


# -- where Fashion-MNIST is found

@pytest.mark.parametrize('inside', ['.', 'FashionMNIST/raw'])
@pytest.mark.parametrize('suffix', ['', '.gz'])
def test_a_given_folder_is_read_in_both_layouts(tmp_path, inside, suffix):
    arrays = write_fashion_mnist(tmp_path / 'given' / inside, suffix)
    images = small_data.load_images('auto', tmp_path / 'given')
    assert images.name == 'Fashion-MNIST'
    assert_holds(images, arrays)


def test_the_package_of_debian_is_found(tmp_path, monkeypatch):
    monkeypatch.setattr(small_data, 'DEBIAN_FOLDER', tmp_path / 'debian')
    arrays = write_fashion_mnist(tmp_path / 'debian', '.gz')
    before = sorted((tmp_path / 'debian').iterdir())
    images = small_data.load_images()
    assert images.origin == str(tmp_path / 'debian')
    assert_holds(images, arrays)
    assert sorted((tmp_path / 'debian').iterdir()) == before


def test_compressed_files_come_first(tmp_path):
    write_fashion_mnist(tmp_path, '', seed=1)
    arrays = write_fashion_mnist(tmp_path, '.gz', seed=2)
    assert_holds(small_data.load_images('fashion_mnist', tmp_path), arrays)


@pytest.mark.parametrize('missing', STEMS)
def test_three_of_four_files_are_no_data(tmp_path, missing):
    write_fashion_mnist(tmp_path, '')
    (tmp_path / missing).unlink()
    assert small_data.find_fashion_mnist(tmp_path) is None
    with pytest.raises(ValueError, match=f'does not hold Fashion-MNIST.*{missing}'):
        small_data.load_images('auto', tmp_path)


@pytest.mark.parametrize('stem, values, problem', [
    ('train-images-idx3-ubyte', np.zeros((40, 32, 32), np.uint8), 'does not hold images of 28x28'),
    ('t10k-images-idx3-ubyte', np.zeros((0, 28, 28), np.uint8), 'does not hold images of 28x28'),
    ('train-labels-idx1-ubyte', np.zeros(39, np.uint8), 'one label from 0 to 9 for each of the 40'),
    ('t10k-labels-idx1-ubyte', np.full(20, 10, np.uint8), 'one label from 0 to 9 for each of the 20'),
])
def test_files_that_do_not_fit_are_named(tmp_path, stem, values, problem):
    write_fashion_mnist(tmp_path, '')
    write_idx(tmp_path / stem, values)
    with pytest.raises(ValueError, match=f'{stem} .*{problem}'):
        small_data.load_images('fashion_mnist', tmp_path)


# -- the download

HALF = '''
import pathlib, sys, time
folder = pathlib.Path(sys.argv[1]) / 'FashionMNIST' / 'raw'
folder.mkdir(parents=True)
(folder / 'train-images-idx3-ubyte.gz').write_bytes(b'half')
'''


@pytest.mark.parametrize('end, seconds, reason', [
    ('sys.exit("broken pipe\\nURLError: no route")', 60, 'URLError: no route'),
    ('sys.exit(7)', 60, 'exit status 7'),
    ('time.sleep(600)', 2, 'not finished after 2 s'),
], ids=['error', 'silent', 'slow'])
def test_a_failed_download_leaves_nothing(tmp_path, monkeypatch, end, seconds, reason):
    monkeypatch.setattr(small_data, 'DOWNLOAD', HALF + end)
    with pytest.raises(small_data.NoImages, match=reason):
        small_data.download_fashion_mnist(tmp_path / 'cache', seconds)
    assert list((tmp_path / 'cache').iterdir()) == []


def test_a_folder_that_cannot_be_made_is_a_failed_download(tmp_path):
    (tmp_path / 'file').write_text('')
    with pytest.raises(small_data.NoImages, match='could not be downloaded'):
        small_data.download_fashion_mnist(tmp_path / 'file' / 'cache', 60)


def test_a_download_is_kept(tmp_path, monkeypatch, capsys):
    arrays = write_fashion_mnist(tmp_path / 'server', '.gz')
    monkeypatch.setattr(small_data, 'DOWNLOAD', f'''
import os, shutil, sys
shutil.copytree({str(tmp_path / 'server')!r}, os.path.join(sys.argv[1], 'FashionMNIST', 'raw'))
''')
    assert_holds(small_data.load_images(), arrays)
    assert 'Downloading' in capsys.readouterr().err
    monkeypatch.setattr(small_data, 'DOWNLOAD', 'raise SystemExit("downloaded again")')
    images = small_data.load_images('fashion_mnist')
    assert_holds(images, arrays)
    assert images.origin == str(tmp_path / 'cache' / 'timm_rope' / 'FashionMNIST' / 'raw')
    assert capsys.readouterr().err == ''
    assert [path.name for path in (tmp_path / 'cache' / 'timm_rope').iterdir()] == ['FashionMNIST']


# -- the digits, and nothing at all

def test_digits_are_the_second_choice(capsys):
    pytest.importorskip('sklearn')
    images = small_data.load_images()
    assert 'no network in tests. Taking the digits' in capsys.readouterr().err
    assert images.name == 'digits'
    assert images.train_images.shape == (1437, 1, 8, 8) and images.test_images.shape == (360, 1, 8, 8)
    assert images.train_images.dtype == torch.uint8 and images.train_images.max() == 255
    together = torch.cat([images.train_labels, images.test_labels]).bincount()
    assert (images.test_labels.bincount() - together / 5).abs().max() < 1
    again = small_data.load_images('digits')
    assert torch.equal(images.test_images, again.test_images)


@pytest.mark.parametrize('source', ['auto', 'fashion_mnist', 'digits'])
def test_without_any_images_it_says_what_to_install(monkeypatch, capsys, source):
    monkeypatch.setitem(sys.modules, 'sklearn', None)
    assert demo.run(parse('--data', source)) == 1
    out, err = capsys.readouterr()
    assert out == ''
    assert err.count("pip install 'timm_rope[demo]'") == 1
    assert err.count('apt-get install dataset-fashion-mnist') == 1
    assert ('no network in tests' in err) == (source != 'digits')


@pytest.mark.parametrize('arguments, message', [
    (('--data-dir', 'nowhere'), 'There is no folder nowhere.'),
    (('--data-dir', '.'), 'does not hold Fashion-MNIST'),
    (('--data', 'digits', '--data-dir', '.'), 'only be given for Fashion-MNIST'),
])
def test_a_wrong_folder_is_an_error(monkeypatch, tmp_path, capsys, arguments, message):
    monkeypatch.chdir(tmp_path)
    assert demo.run(parse(*arguments)) == 1
    assert message in capsys.readouterr().err


# -- arguments

@pytest.mark.parametrize('arguments, message', [
    (('--epochs', '0'), 'at least 1'),
    (('--epochs', '-3'), 'at least 1'),
    (('--epochs', '2.5'), 'at least 1'),
    (('--seed', '-1'), 'at least 0'),
    (('--seed', str(2 ** 64)), 'at least 0'),
    (('--data', 'imagenet'), 'fashion_mnist'),
    (('--json', 'no/such/folder/file.json'), 'folder that exists'),
    (('--json', '.'), 'folder that exists'),
])
def test_wrong_arguments_are_refused_at_once(monkeypatch, tmp_path, capsys, arguments, message):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as caught:
        parse(*arguments)
    assert caught.value.code == 2
    assert f'argument {arguments[0]}: ' in (err := capsys.readouterr().err) and message in err


def test_an_unknown_encoding_is_answered_with_the_known(capsys):
    with pytest.raises(SystemExit):
        parse('--encoding', 'sphere')
    err = capsys.readouterr().err
    assert all(name in err for name in list_ropes())


# -- training and testing

@pytest.mark.parametrize('name', list_ropes())
@pytest.mark.parametrize('task', demo.TASKS.values(), ids=demo.TASKS)
def test_every_encoding_works_in_the_small_model(name, task):
    model = timm.create_model(
        f'vit_tiny_rope_{name}', img_size=task.sizes[0], patch_size=task.patch_size, **demo.MODEL).eval()
    for size in task.sizes:
        assert model(torch.rand(2, 1, size, size)).shape == (2, 10)


class Brightness(nn.Module):
    """Takes the brightness of an image, in tenths, for its class."""

    def __init__(self, mean, std):
        super().__init__()
        self.mean, self.std, self.shapes = mean, std, []

    def forward(self, x):
        assert not self.training
        self.shapes.append(tuple(x.shape))
        classes = ((x * self.std + self.mean).mean((1, 2, 3)) * 10).round().long()
        return torch.eye(10)[classes]


@pytest.mark.parametrize('size', [8, 12, 16])
def test_right_answers_are_counted(size):
    labels = torch.arange(10).repeat(120)
    images = (labels / 10).view(-1, 1, 1, 1).expand(-1, 1, 8, 8).contiguous()
    mean, std = images.mean(), images.std()
    wrong = torch.tensor([3, 77, 600, 601, 602, 1199])
    labels[wrong] = (labels[wrong] + 1) % 10
    model = Brightness(mean, std)
    assert demo.count_right(model, images, labels, size, mean, std) == 1194
    assert {shape[1:] for shape in model.shapes} == {(1, size, size)}
    assert sum(shape[0] for shape in model.shapes) == 1200


def test_enlarging_keeps_the_range_of_pixels():
    images = torch.zeros(4, 1, 8, 8)
    images[..., ::3] = 1
    seen = []
    model = nn.Sequential(nn.Flatten(), nn.LazyLinear(10))
    model.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    demo.count_right(model, images, torch.zeros(4), 16, torch.tensor(0.), torch.tensor(1.))
    assert seen[0].min() == 0 and seen[0].max() == 1
    assert seen[0].unique().numel() > 2, 'bicubic, not nearest'


class Recorder(nn.Module):
    def __init__(self):
        super().__init__()
        self.head = nn.Linear(64, 10)
        self.batches = []

    def forward(self, x):
        assert self.training
        self.batches.append(x.clone())
        return self.head(x.flatten(1))


def test_all_models_see_the_same_batches_and_every_image():
    images = torch.arange(300.).view(300, 1, 1, 1).expand(300, 1, 8, 8)
    labels = torch.zeros(300, dtype=torch.int64)
    models = [Recorder() for _ in range(3)]
    for model, seed in zip(models, (0, 0, 1)):
        demo.train(model, images, labels, 2, seed, 'test')
    first, second, other = ([batch.mean((1, 2, 3)).round() for batch in model.batches] for model in models)
    assert [len(batch) for batch in first] == [64, 64, 64, 64, 44] * 2
    assert all(torch.equal(a, b) for a, b in zip(models[0].batches, models[1].batches))
    assert not torch.equal(first[0], other[0])
    for epoch in (first[:5], first[5:]):
        assert torch.equal(torch.cat(epoch).sort().values, torch.arange(300.))
    assert not torch.equal(torch.cat(first[:5]), torch.cat(first[5:]))


def test_crops_are_squares_of_their_image_in_its_size():
    ramp = torch.arange(28.)  # of slope 1, which a crop of half a side has made 1/2
    x = (ramp[:, None] + 100 * ramp).view(1, 1, 28, 28).repeat(400, 1, 1, 1)
    y = demo.random_crops(x, torch.Generator().manual_seed(0))
    assert y.shape == x.shape
    whole = (y - x).abs().amax((1, 2, 3)) < .01
    assert .4 < whole.float().mean() < .6
    down = (y[:, 0, 20, 14] - y[:, 0, 7, 14]) / 13
    right = (y[:, 0, 14, 20] - y[:, 0, 14, 7]) / 1300
    torch.testing.assert_close(down, right, atol=.03, rtol=0)  # bicubic is not exact on ramps
    sides = down[~whole]
    assert .47 < sides.min() < .53 and .96 < sides.max() < 1.03 and sides.mean() == pytest.approx(.75, abs=.03)
    assert y.min() > -20 and y.max() < 27 * 101 + 20, 'nothing from outside of the image'
    middles = y[~whole][:, 0, 13:15, 13:15].mean((1, 2))
    assert middles.std() > 100, 'crops are everywhere'


def results(tmp_path, *arguments):
    path = tmp_path / 'result.json'
    assert demo.run(parse('--json', str(path), '--plot', str(tmp_path / 'picture.png'), *arguments)) == 0
    return json.loads(path.read_text())


def without_times(result):
    return {**result, 'models': [
        {k: v for k, v in model.items() if not k.endswith('_seconds')} for model in result['models']]}


def test_the_recipe_trains():
    pytest.importorskip('sklearn')
    images = small_data.load_images('digits')
    train, test = images.train_images / 255, images.test_images / 255
    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.Linear(64, 10))
    loss = demo.train(model, (train - .3) / .4, images.train_labels, 8, 0, 'test')
    right = demo.count_right(model, test, images.test_labels, 8, torch.tensor(.3), torch.tensor(.4))
    assert right > 360 * .6, 'a tenth is chance'
    assert loss < 2, 'half of the images are crops'


def test_the_table_and_the_file_say_the_same(tmp_path, capsys):
    pytest.importorskip('sklearn')
    result = results(tmp_path, '--data', 'digits', '--epochs', '1', '--encoding', 'mixed')
    assert result['data'] == {
        'name': 'digits', 'origin': 'scikit-learn', 'train_images': 1437, 'train_images_available': 1437,
        'test_images': 360, 'test_images_available': 360, 'most_frequent_class': 37}
    assert result['recipe']['epochs'] == 1 and result['recipe']['seed'] == 0 and result['recipe']['img_size'] == 8
    assert [model['name'] for model in result['models']] == ['vit_tiny_rope_mixed', 'vit_tiny_ape']
    for model in result['models']:
        assert [test['size'] for test in model['tests']] == [8, 12, 16]
        for test in model['tests']:
            assert test['images'] == 360 and isinstance(test['right'], int) and 0 <= test['right'] <= 360
            assert test['accuracy'] == test['right'] / 360
        assert 2 < model['train_loss'] < 2.6, 'at the beginning it is log(10)'
        assert model['train_seconds'] > 0 and model['test_seconds'] > 0
        created = timm.create_model(model['name'], img_size=8, patch_size=2, **demo.MODEL)
        assert model['parameters'] == sum(p.numel() for p in created.parameters())

    out = capsys.readouterr().out
    assert 'digits (scikit-learn): 1,437 images to train on, 360 to test with.' in out
    rows = {line.split()[0]: line.split()[1:] for line in out.splitlines() if line.startswith('vit_')}
    for model in result['models']:
        assert rows[model['name']] == [
            *(f'{test["right"] / 3.6:.1f}%' for test in model['tests']), f'{model["parameters"]:,}',
            f'{model["train_seconds"] + model["test_seconds"]:.0f}']
    assert 'One seed, a demonstration, not a benchmark.\n' in out and 'python -m timm_rope sweep' in out
    rule = result['models'][0]['by_rule']
    assert rule['rule'] == 'interpolate' and [test['size'] for test in rule['tests']] == [12, 16]
    shown, = [line.split() for line in out.splitlines() if line.startswith('  rope_scaling=')]
    assert shown == ['rope_scaling=interpolate', *(f'{test["right"] / 3.6:.1f}%' for test in rule['tests'])]
    assert result['models'][1]['by_rule'] is None
    picture = tmp_path / 'picture.png'
    assert out.endswith(f'The same as a picture: {picture}\n') and picture.read_bytes()[:4] == b'\x89PNG'


def test_without_matplotlib_there_is_no_picture(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, 'matplotlib.figure', None)
    said = drawing.draw({'models': []}, tmp_path / 'picture.png')
    assert 'matplotlib is missing' in said and not list(tmp_path.iterdir())


def test_the_rule_is_that_of_the_model():
    torch.manual_seed(0)
    images = torch.rand(4, 1, 16, 16)
    model = timm.create_model('vit_tiny_rope_spherical', img_size=8, patch_size=2, **demo.MODEL).eval()
    model.load_state_dict(model.state_dict())
    plain = model(images)
    model.set_rope_scaling(demo.RULE)
    assert not torch.equal(model(images), plain)


def test_the_seed_decides_everything_and_stays_inside(tmp_path):
    write_fashion_mnist(tmp_path, '.gz')
    arguments = ('--data-dir', str(tmp_path), '--epochs', '1')
    before = torch.get_rng_state()
    first = without_times(results(tmp_path, *arguments, '--seed', '3'))
    assert torch.equal(torch.get_rng_state(), before), 'the random numbers of the caller are its own'
    torch.rand(5)
    assert without_times(results(tmp_path, *arguments, '--seed', '3')) == first
    other = results(tmp_path, *arguments, '--seed', '4')
    assert other['models'][0]['train_loss'] != first['models'][0]['train_loss']


def test_the_number_of_cores_decides_nothing_and_is_restored(tmp_path):
    write_fashion_mnist(tmp_path, '', train=200)
    arguments = ('--data-dir', str(tmp_path), '--epochs', '1')
    found, before = [], torch.get_num_threads()
    try:
        for threads in (1, 2):
            torch.set_num_threads(threads)
            found.append(without_times(results(tmp_path, *arguments)))
            assert torch.get_num_threads() == threads
    finally:
        torch.set_num_threads(before)
    assert found[0] == found[1]


def test_only_part_of_a_large_set_is_used(tmp_path, capsys):
    write_fashion_mnist(tmp_path, '.gz')
    images = small_data.load_images('fashion_mnist', tmp_path)
    task = replace(demo.TASKS['Fashion-MNIST'], sizes=(28, 42), train_limit=30, test_limit=10)
    result = demo.compare(images, task, 'axial', 1, 0)
    data = result['data']
    assert (data['train_images'], data['train_images_available']) == (30, 40)
    assert (data['test_images'], data['test_images_available']) == (10, 20)
    assert [(test['size'], test['images']) for test in result['models'][0]['tests']] == [(28, 10), (42, 10)]
    assert '30 of 40 images to train on, 10 of 20 to test with' in capsys.readouterr().out
    altered = replace(images, train_images=images.train_images.clone(), test_images=images.test_images.clone())
    altered.train_images[30:] = 0
    altered.test_images[10:] = 0
    assert without_times(demo.compare(altered, task, 'axial', 1, 0)) == without_times(result)
