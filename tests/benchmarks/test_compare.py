"""The comparison of encodings: its tasks are what they say, runs can be interrupted, nothing is lost or mixed up."""
import itertools
import json
import math
import os
import signal
import statistics
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F

BENCHMARKS = Path(__file__).parents[2] / 'benchmarks'
sys.path.append(str(BENCHMARKS))

import compare  # noqa: E402
import machine  # noqa: E402
from comparison import budget, jobs, training  # noqa: E402
from comparison.direction import Direction, draw_scenes, render  # noqa: E402
from comparison.images import Loaded, SmallImages  # noqa: E402
from comparison.recipe import Recipe  # noqa: E402
from comparison.report import plot_accuracy, plot_curves, tables  # noqa: E402

CPU = torch.device('cpu')
MODEL = dict(embed_dim=24, num_heads=1, depth=1, learning_rate=2e-3, test_images=12)
TINY = {
    'direction': Recipe(sizes=(8, 16, 12), patch_size=4, steps=10, batch_size=4, **MODEL),
    'digits': Recipe(sizes=(8, 16, 12), patch_size=4, steps=10, batch_size=4, **MODEL),
    'folder': Recipe(sizes=(16, 32, 24), patch_size=8, steps=10, batch_size=4, **MODEL),
}
COLOURS = {'dark': 40, 'light': 220}


@pytest.fixture
def tiny_recipes(monkeypatch):
    monkeypatch.setitem(compare.RECIPES, 'small', TINY)
    monkeypatch.setitem(compare.RECIPES, 'large', TINY)


@pytest.fixture
def digits():
    pytest.importorskip('sklearn')
    return SmallImages('digits', None, CPU)


def task_named(name):
    if name == 'digits':
        pytest.importorskip('sklearn')
    return jobs.open_task(name, None, 'cpu', 0)


def make_folder(root, counts):
    """Image folder with so many files in each of its folders; classes differ in brightness."""
    from PIL import Image

    for name, count in counts.items():
        (root / name).mkdir(parents=True)
        for i in range(count):
            level = COLOURS.get(Path(name).name, 100)
            Image.effect_noise((20, 20), 30).point(lambda v, level=level: (v + level) // 2).convert('RGB').save(
                root / name / f'{i}.png')
    return root


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


# -- batches

class Recorder:
    """A task that notes the batches it gives."""

    def __init__(self, task):
        self.task, self.batches = task, []

    def __getattr__(self, name):
        return getattr(self.task, name)

    def train_batches(self, *args):
        for images, labels in self.task.train_batches(*args):
            self.batches.append((images.clone(), labels.clone()))
            yield images, labels


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


# -- models

def model_that_sees_positions(method, task, recipe):
    """Its answers vary from image to image and with everything that changes attention."""
    model = training.build(method, task, recipe, 0).eval()
    with torch.no_grad():
        model.patch_embed.proj.weight.mul_(10)
        for block in model.blocks:
            block.attn.qkv.weight.mul_(20)
            block.attn.proj.weight.mul_(50)
        model.head.weight.normal_(generator=torch.Generator().manual_seed(1))
    return model


def test_the_models_of_the_methods():
    task, recipe = Direction(CPU), replace(TINY['direction'], sizes=(16, 32), depth=3)
    images = render(draw_scenes(4, 0)[0], 16)
    order = torch.randperm(16, generator=torch.Generator().manual_seed(0))
    shuffled = F.fold(F.unfold(images, 4, stride=4)[:, :, order], 16, 4, stride=4)
    for method in compare.METHODS + compare.MORE:
        model, again, other = (training.build(method, task, recipe, seed) for seed in (0, 0, 1))
        assert model.training and all(torch.equal(p, q) for p, q in zip(model.parameters(), again.parameters()))
        assert not torch.equal(model.patch_embed.proj.weight, other.patch_embed.proj.weight)
        assert (model.rope is None) == (method in ('ape', 'none')) and (model.pos_embed is None) == (method != 'ape')
        assert model.rope is None or type(model.rope).__name__.lower() == method.replace('_', '')
        model = model_that_sees_positions(method, task, recipe)
        with torch.inference_mode():
            difference = (model(images) - model(shuffled)).abs().max()
        assert difference < 1e-4 if method == 'none' else difference > .1, method


# -- one run

def without_seconds(row):
    return {k: v for k, v in row.items() if k != 'seconds'}


@pytest.mark.parametrize('name, method', [('direction', 'spherical_learned'), ('digits', 'ape')])
def test_a_run_that_is_stopped_at_every_point_is_the_same(name, method, tmp_path):
    task, recipe = task_named(name), TINY[name]
    whole = training.run(task, method, 0, recipe)
    state = tmp_path / 'state.pt'
    parts = []
    for _ in range(recipe.steps):
        recorder = Recorder(task)
        parts.append(training.run(recorder, method, 0, recipe, state, lambda: True))
        assert len(recorder.batches) == 1  # nothing is done twice
        if parts[-1] is None:
            assert os.listdir(tmp_path) == ['state.pt']
    assert parts[:-1] == [None] * 9 and without_seconds(parts[-1]) == without_seconds(whole)
    assert not os.listdir(tmp_path)
    assert whole['method'] == method and whole['seed'] == 0
    assert whole['parameters'] == sum(p.numel() for p in training.build(method, task, recipe, 0).parameters())
    json.dumps(whole)


