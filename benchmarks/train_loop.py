"""A short training run with the loop of a stock script: does the loss fall, do learned frequencies learn.

    python benchmarks/train_loop.py
    python benchmarks/train_loop.py vit_tiny_rope_mixed --steps 500 --json FILE

timm's AdamW and cosine schedule, bfloat16 autocast, no gradient scaler. The images are made here: noise with one bright
patch, and the class is the quadrant it is in. All patches of an image being alike otherwise, a model that does not know
positions stays at one answer in four. The exit status is 1 if a model fails a check.
"""
import argparse
import sys
import time
import warnings
from typing import Any, Dict, List, Optional, Tuple

import timm
import torch
import torch.nn.functional as F
from machine import Row, add_common, autocast, describe, integer_from, summary, write_result
from peers import Spec, model_spec
from torch import Tensor, nn

from timm_rope import list_ropes
from timm_rope.cli._training import WEIGHT_DECAY, set_up

MODELS = [f'vit_tiny_rope_{name}' for name in list_ropes()]
# LayerScale starts at 1: from the 1e-4 of the entry points, a run this short gets nowhere
MODEL: Dict[str, Any] = dict(img_size=48, patch_size=8, depth=4, init_values=1., num_classes=4)
LEARNING_RATE = 1e-3
CHANCE = 1 / MODEL['num_classes']


def make_batch(size: int, generator: torch.Generator, device: torch.device) -> Tuple[Tensor, Tensor]:
    """Noisy images (size, 3, 48, 48) with one bright patch, and the quadrants the patches are in."""
    patch, side = MODEL['patch_size'], MODEL['img_size'] // MODEL['patch_size']
    row, column = torch.randint(side, (2, size), generator=generator)
    bright = F.one_hot(row * side + column, side * side).view(size, 1, side, side).float()
    images = .5 * torch.randn(size, 3, side * patch, side * patch, generator=generator)
    images += 2 * F.interpolate(bright, scale_factor=patch)
    return images.to(device), (2 * (2 * row // side) + 2 * column // side).to(device)


def learned_freqs(model: nn.Module) -> List[nn.Parameter]:
    """Learned frequencies of all rotary encodings in a model."""
    return [p for name, p in model.named_parameters() if name.endswith('freqs')]


def train(spec: Spec, steps: int, batch: int, device: torch.device) -> Row:
    """Train one model, test it on new images, and check both."""
    torch.manual_seed(0)
    model = timm.create_model(spec.name, **{**MODEL, **spec.options}).to(device, memory_format=torch.channels_last)
    optimizer, scheduler = set_up(model, steps, LEARNING_RATE)
    freqs = learned_freqs(model)
    initial = [p.detach().clone() for p in freqs]
    generator = torch.Generator().manual_seed(0)
    losses = []
    model.train()
    begin = time.perf_counter()
    for step in range(steps):
        images, labels = make_batch(batch, generator, device)
        with autocast(device, 'bf16-autocast'):
            loss = F.cross_entropy(model(images.contiguous(memory_format=torch.channels_last)), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        scheduler.step_update(step + 1)
        losses.append(loss.item())
    seconds = time.perf_counter() - begin

    model.eval()
    images, labels = make_batch(1024, generator, device)
    with torch.inference_mode(), autocast(device, 'bf16-autocast'):
        accuracy = (model(images).argmax(1) == labels).float().mean().item()
    tenth = max(1, steps // 10)
    row: Row = dict(
        model=spec.text, first_loss=sum(losses[:tenth]) / tenth, last_loss=sum(losses[-tenth:]) / tenth,
        accuracy=accuracy, images_per_second=steps * batch / seconds, losses=losses,
        freqs=sum(p.numel() for p in freqs), error=None)
    row['error'] = '; '.join(problems(row, freqs, initial)) or None
    return row


def problems(row: Row, freqs: List[nn.Parameter], initial: List[Tensor]) -> List[str]:
    """What is wrong with a run, one line each."""
    found = []
    if not all(loss == loss and abs(loss) < float('inf') for loss in row['losses']):
        found.append('a loss is not finite')
    if row['last_loss'] > .5 * row['first_loss']:
        found.append(f'the loss went from {row["first_loss"]:.3f} to {row["last_loss"]:.3f}, not below half')
    if row['accuracy'] < 2 * CHANCE:
        found.append(f'{row["accuracy"]:.0%} of new images are right, chance is {CHANCE:.0%}')
    for p, start in zip(freqs, initial):
        if p.grad is None:
            found.append('learned frequencies have no gradient')
            continue
        gradient = p.grad.abs().transpose(0, 1).flatten(1).amax(1)  # of each layer
        if not bool(torch.isfinite(gradient).all()) or not bool((gradient > 0).all()):
            found.append(f'gradients of the frequencies, layer by layer, are {gradient.tolist()}')
        if bool((p.detach() == start).all()):
            found.append('learned frequencies have not moved')
    return found


def format_row(row: Row) -> str:
    text = (
        f'{row["model"]:<32} loss {row["first_loss"]:.3f} -> {row["last_loss"]:.3f}   {row["accuracy"]:4.0%} right   '
        f'{row["freqs"]:>6} frequencies learned   {row["images_per_second"]:,.0f} images/s')
    return f'{text}   failed: {row["error"]}' if row['error'] else text


def parse(argv: Optional[List[str]] = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('models', nargs='*', type=model_spec, metavar='MODEL',
                        help=f'NAME[,ARGUMENT=VALUE ...] of ViTs (default: {" ".join(MODELS)})')
    parser.add_argument('--steps', type=integer_from(1), default=200, metavar='N', help='(default: 200)')
    parser.add_argument('--batch', type=integer_from(1), default=64, metavar='N', help='(default: 64)')
    add_common(parser)
    args = parser.parse_args(argv)
    args.models = args.models or [model_spec(name) for name in MODELS]
    for spec in args.models:
        if not spec.name.startswith('vit_'):
            parser.error(f'the models must be ViTs that take img_size and patch_size, vit_*, got {spec.text}')
    return args


def main(argv: Optional[List[str]] = None) -> int:
    warnings.simplefilter('ignore')
    args = parse(argv)
    if args.threads:
        torch.set_num_threads(args.threads)
    machine = describe(args.device)
    settings = dict(MODEL, steps=args.steps, batch=args.batch, learning_rate=LEARNING_RATE, weight_decay=WEIGHT_DECAY)
    print(summary(machine), flush=True)
    rows: List[Row] = []
    for spec in args.models:
        rows.append(train(spec, args.steps, args.batch, args.device))
        print(format_row(rows[-1]), flush=True)
        if args.json:
            write_result(
                args.json, 'train_loop', machine, settings, rows, finished=len(rows) == len(args.models))
    return int(any(row['error'] for row in rows))


if __name__ == '__main__':
    sys.exit(main())
