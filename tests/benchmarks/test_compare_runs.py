"""One run of the comparison of encodings: it can be stopped at any point, learns, and is tested by every rule."""
import itertools
import json
import math
import os
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import compare
import pytest
import torch
import torch.nn.functional as F
from comparing import CPU, RULES, TINY, Recorder, task_named, without_seconds
from comparison import training
from comparison.direction import Direction, draw_scenes, render

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
        assert model.rope is None or model.rope.name == method
        model = model_that_sees_positions(method, task, recipe)
        with torch.inference_mode():
            difference = (model(images) - model(shuffled)).abs().max()
        assert difference < 1e-4 if method == 'none' else difference > .1, method


# -- one run

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

class Noise:
    """A task whose right answers are those of a model with one rule."""

    in_chans, num_classes, device, turnable = 1, 16, CPU, False
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


def test_every_size_of_at_least_twice_that_of_training_gets_every_rule():
    recipe = replace(TINY['direction'], sizes=(8, 12, 16, 24), test_images=2)
    rows = list(training.test_rules(training.build('axial', Direction(CPU), recipe, 0), Direction(CPU), recipe))
    for size in recipe.sizes:
        rules = [(r['rule'], r['log_n']) for r in rows if r['size'] == size]
        assert rules == (RULES if size >= 16 else RULES[:1])


def test_images_are_turned_where_the_answer_stays(digits):
    recipe = replace(TINY['digits'], turned=90., test_images=300)
    model = training.build('axial', digits, recipe, 0)
    *rest, row = training.test_rules(model, digits, recipe)
    assert not any(r['turned'] for r in rest) and row['turned'] == 90 and row['size'] == 8 and row['images'] == 300
    model.set_rope_scaling('extrapolate')
    images = torch.rot90(torch.cat([x for x, _ in digits.test_batches(8, 300)]), 1, (2, 3))  # counter-clockwise
    with torch.inference_mode():
        answers = model(images).argmax(1)
    digits.images.test_labels[:300].copy_(answers)  # which an untrained model gets right
    *_, row = training.test_rules(model, digits, recipe)
    assert row['right'] == 300 != training.test(model, digits, 8, 300)[0]
    turned = replace(recipe, turned=30.)
    assert not any(r['turned'] for r in training.test_rules(
        training.build('axial', Direction(CPU), turned, 0), Direction(CPU), turned))


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
