"""`python -m timm_rope list`: our models and what they are."""
import argparse
import json
import sys
import warnings
from fnmatch import fnmatchcase
from typing import Any, Dict, List

from .. import plugin


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument('pattern', nargs='?', default='*', metavar='PATTERN',
                        help="shell pattern that the whole name matches, such as '*spherical*' (default: all)")
    parser.add_argument('--json', action='store_true', help='print a JSON list instead of a table')


def run(args: argparse.Namespace) -> int:
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')
        try:
            import timm  # noqa: F401  at the end of its import our models are registered; only then import them

            from ..models.entrypoints import model_names

            names = model_names()
            reason = plugin.status
        except Exception as error:
            names, reason = [], f'{type(error).__name__}: {error}'
        if not names:
            print(f'No models to list ({reason}): run `python -m timm_rope doctor`.', file=sys.stderr)
            return 1
        matching = [name for name in names if fnmatchcase(name, args.pattern)]
        if not matching:
            print(f'No model matches {args.pattern!r}: patterns match whole names, for example '
                  f"'*{args.pattern.strip('*')}*' or '*spherical*'.", file=sys.stderr)
            return 1
        rows = [describe_model(name) for name in matching]
    print(json.dumps(rows, indent=2) if args.json else format_table(rows))
    return 0


def describe_model(name: str) -> Dict[str, Any]:
    """Name, encoding, number of parameters and tags with weights of a model, which is not given any memory."""
    import timm

    model = timm.create_model(name, device='meta', weight_init='skip')
    cfgs = timm.models.get_arch_pretrained_cfgs(name)
    return {
        'name': name,
        'encoding': getattr(getattr(model, 'rope', None), 'name', 'none'),
        'parameters': sum(p.numel() for p in model.parameters()),
        'weights': [full_name.partition('.')[2] for full_name, cfg in cfgs.items() if cfg.has_weights],
    }


def format_table(rows: List[Dict[str, Any]]) -> str:
    """Rows of `describe_model` as aligned columns under a heading."""
    cells = [('name', 'encoding', 'parameters', 'weights')]
    cells += [
        (row['name'], row['encoding'], f'{row["parameters"] / 1e6:.2f} M', ', '.join(row['weights']) or '-')
        for row in rows]
    widths = [max(len(line[i]) for line in cells) for i in range(3)]
    return '\n'.join(
        f'{name:<{widths[0]}}  {encoding:<{widths[1]}}  {parameters:>{widths[2]}}  {weights}'
        for name, encoding, parameters, weights in cells)
