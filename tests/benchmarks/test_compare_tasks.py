"""The tasks of the comparison of encodings are what they say, and a seed gives all methods the same batches."""
import itertools
import math
import os
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from comparing import CPU, TINY, Recorder, command, content_of, make_folder, make_photos, runs_of, task_named
from comparison import training
from comparison.direction import Direction, draw_scenes, render
from comparison.images import Loaded, turn
from comparison.photos import FIELDS, SIDES, Photos

# -- the direction task

def test_labels_are_the_directions_of_the_scenes():
    scenes, labels = draw_scenes(2000, 1)
    for (y0, x0, y1, x1, *_), label in zip(scenes.double().tolist(), labels.tolist()):
        turns = math.atan2(y1 - y0, x1 - x0) / (2 * math.pi) * 16  # y points down: 4 is down
        off = (turns - label + 8) % 16 - 8
        assert abs(off) <= .25 + 1e-4


def test_scenes_are_inside_apart_and_of_all_directions():
    scenes, labels = draw_scenes(8000, 2)
    places, radius, contrasts = scenes[:, :4], scenes[:, 4], scenes[:, 5:]
    assert (places - radius[:, None]).min() > -1e-6 and (places + radius[:, None]).max() < 1 + 1e-6
    assert ((scenes[:, :2] - scenes[:, 2:4]).norm(dim=1) > 2 * radius).all()
    assert contrasts.min() >= .6 and contrasts.max() <= 1 and radius.max() > 2 * radius.min()
    counts = labels.bincount(minlength=16)
    assert len(counts) == 16 and ((counts - 500).abs() < 5 * math.sqrt(500)).all()


def test_both_discs_come_everywhere():
    places = draw_scenes(8000, 3)[0][:, :4].reshape(-1, 2, 2)
    for disc in (places[:, 0], places[:, 1]):
        cells = (disc * 5).long().clamp(0, 4)
        assert (5 * cells[:, 0] + cells[:, 1]).bincount(minlength=25).min() > 50


def moments(images):
    """Mass and centroid (y, x) of images (N, size, size), parts of the side."""
    place = (torch.arange(images.shape[-1]) + .5) / images.shape[-1]
    mass = images.sum((1, 2))
    return mass, torch.stack([(images.sum(2) * place).sum(1), (images.sum(1) * place).sum(1)], 1) / mass[:, None]


@pytest.mark.parametrize('size', [16, 20, 28, 64])
def test_images_show_the_scene(size):
    scenes = draw_scenes(100, 4)[0]
    images = render(scenes, size)
    assert images.shape == (100, 1, size, size)
    for part, columns, contrast in ((images, slice(0, 2), 5), (-images, slice(2, 4), 6)):
        mass, centroid = moments(part[:, 0].clamp(min=0))
        assert ((centroid - scenes[:, columns]) * size).abs().max() < .2  # of a pixel
        # a disc with a linear edge one pixel wide: 2 pi times the integral of d clamp(r + 1/2 - d, 0, 1)
        expected = 3 * scenes[:, contrast] * math.pi * ((scenes[:, 4] * size) ** 2 + 1 / 12)
        assert ((mass - expected) / expected).abs().max() < .12


@pytest.mark.parametrize('size', [20, 40])
def test_the_same_scene_at_twice_the_size(size):
    scenes = draw_scenes(50, 5)[0]
    small, large = render(scenes, size), render(scenes, 2 * size)
    error = (F.avg_pool2d(large, 2) - small).flatten(1).norm(dim=1) / small.flatten(1).norm(dim=1)
    assert error.max() < .15


def test_training_and_test_scenes_differ():
    seen = set()
    for seed, step in itertools.product(range(3), range(10)):
        batch = next(Direction(CPU).train_batches(seed, step, 10, 32, 8))[0]
        seen |= {image.numpy().tobytes() for image in batch}
    test = {image.numpy().tobytes() for images, _ in Direction(CPU).test_batches(8, 500) for image in images}
    assert len(seen) == 3 * 10 * 32 and len(test) == 500 and not seen & test
    assert sum(len(labels) for _, labels in Direction(CPU).test_batches(8, 501)) == 501


