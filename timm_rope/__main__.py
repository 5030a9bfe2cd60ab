"""`python -m timm_rope COMMAND`: what the package can do without a line of Python.

A command is a module or package of `cli/` with `add_arguments(parser)` and `run(args) -> int`, the exit status.
"""
import argparse
import os
import sys
from importlib import import_module
from typing import Any, Dict, List, Optional

from . import plugin
from ._version import __version__

COMMANDS: Dict[str, str] = {  # name of a command, which is that of its module in `cli/` -> help
    'convert': 'turn any known checkpoint into a folder that timm loads and the Hub takes',
    'demo': 'train a rotary and a learned position encoding on small images and compare them on larger ones',
    'doctor': 'say whether scripts that only import timm find the models, and what to do if not',
    'encodings': 'list the encodings and their properties or options',
    'list': 'list the models',
    'plot': 'draw what encodings do: frequencies, patterns, attention, equivariance',
    'recipe': "list or print training settings of the papers, for timm's train.py",
    'sweep': 'evaluate models on images of several sizes',
}


def load(name: str) -> Any:
    """The module of a command. Ends the process with one sentence if torch or timm is missing or too old for it."""
    try:
        command = import_module(f'.cli.{name}', __package__)
        problem = plugin.outdated() if 'timm' in sys.modules else ''
    except (ImportError, AttributeError) as error:
        missing = getattr(error, 'name', None)
        if missing in ('torch', 'timm'):
            problem = f'{missing} is not installed: run `pip install {missing}`'
        else:
            problem = plugin.outdated()
            if not problem:
                raise
    if problem:
        raise SystemExit(f'timm_rope: {problem}. `python -m timm_rope doctor` says more.')
    return command


def main(argv: Optional[List[str]] = None) -> int:
    """Run one command.

    Args:
        argv: Arguments, those of the process by default.

    Returns:
        Exit status: that of the command, or 2 without one.
    """
    argv = sys.argv[1:] if argv is None else argv
    parser = argparse.ArgumentParser(
        prog='python -m timm_rope', description='Rotary position encodings for Vision Transformers, a plugin for timm.')
    parser.add_argument('--version', action='version', version=f'timm_rope {__version__}')
    commands = parser.add_subparsers(metavar='COMMAND')
    for name, text in COMMANDS.items():
        command = commands.add_parser(name, help=text, description=f'{text[0].upper()}{text[1:]}.')
        if argv[:1] == [name]:  # only the command in use is imported: doctor must work where torch and timm are broken
            implementation = load(name)
            implementation.add_arguments(command)
            command.set_defaults(run=implementation.run)
    args = parser.parse_args(argv)
    if not hasattr(args, 'run'):
        parser.print_help()
        return 2
    try:
        status = args.run(args)
        sys.stdout.flush()
        return status
    except BrokenPipeError:  # of `... | head`; what is still buffered goes nowhere instead of failing again at exit
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1


if __name__ == '__main__':
    sys.exit(main())