def test_seconds_of_all_parts_add_up(tmp_path, monkeypatch):
    clock = itertools.count(0, 1000)
    monkeypatch.setattr(training, 'time', SimpleNamespace(perf_counter=lambda: next(clock)))
    args = Direction(CPU), 'ape', 0, TINY['direction'], tmp_path / 'x.pt'
    assert training.run(*args, lambda: True) is None and training.run(*args, lambda: True) is None
    in_parts = training.run(*args)['seconds']
    assert in_parts == training.run(*args)['seconds'] == 1000 * 10  # 9 saves and the end


@pytest.mark.parametrize('steps, points', [
    (10, list(range(1, 11))), (25, [2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 25])])
def test_points_of_the_curve(steps, points):
    row = training.run(Direction(CPU), 'ape', 0, replace(TINY['direction'], steps=steps, sizes=(8, 16)))
    assert [p['step'] for p in row['curve']] == points
    assert all(math.isfinite(p['loss']) and 0 <= p['accuracy'] <= 1 for p in row['curve'])


def spoil(kind, path):
    if kind == 'text':
        path.write_text('not a state')
    elif kind == 'half':
        path.write_bytes(path.read_bytes()[:1000])
    else:
        parts = torch.load(path, weights_only=True)
        del parts['optimizer' if kind == 'part' else 'model']
        torch.save(parts, path)


@pytest.mark.parametrize('kind', ['text', 'half', 'part', 'weights', 'recipe', 'method'])
def test_other_states_are_refused(kind, tmp_path):
    task, recipe, path, method = Direction(CPU), TINY['direction'], tmp_path / 'x.pt', 'mixed'
    assert training.run(task, method, 0, recipe, path, lambda: True) is None
    if kind == 'recipe':
        recipe = replace(recipe, learning_rate=1e-3)
    elif kind == 'method':
        method = 'ape'
    else:
        spoil(kind, path)
    before = path.read_bytes()
    with pytest.raises(ValueError, match=r'x\.pt is no state of this run, delete it to begin anew: .'):
        training.run(task, method, 0, recipe, path)
    assert path.read_bytes() == before and os.listdir(tmp_path) == ['x.pt']


def test_a_save_that_fails_leaves_the_state_that_was_there(tmp_path, monkeypatch):
    args = Direction(CPU), 'ape', 0, TINY['direction'], tmp_path / 'x.pt', lambda: True
    assert training.run(*args) is None
    before = (tmp_path / 'x.pt').read_bytes()

    def full(parts, path):
        Path(path).write_bytes(b'half')
        raise OSError('no space left')

    monkeypatch.setattr(torch, 'save', full)
    with pytest.raises(OSError, match='no space'):
        training.run(*args)
    assert (tmp_path / 'x.pt').read_bytes() == before and os.listdir(tmp_path) == ['x.pt']


def test_a_loss_that_is_not_finite_ends_the_run():
    class Broken(Direction):
        def train_batches(self, *args):
            for images, labels in super().train_batches(*args):
                yield images * float('nan'), labels

    with pytest.raises(RuntimeError, match='loss is nan after 1 steps'):
        training.run(Broken(CPU), 'ape', 0, TINY['direction'])


def test_the_learning_rate_rises_and_falls():
    model = torch.nn.Linear(64, 16)
    recipe = replace(TINY['direction'], steps=40, learning_rate=1.)
    trained = training.Training(model, recipe)
    rates = []
    for _ in range(40):
        rates.append(trained.optimizer.param_groups[0]['lr'])
        trained.update(torch.zeros(2, 64), torch.zeros(2, dtype=torch.long))
    assert rates[:4] == sorted(rates[:4]) and rates[0] < .02 and max(rates) > .9 and rates[4:] == sorted(
        rates[4:], reverse=True)
    assert all(r == pytest.approx((1 + math.cos(math.pi * i / 40)) / 2) for i, r in enumerate(rates) if i > 4)


def test_it_learns(digits):
    recipe = replace(TINY['digits'], sizes=(8, 16), patch_size=2, embed_dim=48, num_heads=2, steps=100, batch_size=32,
                     learning_rate=5e-3, test_images=120)
    row = training.run(digits, 'spherical', 0, recipe)
    losses = [p['loss'] for p in row['curve']]
    trained = row['tests'][0]
    assert trained['images'] == 120 and trained['right'] > 30  # 12 by chance
    assert abs(losses[0] - math.log(10)) < .3 and losses[-1] < losses[0] - .4
    assert trained['right'] / 120 == row['curve'][-1]['accuracy']


# -- tests by rule

RULES = [(rule, log_n) for rule in ('extrapolate', 'interpolate', 'ntk', 'yarn') for log_n in (False, True)]


class Noise:
    """A task whose right answers are those of a model with one rule."""

    in_chans, num_classes, device = 1, 16, CPU
    groups = {'low': tuple(range(6)), 'high': tuple(range(6, 16))}

    def __init__(self):
        self.labels = {}

    def images(self, size, limit):
        return torch.randn(limit, 1, size, size, generator=torch.Generator().manual_seed(size))

    @torch.inference_mode()
    def answer(self, model, size, limit):
        self.labels[size] = model(self.images(size, limit)).argmax(1)

    def test_batches(self, size, limit):
        yield from zip(self.images(size, limit).split(7), self.labels[size].split(7))


