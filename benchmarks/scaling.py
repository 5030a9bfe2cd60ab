"""Accuracy on images larger than in training, by encoding and rule: tiny ViTs on scikit-learn's digits.

Every model is trained at one size, by the recipe of `python -m timm_rope demo`, and evaluated at that size and at
larger ones with every rule its encoding can follow, each with and without log-n temperature. Nothing is trained in
between: a rule changes no weight. Larger images are the same images enlarged (bicubic).

    python benchmarks/scaling.py --json benchmarks/results/scaling_cpu.json
"""
import argparse
import itertools
import multiprocessing
import os
import statistics
from concurrent.futures import ProcessPoolExecutor
from typing import Any, Dict, List, Optional, Sequence

import timm
import torch
import torch.nn.functional as F
from machine import Row, describe, integer_from, output_file, summary, write_result

from timm_rope.cli.demo.command import MODEL, count_right, train
from timm_rope.cli.demo.images import load_digits

PATCH = 2
SIZES = (12, 18, 24, 36)  # 6 x 6 patches in training; 1, 1.5, 2 and 3 times as many on a side
EPOCHS = 15
SHAPE = {**MODEL, 'depth': 2}
# label -> constructor arguments beside the encoding
VARIANTS: Dict[str, Dict[str, Any]] = {
    'axial': {}, 'mixed': {}, 'spherical': {}, 'liere': dict(rope_block=4), 'axial, rescale 2': dict(rope_rescale=2.),
    'ape': {}}


def run_model(label: str, seed: int, epochs: int, sizes: Sequence[int], limit: int) -> List[Row]:
    """Train one model and evaluate it with every rule; a row for each rule and size."""
    torch.set_num_threads(1)  # the processes share the cores
    digits = load_digits()
    images, tests = digits.train_images[:limit].float() / 255, digits.test_images[:limit].float() / 255
    images = F.interpolate(images, (sizes[0], sizes[0]), mode='bicubic').clamp(0, 1)
    mean, std = images.mean(), images.std()

    torch.manual_seed(seed)
    name = 'vit_tiny_ape' if label == 'ape' else f'vit_tiny_rope_{label.split(",")[0]}'
    model: Any = timm.create_model(name, img_size=sizes[0], patch_size=PATCH, **SHAPE, **VARIANTS[label])
    loss = train(model, (images - mean) / std, digits.train_labels[:limit], epochs, seed, f'{label}, seed {seed}')

    rules = [(rule, log_n) for rule in (() if model.rope is None else model.rope.scalings) for log_n in (False, True)]
    rows: List[Row] = []
    for (rule, log_n), size in itertools.product(rules or [(None, False)], sizes):
        if rule is not None:
            model.set_rope_scaling(rule, log_n=log_n)
        right = count_right(model, tests, digits.test_labels[:limit], size, mean, std)
        rows.append(dict(
            model=label, seed=seed, rule=rule, log_n=log_n, size=size, right=right, images=len(tests), train_loss=loss))
    return rows


def table(rows: Sequence[Row], sizes: Sequence[int]) -> str:
    """Accuracy in per cent: mean over seeds, and the smallest and the largest."""
    cells: Dict[Any, List[float]] = {}
    for row in rows:
        key = (row['model'], row['rule'], row['log_n'], row['size'])
        cells.setdefault(key, []).append(100 * row['right'] / row['images'])
    lines = [['', *(f'{size / sizes[0]:g}x' for size in sizes)]]
    for model, rule, log_n in dict.fromkeys(key[:3] for key in cells):
        label = f'{model}: {rule or "resized"}{", log-n" if log_n else ""}'
        found = [cells[model, rule, log_n, size] for size in sizes]
        lines.append([label, *(f'{statistics.mean(v):5.1f} ({min(v):.1f}-{max(v):.1f})' for v in found)])
    widths = [max(map(len, column)) for column in zip(*lines)]
    return '\n'.join('  '.join([line[0].ljust(widths[0]), *map(str.rjust, line[1:], widths[1:])]) for line in lines)


def parse(argv: Optional[Sequence[str]]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description='Accuracy on larger images by encoding and rule, on digits.')
    parser.add_argument('--models', nargs='+', default=list(VARIANTS), choices=VARIANTS, metavar='NAME',
                        help=f'some of {", ".join(map(repr, VARIANTS))} (default: all)')
    parser.add_argument('--seeds', type=integer_from(1), default=3, metavar='N', help='models of each (default: 3)')
    parser.add_argument('--epochs', type=integer_from(1), default=EPOCHS, metavar='N',
                        help=f'passes over the training images (default: {EPOCHS})')
    parser.add_argument('--limit', type=integer_from(10), default=10_000, metavar='N',
                        help='take the first N images only, to try the script')
    parser.add_argument('--workers', type=integer_from(1), default=os.cpu_count() or 1, metavar='N',
                        help='models at a time, each on one core (default: the cores)')
    parser.add_argument('--json', type=output_file, metavar='FILE', help='write the results to FILE, too')
    return parser.parse_args(argv)


def main(argv: Optional[Sequence[str]] = None) -> None:
    args = parse(argv)
    machine = describe(torch.device('cpu'))
    settings = dict(
        models=args.models, seeds=args.seeds, epochs=args.epochs, sizes=SIZES, patch_size=PATCH, limit=args.limit,
        **SHAPE)
    print(summary(machine), flush=True)
    rows: List[Row] = []
    jobs = list(itertools.product(args.models, range(args.seeds)))
    with ProcessPoolExecutor(args.workers, multiprocessing.get_context('spawn')) as pool:
        futures = [pool.submit(run_model, label, seed, args.epochs, SIZES, args.limit) for label, seed in jobs]
        for future in futures:
            rows += future.result()
            if args.json is not None:
                write_result(args.json, 'scaling', machine, settings, rows, finished=future is futures[-1])
    print(table(rows, SIZES))


if __name__ == '__main__':
    main()
