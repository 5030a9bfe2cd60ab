"""`python -m timm_rope demo`: a rotary encoding and a learned position embedding, on images larger than in training.

Two tiny models are trained, one after the other and by the same recipe, on small real images; they differ in nothing
but how they know positions. Then both classify test images of the size of the training images and larger ones.
"""
import argparse
import json
import platform
import sys
import time
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Dict, Iterator, List, Tuple

import timm
import torch
import torch.nn.functional as F
from timm.utils import AverageMeter
from torch import Tensor, nn
from tqdm import tqdm

from ...encodings import list_ropes
from .._common import integer_from, output_file, write_whole
from .._training import WEIGHT_DECAY, set_up
from .images import SOURCES, Images, NoImages, load_images
from .picture import draw

# LayerScale starts at 1: from the 1e-4 of the entry points, a run this short gets nowhere
MODEL: Dict[str, Any] = dict(embed_dim=64, depth=3, num_heads=2, init_values=1., in_chans=1, num_classes=10)
BATCH_SIZE = 64
LEARNING_RATE = 2e-3
RULE = 'interpolate'  # for larger images, which does best on our small models
PICTURE = 'timm_rope_demo.png'
CAVEAT = 'One seed, a demonstration, not a benchmark.'
NEXT = f"""Rotary coordinates go on beyond those of training: the first line on larger images. The rule
rope_scaling={RULE!r} (model.set_rope_scaling) squeezes them into the range that was trained.
Next: `python -m timm_rope encodings` tells the encodings, `python -m timm_rope sweep` measures rules on your own
weights, README.md says how to train."""


@dataclass(frozen=True)
class Task:
    """What to do with a set of images so that the whole demo takes one or two minutes on two cores."""
    epochs: int
    patch_size: int
    sizes: Tuple[int, ...]  # of test images; the first one is that of the training images
    train_limit: int
    test_limit: int


TASKS = {
    'Fashion-MNIST': Task(epochs=3, patch_size=7, sizes=(28, 42, 56), train_limit=10_000, test_limit=2_000),
    'digits': Task(epochs=20, patch_size=2, sizes=(8, 12, 16), train_limit=10_000, test_limit=2_000),
}


# -- the command

def add_arguments(parser: argparse.ArgumentParser) -> None:
    epochs = ', '.join(f'{task.epochs} for {name}' for name, task in TASKS.items())
    parser.add_argument('--encoding', default='spherical', choices=list_ropes(), metavar='NAME',
                        help=f'rotary encoding: {", ".join(list_ropes())} (default: spherical)')
    parser.add_argument('--data', default='auto', choices=SOURCES,
                        help='images; auto takes Fashion-MNIST if it is on the disk or can be downloaded, else the '
                             'digits of scikit-learn (default: auto)')
    parser.add_argument('--data-dir', type=Path, metavar='DIR',
                        help='folder with the files of Fashion-MNIST, or with FashionMNIST/raw as torchvision makes it')
    parser.add_argument('--epochs', type=integer_from(1), metavar='N',
                        help=f'passes over the training images (default: {epochs})')
    parser.add_argument('--seed', type=integer_from(0), default=0, metavar='N',
                        help='seed of initial weights and order of images (default: 0)')
    parser.add_argument('--json', type=output_file, metavar='FILE', help='write the results to FILE, too')
    parser.add_argument('--plot', type=output_file, default=PICTURE, metavar='FILE',
                        help=f'draw the results into FILE, if matplotlib is there (default: {PICTURE})')


def run(args: argparse.Namespace) -> int:
    try:
        images = load_images(args.data, args.data_dir)
    except (NoImages, ValueError) as error:
        print(error, file=sys.stderr)
        return 1
    task = TASKS[images.name]
    with one_thread():
        result = compare(images, task, args.encoding, args.epochs or task.epochs, args.seed)
    print()
    print(format_result(result))
    if args.json is not None:
        write_whole(args.json, json.dumps(result, indent=2) + '\n')
    print(draw(result, args.plot))
    return 0


@contextmanager
def one_thread() -> Iterator[None]:
    """Compute on one core, as long as this lasts.

    Where other programs share the cores, two threads mostly wait for each other: 7.5 minutes instead of 1.5 have been
    measured on two busy cores. Besides, the results then do not depend on the number of cores, which decides how sums
    are rounded.
    """
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


