"""The command of a comparison: earlier results, all runs that are asked for, tables and plots."""
import argparse
import importlib.util
import itertools
import os
import sys
import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Callable, Dict, List, Optional, Sequence, Tuple

import torch
from machine import Row, describe, device_of, integer_from, read_result, summary, write_result
from tqdm import tqdm

from timm_rope.cli.demo.images import NoImages

from .budget import within_budget
from .images import steps_per_epoch
from .jobs import Job, results_of
from .recipe import Recipe, read_recipe
from .training import POINTS


@dataclass(frozen=True)
class Benchmark:
    """What one comparison has that the others have not.

    Attributes:
        name: In the results, and their file is called NAME.json.
        help: Of the command.
        recipes: By scale, 'small' and 'large', and task.
        methods: Those that are taken if none are named, in the order of tables.
        more: Those that have to be named.
        made_up: Tasks that need no files.
        default_tasks: Taken if none are named, by device.
        tasks_named: The same in words.
        opener: Makes a task; arguments as `jobs.open_task`.
        tables: Of rows and tasks.
        plots: Functions of a path, rows and tasks, by name of the file.
    """
    name: str
    help: str
    recipes: Dict[str, Dict[str, Recipe]]
    methods: Tuple[str, ...]
    more: Tuple[str, ...]
    made_up: Tuple[str, ...]
    default_tasks: Callable[[torch.device], List[str]]
    tasks_named: str
    opener: Callable[..., Any]
    tables: Callable[..., str]
    plots: Dict[str, Callable[..., None]]


# -- earlier results

def read_earlier(bench: Benchmark, path: Path) -> Tuple[Dict[str, Any], List[Row]]:
    """Tasks and rows of a results file, none if there is no file.

    Raises:
        ValueError: It is something else, or of a version with other recipes or methods.
    """
    if not path.exists():
        return {}, []
    found = read_result(path, partial=True)
    if found['benchmark'] != bench.name or not isinstance(found['settings'].get('tasks'), dict):
        raise ValueError(f'{path} holds results of {found["benchmark"]!r}, not of {bench.name}. It was left as it is.')
    tasks, rows = found['settings']['tasks'], found['rows']
    try:
        for about in tasks.values():
            recipe_of(about)
        methods = {row['method'] for row in rows} - set(bench.methods + bench.more)
        unknown = methods | {row['task'] for row in rows} - set(tasks)
    except (AttributeError, KeyError, TypeError) as error:
        reason = f'{type(error).__name__}: {error}'
        raise ValueError(f'{path} is of another version of {bench.name} ({reason}). Name another folder.') from None
    if unknown:
        raise ValueError(f'{path} has results of {", ".join(sorted(unknown))}, unknown here. Name another folder.')
    return tasks, rows


def recipe_of(about: Dict[str, Any]) -> Recipe:
    return read_recipe(about['recipe'])


# -- all runs

