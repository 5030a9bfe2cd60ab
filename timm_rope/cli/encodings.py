"""`python -m timm_rope encodings`: the encodings and their properties, from the registry."""
import argparse
import sys
from pathlib import Path
from typing import List

from ..encodings import ENCODINGS, create_rope, list_ropes
from ._common import write_whole

GROUPS = {2: 'pairs', 3: 'triplets'}
RELATIVE = {'xy': 'yes', 'last': 'one axis', '': 'no'}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument('--options', action='store_true', help='list the options of each encoding instead')
    parser.add_argument('--update', nargs='+', type=Path, metavar='FILE',
                        help='write the tables into files that have them between <!-- encodings --> and '
                             '<!-- /encodings -->, or options likewise')


def run(args: argparse.Namespace) -> int:
    if not args.update:
        print(options_table() if args.options else properties_table())
        return 0
    try:
        texts = {path: updated(path) for path in args.update}
        for path, text in texts.items():
            if text != path.read_text(encoding='utf-8'):
                write_whole(path, text)
    except (ValueError, OSError) as error:
        print(f'encodings: {error}', file=sys.stderr)
        return 2
    return 0


def updated(path: Path) -> str:
    """Text of a file with the tables of today.

    Raises:
        ValueError: It has no place for one, or a place that does not begin or end.
    """
    text = path.read_text(encoding='utf-8')
    found = False
    for name, table in (('encodings', properties_table), ('options', options_table)):
        before, begin, rest = text.partition(f'<!-- {name} -->\n')
        _, end, after = rest.partition(f'<!-- /{name} -->')
        if bool(begin) != (f'<!-- /{name} -->' in text) or bool(begin) != bool(end):
            raise ValueError(f'{path} has only one of <!-- {name} --> and <!-- /{name} -->, or the second one first.')
        if begin and end:
            found, text = True, f'{before}{begin}{table()}\n{end}{after}'
    if not found:
        raise ValueError(f'{path} has neither <!-- encodings --> ... <!-- /encodings --> nor the same with options.')
    return text


def properties_table() -> str:
    """Markdown table: what turns, whether it is learned, equivariant, oblique, its parameters in ViT-S, its use."""
    lines = [
        '| encoding | turns | learned | equivariant | oblique | parameters, ViT-S | what and when | source |',
        '|---|---|---|---|---|---|---|---|',
    ]
    for name in list_ropes():
        rope = create_rope(name, device='meta')
        parameters = sum(p.numel() for p in rope.parameters())
        lines.append(
            f'| `{name}` | {GROUPS.get(rope.rotation.size, "blocks")} '
            f'| {_yes(rope.learned)} | {RELATIVE[rope.relative]} | {_yes(rope.oblique)} | {parameters:,} '
            f'| {rope.summary} | {rope.source} |')
    return '\n'.join(lines)


def options_table() -> str:
    """Markdown table: the options of each encoding with their defaults, as the models take them."""
    lines: List[str] = ['| encoding | options and defaults |', '|---|---|']
    for name in list_ropes():
        options = ', '.join(f'`rope_{key}={value}`' for key, value in ENCODINGS[name].option_defaults().items())
        lines.append(f'| `{name}` | {options} |')
    return '\n'.join(lines)


def _yes(value: bool) -> str:
    return 'yes' if value else 'no'
