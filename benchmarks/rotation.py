"""The rotation alone, against a copy of queries and keys of the same size.

    python benchmarks/rotation.py
    python benchmarks/rotation.py mixed liere,block=64 --shapes 8x197 --dtype bf16 --routes auto formula --json FILE

Every encoding turns the packed projection (batch, tokens, 3 * heads * 64) by every route of `timm_rope.kernels`; 'took'
says which one auto, or a fallback, was. The copy reads and writes q and k once, as the rotation must:

* forward: time in copies, and the part of the copy's bandwidth it reaches (bytes of q and k read and written).
* training: forward and backward, with the gradient of a learned payload, less the same without a rotation; in copies.
  Below zero where splitting the projection without a rotation costs more than the route that does both.

Copy, rotations and routes take turns, so that each ratio is one of neighbours in time. Small sizes stay in the cache.
On a GPU each is recorded as a CUDA graph and replayed: the time is that of the GPU, not of Python, which takes longer
to launch most of them than they take to run.
"""
import argparse
import itertools
import os
import statistics
import sys
import warnings
from typing import Any, Callable, Dict, List, Optional, Tuple

import torch
from machine import Row, add_common, describe, in_turns, integer_from, summary, write_result
from peers import Spec, parse_options
from torch import Tensor

from timm_rope import create_rope, list_ropes
from timm_rope.kernels import ROUTES, VARIABLE, find_route, rotate, unpack
from timm_rope.positions.coordinates import square_grid

ENCODINGS = [*list_ropes(), 'liere,block=64']
DTYPES = dict(fp32=torch.float32, bf16=torch.bfloat16, fp16=torch.float16)
HEAD_DIM = 64


class Case:
    """One encoding, route and shape: two things to time."""

    def __init__(self, spec: Spec, route: str, shape: Tuple[int, int], heads: int, like: Tensor) -> None:
        self.route, self.heads, (batch, tokens) = route, heads, shape
        grid, prefix = grid_of(tokens)
        rope = create_rope(spec.name, HEAD_DIM, heads, 1, grid, device=like.device, **spec.options)
        self.rotation, payload = rope.rotation, rope(grid, prefix)[0].detach()
        self.payload = payload.clone().requires_grad_(rope.learned)
        self.qkv = torch.randn(batch, tokens, 3 * heads * HEAD_DIM, device=like.device, dtype=like.dtype)
        self.leaf = self.qkv.clone().requires_grad_()
        # in the layout in which attention hands them back
        self.grads = [torch.randn(batch, tokens, heads, HEAD_DIM, device=like.device, dtype=like.dtype).transpose(1, 2)
                      for _ in range(3)]
        with chosen(route), torch.no_grad():
            module = find_route(self.qkv, self.payload, self.rotation, heads)
            rotate(self.qkv, self.payload, self.rotation, heads)
        self.took = 'formula' if module is None else module.NAME

    def forward(self) -> None:
        with chosen(self.route), torch.no_grad():
            rotate(self.qkv, self.payload, self.rotation, self.heads)

    def training(self) -> None:
        with chosen(self.route):
            out = rotate(self.leaf.clone(), self.payload, self.rotation, self.heads)
            inputs = [self.leaf, self.payload] if self.payload.requires_grad else [self.leaf]
            torch.autograd.grad(out, inputs, self.grads)

    def training_without(self) -> None:
        torch.autograd.grad(unpack(self.leaf.clone(), self.heads), [self.leaf], self.grads)


class chosen:
    """TIMM_ROPE_KERNEL as long as this lasts; cheaper than a generator, as it runs inside the clock."""

    def __init__(self, route: str) -> None:
        self.route = route

    def __enter__(self) -> None:
        self.before = os.environ.get(VARIABLE)
        os.environ[VARIABLE] = self.route

    def __exit__(self, *error: Any) -> None:
        if self.before is None:
            del os.environ[VARIABLE]
        else:
            os.environ[VARIABLE] = self.before


def without_python(step: Callable[[], Any], device: torch.device) -> Callable[[], Any]:
    """The same work as replays of a CUDA graph; on a CPU the step itself."""
    if device.type != 'cuda':
        return step
    side = torch.cuda.Stream(device)
    side.wait_stream(torch.cuda.current_stream(device))
    with torch.cuda.stream(side):
        for _ in range(2):
            step()
    torch.cuda.current_stream(device).wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    return graph.replay


def grid_of(tokens: int) -> Tuple[Tuple[int, int], int]:
    """Square grid of a number of tokens, and whether there is a class token in front of it."""
    for prefix in (0, 1):
        grid = square_grid(tokens - prefix)
        if grid is not None:
            return grid, prefix
    raise ValueError(f'{tokens} tokens are neither a square grid nor one with a class token')


