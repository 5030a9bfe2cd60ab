"""A step of images of mixed shape, padded to one length, against the plain model with as many tokens.

    python benchmarks/naflex.py --threads 1 --json FILE
    python benchmarks/naflex.py liere timm:vit_small_patch16_rope_mixed_224 --mode train

For each encoding, or `timm:` and the name of a model of timm with `use_naflex`, the plain model at 224 pixels and the
NaFlex model take turns. The columns are the time of the latter over that of the former: `full`, all images 14 x 14
patches; `padded`, all 13 x 15 and one token of padding; `mixed`, aspects up to 2 with as many patches as fit into 196,
other images in every round. Medians of rounds; on a CPU of the seconds that the process was given, which other
processes touch little.
"""
import argparse
import math
import random
import statistics
import sys
import time
from typing import Any, Callable, Dict, List, Optional, Tuple

import timm
import torch
from machine import Row, add_common, describe, integer_from, summary, timed, write_result

from timm_rope import list_ropes

TOKENS, PATCH = 196, 16
KINDS = ('full', 'padded', 'mixed')
Grid = Tuple[int, int]


def grids_of(kind: str, batch: int, seed: int) -> List[Grid]:
    """(rows, columns) of the images of a batch."""
    if kind != 'mixed':
        return [(14, 14) if kind == 'full' else (13, 15)] * batch
    draw, grids = random.Random(seed), []
    while len(grids) < batch:
        rows = int(math.sqrt(TOKENS * 2 ** draw.uniform(-1, 1)))
        grids.append((rows, TOKENS // rows))
    return grids


def batch_of(grids: List[Grid], device: torch.device) -> Dict[str, torch.Tensor]:
    """What the loader gives for images of these grids."""
    coord = torch.zeros(len(grids), TOKENS, 2, dtype=torch.long)
    valid = torch.zeros(len(grids), TOKENS, dtype=torch.bool)
    for image, (rows, columns) in enumerate(grids):
        coord[image, :rows * columns] = torch.cartesian_prod(torch.arange(rows), torch.arange(columns))
        valid[image, :rows * columns] = True
    batch = dict(patches=torch.randn(len(grids), TOKENS, 3 * PATCH ** 2), patch_coord=coord, patch_valid=valid)
    return {key: value.to(device) for key, value in batch.items()}


def seconds_of(step: Callable[[], None], device: torch.device) -> float:
    if device.type == 'cuda':
        return timed(step, device, 1)
    begin = time.process_time()
    step()
    return time.process_time() - begin


def measure(name: str, mode: str, args: argparse.Namespace) -> Row:
    """Ratios of one encoding in one mode."""
    model = name.removeprefix('timm:') if name.startswith('timm:') else f'vit_small_rope_{name}'
    plain, naflex = (
        timm.create_model(model, use_naflex=use, depth=args.depth).to(args.device) for use in (False, True))
    images = torch.randn(args.batch, 3, 224, 224, device=args.device)

    def seconds(module: Any, x: Any) -> float:
        module.train(mode == 'train')

        def step() -> None:
            with torch.set_grad_enabled(mode == 'train'):
                out = module(x)
            if mode == 'train':
                out.square().mean().backward()
                module.zero_grad()
        return seconds_of(step, args.device)

    ratios: Dict[str, List[float]] = {kind: [] for kind in KINDS}
    for i in range(args.rounds + 1):
        batches = {kind: batch_of(grids_of(kind, args.batch, i), args.device) for kind in KINDS}
        before = seconds(plain, images)
        taken = {kind: seconds(naflex, batch) for kind, batch in batches.items()}
        base = 0.5 * (before + seconds(plain, images))
        for kind in KINDS if i else ():  # the first round warms up
            ratios[kind].append(taken[kind] / base)
    return dict(name=name, mode=mode, milliseconds=1000 * base,
                **{kind: statistics.median(values) for kind, values in ratios.items()}, ratios=ratios)


def parse(argv: Optional[List[str]] = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('names', nargs='*', default=list_ropes(), metavar='NAME', help='(default: all encodings)')
    parser.add_argument('--mode', nargs='+', choices=('eval', 'train'), default=['eval', 'train'],
                        help='(default: both)')
    parser.add_argument('--batch', type=integer_from(1), default=8, metavar='N', help='(default: 8)')
    parser.add_argument('--depth', type=integer_from(1), default=12, metavar='N', help='blocks (default: 12)')
    add_common(parser, rounds=7)
    args = parser.parse_args(argv)
    for name in args.names:
        if not name.startswith('timm:') and name not in list_ropes():
            parser.error(f'no encoding {name!r}: {", ".join(list_ropes())}, or timm:MODEL')
    return args


def main(argv: Optional[List[str]] = None) -> int:
    args = parse(argv)
    if args.threads:
        torch.set_num_threads(args.threads)
    machine, rows = describe(args.device), []
    print(summary(machine))
    for name in args.names:
        for mode in args.mode:
            rows.append(measure(name, mode, args))
            figures = '  '.join(f'{kind} {rows[-1][kind]:.2f}' for kind in KINDS)
            print(f'{name:<42}{mode:<6}{rows[-1]["milliseconds"]:8.0f} ms  {figures}', flush=True)
            if args.json:
                settings = dict(batch=args.batch, depth=args.depth, rounds=args.rounds)
                finished = len(rows) == len(args.names) * len(args.mode)
                write_result(args.json, 'naflex', machine, settings, rows, finished)
    return 0


if __name__ == '__main__':
    sys.exit(main())
