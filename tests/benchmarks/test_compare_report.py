"""Tables and plots of the comparison of encodings, and the command as a user runs it."""
import importlib.util
import itertools
import math
import os
import signal
import statistics
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import compare
import machine
import pytest
import torch
from comparing import CPU, RULES, command, content_of, runs_of, without_seconds
from comparison import training
from comparison.command import recipe_of
from comparison.direction import Direction
from comparison.report import plot_accuracy, plot_curves, tables

# -- tables and plots

def made_up(task, method, seed, right, groups=False):
    """A row with `right` answers of 200 at size 8, a half and a fifth of 100 at 16 and 12; rules have one more each.

    Digits are turned, too, with three answers less.
    """
    rotary = method not in ('ape', 'none')

    def test(size, rule, log_n, right, images, turned=0.):
        inside = dict(here=[right // 2, images // 2], there=[right - right // 2, images // 2]) if groups else {}
        return dict(size=size, rule=rule if rotary else None, log_n=log_n, turned=turned, right=right, images=images,
                    groups=inside)

    rules = list(enumerate(RULES[:4] if method == 'liere' else RULES if rotary else [('', False)]))
    tests = [test(8, 'extrapolate', False, right, 200)]
    tests += [test(16, rule, log_n, right // 4 + i, 100) for i, (rule, log_n) in rules]
    tests += [test(12, 'extrapolate', False, right // 5, 100)]
    tests += [test(8, 'extrapolate', False, right - 3, 200, 30.)] if task == 'digits' else []
    curve = [dict(step=step, loss=1., accuracy=right / 200) for step in (5, 10)]
    return dict(task=task, method=method, seed=seed, curve=curve, tests=tests, seconds=1., parameters=5)

BENCHMARKS = Path(__file__).parents[2] / 'benchmarks'
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
        ('12 px', mean_and_deviation([18, 22])), ('turned by 30°', mean_and_deviation([43.5, 53.5])), ('seeds', '2')]


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
    find = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, 'find_spec', lambda name, *args: None if name == 'matplotlib' else find(name, *args))
    assert command(done, methods=('ape',)) == 0
    said = capsys.readouterr().out
    assert "No plots: pip install 'timm_rope[bench]'" in said and '**direction**' in said
    assert sorted(os.listdir(done)) == ['compare.json', 'unfinished']


# -- as a user

def start(folder, *args):
    return subprocess.Popen(
        [sys.executable, str(BENCHMARKS / 'compare.py'), str(folder), '--device', 'cpu', '--tasks', 'direction',
         '--methods', 'axial', 'ape', '--seeds', '1', '--batch-size', '4', '--sizes', '8', '16', '--workers', '2',
         *args], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True)


def clean(stderr):
    return 'Traceback' not in stderr and 'Warning' not in stderr and 'leaked' not in stderr


@pytest.mark.slow
def test_two_runs_at_a_time(tmp_path):
    process = start(tmp_path / 'out', '--steps', '10')
    stdout, stderr = process.communicate(timeout=120)
    assert process.returncode == 0 and clean(stderr), stderr
    assert sorted(runs_of(tmp_path / 'out')) == [('direction', 'ape', 0), ('direction', 'axial', 0)]
    content = content_of(tmp_path / 'out')
    rows = sorted(content['rows'], key=lambda row: row['method'])  # APE first
    assert content['finished'] and tables(rows, content['settings']['tasks']) in stdout
    recipe = recipe_of(content['settings']['tasks']['direction'])
    assert recipe == replace(compare.RECIPES['small']['direction'], steps=10, batch_size=4, sizes=(8, 16))
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        here = training.run(Direction(CPU), 'ape', 0, recipe)
    finally:
        torch.set_num_threads(threads)
    assert without_seconds(rows[0]) == dict(task='direction', **without_seconds(here)) and len(rows[1]['tests']) == 9
    assert not os.listdir(tmp_path / 'out' / 'unfinished')


@pytest.mark.slow
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
