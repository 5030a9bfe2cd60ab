"""What the benchmarks share: the machine they ran on, files of results, checks of the command line."""
import argparse
import json
import os
import platform
import subprocess
import time
from pathlib import Path
from typing import Any, Callable, Dict, List, NoReturn, Sequence

import timm
import torch

import timm_rope
from timm_rope.cli._common import integer_from, output_file, write_whole

ROOT = Path(__file__).resolve().parent.parent
FORMAT = 'timm_rope benchmark 1'
PRECISIONS = ('fp32', 'bf16-autocast', 'bf16')
Row = Dict[str, Any]


# -- the machine

def describe(device: torch.device) -> Dict[str, Any]:
    """Machine, versions and commit, as they stand beside every result."""
    return dict(
        device='cpu' if device.type == 'cpu' else torch.cuda.get_device_name(device), cpu=_cpu_name(),
        cores=os.cpu_count(), threads=torch.get_num_threads(), load=os.getloadavg()[0],
        python=platform.python_version(), torch=torch.__version__, timm=timm.__version__,
        timm_rope=timm_rope.__version__, commit=_commit(), kernel=os.environ.get('TIMM_ROPE_KERNEL') or 'auto')


def _cpu_name() -> str:
    try:
        lines = Path('/proc/cpuinfo').read_text().splitlines()
    except OSError:
        return platform.processor()
    return next((line.split(': ')[1] for line in lines if line.startswith('model name')), platform.processor())


def _commit() -> str:
    """Commit of the source, with '-dirty' if files are changed; 'unknown' without git or its history."""
    try:
        done = subprocess.run(
            ['git', '-C', str(ROOT), 'describe', '--always', '--dirty', '--abbrev=12'], capture_output=True, text=True)
    except OSError:
        return 'unknown'
    return done.stdout.strip() or 'unknown'


def summary(machine: Dict[str, Any]) -> str:
    """The machine in one line."""
    where = machine['cpu'] if machine['device'] == 'cpu' else machine['device']
    return (
        f'{where}, {machine["threads"]} CPU threads, load {machine["load"]:.1f}, python {machine["python"]}, '
        f'torch {machine["torch"]}, timm {machine["timm"]}, timm_rope {machine["timm_rope"]}, '
        f'commit {machine["commit"]}, kernel {machine["kernel"]}')


# -- running

def autocast(device: torch.device, precision: str) -> torch.autocast:
    return torch.autocast(device.type, torch.bfloat16, enabled=precision == 'bf16-autocast')


def timed(step: Callable[[], Any], device: torch.device, steps: int) -> float:
    """Seconds of one step, the mean of several in a row; on a GPU by its own clock, gaps between kernels included."""
    if device.type == 'cuda':
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda.synchronize(device)
        start.record()
        for _ in range(steps):
            step()
        end.record()
        torch.cuda.synchronize(device)
        return start.elapsed_time(end) / 1000 / steps
    begin = time.perf_counter()
    for _ in range(steps):
        step()
    return (time.perf_counter() - begin) / steps


def in_turns(
        steps: Dict[str, Callable[[], Any]], device: torch.device, rounds: int, repeat: int,
) -> Dict[str, List[float]]:
    """Seconds of every step, one figure per round.

    All steps run in every round, in an order that alternates, so that what else the machine does meets all of them.
    A first round warms up and is not counted.
    """
    seconds: Dict[str, List[float]] = {name: [] for name in steps}
    for i in range(rounds + 1):
        for name in steps if i % 2 else reversed(steps):
            figure = timed(steps[name], device, repeat)
            if i:
                seconds[name].append(figure)
    return seconds


# -- the command line

def device_of(text: str) -> torch.device:
    if text not in ('cpu', 'cuda'):
        raise argparse.ArgumentTypeError(f'must be cpu or cuda, got {text!r}')
    if text == 'cuda' and not torch.cuda.is_available():
        raise argparse.ArgumentTypeError('torch finds no CUDA device here')
    return torch.device(text)


def add_common(parser: argparse.ArgumentParser, rounds: int = 0) -> None:
    """Options of every benchmark; --rounds where there are any."""
    default = 'cuda' if torch.cuda.is_available() else 'cpu'
    parser.add_argument('--device', type=device_of, default=default, metavar='DEVICE',
                        help='cpu or cuda (default: cuda where there is one)')
    parser.add_argument('--threads', type=integer_from(1), metavar='N', help="CPU threads (default: torch's)")
    if rounds:
        parser.add_argument('--rounds', type=integer_from(1), default=rounds, metavar='N',
                            help=f'rounds in which all take turns (default: {rounds})')
    parser.add_argument('--json', type=output_file, metavar='FILE', help='write the results to FILE, too')


# -- results

def write_result(
        path: Path, benchmark: str, machine: Dict[str, Any], settings: Dict[str, Any], rows: Sequence[Row],
        finished: bool,
) -> None:
    """Write a result, so that a reader finds the whole file or the one before."""
    content = dict(
        format=FORMAT, benchmark=benchmark, finished=finished, machine=machine, settings=settings, rows=list(rows))
    write_whole(path, json.dumps(content, indent=1) + '\n')


def read_result(path: Path, partial: bool = False) -> Dict[str, Any]:
    """Read a result.

    Raises:
        ValueError: The file is none, or its benchmark did not finish and `partial` is False.
    """
    def refuse(reason: str) -> NoReturn:
        raise ValueError(f'{path} is no result of these benchmarks: {reason}.')

    try:
        content = json.loads(path.read_text())
    except OSError as error:
        refuse(str(error))
    except ValueError as error:
        refuse(f'not JSON ({error})')
    if not isinstance(content, dict) or content.get('format') != FORMAT:
        refuse(f'it does not say "format": "{FORMAT}"')
    missing = {'benchmark', 'finished', 'machine', 'settings', 'rows'} - set(content)
    if missing:
        refuse(f'it lacks {", ".join(sorted(missing))}')
    if not content['finished'] and not partial:
        raise ValueError(
            f'{path} is unfinished, its benchmark was stopped after {len(content["rows"])} rows: run it again, or take '
            f'what is there with --partial.')
    return content
