"""The command of the comparison of encodings: nothing is lost or mixed up, bad input is refused."""
import itertools
import json
import os

import compare
import pytest
import torch
from comparing import CPU, TINY, command, content_of, make_folder, runs_of, without_seconds
from comparison import jobs, training
from comparison.direction import Direction
from comparison.images import SmallImages
from comparison.report import tables

# -- the command

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
    monkeypatch.setattr('comparison.photos.DEBIAN_FOLDER', tmp_path / 'none')
    monkeypatch.setitem(compare.RECIPES['small'], 'fashion', TINY['digits'])
    jobs.open_task.cache_clear()
    args = ['--device', 'cpu', '--workers', '1', '--methods', 'ape', '--seeds', '1']
    assert compare.main([str(tmp_path), *args]) == 0
    said = capsys.readouterr().err
    assert 'There is no network.\nTaking the digits' in said and 'apt-get install mate-backgrounds' in said
    assert runs_of(tmp_path) == [('direction', 'ape', 0), ('digits', 'ape', 0)]
    assert compare.main([str(tmp_path), *args, '--tasks', 'fashion']) == 2  # named, so nothing else will do
    assert 'There is no network.' in capsys.readouterr().err
    jobs.open_task.cache_clear()