# -- the comparison

def compare(images: Images, task: Task, encoding: str, epochs: int, seed: int) -> Dict[str, Any]:
    """Train and test `vit_tiny_rope_{encoding}` and `vit_tiny_ape`; the result consists of plain JSON values."""
    device = torch.device('cuda' if torch.cuda.is_available() else 'cpu')
    train_images, test_images = (
        x.to(device, torch.float32) / 255
        for x in (images.train_images[:task.train_limit], images.test_images[:task.test_limit]))
    train_labels = images.train_labels[:task.train_limit].to(device)
    test_labels = images.test_labels[:task.test_limit].to(device)
    # the scaling of pixels every model of timm expects, here from the training images
    mean, std = train_images.mean(), train_images.std()
    train_images = (train_images - mean) / std

    result: Dict[str, Any] = {
        'note': CAVEAT,
        'data': {
            'name': images.name,
            'origin': images.origin,
            'train_images': len(train_labels),
            'train_images_available': len(images.train_labels),
            'test_images': len(test_labels),
            'test_images_available': len(images.test_labels),
            # right answers of one who always says the class that is most frequent here
            'most_frequent_class': int(test_labels.bincount().max()),
        },
        'recipe': {
            **MODEL, 'patch_size': task.patch_size, 'img_size': task.sizes[0], 'epochs': epochs, 'seed': seed,
            'batch_size': BATCH_SIZE, 'learning_rate': LEARNING_RATE, 'weight_decay': WEIGHT_DECAY,
        },
        'environment': {
            'device': torch.cuda.get_device_name() if device.type == 'cuda' else 'cpu',
            'torch': torch.__version__, 'timm': timm.__version__,
            'python': platform.python_version(),
        },
        'models': [],
    }
    print(f'{images.name} ({images.origin}): {of(len(train_labels), len(images.train_labels))} images to train on, '
          f'{of(len(test_labels), len(images.test_labels))} to test with.', flush=True)
    for name in (f'vit_tiny_rope_{encoding}', 'vit_tiny_ape'):
        start = time.perf_counter()
        with torch.random.fork_rng([torch.cuda.current_device()] if device.type == 'cuda' else []):
            torch.manual_seed(seed)
            model = timm.create_model(name, img_size=task.sizes[0], patch_size=task.patch_size, **MODEL).to(device)
            loss = train(model, train_images, train_labels, epochs, seed, name)
        trained = time.perf_counter()
        tests = [test(model, test_images, test_labels, size, mean, std) for size in task.sizes]
        by_rule = None
        rope: Any = getattr(model, 'rope', None)
        if rope is not None and RULE in rope.scalings:
            rope.set_scaling(RULE)
            by_rule = {'rule': RULE, 'tests': [
                test(model, test_images, test_labels, size, mean, std) for size in task.sizes[1:]]}
        result['models'].append({
            'name': name,
            'parameters': sum(p.numel() for p in model.parameters()),
            'train_loss': loss,
            'train_seconds': trained - start,
            'test_seconds': time.perf_counter() - trained,
            'tests': tests,
            'by_rule': by_rule,
        })
    return result