@pytest.mark.parametrize('rule, log_n', RULES)
def test_a_rule_is_right_where_a_model_that_was_set_by_hand_is_right(rule, log_n):
    task, recipe = Noise(), replace(TINY['direction'], sizes=(16, 40, 28), test_images=80, depth=3)
    by_hand, model = (model_that_sees_positions('mixed', task, recipe) for _ in range(2))
    for size, limit in ((16, 80), (28, 40)):
        task.answer(by_hand, size, limit)
    by_hand.set_rope_scaling(rule, log_n=log_n)
    task.answer(by_hand, 40, 40)
    rows = list(training.test_rules(model, task, recipe))
    assert [(r['size'], r['rule'], r['log_n']) for r in rows] == [
        (16, 'extrapolate', False), *((40, *r) for r in RULES), (28, 'extrapolate', False)]
    for row in rows:
        limit = 80 if row['size'] == 16 else 40
        named = row['size'] != 40 or (row['rule'], row['log_n']) == (rule, log_n)
        assert (row['right'] == limit) == named and row['images'] == limit
        answers = task.labels[row['size']]
        assert {k: v[1] for k, v in row['groups'].items()} == dict(
            low=int((answers < 6).sum()), high=int((answers >= 6).sum()))
        assert sum(v[0] for v in row['groups'].values()) == row['right']
        assert sum(v[1] for v in row['groups'].values()) == row['images']
    assert 0 < rows[0]['groups']['low'][1] < 80


@pytest.mark.parametrize('method', ['ape', 'none'])
def test_without_an_encoding_there_are_no_rules(method):
    rows = list(training.test_rules(training.build(method, Direction(CPU), TINY['direction'], 0), Direction(CPU),
                                    TINY['direction']))
    assert [(r['size'], r['rule'], r['log_n'], r['images']) for r in rows] == [
        (8, None, False, 12), (16, None, False, 6), (12, None, False, 6)]


@pytest.mark.parametrize('method', ['liere', 'uniform'])
def test_rules_without_a_meaning_are_left_out(method):
    rows = training.test_rules(
        training.build(method, Direction(CPU), TINY['direction'], 0), Direction(CPU), TINY['direction'])
    assert [(r['rule'], r['log_n']) for r in rows if r['size'] == 16] == RULES[:4]


# -- the command

def command(folder, *args, tasks=('direction',), methods=('axial', 'ape'), seeds=1):
    return compare.main([str(folder), '--device', 'cpu', '--workers', '1', '--tasks', *tasks, '--methods', *methods,
                         '--seeds', str(seeds), *args])


def content_of(folder):
    return json.loads((folder / 'compare.json').read_text())


def runs_of(folder):
    return [(row['task'], row['method'], row['seed']) for row in content_of(folder)['rows']]


def test_a_rerun_does_only_what_is_missing(tiny_recipes, tmp_path, monkeypatch, capsys):
    folder = tmp_path / 'out'
    assert command(folder) == 0
    out = capsys.readouterr().out
    first = content_of(folder)
    assert first['finished'] and first['benchmark'] == 'compare' and first['machine']['torch'] == torch.__version__
    assert first['settings']['tasks'].keys() == {'direction'} and not os.listdir(folder / 'unfinished')
    assert first['settings']['tasks']['direction']['recipe'] == json.loads(json.dumps(vars(TINY['direction'])))
    assert runs_of(folder) == [('direction', 'axial', 0), ('direction', 'ape', 0)]
    for row in first['rows']:
        expected = training.run(Direction(CPU), row['method'], row['seed'], TINY['direction'])
        assert without_seconds(row) == dict(task='direction', **without_seconds(expected))
    assert tables(first['rows'][::-1], first['settings']['tasks']) in out  # APE first
    before = (folder / 'compare.json').read_bytes()
    with monkeypatch.context() as nothing_to_do:
        nothing_to_do.setattr(jobs, 'run', None)
        assert command(folder) == 0 and (folder / 'compare.json').read_bytes() == before
    pytest.importorskip('sklearn')
    assert command(folder, methods=('axial', 'none'), tasks=('direction', 'digits'), seeds=2) == 0
    later = content_of(folder)
    assert later['rows'][:2] == first['rows'] and later['finished'] and later['settings']['tasks'].keys() == {
        'direction', 'digits'}
    # the first seed of everything comes first
    assert runs_of(folder)[2:] == [
        ('direction', 'none', 0), ('digits', 'axial', 0), ('digits', 'none', 0), ('direction', 'axial', 1),
        ('direction', 'none', 1), ('digits', 'axial', 1), ('digits', 'none', 1)]


@pytest.fixture
def done(tiny_recipes, tmp_path):
    folder = tmp_path / 'out'
    assert command(folder, methods=('ape',)) == 0
    return folder


@pytest.mark.parametrize('args, message', [
    (('--steps', '20'), 'another recipe: steps 10, now 20'),
    (('--batch-size', '3'), 'another recipe: batch_size 4, now 3'),
    (('--sizes', '8', '12'), r'another recipe: sizes (8, 16, 12), now (8, 12)'),
    (('--scale', 'large'), 'scale small; now it is'),
])
def test_results_of_other_settings_are_refused(done, args, message, monkeypatch, capsys):
    monkeypatch.setattr(jobs, 'run', None)
    before = (done / 'compare.json').read_bytes()
    assert command(done, *args, seeds=2) == 2
    said = capsys.readouterr().err
    assert message in said and 'compare.json' in said and 'another folder' in said
    assert (done / 'compare.json').read_bytes() == before