class Comparison:
    """All runs that were asked for, and the results there are.

    Args:
        bench: Which comparison.
        args: Of the command.

    Raises:
        NoImages, ValueError: Something is wrong. Nothing has been trained or written.
    """

    def __init__(self, bench: Benchmark, args: argparse.Namespace) -> None:
        self.bench, self.args = bench, args
        self.path = args.folder / f'{bench.name}.json'
        self.unfinished = args.folder / 'unfinished'
        self.tasks, self.rows = read_earlier(bench, self.path)
        if not self.rows and not any(self.unfinished.glob('*.pt')):
            self.tasks = {}  # nothing came of it
        earlier = {name: recipe_of(about) for name, about in self.tasks.items()}
        wanted = {name: self._recipe(name, earlier.get(name)) for name in args.tasks}
        done = {(row['task'], row['method'], row['seed']) for row in self.rows}
        self.jobs = [
            Job(name, method, seed, wanted[name], str(args.device), args.folder, args.data_dir, args.data_workers,
                opener=bench.opener)
            for name, method, seed in itertools.product(args.tasks, args.methods, range(args.seeds))
            if (name, method, seed) not in done]
        for name in args.tasks:
            task = bench.opener(name, args.data_dir, str(args.device), args.data_workers)
            steps_per_epoch(task.train_count, wanted[name].batch_size)
            if hasattr(task, 'check_sizes'):  # not every size can be had from photographs
                task.check_sizes(wanted[name].sizes)
            about = dict(about=task.describe(), scale=args.scale, recipe=asdict(wanted[name]))
            before = self.tasks.setdefault(name, about)
            if {**before, 'recipe': None} != {**about, 'recipe': None}:
                raise ValueError(
                    f'{self.path} has results of {name} with {before["about"]}, scale {before["scale"]}; now it is '
                    f'{about["about"]}, scale {about["scale"]}. Name another folder.')
        if args.budget is not None and self.jobs:
            for name, recipe in within_budget(self.jobs, args.budget, args.workers, earlier).items():
                self.tasks[name]['recipe'] = asdict(recipe)
            deadline = time.time() + 60 * args.budget
            self.jobs = [
                replace(job, recipe=recipe_of(self.tasks[job.task]), deadline=deadline) for job in self.jobs]
        # all seeds of a method last: an interrupted comparison has one seed of every method first
        self.jobs.sort(key=lambda job: (job.seed, args.tasks.index(job.task), args.methods.index(job.method)))

    def _recipe(self, name: str, earlier: Optional[Recipe]) -> Recipe:
        given: Dict[str, Any] = {
            key: getattr(self.args, key) for key in ('steps', 'batch_size', 'sizes', 'patch_size')
            if getattr(self.args, key) is not None}
        recipe = replace(self.bench.recipes[self.args.scale][name], **given)
        for size in recipe.sizes:
            if size % recipe.patch_size:
                raise ValueError(
                    f'the sizes must be multiples of the patch size {recipe.patch_size}, got {size} for {name}: '
                    f'--sizes, --patch-size')
        if earlier is None:
            return recipe
        if self.args.steps is None:  # a budget may have changed it then
            recipe = replace(recipe, steps=earlier.steps)
        if recipe != earlier:
            differ = {k: (v, asdict(recipe)[k]) for k, v in asdict(earlier).items() if asdict(recipe)[k] != v}
            listed = '; '.join(f'{key} {there}, now {here}' for key, (there, here) in differ.items())
            raise ValueError(f'{self.path} has runs of {name} by another recipe: {listed}. Name another folder.')
        return recipe

    def run(self) -> int:
        """Do what is to be done; every result is written at once. Returns how many runs are left."""
        machine = describe(self.args.device)
        self.unfinished.mkdir(exist_ok=True)
        left = len(self.jobs)

        def write() -> None:
            write_result(self.path, self.bench.name, machine, dict(tasks=self.tasks), self.rows, finished=not left)

        if left:  # steps that a budget chose are known to a rerun even if no run comes to its end
            write()
        with tqdm(total=len(self.rows) + left, initial=len(self.rows), desc='all runs', unit='run', position=0,
                  dynamic_ncols=True) as bar:
            for row in results_of(self.jobs, self.args.workers):
                if row is None:
                    continue
                left -= 1
                self.rows.append(row)
                write()
                bar.update()
        return left

    def shown(self) -> List[Row]:
        """Rows in the order of methods and tasks, not of their end."""
        def order(row: Row) -> Tuple[int, int]:
            return (self.bench.methods + self.bench.more).index(row['method']), row['seed']

        return sorted(self.rows, key=order)


# -- the command