def train(model: nn.Module, images: Tensor, labels: Tensor, epochs: int, seed: int, title: str) -> float:
    """Train with random crops, AdamW, a warm-up over a tenth of the steps and cosine decay.

    Args:
        model: Model, trained in place.
        images: (N, 1, height, width), scaled.
        labels: (N).
        epochs: Passes over the images.
        seed: Of the order and the crops of the images, which are thus the same for every model.
        title: Of the progress bar.

    Returns:
        Mean loss of the last epoch.
    """
    random = torch.Generator().manual_seed(seed)
    steps = epochs * -(-len(labels) // BATCH_SIZE)
    optimizer, scheduler = set_up(model, steps, LEARNING_RATE)
    model.train()
    losses = AverageMeter()
    step = 0
    # in a log file a line now and then
    interval = .2 if sys.stderr.isatty() else 20.
    with tqdm(total=steps, desc=title, unit='step', dynamic_ncols=True, mininterval=interval) as progress:
        for _ in range(epochs):
            losses.reset()
            for batch in torch.randperm(len(labels), generator=random).to(labels.device).split(BATCH_SIZE):
                x = random_crops(images[batch], random)
                with autocast(x.device):
                    logits = model(x)
                loss = F.cross_entropy(logits.float(), labels[batch])
                loss.backward()
                optimizer.step()
                optimizer.zero_grad()
                step += 1
                scheduler.step_update(step)
                losses.update(loss.item(), len(batch))
                progress.set_postfix(loss=f'{losses.avg:.3f}', refresh=False)
                progress.update()
    return losses.avg


def random_crops(x: Tensor, random: torch.Generator) -> Tensor:
    """Enlarge a random square of each image (N, 1, size, size) to the full size, for about half of the images.

    As in all recipes for larger images, things must have been seen at several sizes: in an enlarged image a patch shows
    a smaller part of them.
    """
    side = 1 - torch.rand(len(x), generator=random) / 2
    side[torch.rand(len(x), generator=random) < .5] = 1
    centre = (torch.rand(len(x), 2, generator=random) * 2 - 1) * (1 - side)[:, None]  # the image is from -1 to 1
    squares = torch.cat([torch.eye(2) * side[:, None, None], centre[:, :, None]], 2).to(x.device)
    grid = F.affine_grid(squares, list(x.shape), align_corners=False)
    return F.grid_sample(x, grid, mode='bicubic', padding_mode='border', align_corners=False)


def test(model: nn.Module, images: Tensor, labels: Tensor, size: int, mean: Tensor, std: Tensor) -> Dict[str, Any]:
    right = count_right(model, images, labels, size, mean, std)
    return {'size': size, 'right': right, 'images': len(labels), 'accuracy': right / len(labels)}


@torch.inference_mode()
def count_right(model: nn.Module, images: Tensor, labels: Tensor, size: int, mean: Tensor, std: Tensor) -> int:
    """How many of the images (N, 1, height, width), 0 to 1, the model classifies rightly at `size` pixels."""
    model.eval()
    right = 0
    for x, y in zip(images.split(500), labels.split(500)):
        if x.shape[-1] != size:
            # bicubic overshoots at edges, image files cannot
            x = F.interpolate(x, (size, size), mode='bicubic').clamp(0, 1)
        with autocast(x.device):
            logits = model((x - mean) / std)
        right += int((logits.argmax(1) == y).sum())
    return right


def autocast(device: torch.device) -> torch.autocast:
    return torch.autocast(device.type, torch.bfloat16, enabled=device.type == 'cuda')


# -- output

def of(used: int, available: int) -> str:
    return f'{used:,} of {available:,}' if used < available else f'{used:,}'


def format_result(result: Dict[str, Any]) -> str:
    """The result of `compare` as a table of accuracies, sizes in columns."""
    data, recipe, models = result['data'], result['recipe'], result['models']
    sizes = [test['size'] for test in models[0]['tests']]
    rows: List[List[str]] = [['right answers', *(f'{size} px' for size in sizes), 'parameters', 'seconds']]
    for model in models:
        rows.append([
            model['name'], *(f'{test["accuracy"]:.1%}' for test in model['tests']), f'{model["parameters"]:,}',
            f'{model["train_seconds"] + model["test_seconds"]:.0f}'])
        if model['by_rule']:
            rows.append([
                f'  rope_scaling={model["by_rule"]["rule"]}', '',
                *(f'{test["accuracy"]:.1%}' for test in model['by_rule']['tests']), '', ''])
    chance = data['most_frequent_class'] / data['test_images']
    rows.append(['(always the same class)', *[f'{chance:.1%}'] * len(sizes), '', ''])
    widths = [max(map(len, column)) for column in zip(*rows)]
    lines = ['  '.join([row[0].ljust(widths[0]), *(cell.rjust(w) for cell, w in zip(row[1:], widths[1:]))]).rstrip()
             for row in rows]
    return '\n'.join([
        *lines, '',
        f'{data["test_images"]:,} test images of {data["name"]}. Training was at {recipe["img_size"]} px, larger '
        f'images are enlarged ones (bicubic).',
        f'Both models: {recipe["embed_dim"]} wide, {recipe["depth"]} blocks, {recipe["num_heads"]} heads, patches of '
        f'{recipe["patch_size"]} px; {recipe["epochs"]} epochs, seed {recipe["seed"]}, on '
        f'{result["environment"]["device"]}.',
        result['note'], '', NEXT])