def changed(content, *keys, value):
    *path, last = keys
    inner = content
    for key in path:
        inner = inner[key]
    inner[last] = value
    return content


@pytest.mark.parametrize('change, message', [
    (lambda c: 'hello', 'no result of these benchmarks'),
    (lambda c: changed(c, 'format', value='other'), 'no result of these benchmarks'),
    (lambda c: changed(c, 'benchmark', value='speed'), "results of 'speed', not of compare"),
    (lambda c: changed(c, 'settings', value={}), "results of 'compare'"),
    (lambda c: changed(c, 'settings', 'tasks', 'direction', 'recipe', 'colour', value=1), 'another version'),
    (lambda c: changed(c, 'settings', 'tasks', 'direction', value={}), 'another version'),
    (lambda c: changed(c, 'rows', value=[dict(task='direction')]), 'another version'),
    (lambda c: changed(c, 'rows', 0, 'method', value='juggling'), 'results of juggling, unknown here'),
    (lambda c: changed(c, 'rows', 0, 'task', value='balance'), 'results of balance, unknown here'),
])
def test_files_of_others_are_refused(done, change, message, monkeypatch, capsys):
    monkeypatch.setattr(jobs, 'run', None)
    path = done / 'compare.json'
    path.write_text(json.dumps(change(content_of(done))))
    before = path.read_bytes()
    assert command(done, seeds=2) == 2
    said = capsys.readouterr().err
    assert message in said and str(path) in said and path.read_bytes() == before


def test_other_images_are_refused(tiny_recipes, tmp_path, capsys):
    folders = [make_folder(tmp_path / f'{n}', {
        'train/dark': n, 'train/light': n, 'val/dark': 2, 'val/light': 2}) for n in (4, 6)]
    args = dict(tasks=('direction', 'folder'), methods=('ape',))
    assert command(tmp_path / 'out', '--data-dir', str(folders[0]), **args) == 0
    before = (tmp_path / 'out' / 'compare.json').read_bytes()
    assert command(tmp_path / 'out', '--data-dir', str(folders[1]), **args) == 2
    said = capsys.readouterr().err
    assert '8 images of 2 classes' in said and '12 images of 2 classes' in said
    assert (tmp_path / 'out' / 'compare.json').read_bytes() == before


def test_a_run_that_fails_is_named_and_the_others_stay(tiny_recipes, tmp_path, monkeypatch, capsys):
    def failing(task, method, *args, **kwargs):
        if method == 'uniform':
            raise RuntimeError('the loss is nan')
        return training.run(task, method, *args, **kwargs)

    methods = ('axial', 'uniform', 'ape')
    with monkeypatch.context() as broken:
        broken.setattr(jobs, 'run', failing)
        assert command(tmp_path / 'out', methods=methods) == 1
    said = capsys.readouterr().err
    assert 'direction uniform, seed 0: RuntimeError: the loss is nan' in said and '1 runs are in' in said
    assert runs_of(tmp_path / 'out') == [('direction', 'axial', 0)] and not content_of(tmp_path / 'out')['finished']
    assert command(tmp_path / 'out', methods=methods) == 0 and content_of(tmp_path / 'out')['finished']
    assert [m for _, m, _ in runs_of(tmp_path / 'out')] == ['axial', 'uniform', 'ape']


def interrupted_in(monkeypatch, number):
    """Make the save of the `number`th point of all runs the last thing before an interruption."""
    saves = itertools.count(1)
    save = training.Training.save

    def save_and_stop(self, path):
        save(self, path)
        if next(saves) == number:
            raise KeyboardInterrupt

    monkeypatch.setattr(training.Training, 'save', save_and_stop)


def test_an_interruption_keeps_what_there_is(tiny_recipes, tmp_path, monkeypatch, capsys):
    with monkeypatch.context() as interrupted:
        interrupted_in(interrupted, 9 + 4)
        assert command(tmp_path / 'out') == 130
    assert 'interrupted. 1 runs are in' in capsys.readouterr().err
    assert runs_of(tmp_path / 'out') == [('direction', 'axial', 0)] and not content_of(tmp_path / 'out')['finished']
    assert os.listdir(tmp_path / 'out' / 'unfinished') == ['direction-ape-0.pt']
    updates = []
    update = training.Training.update
    monkeypatch.setattr(training.Training, 'update', lambda self, *batch: updates.append(1) or update(self, *batch))
    assert command(tmp_path / 'out') == 0 and len(updates) == 6
    assert runs_of(tmp_path / 'out') == [('direction', 'axial', 0), ('direction', 'ape', 0)]
    whole = training.run(Direction(CPU), 'ape', 0, TINY['direction'])
    assert without_seconds(content_of(tmp_path / 'out')['rows'][1]) == dict(
        task='direction', **without_seconds(whole))
    assert not os.listdir(tmp_path / 'out' / 'unfinished') and content_of(tmp_path / 'out')['finished']


def test_what_is_no_state_fails_one_run_and_stays(done, capsys):
    state = done / 'unfinished' / 'direction-axial-0.pt'
    state.write_text('not a state')
    assert command(done) == 1
    assert 'direction axial, seed 0: ValueError' in capsys.readouterr().err
    assert state.read_text() == 'not a state' and runs_of(done) == [('direction', 'ape', 0)]


# -- a budget

def fixed_seconds(monkeypatch, step, tests):
    monkeypatch.setattr(budget, 'seconds_of', lambda job: (step, tests))


