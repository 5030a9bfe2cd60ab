"""Fixtures of the tests of benchmarks."""

import compare
import pytest
from comparing import CPU, TINY, command
from comparison.images import SmallImages


@pytest.fixture
def tiny_recipes(monkeypatch):
    monkeypatch.setitem(compare.RECIPES, 'small', TINY)
    monkeypatch.setitem(compare.RECIPES, 'large', TINY)


@pytest.fixture
def digits():
    pytest.importorskip('sklearn')
    return SmallImages('digits', None, CPU)


@pytest.fixture
def done(tiny_recipes, tmp_path):
    folder = tmp_path / 'out'
    assert command(folder, methods=('ape',)) == 0
    return folder