def measure(args: argparse.Namespace, shape: Tuple[int, int], dtype: str) -> List[Row]:
    like = torch.empty(0, device=args.device, dtype=DTYPES[dtype])
    source = torch.randn(2, *shape, args.heads * HEAD_DIM, device=args.device, dtype=like.dtype)
    target = torch.empty_like(source)
    moved = 2 * source.numel() * source.element_size()
    rows = []
    for spec in args.encodings:
        cases: Dict[str, Case] = {}
        errors: Dict[str, str] = {}
        steps = {'copy': without_python(lambda: target.copy_(source), args.device)}
        for route in args.routes:
            try:
                case = Case(spec, route, shape, args.heads, like)
                forward, training, without = (
                    without_python(step, args.device) for step in (case.forward, case.training, case.training_without))
                training()
            except Exception as error:  # a route that cannot take this input says so
                errors[route] = f'{type(error).__name__}: {str(error).partition(chr(10))[0]}'
                continue
            cases[route] = case
            steps.setdefault('without', without)
            steps.update({f'{route} forward': forward, f'{route} training': training})
        seconds = in_turns(steps, args.device, args.rounds, args.steps)
        for route in args.routes:
            row: Row = dict(encoding=spec.text, route=route, took=None, batch=shape[0], tokens=shape[1], dtype=dtype,
                            error=errors.get(route))
            if route in cases:
                forward_s, training_s = seconds[f'{route} forward'], seconds[f'{route} training']
                row.update(
                    took=cases[route].took, forward_ms=1000 * statistics.median(forward_s),
                    training_ms=1000 * statistics.median(training_s),
                    without_ms=1000 * statistics.median(seconds['without']),
                    copy_ms=1000 * statistics.median(seconds['copy']),
                    gigabytes_per_second=moved / statistics.median(forward_s) / 1e9,
                    forward_copies=statistics.median(a / b for a, b in zip(forward_s, seconds['copy'])),
                    training_copies=statistics.median(
                        (a - b) / c for a, b, c in zip(training_s, seconds['without'], seconds['copy'])))
                row['fraction_of_copy'] = 1 / row['forward_copies']
            rows.append(row)
    return rows


def format_row(row: Row) -> str:
    where = f'{row["encoding"]:<18}{row["route"]:<9}{row["batch"]:>4} x {row["tokens"]:<6}{row["dtype"]:<5}'
    if row['error']:
        return f'{where} failed: {row["error"]}'
    return (
        f'{where} took {row["took"]:<15} forward {row["forward_ms"]:8.3f} ms = {row["forward_copies"]:5.2f} copies, '
        f'{row["gigabytes_per_second"]:7.1f} GB/s = {row["fraction_of_copy"]:4.0%} of a copy   '
        f'training {row["training_copies"]:6.2f} copies')


def encoding_spec(text: str) -> Spec:
    spec = parse_options(text)
    try:
        create_rope(spec.name, HEAD_DIM, device='meta', **spec.options)
    except (TypeError, ValueError) as error:
        raise argparse.ArgumentTypeError(str(error)) from None
    return spec


def shape(text: str) -> Tuple[int, int]:
    batch, _, tokens = text.partition('x')
    if not (batch.isdecimal() and tokens.isdecimal() and int(batch)):
        raise argparse.ArgumentTypeError(f'must be BATCHxTOKENS such as 8x197, got {text!r}')
    try:
        grid_of(int(tokens))
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None
    return int(batch), int(tokens)


def parse(argv: Optional[List[str]] = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('encodings', nargs='*', type=encoding_spec, metavar='ENCODING',
                        help=f'NAME[,OPTION=VALUE ...] of {", ".join(list_ropes())} (default: {" ".join(ENCODINGS)})')
    parser.add_argument('--shapes', nargs='+', type=shape, metavar='BATCHxTOKENS',
                        help='(default: 8x197 2x4096; 8x197 256x197 16x4096 on a GPU)')
    parser.add_argument('--dtype', nargs='+', choices=DTYPES, help='(default: fp32; bf16 on a GPU)')
    parser.add_argument('--routes', nargs='+', choices=ROUTES, default=['auto', 'formula'],
                        help='values of TIMM_ROPE_KERNEL (default: auto formula)')
    parser.add_argument('--heads', type=integer_from(1), default=6, metavar='N', help='(default: 6)')
    parser.add_argument('--steps', type=integer_from(1), metavar='N',
                        help='steps in a row for one figure (default: 3; 20 on a GPU)')
    add_common(parser, rounds=15)
    args = parser.parse_args(argv)
    gpu = args.device.type == 'cuda'
    args.encodings = args.encodings or [parse_options(text) for text in ENCODINGS]
    args.shapes = args.shapes or ([(8, 197), (256, 197), (16, 4096)] if gpu else [(8, 197), (2, 4096)])
    args.dtype = args.dtype or ['bf16' if gpu else 'fp32']
    args.steps = args.steps or (20 if gpu else 3)
    return args


def main(argv: Optional[List[str]] = None) -> None:
    warnings.simplefilter('ignore')
    args = parse(argv)
    if args.threads:
        torch.set_num_threads(args.threads)
    machine = describe(args.device)
    settings = dict(rounds=args.rounds, steps=args.steps, heads=args.heads, head_dim=HEAD_DIM)
    print(summary(machine), flush=True)
    rows: List[Row] = []
    combinations = list(itertools.product(args.shapes, args.dtype))
    for i, (each, dtype) in enumerate(combinations):
        for row in measure(args, each, dtype):
            rows.append(row)
            print(format_row(row), flush=True)
        if args.json:
            write_result(args.json, 'rotation', machine, settings, rows, finished=i == len(combinations) - 1)


if __name__ == '__main__':
    sys.exit(main())
