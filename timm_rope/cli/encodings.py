"""`python -m timm_rope encodings`: the encodings and their properties, from the registry."""
import argparse
from typing import List

from ..encodings import ENCODINGS, create_rope, list_ropes

RELATIVE = {'xy': 'yes', 'last': 'one axis', '': 'no'}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument('--options', action='store_true', help='list the options of each encoding instead')


def run(args: argparse.Namespace) -> int:
    print(options_table() if args.options else properties_table())
    return 0


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
            f'| `{name}` | {type(rope.rotation).__name__.removesuffix("Rotation").lower()}s '
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
