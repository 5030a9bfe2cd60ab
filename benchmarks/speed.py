"""Time of whole models against the first one, in one process, in rounds that take turns.

    python benchmarks/speed.py                                      # ViT-S against timm's deit3_small, batch 8
    python benchmarks/speed.py swin_tiny_patch4_window7_224 swin_tiny_rope_axial swin_tiny_rope_mixed --json FILE
    python benchmarks/speed.py --precision bf16-autocast bf16 --batch 64 256 --size 224 512 --run eager compile

Every option that takes several values multiplies the settings. A training step is forward and backward of the mean
square of the logits, without an optimizer. The ratio is the median of the ratios of single rounds, in brackets their
quartiles. Beside it:

* bytes per element: what a block reads and writes more than a block of the first model, by the tensors that go in and
  out of torch's operations, for each element of q and k. One float32 pass over them, read and written, is 8. Eager
  only; on a GPU not for our own models, whose kernels are launched past the counter, unless TIMM_ROPE_KERNEL=formula.
* memory: on a GPU the peak of a step above what all the models hold already; on a CPU, in training, the bytes kept for
  the backward pass, which need no other process. `memory.py` measures the peak there.
"""
import argparse
import gc
import itertools
import os
import statistics
import sys
import warnings
from typing import Any, Callable, Dict, List, Optional

import torch
from counting import Traffic, per_block, saved_for_backward
from machine import (
    PRECISIONS,
    Row,
    add_common,
    autocast,
    describe,
    in_turns,
    integer_from,
    summary,
    timed,
    write_result,
)
from peers import Spec, build, check_models, model_spec, parse_options, tokens_of
from torch import nn

from timm_rope import list_ropes

UNIT = 'deit3_small_patch16_224'
MODELS = [
    UNIT, *(f'vit_small_rope_{name}' for name in list_ropes()),
    'vit_small_patch16_rope_224', 'vit_small_patch16_rope_mixed_224',
    'naive:vit_small_rope_axial', 'naive:vit_small_rope_mixed']
MODES, RUNS = ('eval', 'train'), ('eager', 'compile')
Setting = Dict[str, Any]


def make_step(model: Callable[[torch.Tensor], torch.Tensor], module: nn.Module, images: torch.Tensor,
              setting: Setting) -> Callable[[], None]:
    """One step of the setting; `model` is the module or what was compiled from it."""
    def evaluate() -> None:
        with torch.inference_mode(), autocast(images.device, setting['precision']):
            model(images)

    def train() -> None:
        module.zero_grad()
        with autocast(images.device, setting['precision']):
            logits = model(images)
        logits.float().square().mean().backward()

    module.train(setting['mode'] == 'train')
    return train if setting['mode'] == 'train' else evaluate


class Contestant:
    """One model in one setting, built and warmed up."""

    def __init__(self, spec: Spec, images: torch.Tensor, setting: Setting, kwargs: Dict[str, Any]) -> None:
        self.spec, self.images, self.setting, self.kwargs = spec, images, setting, kwargs
        self.module = self.make()
        compiled = setting['run'] == 'compile'
        model = torch.compile(self.module, dynamic=False) if compiled else self.module
        self.step = make_step(model, self.module, images, setting)
        seconds = timed(self.step, images.device, 1)
        self.compile_seconds = seconds if compiled else None
        self.memory = self.memory_of_step()

    def make(self, **kwargs: Any) -> nn.Module:
        dtype = torch.bfloat16 if self.setting['precision'] == 'bf16' else torch.float32
        return build(self.spec, self.setting['size'], self.images.device, dtype, **{**self.kwargs, **kwargs})

    def memory_of_step(self) -> Optional[int]:
        if self.images.device.type == 'cuda':
            self.module.zero_grad()
            torch.cuda.reset_peak_memory_stats()
            before = torch.cuda.memory_allocated()
            self.step()
            torch.cuda.synchronize()
            return torch.cuda.max_memory_allocated() - before
        if self.setting['mode'] == 'eval' or self.setting['run'] == 'compile':
            return None
        with saved_for_backward(self.module.parameters()) as count:
            self.step()
        return count()

    def bytes_per_block(self) -> Optional[int]:
        """Bytes that one block reads and writes in a step, None where they cannot be counted."""
        hidden = (
            self.images.device.type == 'cuda' and getattr(self.module, 'rope', None) is not None
            and type(self.module).__module__.startswith('timm_rope.')
            and os.environ.get('TIMM_ROPE_KERNEL') != 'formula')
        if self.setting['run'] == 'compile' or tokens_of(self.module) is None or hidden:
            return None

        def count(model: nn.Module) -> int:
            step = make_step(model, model, self.images, self.setting)
            step()  # fills the cache of payloads
            with Traffic() as traffic:
                step()
            return traffic.bytes

        return per_block(lambda depth: self.make(depth=depth), count)


