"""Fixtures of the tests of commands."""
import numpy as np
import pytest
from PIL import Image
from sweeping import CLASSES, PER_CLASS, SPHERICAL, save

from timm_rope.__main__ import main


@pytest.fixture
def convert(capsys):
    """Run the command; exit status, its lines, its standard error."""
    def run(*args):
        status = main(['convert', *map(str, args)])
        out, err = capsys.readouterr()
        assert err.count('\n') == (1 if status else 0), 'an error is one line, success none'
        return status, out, err
    return run


@pytest.fixture(scope='session')
def data(tmp_path_factory):
    """Noise with structure, twice as wide as high, so that crops and sizes matter. Only the split is looked for."""
    folder, random = tmp_path_factory.mktemp('images'), np.random.default_rng(0)
    for label in range(CLASSES):
        (folder / 'val' / f'n{label}').mkdir(parents=True)
        for i in range(PER_CLASS):
            pixels = random.integers(0, 256, (9, 18, 3), np.uint8)
            Image.fromarray(pixels).resize((112, 56), Image.Resampling.NEAREST).save(
                folder / 'val' / f'n{label}' / f'{i}.png')
    return folder


@pytest.fixture(scope='session')
def spherical(tmp_path_factory):
    """What `sweep` is told to evaluate: a checkpoint of a tiny model that was trained at 48 px."""
    return save(tmp_path_factory.mktemp('weights') / 'last.pth.tar', SPHERICAL, 48)