def clock_of_jobs(monkeypatch):
    """Seconds that are added to the clock which runs look at."""
    late = [0.]
    monkeypatch.setattr(jobs, 'time', SimpleNamespace(time=lambda: time.time() + late[0]))
    return late


@pytest.fixture
def thousands(tiny_recipes, monkeypatch):
    tasks = {name: replace(recipe, steps=steps) for (name, recipe), steps in zip(TINY.items(), (1000, 500, 100))}
    monkeypatch.setitem(compare.RECIPES, 'small', tasks)


def test_a_budget_chooses_steps_that_fit(thousands, tmp_path, monkeypatch):
    pytest.importorskip('sklearn')
    fixed_seconds(monkeypatch, .5, 3.)
    planned = []
    monkeypatch.setattr(compare, 'results_of', lambda jobs, workers: planned.extend(jobs) or iter(()))
    for minutes, workers in ((3., 1), (2., 4)):
        planned.clear()
        args = ['--device', 'cpu', '--tasks', 'direction', 'digits', '--methods', 'axial', 'ape', '--seeds', '3']
        begin = time.time()
        assert compare.main([
            str(tmp_path / f'{workers}'), *args, '--workers', str(workers), '--budget', str(minutes)]) == 0
        seconds = sum(.5 * job.recipe.steps + 3 for job in planned) / workers
        assert len(planned) == 12 and .75 * 60 * minutes < seconds < 60 * minutes
        steps = {job.task: job.recipe.steps for job in planned}
        assert abs(steps['direction'] - 2 * steps['digits']) <= 2  # the same factor for both
        assert all(0 <= job.deadline - begin - 60 * minutes < 30 for job in planned)
        recorded = content_of(tmp_path / f'{workers}')['settings']['tasks']
        assert {name: about['recipe']['steps'] for name, about in recorded.items()} == steps
    fixed_seconds(monkeypatch, 1e-6, 1e-6)
    planned.clear()
    assert command(tmp_path / 'fast', '--budget', '60') == 0
    assert {job.recipe.steps for job in planned} == {4000}


def test_a_budget_leaves_tasks_that_there_are_results_of(thousands, tmp_path, monkeypatch):
    pytest.importorskip('sklearn')
    assert command(tmp_path, '--steps', '12', methods=('ape',)) == 0
    fixed_seconds(monkeypatch, .5, 3.)
    planned = []
    monkeypatch.setattr(compare, 'results_of', lambda jobs, workers: planned.extend(jobs) or iter(()))
    assert command(tmp_path, '--budget', '2', tasks=('direction', 'digits')) == 0
    steps = {job.task: job.recipe.steps for job in planned}
    assert steps['direction'] == 12 and .75 * 120 < .5 * (12 + 2 * steps['digits']) + 3 * 3 < 120


def test_a_budget_that_is_too_short_is_refused(thousands, tmp_path, monkeypatch, capsys):
    fixed_seconds(monkeypatch, 60., 60.)
    assert command(tmp_path / 'out', '--budget', '1') == 2
    assert '--budget 1 is too short' in capsys.readouterr().err and not (tmp_path / 'out' / 'compare.json').exists()


@pytest.mark.parametrize('after', ['run', 'point'])
def test_runs_that_the_time_does_not_suffice_for_are_left(thousands, tmp_path, monkeypatch, capsys, after):
    folder = tmp_path / 'out'
    fixed_seconds(monkeypatch, 1., 1.)
    with monkeypatch.context() as limited:
        late = clock_of_jobs(limited)
        if after == 'run':
            def run(*args, **kwargs):
                row = training.run(*args, **kwargs)
                late[0] = 1e6
                return row

            limited.setattr(jobs, 'run', run)
        else:
            save = training.Training.save
            limited.setattr(
                training.Training, 'save', lambda self, path: save(self, path) or late.__setitem__(0, 1e6))
        assert command(folder, '--budget', '1') == 0
    assert f'Runs that are left: {1 if after == "run" else 2}' in capsys.readouterr().out
    assert len(runs_of(folder)) == (after == 'run') and not content_of(folder)['finished']
    assert os.listdir(folder / 'unfinished') == ([] if after == 'run' else ['direction-axial-0.pt'])
    steps = content_of(folder)['settings']['tasks']['direction']['recipe']['steps']
    assert 10 <= steps < 30
    assert command(folder) == 0
    assert runs_of(folder) == [('direction', 'axial', 0), ('direction', 'ape', 0)] and content_of(folder)['finished']
    assert [row['curve'][-1]['step'] for row in content_of(folder)['rows']] == [steps, steps]
    assert content_of(folder)['settings']['tasks']['direction']['recipe']['steps'] == steps
    # another budget changes nothing any more
    fixed_seconds(monkeypatch, .1, .1)
    assert command(folder, '--budget', '1', methods=('axial', 'none')) == 0
    assert content_of(folder)['rows'][-1]['curve'][-1]['step'] == steps


def test_what_nothing_came_of_does_not_bind(thousands, tmp_path, monkeypatch):
    """An interruption before the first point of the first curve leaves a record, no result."""
    with monkeypatch.context() as interrupted:
        interrupted.setattr(jobs, 'run', lambda *args, **kwargs: signal.raise_signal(signal.SIGINT))
        assert command(tmp_path / 'out') == 130 and runs_of(tmp_path / 'out') == []
    assert command(tmp_path / 'out', '--steps', '10') == 0
    assert content_of(tmp_path / 'out')['settings']['tasks']['direction']['recipe']['steps'] == 10