def measure(specs: List[Spec], setting: Setting, args: argparse.Namespace, kwargs: Dict[str, Any]) -> List[Row]:
    """Rows of one setting; a model that fails has its error in its row, and ratios need the first model."""
    dtype = torch.bfloat16 if setting['precision'] == 'bf16' else torch.float32
    images = torch.randn(setting['batch'], 3, setting['size'], setting['size'], device=args.device, dtype=dtype)
    contestants: Dict[str, Contestant] = {}
    errors: Dict[str, str] = {}
    for spec in specs:
        try:
            contestants[spec.text] = Contestant(spec, images, setting, kwargs)
        except Exception as error:  # one that does not fit, or cannot be compiled, must not end the run
            errors[spec.text] = f'{type(error).__name__}: {str(error).strip().partition(chr(10))[0]}'
    seconds = in_turns({name: c.step for name, c in contestants.items()}, args.device, args.rounds, args.steps)
    unit = contestants.get(specs[0].text)
    unit_bytes = unit.bytes_per_block() if unit else None
    rows = []
    for spec in specs:
        row: Row = dict(setting, model=spec.text, error=errors.get(spec.text))
        if spec.text in contestants:
            contestant = contestants[spec.text]
            row.update(
                milliseconds=1000 * statistics.median(seconds[spec.text]), seconds=seconds[spec.text],
                memory_bytes=contestant.memory, compile_seconds=contestant.compile_seconds)
            if unit is not None:
                ratios = [ours / base for ours, base in zip(seconds[spec.text], seconds[unit.spec.text])]
                row.update(ratio=statistics.median(ratios), quartiles=quartiles(ratios))
            moved = contestant.bytes_per_block() if unit_bytes is not None and contestant is not unit else None
            if moved is not None and unit_bytes is not None:
                tokens, channels = tokens_of(contestant.module)
                row['bytes_per_element'] = (moved - unit_bytes) / (2 * setting['batch'] * tokens * channels)
        rows.append(row)
    return rows


def quartiles(values: List[float]) -> List[float]:
    if len(values) == 1:
        return values * 2
    low, _, high = statistics.quantiles(values, n=4, method='inclusive')
    return [low, high]


def format_row(row: Row) -> str:
    where = (
        f'{row["mode"]:<6}{row["precision"]:<14}{row["run"]:<8}{row["batch"]:>4} x {row["size"]:<5}{row["model"]:<36}')
    if row['error']:
        return f'{where} failed: {row["error"]}'
    text = f'{where}{row["milliseconds"]:>9.2f} ms'
    if 'ratio' in row:
        text += f'   {row["ratio"]:.3f} [{row["quartiles"][0]:.3f}, {row["quartiles"][1]:.3f}]'
    if 'bytes_per_element' in row:
        text += f'  {row["bytes_per_element"]:6.1f} B/element'
    if row['memory_bytes'] is not None:
        text += f'  {row["memory_bytes"] / 2 ** 20:,.0f} MiB'
    if row['compile_seconds'] is not None:
        text += f'  compiled in {row["compile_seconds"]:.0f} s'
    return text


def parse(argv: Optional[List[str]] = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('models', nargs='*', type=model_spec, metavar='MODEL',
                        help=f'NAME[,ARGUMENT=VALUE ...], the first is the unit (default: {" ".join(MODELS)})')
    parser.add_argument('--mode', nargs='+', choices=MODES, default=list(MODES), help='(default: both)')
    parser.add_argument('--precision', nargs='+', choices=PRECISIONS, help='(default: fp32; bf16 on a GPU)')
    parser.add_argument('--run', nargs='+', choices=RUNS, default=['eager'], help='(default: eager)')
    parser.add_argument('--batch', nargs='+', type=integer_from(1), metavar='N', help='(default: 8; 256 on a GPU)')
    parser.add_argument('--size', nargs='+', type=integer_from(1), default=[224], metavar='PIXELS',
                        help='(default: 224)')
    parser.add_argument('--steps', type=integer_from(1), metavar='N',
                        help='steps in a row for one figure (default: 1; 10 on a GPU)')
    parser.add_argument('--model-args', type=lambda text: parse_options(f',{text}').options, default={},
                        metavar='ARGUMENT=VALUE,...', help='for all models')
    add_common(parser, rounds=10)
    args = parser.parse_args(argv)
    gpu = args.device.type == 'cuda'
    args.models = args.models or [model_spec(name) for name in MODELS]
    args.precision = args.precision or ['bf16' if gpu else 'fp32']
    args.batch = args.batch or [256 if gpu else 8]
    args.steps = args.steps or (10 if gpu else 1)
    texts = [spec.text for spec in args.models]
    if len(set(texts)) < len(texts):
        parser.error(f'a model is given twice: {" ".join(texts)}')
    try:
        check_models(args.models, args.size, **args.model_args)
    except ValueError as error:
        parser.error(str(error))
    return args


def main(argv: Optional[List[str]] = None) -> None:
    warnings.simplefilter('ignore')
    args = parse(argv)
    if args.threads:
        torch.set_num_threads(args.threads)
    # the models share their classes' code; beyond the limit torch would go on in eager mode without a word
    torch._dynamo.config.recompile_limit = 1000
    machine = describe(args.device)
    settings = dict(rounds=args.rounds, steps=args.steps, models=[spec.text for spec in args.models],
                    model_args=args.model_args)
    print(summary(machine), flush=True)
    rows: List[Row] = []
    combinations = list(itertools.product(args.run, args.size, args.batch, args.precision, args.mode))
    for i, (run, size, batch, precision, mode) in enumerate(combinations):
        setting = dict(mode=mode, precision=precision, run=run, batch=batch, size=size)
        for row in measure(args.models, setting, args, args.model_args):
            rows.append(row)
            print(format_row(row), flush=True)
        if args.json:
            write_result(args.json, 'speed', machine, settings, rows, finished=i == len(combinations) - 1)
        gc.collect()
        torch._dynamo.reset()
        if args.device.type == 'cuda':
            torch.cuda.empty_cache()


if __name__ == '__main__':
    sys.exit(main())
