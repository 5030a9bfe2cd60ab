"""`python -m timm_rope recipe`: training settings of the papers, for timm's stock `train.py --config`.

A recipe is a YAML file of this folder. Its first line says what it trains, its keys are arguments of train.py, and its
comments say which number of GPUs the batch is meant for and what the paper leaves open.
"""
import argparse
import sys
from difflib import get_close_matches
from importlib.resources import files
from pathlib import Path
from typing import Dict


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument('name', nargs='?', metavar='NAME', help='recipe to print; without it all are listed')
    parser.add_argument('--output', type=Path, metavar='FILE', help='write the recipe to FILE, which must not exist')
    parser.epilog = ('Train with `train.py --config FILE --data-dir DIR` of timm; what the command line says goes '
                     'before what the recipe says. Exit status: 0, or 2 if there is no such recipe or FILE.')


def run(args: argparse.Namespace) -> int:
    try:
        if args.name is None:
            if args.output is not None:
                raise ValueError('--output needs the NAME of a recipe.')
            recipes = list_recipes()
            width = max(map(len, recipes))
            print('\n'.join(f'{name:<{width}}  {title}' for name, title in recipes.items()))
        elif args.output is None:
            print(read_recipe(args.name), end='')
        else:
            write_recipe(args.name, args.output)
    except (ValueError, OSError) as error:
        print(f'recipe: {error}', file=sys.stderr)
        return 2
    return 0


def list_recipes() -> Dict[str, str]:
    """Names of all recipes, sorted, with what each trains in one line."""
    folder = files(__package__)
    names = sorted(item.name[:-len('.yaml')] for item in folder.iterdir() if item.name.endswith('.yaml'))
    return {name: read_text(name).partition('\n')[0].lstrip('# ') for name in names}


def read_recipe(name: str) -> str:
    """Text of a recipe, YAML with comments.

    Raises:
        ValueError: There is no such recipe; names a near one, if there is any, and all.
    """
    names = list(list_recipes())
    if name not in names:
        nearest = get_close_matches(name, names, n=1, cutoff=0.6)
        hint = f', the nearest name is {nearest[0]!r}' if nearest else ''
        raise ValueError(f'there is no recipe {name!r}{hint}. Recipes: {", ".join(names)}.')
    return read_text(name)


def read_text(name: str) -> str:
    return (files(__package__) / f'{name}.yaml').read_text(encoding='utf-8')


def write_recipe(name: str, path: Path) -> None:
    """Write a recipe to a new file, whole or not at all.

    Raises:
        ValueError: There is no such recipe, or `path` cannot be a new file.
    """
    text = read_recipe(name)
    try:
        file = path.open('x', encoding='utf-8')
    except FileExistsError:
        raise ValueError(f'--output must be a new file, {path} exists: name another one.') from None
    except FileNotFoundError:
        raise ValueError(f'--output must be in a folder that exists, {path.parent} is none.') from None
    try:
        with file:
            file.write(text)
    except BaseException:
        path.unlink()
        raise