def test_the_trial_of_a_budget_can_be_interrupted_and_can_fail(thousands, tmp_path, monkeypatch, capsys):
    def broken(job):
        raise RuntimeError('the loss is nan')

    monkeypatch.setattr(budget, 'seconds_of', broken)
    assert command(tmp_path / 'out', '--budget', '1') == 1 and 'the loss is nan' in capsys.readouterr().err
    monkeypatch.setattr(budget, 'seconds_of', lambda job: signal.raise_signal(signal.SIGINT))
    assert command(tmp_path / 'out', '--budget', '1') == 130 and 'before the first run' in capsys.readouterr().err
    assert not (tmp_path / 'out' / 'compare.json').exists()


def test_seconds_are_those_of_all_images(monkeypatch, tmp_path):
    """By a clock that only steps and tests move: 2 seconds a step, 10 ms an image."""
    clock = [0.]
    monkeypatch.setattr(budget, 'time', SimpleNamespace(perf_counter=lambda: clock[0]))
    update = training.Training.update

    def counted(*args):
        clock[0] += 2
        update(*args)

    def tested(model, task, size, limit, groups=None):
        clock[0] += .01 * limit
        return 0, limit

    monkeypatch.setattr(training.Training, 'update', counted)
    monkeypatch.setattr(training, 'test', tested)
    monkeypatch.setattr(budget, 'test', tested)
    recipe = replace(TINY['direction'], test_images=1200)
    job = jobs.Job('direction', 'mixed', 0, recipe, 'cpu', tmp_path, None, 0)
    step, tests = budget.seconds_of(job)
    images = 10 * 1000 + 1200 + 8 * 600 + 600
    assert step == pytest.approx(2) and tests == pytest.approx(.01 * images)


# -- bad input

@pytest.mark.parametrize('args, message', [
    (['--budget', '1', '--steps', '10'], '--budget chooses the steps'),
    (['--budget', '0'], "above 0, got '0'"),
    (['--budget', 'nan'], "above 0, got 'nan'"),
    (['--budget', 'inf'], "above 0, got 'inf'"),
    (['--budget', 'long'], "above 0, got 'long'"),
    (['--steps', '9'], "at least 10, got '9'"),
    (['--sizes', '8'], 'must be two or more'),
    (['--sizes', '8', '8'], 'must be two or more'),
    (['--batch-size', '0'], "at least 1, got '0'"),
    (['--seeds', '0'], "at least 1, got '0'"),
    (['--workers', '0'], "at least 1, got '0'"),
    (['--data-dir', '.'], 'exactly one task that reads files in --tasks, got none'),
    (['--data-dir', '.', '--tasks', 'direction', 'digits'], 'got none'),
    (['--data-dir', '.', '--tasks', 'fashion', 'folder'], 'got fashion, folder'),
    (['--methods', 'axail'], "invalid choice: 'axail'"),
    (['--tasks', 'imagenet'], "invalid choice: 'imagenet'"),
    (['--scale', 'huge'], "invalid choice: 'huge'"),
    (['--device', 'tpu'], "must be cpu or cuda, got 'tpu'"),
])
def test_bad_input_is_refused(args, message, tmp_path, capsys):
    with pytest.raises(SystemExit) as error:
        compare.main([str(tmp_path / 'out'), *args])
    assert error.value.code == 2 and message in capsys.readouterr().err and not (tmp_path / 'out').exists()


def test_a_folder_that_cannot_be_one_is_refused(tmp_path, capsys):
    (tmp_path / 'file').write_text('mine')
    for folder in (tmp_path / 'file', tmp_path / 'none' / 'out'):
        with pytest.raises(SystemExit) as error:
            command(folder)
        assert error.value.code == 2 and f'{folder} cannot be a folder' in capsys.readouterr().err
    assert (tmp_path / 'file').read_text() == 'mine'


@pytest.mark.parametrize('args, message', [
    (['--sizes', '8', '10'], 'multiples of the patch size 4, got 10 for direction'),
    (['--patch-size', '3'], 'multiples of the patch size 3, got 8 for direction'),
    (['--tasks', 'folder'], 'the task folder needs --data-dir'),
    (['--tasks', 'direction', 'cifar100', '--data-dir', 'none'], 'none is no folder. It must hold CIFAR-100'),
    (['--tasks', 'digits', '--batch-size', '5000'], 'fewer than a batch of 5000: --batch-size'),
])
def test_what_cannot_be_done_is_refused(tiny_recipes, args, message, tmp_path, monkeypatch, capsys):
    pytest.importorskip('sklearn')
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(compare.RECIPES['small'], 'cifar100', TINY['folder'])
    args = ['--tasks', 'direction', *args] if '--tasks' not in args else args
    assert compare.main(['out', '--device', 'cpu', '--workers', '1', *args]) == 2
    assert message in capsys.readouterr().err and os.listdir('out') == []


