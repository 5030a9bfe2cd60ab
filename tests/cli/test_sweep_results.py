"""Results of `python -m timm_rope sweep`: kept, continued, drawn, and never mixed with those of another run."""
import csv
import os
import subprocess
import sys

import numpy as np
import pytest
import timm
from PIL import Image
from sweeping import CLASSES, PER_CLASS, SIZES, SPHERICAL, TEXTS, at_sizes, counts_of, rows_of, save, sweep

from timm_rope.cli.sweep import evaluate
from timm_rope.cli.sweep.views import write_plot

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
