"""benchmarks/depth.py: rows of both times, a table, a figure, and reruns that go on."""
import json

import depth
import pytest
from test_benchmarks import BENCHMARKS  # noqa: F401  (puts the folder on the path)

ARGS = ['--device', 'cpu', '--tasks', 'direction', '--steps', '3', '--depth', '2', '--seeds', '1']


def test_runs_are_measured_and_taken_up(tmp_path, capsys):
    result, picture = tmp_path / 'depth.json', tmp_path / 'depth.png'
    assert depth.main([*ARGS, '--methods', 'ape', 'mixed', '--json', str(result)]) == 0
    first = json.loads(result.read_text())
    assert first['finished'] and [row['method'] for row in first['rows']] == ['ape', 'mixed']
    ape, mixed = first['rows']
    assert ape['after']['length'] is None and mixed['before']['waves'] != mixed['after']['waves']
    for row in first['rows']:
        assert 0 <= row['accuracy'] <= 1 and row['before']['distance'] != row['after']['distance']
        assert all(len(row['after'][key]) == 2 for key in ('distance', 'entropy'))
    assert len(mixed['after']['waves']) == 2 and len(mixed['after']['waves'][0]) == 2 * 12  # heads * pairs
    pytest.importorskip('matplotlib')
    capsys.readouterr()
    again = [*ARGS, '--methods', 'ape', 'mixed', 'spherical', '--json', str(result), '--plot', str(picture)]
    assert depth.main(again) == 0
    second = json.loads(result.read_text())
    assert second['rows'][:2] == first['rows'] and second['rows'][2]['method'] == 'spherical'
    assert picture.read_bytes()[:4] == b'\x89PNG'
    out = capsys.readouterr().out
    assert '| direction | `mixed` |' in out and out.count('fixed |') == 1


def test_other_results_stay(tmp_path, capsys):
    result = tmp_path / 'depth.json'
    assert depth.main([*ARGS, '--methods', 'ape', '--json', str(result)]) == 0
    before = result.read_text()
    assert depth.main([*ARGS[:-4], '--depth', '3', '--seeds', '1', '--methods', 'ape', '--json', str(result)]) == 2
    assert 'It was left as it is' in capsys.readouterr().err and result.read_text() == before
