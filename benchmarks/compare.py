"""Compare encodings: the same small ViT with each of them and with APE, one recipe, several seeds.

    python benchmarks/compare.py results                # directions and Fashion-MNIST, half an hour on 2 cores
    python benchmarks/compare.py results --budget 10    # fewer steps, so that it takes 10 minutes
    python benchmarks/compare.py results --tasks cifar100 --data-dir DIR

Results, plots and the state of unfinished runs are in the folder `results`. After an interruption, or for more
methods, seeds or tasks, run it again: what is there is not done twice. `--scale large`, the default with a GPU, takes
wider models, bfloat16 and torch.compile.
"""
import argparse
import functools
import importlib.util
import itertools
import multiprocessing
import os
import sys
import time
from concurrent.futures import FIRST_COMPLETED, ProcessPoolExecutor, wait
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Dict, Iterator, List, Optional, Sequence, Tuple

import torch
from comparison.direction import Direction
from comparison.images import Loaded, SmallImages
from comparison.recipe import RECIPES, Recipe
from comparison.report import plot_accuracy, plot_curves, tables
from comparison.training import POINTS, Training, build, run, test, test_rules
from machine import Row, describe, device_of, integer_from, read_result, summary, write_result

from timm_rope.small_data import NoImages

# in the order of table 2 of arXiv 2511.08368
METHODS = ('ape', 'axial', 'axial_learned', 'uniform', 'spherical', 'spherical_learned', 'mixed', 'liere')
MORE = ('spiral', 'none')
TASKS = tuple(RECIPES['small'])
RESULT = 'compare.json'
RESERVE = .85  # share of a budget that is planned for: other programs may need the machine, too


@dataclass(frozen=True)
class Job:
    """One run: everything a process needs to know."""
    task: str
    method: str
    seed: int
    recipe: Recipe
    device: str
    folder: Path
    data_dir: Optional[Path]
    data_workers: int
    deadline: Optional[float] = None  # seconds since the epoch

    @property
    def key(self) -> Tuple[str, str, int]:
        return self.task, self.method, self.seed

    @property
    def unfinished(self) -> Path:
        return self.folder / 'unfinished' / f'{self.task}-{self.method}-{self.seed}.pt'


@functools.lru_cache(maxsize=1)
def open_task(name: str, data_dir: Optional[Path], device: str, workers: int) -> Any:
    """The task, with its images in memory or found.

    Raises:
        NoImages, ValueError: There are none, or they are wrong.
    """
    where = torch.device(device)
    if name == 'direction':
        return Direction(where)
    if name in ('fashion', 'digits'):
        return SmallImages('fashion_mnist' if name == 'fashion' else name, data_dir, where)
    if data_dir is None:
        raise ValueError(f'the task {name} needs --data-dir, the folder with its images')
    return Loaded('torch/cifar100' if name == 'cifar100' else '', data_dir, where, workers)


def task_of(job: Job) -> Any:
    return open_task(job.task, job.data_dir, job.device, job.data_workers)


# -- one run

def start_worker(positions: Any) -> None:
    """Take a line for the progress bar and one core: so many small models are faster side by side than on all cores."""
    global position
    position = positions.get()
    torch.set_num_threads(1)


position = 0


def run_job(job: Job) -> Optional[Row]:
    """A row of results; None if the time was over before."""
    def late() -> bool:
        return job.deadline is not None and time.time() > job.deadline

    if late():
        return None
    row = run(
        task_of(job), job.method, job.seed, job.recipe, job.unfinished, late, position=position, leave=False,
        desc=f'{job.task} {job.method} {job.seed}')
    return None if row is None else dict(task=job.task, **row)


def seconds_of(job: Job, steps: int = 8) -> Tuple[float, float]:
    """Seconds of one step, and of all tests of a run, tried for a moment."""
    task, recipe = task_of(job), replace(job.recipe, steps=steps + 2)
    training = Training(build(job.method, task, recipe, 0), recipe)
    begin = 0.
    for images, labels in task.train_batches(0, 0, recipe.steps, recipe.batch_size, recipe.sizes[0]):
        if training.step == 2:  # warm
            begin = time.perf_counter()
        training.update(images, labels)
    training.mean_loss()  # waits for a GPU
    step = (time.perf_counter() - begin) / steps
    begin = time.perf_counter()
    few = min(job.recipe.test_images, 200)
    test(training.model, task, recipe.sizes[0], few)
    curve = (time.perf_counter() - begin) * min(1000, job.recipe.test_images) / few * POINTS
    begin = time.perf_counter()
    list(test_rules(training.model, task, replace(recipe, test_images=few)))
    return step, curve + (time.perf_counter() - begin) * job.recipe.test_images / few


# -- all runs

