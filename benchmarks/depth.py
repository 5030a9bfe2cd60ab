"""What training does to attention and frequencies, block by block: the papers' figures on models that train here.

    python benchmarks/depth.py --json FILE.json --plot FILE.png     # 18 minutes on one core
    python benchmarks/depth.py --steps 200 --seeds 1                # to try it

The models and recipes are those of `compare.py`, but deeper, since the figures are about depth: learned frequencies by
block and as a scatter (arXiv 2511.08368, figures 4 and 5), attention distance and entropy by block (arXiv 2403.13298),
before and after training. Rows are written as they come; a rerun with the same file skips what is there.
"""
import argparse
import importlib.util
import statistics
import sys
import time
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, Dict, List, Optional, Sequence

import torch
from comparison.jobs import open_task
from comparison.recipe import RECIPES, Recipe, read_recipe
from comparison.training import Training, build, test
from machine import Row, add_common, describe, integer_from, read_result, summary, write_result
from tqdm import tqdm

from timm_rope import analysis
from timm_rope.cli._common import output_file
from timm_rope.encodings import ENCODINGS

METHODS = ('ape', 'axial', 'mixed', 'spherical', 'axial_learned', 'spherical_learned')
IMAGES = 64  # on which attention is measured


def parse(argv: Optional[Sequence[str]]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_common(parser)
    parser.add_argument('--tasks', nargs='+', default=['direction', 'digits'], metavar='NAME',
                        choices=['direction', 'digits', 'fashion'],
                        help='some of direction, digits, fashion (default: direction digits)')
    parser.add_argument('--methods', nargs='+', default=list(METHODS), choices=['ape', 'none', *ENCODINGS],
                        metavar='NAME', help=f"encodings, 'ape' and 'none' (default: {' '.join(METHODS)})")
    parser.add_argument('--seeds', type=integer_from(1), default=2, metavar='N', help='runs of each (default: 2)')
    parser.add_argument('--depth', type=integer_from(2), default=6, metavar='N', help='blocks (default: 6)')
    parser.add_argument('--steps', type=integer_from(1), metavar='N', help="updates (default: the recipe's)")
    parser.add_argument('--plot', type=output_file, metavar='FILE.png', help='draw the figures at the end')
    args = parser.parse_args(argv)
    if args.plot is not None and importlib.util.find_spec('matplotlib') is None:
        parser.error("--plot needs matplotlib: pip install 'timm_rope[bench]'")
    return args


def look(model: Any, images: torch.Tensor) -> Dict[str, Any]:
    """Distance and entropy of each block (mean of the heads), lengths of its waves, and the waves of all."""
    maps = analysis.attention_maps(model, images)
    out: Dict[str, Any] = dict(
        distance=[float(analysis.mean_distance(each).mean()) for each in maps],
        entropy=[float(analysis.mean_entropy(each).mean()) for each in maps], length=None, waves=None)
    if model.rope is not None:
        waves = analysis.wave_vectors(model).flatten(1, 2)  # (L, H * G, 2)
        out['length'] = waves.norm(dim=-1).mean(1).tolist()
        if model.rope.learned:
            out['waves'] = [[[round(c, 4) for c in wave] for wave in block] for block in waves.tolist()]
    return out


def run(task: Any, task_name: str, method: str, seed: int, recipe: Recipe) -> Row:
    """Train one model and look at it before and after."""
    begin = time.perf_counter()
    model = build(method, task, recipe, seed)
    images = next(iter(task.test_batches(recipe.sizes[0], IMAGES)))[0][:IMAGES]
    before, training = look(model, images), Training(model, recipe)
    batches = task.train_batches(seed, 0, recipe.steps, recipe.batch_size, recipe.sizes[0])
    for batch, labels in tqdm(batches, total=recipe.steps, desc=f'{task_name} {method} {seed}', leave=False):
        training.update(batch, labels)
    training.mean_loss()
    right, count = test(model, task, recipe.sizes[0], recipe.test_images)
    return dict(task=task_name, method=method, seed=seed, accuracy=right / count, before=before,
                after=look(model, images), seconds=time.perf_counter() - begin)


def table(rows: List[Row]) -> str:
    """One line for each task and method: the mean over the seeds, block by block."""
    lines = ['| task | method | accuracy, % | attention distance, pixels | entropy, nats | mean length of the waves, '
             'before -> after |', '|---|---|---|---|---|---|']
    for task, method in dict.fromkeys((row['task'], row['method']) for row in rows):
        runs = [row for row in rows if (row['task'], row['method']) == (task, method)]

        def blocks(when: str, what: str, digits: int = 2, runs: List[Row] = runs) -> str:
            values = [run[when][what] for run in runs]
            if values[0] is None:
                return '-'
            return ' '.join(f'{statistics.mean(each):.{digits}f}' for each in zip(*values))

        moved = f'{blocks("before", "length")} -> {blocks("after", "length")}' if runs[0]['after']['waves'] else 'fixed'
        lines.append(
            f'| {task} | `{method}` | {100 * statistics.mean(run["accuracy"] for run in runs):.1f} | '
            f'{blocks("after", "distance", 1)} | {blocks("after", "entropy")} | '
            f'{"-" if runs[0]["after"]["length"] is None else moved} |')
    return '\n'.join(lines)


def plot(path: Path, rows: List[Row]) -> None:
    """Attention distance and length of the waves by block, and the scatter of the learned waves after training."""
    from matplotlib.figure import Figure

    tasks = list(dict.fromkeys(row['task'] for row in rows))
    learned = [m for m in dict.fromkeys(row['method'] for row in rows) if any(
        row['method'] == m and row['after']['waves'] for row in rows)]
    figure = Figure(figsize=(4 * (2 + len(learned)), 3.6 * len(tasks)), layout='constrained')
    axes = figure.subplots(len(tasks), 2 + len(learned), squeeze=False)
    for line, task in zip(axes, tasks):
        runs = [row for row in rows if row['task'] == task]
        for method in dict.fromkeys(row['method'] for row in runs):
            for ax, what in zip(line, ('distance', 'length')):
                values = [r['after'][what] for r in runs if r['method'] == method and r['after'][what] is not None]
                if values and (what == 'distance' or method in learned):
                    ax.plot([statistics.mean(each) for each in zip(*values)], 'o-', markersize=4, label=method)
        for ax, name in zip(line, ('mean attention distance, pixels', 'mean length, radians per patch')):
            ax.set(xlabel='block', ylabel=name, title=task)
            ax.set_ylim(bottom=0)
            ax.legend(fontsize=7)
        for ax, method in zip(line[2:], learned):
            waves = next(r['after']['waves'] for r in runs if r['method'] == method)
            for i, block in enumerate(waves):
                shade = 0.9 * i / max(1, len(waves) - 1)
                ax.plot(*zip(*block), '.', markersize=3, color=(shade, 0.3, 1 - shade), label=f'block {i}')
            ax.set(xlabel='$w_x$, radians per patch', ylabel='$w_y$', title=f'{task}, {method}', aspect='equal')
            ax.invert_yaxis()
        if learned:
            line[-1].legend(fontsize=7, markerscale=2)
    figure.savefig(path, dpi=80)


def main(argv: Optional[Sequence[str]] = None) -> int:
    args = parse(argv)
    if args.threads:
        torch.set_num_threads(args.threads)
    machine = describe(args.device)
    print(summary(machine), flush=True)
    recipes = {task: replace(RECIPES['small'][task], depth=args.depth, **(
        dict(steps=args.steps) if args.steps else {})) for task in args.tasks}
    settings = dict(recipes={task: asdict(recipe) for task, recipe in recipes.items()})
    rows: List[Row] = []
    try:
        if args.json is not None and args.json.exists():
            found = read_result(args.json, partial=True)
            earlier = found['settings'].get('recipes', {})
            if found['benchmark'] != 'depth' or any(
                    read_recipe(earlier[task]) != recipe for task, recipe in recipes.items() if task in earlier):
                raise ValueError(f'{args.json} holds results of another benchmark or recipe. It was left as it is.')
            rows, settings['recipes'] = found['rows'], {**earlier, **settings['recipes']}
        done = {(row['task'], row['method'], row['seed']) for row in rows}
        jobs = [(t, m, s) for s in range(args.seeds) for t in args.tasks for m in args.methods]
        for job in tqdm([job for job in jobs if job not in done], desc='runs'):
            task = open_task(job[0], None, str(args.device), 0)
            rows.append(run(task, *job, recipes[job[0]]))
            if args.json is not None:
                write_result(args.json, 'depth', machine, settings, rows, job == jobs[-1])
    except KeyboardInterrupt:
        print('depth: interrupted; a rerun with the same --json continues.', file=sys.stderr)
        return 130
    except (ValueError, TypeError, KeyError, RuntimeError, OSError) as error:
        print(f'depth: {error}', file=sys.stderr)
        return 2
    print(table(rows))
    if args.plot is not None:
        plot(args.plot, rows)
    return 0


if __name__ == '__main__':
    sys.exit(main())
