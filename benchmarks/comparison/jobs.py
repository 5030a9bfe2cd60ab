"""The runs of a comparison: what one is, and many of them side by side, each in a process with one core."""
import functools
import multiprocessing
import signal
import threading
import time
from concurrent.futures import FIRST_COMPLETED, ProcessPoolExecutor, wait
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Callable, Dict, Iterator, List, Optional

import torch
from tqdm import tqdm

from .direction import Direction
from .images import Loaded, SmallImages
from .photos import Photos
from .recipe import Recipe
from .training import run

Row = Dict[str, Any]
_position = 1  # line of the progress bar of this process, below the one of all runs


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
        fashion = name == 'fashion'
        return SmallImages('fashion_mnist' if fashion else name, data_dir if fashion else None, where)
    if name == 'photos':
        return Photos(data_dir, where)
    if data_dir is None:
        raise ValueError(f'the task {name} needs --data-dir, the folder with its images')
    return Loaded('torch/cifar100' if name == 'cifar100' else '', data_dir, where, workers)


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
    opener: Callable[..., Any] = open_task  # makes the task, in the process that runs it

    @property
    def unfinished(self) -> Path:
        return self.folder / 'unfinished' / f'{self.task}-{self.method}-{self.seed}.pt'


def task_of(job: Job) -> Any:
    return job.opener(job.task, job.data_dir, job.device, job.data_workers)


def run_job(job: Job) -> Optional[Row]:
    """A row of results; None if the time was over before."""
    def late() -> bool:
        return job.deadline is not None and time.time() > job.deadline

    if late():
        return None
    row = run(
        task_of(job), job.method, job.seed, job.recipe, job.unfinished, late, position=_position, leave=False,
        desc=f'{job.task} {job.method} {job.seed}')
    return None if row is None else dict(task=job.task, **row)


def _start_worker(positions: Any) -> None:
    """Take a line for the progress bar and one core: many small models are faster side by side than on all cores."""
    global _position
    _position = positions.get()
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # a terminal sends it to all; the process of the command ends this one
    tqdm.set_lock(threading.RLock())  # its own is a semaphore, which a process that is ended leaves behind
    torch.set_num_threads(1)


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
    pool = ProcessPoolExecutor(workers, context, _start_worker, (positions,))
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
