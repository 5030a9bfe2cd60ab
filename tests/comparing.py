"""What the tests of the comparison of encodings share: tiny settings, made-up folders and runs of the command."""
import json
from pathlib import Path

import compare
import pytest
import torch
from comparison import jobs
from comparison.recipe import Recipe

CPU = torch.device('cpu')
MODEL = dict(embed_dim=24, num_heads=1, depth=1, learning_rate=2e-3, test_images=12)
TINY = {
    'direction': Recipe(sizes=(8, 16, 12), patch_size=4, steps=10, batch_size=4, **MODEL),
    'digits': Recipe(sizes=(8, 16, 12), patch_size=4, steps=10, batch_size=4, **MODEL),
    'photos': Recipe(sizes=(8, 16, 12), patch_size=4, steps=10, batch_size=4, turned=30., **MODEL),
    'folder': Recipe(sizes=(16, 32, 24), patch_size=8, steps=10, batch_size=4, **MODEL),
}
COLOURS = {'dark': 40, 'light': 220}


def task_named(name):
    if name == 'digits':
        pytest.importorskip('sklearn')
    return jobs.open_task(name, None, 'cpu', 0)


def make_folder(root, counts):
    """Image folder with so many files in each of its folders; classes differ in brightness."""
    from PIL import Image

    for name, count in counts.items():
        (root / name).mkdir(parents=True)
        for i in range(count):
            level = COLOURS.get(Path(name).name, 100)
            Image.effect_noise((20, 20), 30).point(lambda v, level=level: (v + level) // 2).convert('RGB').save(
                root / name / f'{i}.png')
    return root


def make_photos(root, height=240, width=300):
    """Folder with two pictures of smooth noise that has no period."""
    from PIL import Image, ImageFilter

    root.mkdir()
    for name in 'ab':
        noise = Image.effect_noise((width, height), 90).filter(ImageFilter.GaussianBlur(4))
        noise.point(lambda v: min(255, max(0, 8 * v - 900))).save(root / f'{name}.png')
    return root


class Recorder:
    """A task that notes the batches it gives."""

    def __init__(self, task):
        self.task, self.batches = task, []

    def __getattr__(self, name):
        return getattr(self.task, name)

    def train_batches(self, *args):
        for images, labels in self.task.train_batches(*args):
            self.batches.append((images.clone(), labels.clone()))
            yield images, labels


def without_seconds(row):
    return {k: v for k, v in row.items() if k != 'seconds'}


RULES = [(rule, log_n) for rule in ('extrapolate', 'interpolate', 'ntk', 'yarn') for log_n in (False, True)]


def command(folder, *args, tasks=('direction',), methods=('axial', 'ape'), seeds=1):
    return compare.main([str(folder), '--device', 'cpu', '--workers', '1', '--tasks', *tasks, '--methods', *methods,
                         '--seeds', str(seeds), *args])


def content_of(folder):
    return json.loads((folder / 'compare.json').read_text())


def runs_of(folder):
    return [(row['task'], row['method'], row['seed']) for row in content_of(folder)['rows']]