def test_without_fashion_there_are_the_digits(tiny_recipes, tmp_path, monkeypatch, capsys):
    pytest.importorskip('sklearn')

    def load(source, folder):
        if source == 'fashion_mnist':
            raise compare.NoImages('There is no network.')
        return images

    images = SmallImages('digits', None, CPU).images
    monkeypatch.setattr('comparison.images.load_images', load)
    monkeypatch.setitem(compare.RECIPES['small'], 'fashion', TINY['digits'])
    jobs.open_task.cache_clear()
    args = ['--device', 'cpu', '--workers', '1', '--methods', 'ape', '--seeds', '1']
    assert compare.main([str(tmp_path), *args]) == 0
    assert 'There is no network.\nTaking the digits' in capsys.readouterr().err
    assert runs_of(tmp_path) == [('direction', 'ape', 0), ('digits', 'ape', 0)]
    assert compare.main([str(tmp_path), *args, '--tasks', 'fashion']) == 2  # named, so nothing else will do
    assert 'There is no network.' in capsys.readouterr().err
    jobs.open_task.cache_clear()


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


# -- tables and plots

def made_up(task, method, seed, right, groups=False):
    """A row with `right` answers of 200 at size 8, a half and a fifth of 100 at 16 and 12; rules have one more each."""
    rotary = method not in ('ape', 'none')

    def test(size, rule, log_n, right, images):
        inside = dict(here=[right // 2, images // 2], there=[right - right // 2, images // 2]) if groups else {}
        return dict(size=size, rule=rule if rotary else None, log_n=log_n, right=right, images=images, groups=inside)

    rules = list(enumerate(RULES[:4] if method == 'liere' else RULES if rotary else [('', False)]))
    tests = [test(8, 'extrapolate', False, right, 200)]
    tests += [test(16, rule, log_n, right // 4 + i, 100) for i, (rule, log_n) in rules]
    tests += [test(12, 'extrapolate', False, right // 5, 100)]
    curve = [dict(step=step, loss=1., accuracy=right / 200) for step in (5, 10)]
    return dict(task=task, method=method, seed=seed, curve=curve, tests=tests, seconds=1., parameters=5)


TASKS = {name: dict(about=f'all about {name}', scale='small', recipe=dict(sizes=[8, 16, 12]))
         for name in ('direction', 'digits')}
ROWS = [
    made_up('direction', 'ape', 0, 60, True),
    *(made_up('direction', 'axial', seed, right, True) for seed, right in enumerate((101, 120, 133))),
    made_up('direction', 'liere', 0, 80, True), made_up('digits', 'axial', 0, 90), made_up('digits', 'axial', 1, 110)]


def table_after(text, title):
    lines = iter(text[text.index(title):].splitlines()[1:])
    lines = itertools.takewhile(lambda line: line.startswith('|'), itertools.dropwhile(lambda line: not line, lines))
    cells = [[cell.strip() for cell in line.strip('|').split('|')] for line in lines]
    assert len({len(line) for line in cells}) == 1 and set(cells[1]) == {'---'}
    return {line[0]: dict(zip(cells[0][1:], line[1:])) for line in cells[2:]}


def mean_and_deviation(values):
    mean = sum(values) / len(values)
    if len(values) == 1:
        return f'{mean:.1f}'
    return f'{mean:.1f} ± {math.sqrt(sum((v - mean) ** 2 for v in values) / (len(values) - 1)):.1f}'


def test_tables_have_means_and_deviations():
    text = tables(ROWS, TASKS)
    main = table_after(text, '**direction**: all about direction')
    assert list(main) == ['`ape`', '`axial`', '`liere`']
    assert list(main['`ape`']) == ['8 px', 'here', 'there', '16 px', '12 px', 'seeds']
    right = [101, 120, 133]
    assert main['`axial`'] == {
        '8 px': mean_and_deviation([r / 2 for r in right]), 'here': mean_and_deviation([r // 2 for r in right]),
        'there': mean_and_deviation([r - r // 2 for r in right]), '16 px': mean_and_deviation([r // 4 for r in right]),
        '12 px': mean_and_deviation([r // 5 for r in right]), 'seeds': '3'}
    assert main['`axial`']['8 px'] == f'59.0 ± {statistics.stdev([50.5, 60, 66.5]):.1f}'
    assert main['`ape`'] == {'8 px': '30.0', 'here': '30.0', 'there': '30.0', '16 px': '15.0', '12 px': '12.0',
                             'seeds': '1'}
    turned = [{**row, 'tests': row['tests'][::-1]} for row in ROWS]
    assert table_after(tables(turned, TASKS), '**direction**: all about direction') == main
    rules = table_after(text, '**direction** at 16 px, by rule')
    assert list(rules) == ['`axial`', '`liere`']
    for i, (rule, log_n) in enumerate(RULES):
        name = f'{rule}, log-n' if log_n else rule
        assert rules['`axial`'][name] == mean_and_deviation([r // 4 + i for r in right])
        assert rules['`liere`'][name] == (f'{20 + i:.1f}' if i < 4 else '-')
    other = table_after(text, '**digits**: all about digits')
    assert list(other['`axial`'].items()) == [
        ('8 px', mean_and_deviation([45, 55])), ('16 px', mean_and_deviation([22, 27])),
        ('12 px', mean_and_deviation([18, 22])), ('seeds', '2')]


def test_tables_of_little():
    assert tables([], TASKS) == ''
    text = tables([made_up('digits', 'ape', 0, 50)], TASKS)
    assert '±' not in text and 'by rule' not in text and 'direction' not in text and '25.0' in text


@pytest.mark.parametrize('rows', [ROWS, [r for r in ROWS if r['task'] == 'digits'], []])
def test_plots(rows, tmp_path, monkeypatch):
    pytest.importorskip('matplotlib')
    from matplotlib.figure import Figure

    drawn = []
    savefig = Figure.savefig
    monkeypatch.setattr(Figure, 'savefig', lambda self, *args, **kwargs: drawn.append(self) or savefig(
        self, *args, **kwargs))
    for plot in (plot_accuracy, plot_curves):
        path = tmp_path / f'{plot.__name__}.png'
        plot(path, rows, TASKS)
        assert path.read_bytes().startswith(b'\x89PNG')
        panels = {axes.get_title(): axes for axes in drawn.pop().axes}
        assert list(panels) == [task for task in TASKS if any(row['task'] == task for row in rows)]
        for task, axes in panels.items():
            lines = axes.containers if plot is plot_accuracy else axes.get_lines()
            assert [line.get_label() for line in lines] == list(
                dict.fromkeys(row['method'] for row in rows if row['task'] == task))
            shown = (lines[-2 if task == 'direction' else -1])
            x, y = (shown[0] if plot is plot_accuracy else shown).get_data()
            right = [row['tests'][0]['right'] for row in rows if (row['task'], row['method']) == (task, 'axial')]
            if plot is plot_curves:
                assert list(x) == [5, 10] and list(y) == pytest.approx(2 * [statistics.mean(right) / 2])
            else:
                assert list(x) == [8, 12, 16] and list(y) == pytest.approx(
                    [statistics.mean(r / 2 for r in right), statistics.mean(r // 5 for r in right),
                     statistics.mean(r // 4 for r in right)])
    assert sorted(os.listdir(tmp_path)) == ['plot_accuracy.png', 'plot_curves.png']


def test_the_command_draws_plots_or_says_why_not(done, monkeypatch, capsys):
    pytest.importorskip('matplotlib')
    assert sorted(os.listdir(done)) == ['accuracy.png', 'compare.json', 'curves.png', 'unfinished']
    (done / 'accuracy.png').unlink()
    (done / 'curves.png').unlink()
    capsys.readouterr()
    find = compare.importlib.util.find_spec
    monkeypatch.setattr(
        compare.importlib.util, 'find_spec', lambda name, *args: None if name == 'matplotlib' else find(name, *args))
    assert command(done, methods=('ape',)) == 0
    said = capsys.readouterr().out
    assert "No plots: pip install 'timm_rope[bench]'" in said and '**direction**' in said
    assert sorted(os.listdir(done)) == ['compare.json', 'unfinished']


# -- as a user

def start(folder, *args):
    return subprocess.Popen(
        [sys.executable, str(BENCHMARKS / 'compare.py'), str(folder), '--device', 'cpu', '--tasks', 'direction',
         '--methods', 'axial', 'ape', '--seeds', '1', '--batch-size', '4', '--sizes', '8', '12', '--workers', '2',
         *args], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True)


def clean(stderr):
    return 'Traceback' not in stderr and 'Warning' not in stderr and 'leaked' not in stderr


def test_two_runs_at_a_time(tmp_path):
    process = start(tmp_path / 'out', '--steps', '10')
    stdout, stderr = process.communicate(timeout=120)
    assert process.returncode == 0 and clean(stderr), stderr
    assert sorted(runs_of(tmp_path / 'out')) == [('direction', 'ape', 0), ('direction', 'axial', 0)]
    content = content_of(tmp_path / 'out')
    rows = sorted(content['rows'], key=lambda row: row['method'])  # APE first
    assert content['finished'] and tables(rows, content['settings']['tasks']) in stdout
    recipe = compare.recipe_of(content['settings']['tasks']['direction'])
    assert recipe == replace(compare.RECIPES['small']['direction'], steps=10, batch_size=4, sizes=(8, 12))
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        here = training.run(Direction(CPU), 'ape', 0, recipe)
    finally:
        torch.set_num_threads(threads)
    assert without_seconds(rows[0]) == dict(task='direction', **without_seconds(here)) and len(rows[1]['tests']) == 9
    assert not os.listdir(tmp_path / 'out' / 'unfinished')


def test_an_interruption_of_two_runs(tmp_path):
    """As from a terminal: to all processes at once."""
    folder = tmp_path / 'out'
    process = start(folder, '--steps', '1000')
    try:
        limit = time.monotonic() + 90
        while not list(folder.glob('unfinished/[a-z]*.pt')):
            assert process.poll() is None and time.monotonic() < limit
            time.sleep(.02)
        os.killpg(process.pid, signal.SIGINT)
        stdout, stderr = process.communicate(timeout=60)
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
    assert process.returncode == 130 and clean(stderr), stderr
    assert 'interrupted. 0 runs are in' in stderr and content_of(folder)['rows'] == []
    states = list(folder.glob('unfinished/[a-z]*.pt'))
    assert states and all(torch.load(path, weights_only=True)['step'] % 100 == 0 for path in states)
    limit = time.monotonic() + 20
    with pytest.raises(ProcessLookupError):  # no process is left behind
        while time.monotonic() < limit:
            os.killpg(process.pid, 0)
            time.sleep(.05)


def test_rows_survive_a_write_that_fails(done, monkeypatch, capsys):
    before = (done / 'compare.json').read_bytes()

    def full(*args):
        raise OSError('no space left')

    monkeypatch.setattr(machine.os, 'replace', full)
    assert command(done, methods=('axial',)) == 1 and 'no space left' in capsys.readouterr().err
    assert (done / 'compare.json').read_bytes() == before
