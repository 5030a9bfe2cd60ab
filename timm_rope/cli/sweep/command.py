"""`python -m timm_rope sweep`: models over image sizes and rules for larger grids, each loaded once, resumable."""
import argparse
import re
import sys
from pathlib import Path
from typing import Any, Dict, List

import torch
from timm.utils import ParseKwargs

from .._common import can_write, integer_from
from .evaluate import Size
from .rules import parse_rule
from .tasks import Sweep
from .views import check_csv, check_plot, format_table, write_csv, write_plot

SIZES = ((144, 144), (192, 192), (224, 224), (256, 256), (320, 320), (384, 384), (512, 512))  # of arXiv 2403.13298
SUFFIXES = dict(results='.json', csv='.csv', plot='.png')


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument('data', type=Path, metavar='DATA', help='folder with a folder of images for each class, '
                        'or one that holds it as val or validation')
    parser.add_argument('models', nargs='+', metavar='MODEL',
                        help='NAME[.TAG] of published weights, NAME=CHECKPOINT, as train.py writes them, '
                             'local-dir:FOLDER or hf-hub:ORG/NAME; any model of timm')
    parser.add_argument('--sizes', nargs='+', type=parse_size, default=list(SIZES), metavar='SIZE',
                        help='image sizes in pixels, N or HEIGHTxWIDTH (default: 144 192 224 256 320 384 512)')
    parser.add_argument('--rope-scaling', nargs='+', type=parse_rule, metavar='RULE',
                        help='rules for grids larger than that of training, each evaluated by itself: extrapolate, '
                             'interpolate, ntk, yarn, and with log-n temperature extrapolate+log_n, ...; models '
                             'without a rotation of timm_rope are evaluated once (default: the rule each was built '
                             'with)')
    parser.add_argument('--results', type=Path, metavar='FILE.json',
                        help='write results to this file after each evaluation; a rerun skips what is in it')
    parser.add_argument('--csv', type=Path, metavar='FILE.csv', help='write a table at the end')
    parser.add_argument('--plot', type=Path, metavar='FILE.png',
                        help='draw accuracy against image size at the end; needs matplotlib')
    parser.add_argument('--crop-pct', type=float, metavar='X',
                        help="share of the image that is used, above 0 and at most 1; the same at every size (default: "
                             "the model's own)")
    parser.add_argument('--use-ema', action='store_true', help='averaged weights of the checkpoints')
    parser.add_argument('--model-kwargs', nargs='*', default={}, action=ParseKwargs, metavar='KEY=VALUE',
                        help='constructor arguments of all models, before those that a checkpoint tells')
    parser.add_argument('--device', default='cuda' if torch.cuda.is_available() else 'cpu', metavar='NAME',
                        help='where to compute (default: %(default)s)')
    parser.add_argument('--amp', action='store_true', help='mixed precision')
    parser.add_argument('--amp-dtype', default='float16', choices=('float16', 'bfloat16'),
                        help='lower precision of --amp (default: float16)')
    parser.add_argument('--channels-last', action='store_true', help='channels_last memory layout')
    parser.add_argument('-b', '--batch-size', type=integer_from(1), default=256, metavar='N', help='(default: 256)')
    parser.add_argument('-j', '--workers', type=integer_from(0), default=4, metavar='N',
                        help='processes that read images (default: 4)')
    parser.epilog = (
        'Images are prepared as by validate.py --img-size. A ViT extrapolates from the grid that it was trained on, '
        'or follows --rope-scaling; the windows of a Swin grow with the image. Exit status: 0; 1 if an evaluation '
        'failed, 2 if it could not begin, 130 if it was interrupted. What was done until then is kept.')


def parse_size(text: str) -> Size:
    match = re.fullmatch(r'(\d+)(?:x(\d+))?', text)
    size = (int(match[1]), int(match[2] or match[1])) if match else (0, 0)
    if min(size) < 1:
        raise argparse.ArgumentTypeError(f'must be N or HEIGHTxWIDTH in pixels, got {text!r}')
    return size


def run(args: argparse.Namespace) -> int:
    try:
        check_arguments(args)
        sweep = Sweep(args)
    except (ValueError, TypeError, RuntimeError, OSError, AssertionError) as error:
        print(f'sweep: {error}', file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130
    status = 0
    try:
        sweep.run()
    except KeyboardInterrupt:
        print(f'sweep: interrupted, {sweep.progress()}.', file=sys.stderr)
        status = 130
    except (RuntimeError, ValueError, OSError) as error:
        print(f'sweep: {error}\nsweep: {sweep.progress()}.', file=sys.stderr)
        status = 1
    rows = sweep.rows()
    if rows:
        print(format_table(rows))
        try:
            show(args, rows)
        except OSError as error:
            print(f'sweep: {error}', file=sys.stderr)
            status = status or 1
    return status


def show(args: argparse.Namespace, rows: List[Dict[str, Any]]) -> None:
    """Write the files that are made of the results."""
    if args.csv is not None:
        write_csv(args.csv, rows)
    if args.plot is not None:
        write_plot(args.plot, rows)


def check_arguments(args: argparse.Namespace) -> None:
    """Refuse what can be told from the arguments alone."""
    if args.crop_pct is not None and not 0 < args.crop_pct <= 1:
        raise ValueError(f'--crop-pct must be above 0 and at most 1, got {args.crop_pct}.')
    if 'num_classes' in args.model_kwargs:
        raise ValueError('--model-kwargs must not hold num_classes: it is that of the weights.')
    rivals = ' '.join(key for key in ('rope_scaling', 'rope_log_n') if key in args.model_kwargs)
    if args.rope_scaling and rivals:
        raise ValueError(f'--rope-scaling and --model-kwargs {rivals} contradict each other: give one of them.')
    for option in ('results', 'csv', 'plot'):
        path, suffix = getattr(args, option), SUFFIXES[option]
        if path is not None and (path.suffix != suffix or not can_write(path)):
            raise ValueError(f'--{option} must be a file *{suffix} in a folder that can be written to, got {path}.')
    if args.csv is not None:
        check_csv(args.csv)
    if args.plot is not None:
        check_plot(args.plot)
