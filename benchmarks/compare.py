"""Compare encodings: the same small ViT with each of them and with APE, one recipe, several seeds.

    python benchmarks/compare.py results                # directions, Fashion-MNIST, photographs: hours on 2 cores
    python benchmarks/compare.py results --budget 10    # fewer steps, so that it takes 10 minutes
    python benchmarks/compare.py results --tasks cifar100 --data-dir DIR

Results, plots and the state of unfinished runs are in the folder `results`. After an interruption, or for more
methods, seeds or tasks, run it again: what is there is not done twice. `--scale large`, the default with a GPU, takes
wider models, bfloat16 and torch.compile.
"""
import sys
from typing import List, Optional, Sequence

import torch
from comparison.command import Benchmark
from comparison.command import main as run_command
from comparison.jobs import open_task
from comparison.recipe import RECIPES
from comparison.report import plot_accuracy, plot_curves, tables

from timm_rope import list_ropes
from timm_rope.cli.demo.images import NoImages

METHODS = ('ape', *list_ropes())
MORE = ('none',)


def default_tasks(device: torch.device) -> List[str]:
    """Directions, Fashion-MNIST or else the digits, and photographs where there are some."""
    def there(name: str, instead: str) -> bool:
        try:
            open_task(name, None, str(device), 0)
        except NoImages as error:
            print(f'{error}\n{instead}', file=sys.stderr)
            return False
        return True

    fashion = there('fashion', 'Taking the digits instead.')
    return ['direction', 'fashion' if fashion else 'digits', *['photos'] * there('photos', 'Leaving them out.')]


def main(argv: Optional[Sequence[str]] = None) -> int:
    return run_command(BENCHMARK, argv)


BENCHMARK = Benchmark(
    name='compare', help=__doc__, recipes=RECIPES, methods=METHODS, more=MORE, made_up=('direction', 'digits'),
    default_tasks=default_tasks, tasks_named='direction, fashion or digits, and photos where there are some',
    opener=open_task, tables=tables, plots={'accuracy.png': plot_accuracy, 'curves.png': plot_curves})

if __name__ == '__main__':
    sys.exit(main())
