"""benchmarks/naflex.py: every encoding or model of timm in every kind of batch, and batches that fit."""
import json

import naflex
import pytest
from test_benchmarks import BENCHMARKS  # noqa: F401  (puts the folder on the path)


def test_rows_of_both_modes(tmp_path, capsys):
    path = tmp_path / 'naflex.json'
    names = ['mixed', 'timm:vit_small_patch16_rope_mixed_224']
    small = ['--device', 'cpu', '--batch', '2', '--depth', '1', '--rounds', '1']
    assert naflex.main([*names, *small, '--json', str(path)]) == 0
    content = json.loads(path.read_text())
    assert content['finished'] and [(row['name'], row['mode']) for row in content['rows']] == [
        (name, mode) for name in names for mode in ('eval', 'train')]
    assert all(row[kind] > 0 for row in content['rows'] for kind in naflex.KINDS)
    with pytest.raises(SystemExit):
        naflex.parse(['mixd'])
    assert "no encoding 'mixd'" in capsys.readouterr().err


def test_mixed_batches_fit():
    grids = naflex.grids_of('mixed', 50, 0)
    assert len(set(grids)) > 5 and all(150 < rows * columns <= naflex.TOKENS for rows, columns in grids)
    assert naflex.batch_of(grids, 'cpu')['patch_valid'].sum(1).tolist() == [a * b for a, b in grids]
