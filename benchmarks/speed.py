"""Time of whole models against the same model without rotation, in one process, in rounds that take turns.

    python benchmarks/speed.py                                      # ViT-S against timm's deit3_small, batch 8
    python benchmarks/speed.py swin_tiny_patch4_window7_224 swin_tiny_rope_axial swin_tiny_rope_mixed --json FILE

The first model is the unit. Eager, float32, on the CPU; a training step is forward and backward without an optimizer.
"""
import argparse
import json
import os
import platform
import statistics
import subprocess
import time
import warnings
from pathlib import Path
from typing import Any, Dict, List

import timm
import torch
from torch import nn

VITS = ['deit3_small_patch16_224', 'vit_small_rope_axial', 'vit_small_rope_mixed', 'vit_small_rope_spherical',
        'vit_small_patch16_rope_224', 'vit_small_patch16_rope_mixed_224']


def evaluate(model: nn.Module, images: torch.Tensor) -> float:
    model.eval()
    with torch.inference_mode():
        start = time.perf_counter()
        model(images)
        return time.perf_counter() - start


def train(model: nn.Module, images: torch.Tensor) -> float:
    model.train()
    model.zero_grad()
    start = time.perf_counter()
    model(images).square().mean().backward()
    return time.perf_counter() - start


def measure(names: List[str], batch: int, rounds: int) -> List[Dict[str, Any]]:
    models = {name: timm.create_model(name) for name in names}
    images = torch.randn(batch, 3, 224, 224)
    rows = []
    for mode, step in (('eval', evaluate), ('train', train)):
        times: Dict[str, List[float]] = {name: [] for name in names}
        for i in range(rounds + 1):
            for name in names if i % 2 else reversed(names):
                seconds = step(models[name], images)
                if i:  # the first round warms up
                    times[name].append(seconds)
        for name in names:
            ratios = [ours / unit for ours, unit in zip(times[name], times[names[0]])]
            rows.append(dict(
                mode=mode, model=name, milliseconds=1000 * statistics.median(times[name]),
                ratio=statistics.median(ratios), ratios=ratios))
            print(f'{mode:<6}{name:<34}{rows[-1]["milliseconds"]:>8.0f} ms   {rows[-1]["ratio"]:.3f}', flush=True)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('models', nargs='*', default=VITS, help='model names, the first is the unit')
    parser.add_argument('--batch', type=int, default=8, help='images (default: 8)')
    parser.add_argument('--rounds', type=int, default=10, help='rounds of all models (default: 10)')
    parser.add_argument('--json', type=Path, metavar='FILE', help='write the figures to FILE, too')
    args = parser.parse_args()
    warnings.simplefilter('ignore')
    commit = subprocess.run(
        ['git', 'describe', '--always', '--dirty'], capture_output=True, text=True, cwd=Path(__file__).parent)
    machine = dict(
        cores=os.cpu_count(), threads=torch.get_num_threads(), load=os.getloadavg()[0], torch=torch.__version__,
        timm=timm.__version__, python=platform.python_version(), commit=commit.stdout.strip())
    print(', '.join(f'{key} {value}' for key, value in machine.items()))
    rows = measure(args.models, args.batch, args.rounds)
    if args.json:
        args.json.write_text(json.dumps(dict(machine=machine, batch=args.batch, rows=rows), indent=1) + '\n')


if __name__ == '__main__':
    main()