def test_groups_are_all_directions():
    groups = Direction.groups
    assert sorted(itertools.chain(*groups.values())) == list(range(16))
    assert all(math.isclose(math.sin(4 * math.pi * k / 16), 0, abs_tol=1e-9) for k in groups['along an axis'])
    assert len(groups['along an axis']) == 4


# -- photographs

@pytest.fixture(scope='module')
def photos(tmp_path_factory):
    pytest.importorskip('PIL')
    return Photos(make_photos(tmp_path_factory.mktemp('photos') / 'data'), CPU)


def test_the_two_squares_lie_beside_each_other(photos):
    """The edges that meet are alike, of the side that the label says more than of all others."""
    images, labels = next(photos.train_batches(0, 0, 1, 400, 24))
    assert images.shape == (400, 1, 24, 24) and sorted(labels.unique().tolist()) == list(range(len(SIDES)))
    first, second = images[:, 0, :12, :12], images[:, 0, 12:, 12:]
    assert not images[:, 0, 12:, :12].any() and not images[:, 0, :12, 12:].any()
    meeting = torch.stack([
        first[:, :, -1] - second[:, :, 0], first[:, -1] - second[:, 0], first[:, :, 0] - second[:, :, -1],
        first[:, 0] - second[:, -1]], 1).square().mean(2)
    assert (meeting.argmin(1) == labels).float().mean() > .9


def test_training_and_tests_see_other_quarters(photos, monkeypatch):
    seen = {}
    for number, name in enumerate(photos.pictures):
        height, width = photos.pictures[name].shape
        place = torch.arange(height)[:, None] // (height // 2) * 2 + torch.arange(width) // (width // 2)
        seen[name] = (10 * number + place).float()  # the quarter of every pixel instead of what it shows
    monkeypatch.setattr(photos, '_pictures_for', lambda size, field: list(seen.values()))
    for test in (False, True):
        random = torch.Generator().manual_seed(3)
        quarters = photos._crops(500, 18, random, test, 30. if test else 0.).unique() % 10
        assert quarters.round().unique().tolist() == ([1, 2] if test else [0, 3])


def test_larger_photographs_have_more_pixels_of_the_same(photos):
    small, large = (next(iter(photos.test_batches(size, 100))) for size in (8, 16))
    assert torch.equal(small[1], large[1])
    alike = torch.corrcoef(torch.stack([F.avg_pool2d(large[0], 2).flatten(), small[0].flatten()]))[0, 1]
    assert alike > .9
    for field in FIELDS:
        assert all(len(p) == round(24 / field) for p in photos._pictures_for(24, field))


def test_turned_photographs(photos):
    upright, turned = (next(iter(photos.test_batches(16, 50, degrees)))[0] for degrees in (0., 90.))
    whole, quarter = upright[:, 0, :8, :8], turned[:, 0, :8, :8]
    # the crops are normalised with their surroundings, which turn as well
    assert (torch.rot90(whole, 1, (1, 2)) - quarter).abs().max() < 1e-3


