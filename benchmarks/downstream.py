"""Detection and segmentation on backbones with each encoding and with APE, one recipe, several seeds.

    python benchmarks/downstream.py results                # made-up scenes, half an hour on 2 cores
    python benchmarks/downstream.py results --budget 10    # fewer steps, so that it takes 10 minutes
    python benchmarks/downstream.py results --tasks detection_placed segmentation_placed
    python benchmarks/downstream.py results --tasks coco --data-dir DIR
    python benchmarks/downstream.py results --tasks ade20k --data-dir DIR

Detectors are FCOS on the simple pyramid of ViTDet, segmenters are DPT. Scenes hold shapes of many scales; models are
tested at larger sizes, where shapes are as large as in training and more, or are enlarged, extrapolating and by
`interpolate`. In those of the `_placed` tasks a disc is of the class of the nearest mark, which is further away than
convolutions see: models without positions fail. Folders are laid out as COCO and as ADE20k. Results, a plot and the
state of unfinished runs are in the folder `results`. After an interruption, or for more methods, seeds or tasks, run it
again: what is there is not done twice. `--scale large`, the default with a GPU, takes a ViT-S and bfloat16 (not tried).
What it needs is installed by `pip install 'timm_rope[downstream]'`.
"""
import sys
from typing import Optional, Sequence

from comparison.command import Benchmark
from comparison.command import main as run_command
from downstream_parts.opening import MADE_UP, RECIPES, open_task
from downstream_parts.report import plot, tables

from timm_rope import list_ropes

METHODS = ('ape', 'axial', 'mixed', 'spherical', 'mixed_ape')
MORE = tuple(name for rope in list_ropes() for name in (rope, f'{rope}_ape') if name not in METHODS)

DEFAULT = ('detection', 'segmentation')

BENCHMARK = Benchmark(
    name='downstream', help=__doc__, recipes=RECIPES, methods=METHODS, more=(*MORE, 'none'), made_up=tuple(MADE_UP),
    default_tasks=lambda device: list(DEFAULT), tasks_named=' and '.join(DEFAULT), opener=open_task, tables=tables,
    plots={'figures.png': plot})


def main(argv: Optional[Sequence[str]] = None) -> int:
    return run_command(BENCHMARK, argv)


if __name__ == '__main__':
    sys.exit(main())
