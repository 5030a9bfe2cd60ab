"""How many steps fit into the minutes there are."""
import itertools
import time
from dataclasses import replace
from typing import Dict, List, Tuple

from .jobs import Job, task_of
from .recipe import Recipe
from .training import CURVE_IMAGES, POINTS, Training

RESERVE = .85  # share of a budget that is planned for: other programs may need the machine, too
TRIED = 200  # test images


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


def seconds_of(job: Job, steps: int = 8) -> Tuple[float, float]:
    """Seconds of one step, and of all tests of a run, tried for a moment."""
    task, recipe = task_of(job), replace(job.recipe, steps=steps + 2)
    training = Training(task.build(job.method, recipe, 0), recipe, task)
    begin = 0.
    for images, labels in task.train_batches(0, 0, recipe.steps, recipe.batch_size, recipe.sizes[0]):
        if training.step == 2:  # warm
            begin = time.perf_counter()
        training.update(images, labels)
    training.mean_loss()  # waits for a GPU
    step = (time.perf_counter() - begin) / steps
    begin = time.perf_counter()
    few = min(job.recipe.test_images, TRIED)
    task.score(training.model, replace(recipe, test_images=few))
    curve = (time.perf_counter() - begin) * min(CURVE_IMAGES, job.recipe.test_images) / few * POINTS
    begin = time.perf_counter()
    list(task.tests(training.model, replace(recipe, test_images=few)))
    return step, curve + (time.perf_counter() - begin) * job.recipe.test_images / few
