"""Memory of a training step against the first model: kept by each block for the backward pass, and the peak.

    python benchmarks/memory.py --json FILE
    python benchmarks/memory.py vit_small_ape vit_small_rope_mixed --batch 32 --precision bf16-autocast

* kept: bytes that autograd keeps from the forward pass of one block, in units of one tensor of tokens (batch, tokens,
  channels) in the precision of the step. Counted by the storages saved, exact and the same on every run.
* peak: of two training steps (forward and backward, no optimizer) with everything they need, weights and gradients
  included, above what the process had before the model was built. On a CPU the resident memory of a fresh process by
  Linux's account, one process for each model and round; on a GPU torch's own account of this one.
"""
import argparse
import gc
import multiprocessing
import statistics
import sys
import warnings
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from typing import Any, Dict, List, Optional

import torch
from counting import per_block, saved_for_backward
from machine import PRECISIONS, Row, add_common, describe, integer_from, summary, write_result
from peers import Spec, build, check_models, model_spec, parse_options, tokens_of
from speed import UNIT, make_step
from torch import nn

from timm_rope import list_ropes

MODELS = [
    UNIT, *(f'vit_small_rope_{name}' for name in list_ropes()),
    'vit_small_patch16_rope_mixed_224', 'naive:vit_small_rope_mixed']
STATUS, CLEAR = Path('/proc/self/status'), Path('/proc/self/clear_refs')
Setting = Dict[str, Any]


def make_images(setting: Setting) -> torch.Tensor:
    dtype = torch.bfloat16 if setting['precision'] == 'bf16' else torch.float32
    size = setting['size']
    return torch.randn(setting['batch'], 3, size, size, device=setting['device'], dtype=dtype)


def make_model(spec: Spec, images: torch.Tensor, setting: Setting, **kwargs: Any) -> nn.Module:
    return build(spec, setting['size'], images.device, images.dtype, **{**setting['model_args'], **kwargs})


def kept_by_block(spec: Spec, setting: Setting) -> Optional[float]:
    """Tensors of tokens that one block keeps for the backward pass; None if the model has no such blocks."""
    images = make_images(setting)

    def count(model: nn.Module) -> int:
        step = make_step(model, model, images, {**setting, 'mode': 'train'})
        step()  # fills the cache of payloads
        with saved_for_backward(model.parameters()) as kept:
            step()
        return kept()

    shape = tokens_of(make_model(spec, torch.empty(0, device='meta', dtype=images.dtype), setting))
    if shape is None:
        return None
    itemsize = 4 if setting['precision'] == 'fp32' else 2
    unit = setting['batch'] * shape[0] * shape[1] * itemsize
    return per_block(lambda depth: make_model(spec, images, setting, depth=depth), count) / unit


def train_twice(spec: Spec, setting: Setting) -> None:
    images = make_images(setting)
    model = make_model(spec, images, setting)
    step = make_step(model, model, images, {**setting, 'mode': 'train'})
    step()
    step()


def peak_of_process(spec: Spec, setting: Setting, threads: int) -> int:
    """Peak of resident memory above that of now, in bytes; for a process that has done nothing yet."""
    warnings.simplefilter('ignore')
    torch.set_num_threads(threads)
    CLEAR.write_text('5')  # the peak starts from here
    before = _resident('VmRSS')
    train_twice(spec, setting)
    return _resident('VmHWM') - before


def _resident(kind: str) -> int:
    return next(1024 * int(line.split()[1]) for line in STATUS.read_text().splitlines() if line.startswith(kind))


def peak(spec: Spec, setting: Setting) -> int:
    """Peak memory of training `spec`, in bytes.

    Raises:
        RuntimeError: The process died, as it does when memory runs out.
    """
    device = setting['device']
    if device.type == 'cuda':
        gc.collect()
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        train_twice(spec, setting)
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before
    # children of a server that has imported everything and computed nothing start in a moment, and from one state
    context = multiprocessing.get_context('forkserver')
    context.set_forkserver_preload(['timm', 'timm_rope.models.vit'])
    with ProcessPoolExecutor(1, mp_context=context) as pool:
        try:
            return pool.submit(peak_of_process, spec, setting, torch.get_num_threads()).result()
        except BrokenProcessPool:
            raise RuntimeError(f'the process that trained {spec.text} died, perhaps for want of memory') from None


def measure(specs: List[Spec], setting: Setting, rounds: int) -> List[Row]:
    if setting['device'].type == 'cuda':
        peak(specs[0], setting)  # the libraries take their workspace once
    peaks: Dict[str, List[int]] = {spec.text: [] for spec in specs}
    for _ in range(rounds):
        for spec in specs:
            peaks[spec.text].append(peak(spec, setting))
    unit = peaks[specs[0].text]
    return [
        dict(
            model=spec.text, precision=setting['precision'], batch=setting['batch'], size=setting['size'],
            kept_units=kept_by_block(spec, setting), peak_bytes=statistics.median(peaks[spec.text]),
            peaks=peaks[spec.text],
            peak_ratio=statistics.median(ours / base for ours, base in zip(peaks[spec.text], unit)))
        for spec in specs]


def format_row(row: Row) -> str:
    kept = '-' if row['kept_units'] is None else f'{row["kept_units"]:.2f}'
    return (
        f'{row["precision"]:<14}{row["batch"]:>4} x {row["size"]:<5}{row["model"]:<36}{kept:>7} kept per block   peak '
        f'{row["peak_bytes"] / 2 ** 20:8,.0f} MiB  {row["peak_ratio"]:.3f}')


def parse(argv: Optional[List[str]] = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('models', nargs='*', type=model_spec, metavar='MODEL',
                        help=f'NAME[,ARGUMENT=VALUE ...], the first is the unit (default: {" ".join(MODELS)})')
    parser.add_argument('--precision', nargs='+', choices=PRECISIONS, default=['fp32', 'bf16-autocast'],
                        help='(default: fp32 bf16-autocast)')
    parser.add_argument('--batch', type=integer_from(1), metavar='N', help='(default: 8; 256 on a GPU)')
    parser.add_argument('--size', type=integer_from(1), default=224, metavar='PIXELS', help='(default: 224)')
    parser.add_argument('--model-args', type=lambda text: parse_options(f',{text}').options, default={},
                        metavar='ARGUMENT=VALUE,...', help='for all models')
    add_common(parser, rounds=3)
    args = parser.parse_args(argv)
    args.models = args.models or [model_spec(name) for name in MODELS]
    args.batch = args.batch or (256 if args.device.type == 'cuda' else 8)
    if args.device.type == 'cpu' and not CLEAR.exists():
        parser.error("the peak on a CPU is read from Linux's /proc, which is not here")
    try:
        check_models(args.models, [args.size], **args.model_args)
    except ValueError as error:
        parser.error(str(error))
    return args


def main(argv: Optional[List[str]] = None) -> None:
    warnings.simplefilter('ignore')
    args = parse(argv)
    if args.threads:
        torch.set_num_threads(args.threads)
    machine = describe(args.device)
    settings = dict(rounds=args.rounds, models=[spec.text for spec in args.models], model_args=args.model_args)
    print(summary(machine), flush=True)
    rows: List[Row] = []
    for precision in args.precision:
        setting = dict(
            precision=precision, batch=args.batch, size=args.size, device=args.device, model_args=args.model_args)
        for row in measure(args.models, setting, args.rounds):
            rows.append(row)
            print(format_row(row), flush=True)
        if args.json:
            write_result(args.json, 'memory', machine, settings, rows, finished=precision == args.precision[-1])


if __name__ == '__main__':
    sys.exit(main())
