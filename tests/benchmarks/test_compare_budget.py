"""A budget of minutes for the comparison of encodings chooses steps that fit."""
import os
import signal
import time
from dataclasses import replace
from types import SimpleNamespace

import compare
import pytest
from comparing import TINY, command, content_of, runs_of
from comparison import budget, jobs, training
from comparison import command as comparison_command


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
    monkeypatch.setattr(comparison_command, 'results_of', lambda jobs, workers: planned.extend(jobs) or iter(()))
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
    monkeypatch.setattr(comparison_command, 'results_of', lambda jobs, workers: planned.extend(jobs) or iter(()))
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

    def tested(model, task, size, limit, groups=None, degrees=0.):
        clock[0] += .01 * limit
        return 0, limit

    monkeypatch.setattr(training.Training, 'update', counted)
    monkeypatch.setattr(training, 'test', tested)
    recipe = replace(TINY['direction'], test_images=1200)
    job = jobs.Job('direction', 'mixed', 0, recipe, 'cpu', tmp_path, None, 0)
    step, tests = budget.seconds_of(job)
    images = 10 * 1000 + 1200 + 8 * 600 + 600
    assert step == pytest.approx(2) and tests == pytest.approx(.01 * images)
