"""`python -m timm_rope plot`: what encodings do, as pictures with their values beside them."""
import argparse
import csv
import importlib.util
import io
import json
import sys
import time
from pathlib import Path
from typing import Any, Dict, Iterator, List

from timm.utils import ParseKwargs

from ..._version import __version__
from .._common import can_write, integer_from, write_whole
from .._models import Subject, load, parse_source
from .images import find_images, load_images
from .values import KINDS, Look, Values

FORMATS = ('.png', '.svg')
DRAWN = ('image', 'drawn', 'maps', 'waves', 'middle', 'token')  # values that are pixels or points, not for a table


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument('kinds', type=parse_kinds, metavar='KIND', help=f'{", ".join(KINDS)}, several of them with '
                        'commas between, or all')
    parser.add_argument('models', nargs='+', metavar='MODEL',
                        help='one model, or several side by side: NAME[.TAG] of published weights, NAME=CHECKPOINT, '
                             'local-dir:FOLDER or hf-hub:ORG/NAME; ours, or of timm')
    parser.add_argument('--output', type=Path, required=True, metavar='FILE',
                        help='picture *.png or *.svg; its values are written beside it as *.json and *.csv')
    parser.add_argument('--untrained', action='store_true', help='models as they begin, no weights are loaded')
    parser.add_argument('--images', type=Path, metavar='FOLDER',
                        help='images for attention and logits (default: a picture of our own)')
    parser.add_argument('--limit', type=integer_from(1), default=8, metavar='N',
                        help='images of the folder that are used (default: 8)')
    parser.add_argument('--dpi', type=integer_from(20), default=110, metavar='N',
                        help='dots per inch of a PNG (default: 110)')
    parser.add_argument('--use-ema', action='store_true', help='averaged weights of the checkpoints')
    parser.add_argument('--model-kwargs', nargs='*', default={}, action=ParseKwargs, metavar='KEY=VALUE',
                        help='constructor arguments of all models, before those that a checkpoint tells')
    parser.epilog = 'Exit status: 0; 2 if nothing was drawn, 130 if it was interrupted. Files are written at the end.'


def parse_kinds(text: str) -> List[str]:
    kinds = list(KINDS) if text == 'all' else text.split(',')
    for kind in kinds:
        if kind not in KINDS:
            raise argparse.ArgumentTypeError(f'must be of {", ".join(KINDS)}, or all, got {kind!r}')
    return kinds


def run(args: argparse.Namespace) -> int:
    try:
        check_arguments(args)
        sources = [parse_source(text, args.untrained) for text in args.models]
        paths = find_images(args.images, args.limit) if args.images is not None else []
        values = []
        for i, source in enumerate(sources):
            say(f'loading {source.text}')
            values.append(measure(load(source, args.model_kwargs, args.use_ema), paths, args.kinds, i, len(sources)))
        write(args, values)
    except KeyboardInterrupt:
        print('plot: interrupted, nothing was written.', file=sys.stderr)
        return 130
    except (ValueError, TypeError, RuntimeError, OSError, AssertionError) as error:
        print(f'plot: {error}', file=sys.stderr)
        return 2
    return 0


def check_arguments(args: argparse.Namespace) -> None:
    """Refuse what can be told from the arguments alone, before a model is built."""
    if importlib.util.find_spec('matplotlib') is None:
        raise ValueError("plot needs matplotlib: pip install 'timm_rope[plot]', or pip install matplotlib.")
    if args.output.suffix not in FORMATS or not can_write(args.output):
        raise ValueError(
            f'--output must be a file *.png or *.svg in a folder that can be written to, got {str(args.output)!r}.')
    if args.untrained and args.use_ema:
        raise ValueError('--untrained and --use-ema contradict each other: give one of them.')


def say(text: str) -> None:
    print(f'plot: {text}', file=sys.stderr)


def measure(subject: Subject, paths: List[Path], kinds: List[str], place: int, models: int) -> Dict[str, Values]:
    """Values of one model, kind by kind; of several kinds, those it lacks are said to be missing."""
    images, seen = load_images(subject.model, subject.data, paths)
    look = Look(subject.model, images, seen)
    out: Dict[str, Values] = {}
    for i, kind in enumerate(kinds):
        begin = time.perf_counter()
        try:
            out[kind] = KINDS[kind](look)
        except ValueError as error:
            if len(kinds) == 1:
                raise
            out[kind] = dict(missing=str(error))
        done, total = place * len(kinds) + i + 1, models * len(kinds)
        seconds = time.perf_counter() - begin
        say(f'[{"#" * done}{"." * (total - done)}] {kind} of {subject.source.text}, {seconds:.1f} s')
    return out


def write(args: argparse.Namespace, values: List[Dict[str, Values]]) -> None:
    """The picture and its values, each of them whole or not at all."""
    from .draw import figure_of

    names = [f'{text} (untrained)' if args.untrained else text for text in args.models]
    picture = io.BytesIO()
    figure_of(args.kinds, names, values).savefig(picture, format=args.output.suffix[1:], dpi=args.dpi)
    models = [dict(model=text, untrained=args.untrained, values=each) for text, each in zip(args.models, values)]
    table = io.StringIO()
    writer = csv.writer(table, lineterminator='\n')
    writer.writerow(['model', 'kind', 'quantity', 'value'])
    for model in models:
        for kind, each in model['values'].items():
            writer.writerows([model['model'], kind, name, value] for name, value in flat(each))
    write_whole(args.output.with_suffix('.csv'), table.getvalue())
    write_whole(args.output.with_suffix('.json'), json.dumps(dict(timm_rope=__version__, models=models)))
    write_whole(args.output, picture.getvalue())
    print(f'{args.output}, with the values in {args.output.with_suffix(".json").name} '
          f'and {args.output.with_suffix(".csv").name}')


def flat(values: Any, path: str = '') -> Iterator[Any]:
    """(name, number) of each number in nested values, but not the pixels of pictures."""
    if isinstance(values, dict):
        name = values.get('name', values.get('kind'))
        for key, value in values.items():
            if key not in DRAWN:
                yield from flat(value, '/'.join(filter(None, (path, str(name) if name else '', key))))
    elif isinstance(values, list):
        for i, value in enumerate(values):
            yield from flat(value, path if isinstance(value, dict) else f'{path}/{i}')
    elif isinstance(values, (int, float)) and not isinstance(values, bool):
        yield path, values
