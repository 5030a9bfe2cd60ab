"""Fixtures that several test modules share."""
import os
import signal
import sys
from pathlib import Path

import pytest

sys.path.append(str(Path(__file__).parents[1] / 'benchmarks'))  # scripts, no package: tests import them by name
# A shell that starts the tests in the background makes them, and all their processes, ignore Ctrl-C.
signal.signal(signal.SIGINT, signal.default_int_handler)
# Tiny models gain nothing from threads and lose a lot where the cores are shared; subprocesses inherit this.
os.environ.setdefault('OMP_NUM_THREADS', '1')


@pytest.fixture(scope='session')
def digits_folder(tmp_path_factory):
    """Image folder of scikit-learn's handwritten digits: train/ and val/, ten classes, 64 px RGB PNG files."""
    datasets = pytest.importorskip('sklearn.datasets')
    from PIL import Image

    folder = tmp_path_factory.mktemp('digits')
    digits = datasets.load_digits()
    wanted = {'train': 24, 'val': 8}
    for label in range(10):
        images = iter(digits.images[digits.target == label])
        for split, count in wanted.items():
            (folder / split / str(label)).mkdir(parents=True)
            for i in range(count):
                pixels = (next(images) * (255 / 16)).astype('uint8')
                image = Image.fromarray(pixels).resize((64, 64), Image.Resampling.BICUBIC).convert('RGB')
                image.save(folder / split / str(label) / f'{i:02}.png')
    return folder