def positive(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = 0.
    if not 0 < value < float('inf'):
        raise argparse.ArgumentTypeError(f'must be a number of minutes above 0, got {text!r}')
    return value


def parse(bench: Benchmark, argv: Optional[Sequence[str]]) -> argparse.Namespace:
    tasks = tuple(bench.recipes['small'])
    parser = argparse.ArgumentParser(description=bench.help, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('folder', type=Path, metavar='FOLDER', help='for results; made if there is none')
    parser.add_argument('--tasks', nargs='+', choices=tasks, metavar='NAME',
                        help=f'some of {", ".join(tasks)} (default: {bench.tasks_named})')
    parser.add_argument('--methods', nargs='+', default=list(bench.methods), choices=bench.methods + bench.more,
                        metavar='NAME',
                        help=f'some of {", ".join(bench.methods)} (these are the default), {", ".join(bench.more)}')
    parser.add_argument('--seeds', type=integer_from(1), default=3, metavar='N', help='runs of each (default: 3)')
    parser.add_argument('--budget', type=positive, metavar='MINUTES',
                        help='choose the number of steps so that all runs fit; what does not is left for a rerun')
    parser.add_argument('--steps', type=integer_from(POINTS), metavar='N', help="updates (default: the recipe's)")
    parser.add_argument('--batch-size', type=integer_from(1), metavar='N', help="(default: the recipe's)")
    parser.add_argument('--sizes', nargs='+', type=integer_from(1), metavar='N',
                        help='image sizes, that of training first (default: as the recipe)')
    parser.add_argument('--patch-size', type=integer_from(1), metavar='N', help="(default: the recipe's)")
    parser.add_argument('--data-dir', type=Path, metavar='DIR', help='with the files of the one task that needs some')
    parser.add_argument('--device', type=device_of, default='cuda' if torch.cuda.is_available() else 'cpu',
                        metavar='DEVICE', help='cpu or cuda (default: cuda where there is one)')
    parser.add_argument('--scale', choices=tuple(bench.recipes), help='(default: large on a GPU, else small)')
    parser.add_argument('--workers', type=integer_from(1), metavar='N',
                        help='runs at a time (default: the cores; 1 on a GPU)')
    parser.add_argument('--data-workers', type=integer_from(0), default=0, metavar='N',
                        help='processes of each run that read images of --data-dir (default: 0)')
    args = parser.parse_args(argv)
    args.scale = args.scale or ('large' if args.device.type == 'cuda' else 'small')
    args.workers = args.workers or (1 if args.device.type == 'cuda' else os.cpu_count() or 1)
    for name in ('tasks', 'methods', 'sizes'):
        if getattr(args, name) is not None:
            setattr(args, name, list(dict.fromkeys(getattr(args, name))))
    if args.sizes is not None:
        args.sizes = tuple(args.sizes)
        if len(args.sizes) < 2:
            parser.error('--sizes must be two or more, that of training and larger ones')
    if args.budget is not None and args.steps is not None:
        parser.error('--budget chooses the steps: leave out --steps, or --budget')
    files = [name for name in args.tasks or () if name not in bench.made_up]
    if args.data_dir is not None and len(files) != 1:
        parser.error(f'--data-dir needs exactly one task that reads files in --tasks, got {", ".join(files) or "none"}')
    try:
        args.folder.mkdir(exist_ok=True)
    except OSError as error:
        parser.error(f'{args.folder} cannot be a folder for results: {error}')
    return args


def main(bench: Benchmark, argv: Optional[Sequence[str]] = None) -> int:
    args = parse(bench, argv)
    print(summary(describe(args.device)), flush=True)
    try:
        args.tasks = args.tasks or bench.default_tasks(args.device)
        comparison = Comparison(bench, args)
    except (NoImages, ValueError) as error:
        print(f'{bench.name}: {error}', file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(f'{bench.name}: interrupted before the first run.', file=sys.stderr)
        return 130
    except (RuntimeError, OSError) as error:
        print(f'{bench.name}: {error}', file=sys.stderr)
        return 1
    try:
        left = comparison.run()
    except KeyboardInterrupt:
        print(f'{bench.name}: interrupted. {len(comparison.rows)} runs are in {comparison.path}, a rerun continues.',
              file=sys.stderr)
        return 130
    except (RuntimeError, OSError) as error:
        print(f'{bench.name}: {error}\n{len(comparison.rows)} runs are in {comparison.path}.', file=sys.stderr)
        return 1
    rows = comparison.shown()
    print(bench.tables(rows, comparison.tasks))
    if importlib.util.find_spec('matplotlib') is None:
        print("\nNo plots: pip install 'timm_rope[bench]'.")
    else:
        for file, plot in bench.plots.items():
            plot(args.folder / file, rows, comparison.tasks)
    if left:
        print(f'The time is over. Runs that are left: {left}, a rerun continues.')
    return 0