def within_budget(jobs: List[Job], minutes: float, workers: int, chosen: Dict[str, Recipe]) -> Dict[str, Recipe]:
    """Recipes with as many steps as fit: the same factor for all tasks, at most four.

    Args:
        jobs: All runs that are to be done.
        minutes: For all of them.
        workers: Runs at a time.
        chosen: Recipes of tasks that results are there for, which stay.

    Raises:
        ValueError: Not even a hundredth of the steps would fit.
    """
    fixed, variable = 0., 0.
    for (task, method), group in itertools.groupby(jobs, lambda job: (job.task, job.method)):
        some = list(group)
        step, tests = seconds_of(some[0])
        fixed += tests * len(some)
        if task in chosen:
            fixed += step * chosen[task].steps * len(some)
        else:
            variable += step * some[0].recipe.steps * len(some)
        print(f'{task} {method}: {1000 * step:.0f} ms a step, {tests:.0f} s of tests', flush=True)
    room = 60 * minutes * RESERVE * workers - fixed
    if not variable:
        return {}
    factor = min(4., room / variable)
    if factor < .01:
        need = (fixed + variable) / 60 / RESERVE / workers
        raise ValueError(
            f'--budget {minutes:g} is too short: tests and a hundredth of the steps take '
            f'{(fixed + .01 * variable) / 60 / RESERVE / workers:.1f} minutes, all steps {need:.0f} minutes.')
    return {
        job.task: replace(job.recipe, steps=max(POINTS, int(job.recipe.steps * factor))) for job in jobs
        if job.task not in chosen}


def results_of(jobs: List[Job], workers: int) -> Iterator[Optional[Row]]:
    """Rows as they are done; None for a run that the time did not suffice for.

    Raises:
        RuntimeError: A run failed; names it. Those under way are ended.
    """
    def named(job: Job, error: Exception) -> RuntimeError:
        return RuntimeError(f'{job.task} {job.method}, seed {job.seed}: {type(error).__name__}: {error}')

    if workers == 1:
        for job in jobs:
            try:
                row = run_job(job)
            except Exception as error:
                raise named(job, error) from error
            yield row
        return
    context = multiprocessing.get_context('spawn')
    positions = context.Queue()
    for number in range(workers):
        positions.put(number + 1)  # below the bar of all runs
    pool = ProcessPoolExecutor(workers, context, start_worker, (positions,))
    try:
        waiting = {pool.submit(run_job, job): job for job in jobs}
        while waiting:
            for future in wait(waiting, return_when=FIRST_COMPLETED).done:
                job = waiting.pop(future)
                try:
                    row = future.result()
                except Exception as error:
                    raise named(job, error) from error
                yield row
    except BaseException:  # an interruption, too
        processes = list((pool._processes or {}).values())
        pool.shutdown(wait=False, cancel_futures=True)
        for process in processes:
            process.terminate()
        raise
    pool.shutdown()


def read_earlier(path: Path) -> Tuple[Dict[str, Any], List[Row]]:
    """Tasks and rows of a results file, none if there is no file.

    Raises:
        ValueError: It is something else.
    """
    if not path.exists():
        return {}, []
    found = read_result(path, partial=True)
    if found['benchmark'] != 'compare' or not isinstance(found['settings'].get('tasks'), dict):
        raise ValueError(f'{path} holds results of {found["benchmark"]!r}, not of compare. It was left as it is.')
    return found['settings']['tasks'], found['rows']


def recipe_of(about: Dict[str, Any]) -> Recipe:
    return Recipe(**{**about['recipe'], 'sizes': tuple(about['recipe']['sizes'])})


class Comparison:
    """All runs that were asked for, and the results there are.

    Args:
        args: Of the command.

    Raises:
        NoImages, ValueError: Something is wrong. Nothing has been trained or written.
    """

    def __init__(self, args: argparse.Namespace) -> None:
        self.args = args
        self.path = args.folder / RESULT
        self.tasks, self.rows = read_earlier(self.path)
        earlier = {name: recipe_of(about) for name, about in self.tasks.items()}
        wanted = {name: self._recipe(name, earlier.get(name)) for name in args.tasks}
        done = {(row['task'], row['method'], row['seed']) for row in self.rows}
        self.jobs = [
            Job(name, method, seed, wanted[name], str(args.device), args.folder, args.data_dir, args.data_workers)
            for name, method, seed in itertools.product(args.tasks, args.methods, range(args.seeds))
            if (name, method, seed) not in done]
        for name in args.tasks:
            task = open_task(name, args.data_dir, str(args.device), args.data_workers)
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
        recipe = replace(RECIPES[self.args.scale][name], **given)
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
            raise ValueError(f'{self.path} has results of {name} by another recipe: {listed}. Name another folder.')
        return recipe

    def run(self) -> int:
        """Do what is to be done; every result is written at once. Returns how many runs are left."""
        from tqdm import tqdm

        machine = describe(self.args.device)
        (self.args.folder / 'unfinished').mkdir(exist_ok=True)
        left = len(self.jobs)
        with tqdm(total=len(self.rows) + left, initial=len(self.rows), desc='all runs', unit='run', position=0,
                  dynamic_ncols=True) as bar:
            for row in results_of(self.jobs, self.args.workers):
                if row is None:
                    continue
                left -= 1
                self.rows.append(row)
                write_result(self.path, 'compare', machine, dict(tasks=self.tasks), self.rows, finished=not left)
                bar.update()
        return left

    def shown(self) -> List[Row]:
        """Rows in the order of methods and tasks, not of their end."""
        def order(row: Row) -> Tuple[int, int]:
            return (METHODS + MORE).index(row['method']), row['seed']

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