@pytest.mark.parametrize('degrees', [90, 180, 270])
def test_turns_are_counter_clockwise(degrees):
    images = torch.rand(2, 3, 8, 8)
    assert (turn(images, degrees) - torch.rot90(images, degrees // 90, (2, 3))).abs().max() < 1e-5
    assert turn(images, 0) is images


def test_photographs_as_a_user_compares_with_them(tiny_recipes, tmp_path):
    pytest.importorskip('PIL')
    data = make_photos(tmp_path / 'data')
    assert command(tmp_path / 'out', '--data-dir', str(data), tasks=('photos',), methods=('axial',)) == 0
    tests = content_of(tmp_path / 'out')['rows'][0]['tests']
    assert [t['turned'] for t in tests] == [0.] * (len(tests) - 1) + [30.] and len(tests) == 1 + 8 + 1 + 1


@pytest.mark.parametrize('args, message', [
    (('--sizes', '8', '36', '--patch-size', '2'), 'images of 36 px need pictures of 324 px height, and a.png in'),
    (('--sizes', '7', '14', '--patch-size', '1'), 'images of two squares need an even size, got 7: --sizes'),
])
def test_sizes_that_photographs_do_not_hold(args, message, tiny_recipes, tmp_path, capsys):
    pytest.importorskip('PIL')
    data = make_photos(tmp_path / 'data')
    assert command(tmp_path / 'out', '--data-dir', str(data), *args, tasks=('photos',)) == 2
    assert message in capsys.readouterr().err and os.listdir(tmp_path / 'out') == []


def test_folders_without_photographs(tmp_path):
    image = pytest.importorskip('PIL.Image')
    with pytest.raises(ValueError, match='holds no pictures'):
        Photos(tmp_path, CPU)
    image.new('L', (20, 30)).save(tmp_path / 'upright.png')
    with pytest.raises(ValueError, match=r'upright.png is upright \(20 x 30\)'):
        Photos(tmp_path, CPU)
    (tmp_path / 'upright.png').write_bytes(b'no picture')
    with pytest.raises(ValueError, match='upright.png cannot be read as a picture'):
        Photos(tmp_path, CPU)


# -- batches

def same(a, b):
    return len(a) == len(b) and all(torch.equal(x, y) for one, two in zip(a, b) for x, y in zip(one, two))


@pytest.fixture(params=['direction', 'digits', 'folder'])
def any_task(request, tmp_path):
    if request.param != 'folder':
        return request.param, task_named(request.param)
    make_folder(tmp_path / 'data', {'train/dark': 8, 'train/light': 9, 'val/dark': 6, 'val/light': 6})
    return request.param, Loaded('', tmp_path / 'data', CPU, 0)


def test_a_seed_gives_all_methods_the_same_batches(any_task):
    name, task = any_task
    recipe = replace(TINY[name], sizes=TINY[name].sizes[:2])
    batches = []
    for method, seed in (('mixed', 0), ('ape', 0), ('none', 1)):
        recorder = Recorder(task)
        training.run(recorder, method, seed, recipe)
        assert len(recorder.batches) == recipe.steps
        batches.append(recorder.batches)
    assert same(batches[0], batches[1]) and not same(batches[0], batches[2])
    assert not torch.equal(batches[0][0][0], batches[0][1][0])


def test_batches_from_the_middle(any_task):
    name, task = any_task
    whole = list(task.train_batches(0, 0, 9, 4, 16))
    rest = list(task.train_batches(0, 5, 9, 4, 16))
    assert len(whole) == 9 and len(rest) == 4
    if name == 'folder':  # images are the same, their augmentation is not
        assert all(torch.equal(x[1], y[1]) for x, y in zip(whole[5:], rest))
    else:
        assert same(whole[5:], rest)


def test_an_epoch_has_every_image_once(digits, monkeypatch):
    count = digits.train_count
    digits.train_images = torch.arange(float(count))[:, None, None, None].expand(-1, 1, 8, 8)
    digits.mean, digits.std = 0., 1.
    monkeypatch.setattr('comparison.images.random_crops', lambda x, random: x)
    steps = count // 100
    epochs = torch.cat([x[:, 0, 0, 0] for x, _ in digits.train_batches(0, 0, 2 * steps, 100, 8)]).chunk(2)
    assert all(len(e.unique()) == 100 * steps for e in epochs) and not torch.equal(*epochs)


def test_enlarged_digits_stay_digits(digits):
    """Labels of the test images, and a normalisation that does not depend on the size."""
    small, large = (torch.cat([x for x, _ in digits.test_batches(size, 300)]) for size in (8, 24))
    assert torch.equal(torch.cat([y for _, y in digits.test_batches(24, 300)]), digits.images.test_labels[:300])
    assert large.shape == (300, 1, 24, 24) and len(small) == 300
    assert (F.avg_pool2d(large, 3) - small).abs().mean() < .2 < small.abs().mean()
    train = torch.cat([digits.train_images])
    assert large.min() >= -train.mean() / train.std() - 1e-5 and large.max() <= (1 - train.mean()) / train.std() + 1e-5


# -- folders and CIFAR-100

@pytest.mark.parametrize('names', [('train', 'val'), ('train', 'validation')])
def test_a_folder_is_read(names, tmp_path):
    train, val = names
    data = make_folder(tmp_path, {
        f'{train}/dark': 6, f'{train}/light': 7, f'{val}/dark': 3, f'{val}/light': 4})
    task = Loaded('', data, CPU, 0)
    assert task.num_classes == 2 and task.in_chans == 3 and task.train_count == 13
    assert task.describe() == '13 images of 2 classes to train on, 7 to test with'
    (images, labels), = task.test_batches(24, 100)
    assert images.shape == (7, 3, 24, 24) and sorted(labels.tolist()) == [0, 0, 0, 1, 1, 1, 1]
    bright = images.mean((1, 2, 3))
    assert bright[labels == 0].max() < bright[labels == 1].min()
    (images, labels), = task.test_batches(16, 3)
    assert len(images) == 3 and len(labels.unique()) == 2  # files are sorted by class, a part of them is not
    batches = list(task.train_batches(0, 0, 3, 6, 16))
    assert [x.shape for x, _ in batches] == 3 * [(6, 3, 16, 16)]


def test_a_folder_beside_the_digits(tiny_recipes, tmp_path):
    pytest.importorskip('sklearn')
    data = make_folder(tmp_path / 'data', {'train/dark': 4, 'train/light': 4, 'val/dark': 2, 'val/light': 2})
    assert command(tmp_path / 'out', '--data-dir', str(data), tasks=('digits', 'folder'), methods=('axial',)) == 0
    assert [task for task, _, _ in runs_of(tmp_path / 'out')] == ['digits', 'folder']
    tests = content_of(tmp_path / 'out')['rows'][1]['tests']
    assert {t['images'] for t in tests} == {4} and len(tests) == 1 + 8 + 1


@pytest.mark.parametrize('counts, message', [
    ({}, 'does not hold train and val, with a folder for each class: Found 0 images'),
    ({'train/dark': 0, 'train/light': 0, 'val/dark': 1, 'val/light': 1}, 'Found 0 images'),
    ({'train/dark': 2, 'train/light': 2}, 'one of the two is missing'),
    ({'val/dark': 2, 'val/light': 2}, 'one of the two is missing'),
    ({'dark': 2, 'light': 2}, 'one of the two is missing'),
    ({'train/dark': 2, 'val/dark': 2}, 'at least two, got 1 and 1'),
    ({'train/dark': 2, 'train/light': 2, 'val/dark': 2, 'val/red': 2}, 'got 2 and 2, only in one of them light, red'),
    ({'train/dark': 2, 'train/light': 2, 'val/dark': 2}, 'got 2 and 1, only in one of them light'),
])
def test_folders_that_will_not_do(counts, message, tmp_path):
    with pytest.raises(ValueError, match=message) as error:
        Loaded('', make_folder(tmp_path, counts), CPU, 0)
    assert str(tmp_path) in str(error.value)


def test_fewer_images_than_a_batch(tiny_recipes, tmp_path, capsys):
    data = make_folder(tmp_path / 'data', {'train/dark': 1, 'train/light': 2, 'val/dark': 1, 'val/light': 1})
    assert command(tmp_path / 'out', '--data-dir', str(data), tasks=('folder',)) == 2
    assert 'There are 3 images to train on, fewer than a batch of 4: --batch-size' in capsys.readouterr().err
    assert os.listdir(tmp_path / 'out') == []
    with pytest.raises(ValueError, match='3 images'):
        next(Loaded('', data, CPU, 0).train_batches(0, 0, 1, 4, 16))
    assert command(tmp_path / 'out', '--data-dir', str(data), '--batch-size', '3', tasks=('folder',)) == 0


def test_cifar_that_is_not_there(tmp_path):
    pytest.importorskip('torchvision')
    with pytest.raises(ValueError, match='does not hold CIFAR-100 as torchvision stores it'):
        Loaded('torch/cifar100', tmp_path, CPU, 0)
    with pytest.raises(ValueError, match='is no folder. It must hold CIFAR-100'):
        Loaded('torch/cifar100', tmp_path / 'none', CPU, 0)
    assert os.listdir(tmp_path) == []
