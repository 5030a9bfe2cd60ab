"""The tasks by name, with the recipes of their models."""
import functools
from importlib import metadata
from pathlib import Path
from typing import Any, Dict, Optional

import torch
from comparison.recipe import Recipe

from timm_rope.plugin import too_old

from .folders import Ade, Coco
from .tasks import PlacedDetection, PlacedSegmentation, SceneDetection, SceneSegmentation

MADE_UP = {
    'detection': SceneDetection, 'segmentation': SceneSegmentation, 'detection_placed': PlacedDetection,
    'segmentation_placed': PlacedSegmentation}
FOLDERS = {'coco': Coco, 'ade20k': Ade}
# the extra `downstream` of setup.cfg; torchvision has FCOS since 0.12, segmentation_models_pytorch DPT since 0.5
NEEDS = {'torchvision': (0, 12), 'pycocotools': (2, 0), 'segmentation_models_pytorch': (0, 5)}

TINY: Dict[str, Any] = dict(sizes=(64, 128, 96), embed_dim=48, num_heads=2, depth=3)
PLACED: Dict[str, Any] = {**TINY, 'sizes': (96, 192, 128)}
SMALL: Dict[str, Any] = dict(embed_dim=384, num_heads=8, depth=12, learning_rate=5e-4)
RECIPES: Dict[str, Dict[str, Recipe]] = {
    'small': {
        'detection': Recipe(
            patch_size=4, steps=400, batch_size=16, learning_rate=4e-3, test_images=200, **TINY),
        'segmentation': Recipe(
            patch_size=8, steps=400, batch_size=16, learning_rate=4e-3, test_images=200, **TINY),
        'detection_placed': Recipe(
            patch_size=8, steps=600, batch_size=16, learning_rate=2e-3, test_images=200, **PLACED),
        'segmentation_placed': Recipe(
            patch_size=8, steps=500, batch_size=16, learning_rate=2e-3, test_images=200, **PLACED),
        'coco': Recipe(patch_size=8, steps=2000, batch_size=8, learning_rate=1e-3, test_images=1000, **TINY),
        'ade20k': Recipe(patch_size=8, steps=2000, batch_size=8, learning_rate=1e-3, test_images=1000, **TINY),
    },
    'large': {
        'detection': Recipe(
            sizes=(256, 512, 384), patch_size=16, steps=5000, batch_size=32, test_images=1000, **SMALL),
        'segmentation': Recipe(
            sizes=(256, 512, 384), patch_size=16, steps=5000, batch_size=32, test_images=1000, **SMALL),
        **dict.fromkeys(('detection_placed', 'segmentation_placed'), Recipe(
            sizes=(256, 512, 384), patch_size=16, steps=5000, batch_size=32, test_images=1000, **SMALL)),
        'coco': Recipe(sizes=(512, 1024, 768), patch_size=16, steps=90_000, batch_size=16, test_images=5000, **SMALL),
        'ade20k': Recipe(sizes=(512, 1024, 768), patch_size=16, steps=80_000, batch_size=16, test_images=2000, **SMALL),
    },
}


def version_of(library: str) -> Optional[str]:
    """None if it is not installed."""
    try:
        return metadata.version(library)
    except metadata.PackageNotFoundError:
        return None


@functools.lru_cache(maxsize=1)
def open_task(name: str, data_dir: Optional[Path], device: str, workers: int) -> Any:
    """The task, with its images found.

    Raises:
        ValueError: A library is missing, or the folder is wrong.
    """
    for library, least in NEEDS.items():
        version = version_of(library)
        if version is None:
            raise ValueError(f"{library} is not installed: run `pip install 'timm_rope[downstream]'`.")
        problem = too_old(library, version, least, None)
        if problem:
            raise ValueError(f'{problem}.')
    where = torch.device(device)
    if name in MADE_UP:
        return MADE_UP[name](where)
    if data_dir is None:
        raise ValueError(f'the task {name} needs --data-dir, a folder laid out as {FOLDERS[name].layout}')
    return FOLDERS[name](data_dir, where, workers)