def parse(argv: Optional[Sequence[str]]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('folder', type=Path, metavar='FOLDER', help='for results; made if there is none')
    parser.add_argument('--tasks', nargs='+', choices=TASKS, metavar='NAME',
                        help=f'some of {", ".join(TASKS)} (default: direction and fashion, or digits)')
    parser.add_argument('--methods', nargs='+', default=list(METHODS), choices=METHODS + MORE, metavar='NAME',
                        help=f'some of {", ".join(METHODS)} (these are the default), {" and ".join(MORE)}')
    parser.add_argument('--seeds', type=integer_from(1), default=3, metavar='N', help='runs of each (default: 3)')
    parser.add_argument('--budget', type=positive, metavar='MINUTES',
                        help='choose the number of steps so that all runs fit; what does not is left for a rerun')
    parser.add_argument('--steps', type=integer_from(POINTS), metavar='N', help="updates (default: the recipe's)")
    parser.add_argument('--batch-size', type=integer_from(1), metavar='N', help="(default: the recipe's)")
    parser.add_argument('--sizes', nargs='+', type=integer_from(1), metavar='N',
                        help='image sizes, that of training first, every rule at the second (default: as the recipe)')
    parser.add_argument('--patch-size', type=integer_from(1), metavar='N', help="(default: the recipe's)")
    parser.add_argument('--data-dir', type=Path, metavar='DIR', help='with the files of the one task that needs some')
    parser.add_argument('--device', type=device_of, default='cuda' if torch.cuda.is_available() else 'cpu',
                        metavar='DEVICE', help='cpu or cuda (default: cuda where there is one)')
    parser.add_argument('--scale', choices=tuple(RECIPES), help='(default: large on a GPU, else small)')
    parser.add_argument('--workers', type=integer_from(1), metavar='N',
                        help='runs at a time (default: the cores; 1 on a GPU)')
    parser.add_argument('--data-workers', type=integer_from(0), default=0, metavar='N',
                        help='processes of each run that read images of cifar100 and folder (default: 0)')
    args = parser.parse_args(argv)
    args.scale = args.scale or ('large' if args.device.type == 'cuda' else 'small')
    args.workers = args.workers or (1 if args.device.type == 'cuda' else os.cpu_count() or 1)
    for name in ('tasks', 'methods', 'sizes'):
        if getattr(args, name) is not None:
            setattr(args, name, list(dict.fromkeys(getattr(args, name))))
    if args.sizes is not None:
        args.sizes = tuple(args.sizes)
        if len(args.sizes) < 2:
            parser.error('--sizes must be two or more, that of training and one that all rules are tried at')
    if args.budget is not None and args.steps is not None:
        parser.error('--budget chooses the steps: leave out --steps, or --budget')
    files = [name for name in args.tasks or () if name not in ('direction', 'digits')]
    if args.data_dir is not None and len(files) != 1:
        parser.error(f'--data-dir needs exactly one task that reads files in --tasks, got {", ".join(files) or "none"}')
    try:
        args.folder.mkdir(exist_ok=True)
    except OSError as error:
        parser.error(f'{args.folder} cannot be a folder for results: {error}')
    return args


def default_tasks(device: torch.device) -> List[str]:
    try:
        open_task('fashion', None, str(device), 0)
    except NoImages as error:
        print(f'{error}\nTaking the digits instead.', file=sys.stderr)
        return ['direction', 'digits']
    return ['direction', 'fashion']


def main(argv: Optional[Sequence[str]] = None) -> int:
    args = parse(argv)
    print(summary(describe(args.device)), flush=True)
    try:
        args.tasks = args.tasks or default_tasks(args.device)
        comparison = Comparison(args)
    except (NoImages, ValueError) as error:
        print(f'compare: {error}', file=sys.stderr)
        return 2
    try:
        left = comparison.run()
    except KeyboardInterrupt:
        print(f'compare: interrupted. {len(comparison.rows)} runs are in {comparison.path}, a rerun continues.',
              file=sys.stderr)
        return 130
    except (RuntimeError, OSError) as error:
        print(f'compare: {error}\n{len(comparison.rows)} runs are in {comparison.path}.', file=sys.stderr)
        return 1
    rows = comparison.shown()
    print(tables(rows, comparison.tasks))
    if importlib.util.find_spec('matplotlib') is None:
        print("\nNo plots: pip install 'timm_rope[bench]'.")
    else:
        plot_accuracy(args.folder / 'accuracy.png', rows, comparison.tasks)
        plot_curves(args.folder / 'curves.png', rows, comparison.tasks)
    if left:
        print(f'The time is over, {left} runs are left: a rerun continues.')
    return 0


if __name__ == '__main__':
    sys.exit(main())
