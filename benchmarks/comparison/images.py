"""Tasks with real images: small sets that fit in memory, and folders and CIFAR-100 by way of timm's data sets."""
import math
import random
from pathlib import Path
from typing import Dict, Iterator, Optional, Tuple

import torch
import torch.nn.functional as F
from timm.data import create_dataset, create_transform
from torch import Tensor
from torch.utils.data import DataLoader, Subset

from timm_rope.cli.demo.command import random_crops
from timm_rope.cli.demo.images import load_images

from .training import Classification

BATCH = 250
Batches = Iterator[Tuple[Tensor, Tensor]]


def steps_per_epoch(count: int, batch_size: int) -> int:
    """Whole batches of an epoch.

    Raises:
        ValueError: There are fewer images than a batch.
    """
    if count < batch_size:
        raise ValueError(f'There are {count} images to train on, fewer than a batch of {batch_size}: --batch-size.')
    return count // batch_size


def turn(images: Tensor, degrees: float) -> Tensor:
    """Images (N, C, size, size) turned counter-clockwise about their middle; their border goes on outside."""
    if not degrees:
        return images
    cos, sin = math.cos(math.radians(degrees)), math.sin(math.radians(degrees))
    # the grid says where each pixel of the result comes from, and y points down
    matrix = images.new_tensor([[cos, -sin, 0], [sin, cos, 0]]).expand(len(images), 2, 3)
    grid = F.affine_grid(matrix, list(images.shape), align_corners=False)
    return F.grid_sample(images, grid, mode='bilinear', padding_mode='border', align_corners=False)


class SmallImages(Classification):
    """Fashion-MNIST or scikit-learn's digits, all in memory; larger test images are enlarged ones (bicubic).

    Raises:
        timm_rope.cli.demo.images.NoImages: There are none.
        ValueError: The folder is wrong, or a file is damaged.
    """

    num_classes = 10
    in_chans = 1
    turnable = True
    groups: Dict[str, Tuple[int, ...]] = {}

    def __init__(self, source: str, folder: Optional[Path], device: torch.device) -> None:
        self.images = load_images(source, folder)
        self.device = device
        self.train_images = self.images.train_images.to(device, torch.float32) / 255
        self.train_labels = self.images.train_labels.to(device)
        self.train_count = len(self.train_labels)
        self.mean, self.std = self.train_images.mean(), self.train_images.std()

    def describe(self) -> str:
        return f'{self.images.name}, {self.train_count:,} images to train on'

    def train_batches(self, seed: int, first: int, steps: int, batch_size: int, size: int) -> Batches:
        per_epoch = steps_per_epoch(self.train_count, batch_size)
        for step in range(first, steps):
            epoch, number = divmod(step, per_epoch)
            if number == 0 or step == first:
                shuffle = torch.Generator().manual_seed(1_000_003 * (seed + 1) + epoch)
                order = torch.randperm(self.train_count, generator=shuffle)
            index = order[number * batch_size:(number + 1) * batch_size].to(self.device)
            crops = torch.Generator().manual_seed(2_000_003 * (seed + 1) + step)
            images = random_crops((self._resized(self.train_images[index], size) - self.mean) / self.std, crops)
            yield images, self.train_labels[index]

    def test_batches(self, size: int, limit: int, degrees: float = 0.) -> Batches:
        images, labels = self.images.test_images[:limit], self.images.test_labels[:limit]
        for some, right in zip(images.split(BATCH), labels.split(BATCH)):
            some = self._resized(some.to(self.device, torch.float32) / 255, size)
            yield turn((some - self.mean) / self.std, degrees), right.to(self.device)

    def _resized(self, x: Tensor, size: int) -> Tensor:
        if x.shape[-1] == size:
            return x
        # bicubic overshoots at edges, image files cannot
        return F.interpolate(x, (size, size), mode='bicubic').clamp(0, 1)


class Loaded(Classification):
    """Images that timm reads: CIFAR-100 as torchvision stores it, or a folder with `train` and `val`.

    Random crops, flips and 3-Augment in training, as arXiv 2511.08368; for the test a resized centre crop.

    Args:
        dataset: For timm.data.create_dataset: 'torch/cifar100' or ''.
        folder: Where the files are. Nothing is downloaded.
        device: Where batches are put.
        workers: Processes that read images.

    Raises:
        ValueError: There are no such images, images of one of the two sets are missing, or there is a single class.
    """

    in_chans = 3
    turnable = True
    groups: Dict[str, Tuple[int, ...]] = {}

    def __init__(self, dataset: str, folder: Path, device: torch.device, workers: int) -> None:
        self.device, self.workers, self.cifar = device, workers, dataset == 'torch/cifar100'
        what = 'CIFAR-100 as torchvision stores it' if self.cifar else 'train and val, with a folder for each class'
        if not folder.is_dir():
            raise ValueError(f'--data-dir {folder} is no folder. It must hold {what}.')
        try:
            self.train, self.test = (
                create_dataset(dataset, root=str(folder), split=split, download=False)
                for split in ('train', 'validation'))
        except (RuntimeError, FileNotFoundError) as error:
            raise ValueError(f'--data-dir {folder} does not hold {what}: {error}') from None
        if self.cifar:
            self.num_classes = len(self.train.classes)
        else:
            if any(Path(data.reader.root) == folder for data in (self.train, self.test)):
                # timm takes all images for a set that has no folder: the test would be with those of training
                raise ValueError(f'--data-dir {folder} must hold {what}; one of the two is missing.')
            classes = [set(data.reader.class_to_idx) for data in (self.train, self.test)]
            if classes[0] != classes[1] or len(classes[0]) < 2:
                differ = ', '.join(sorted(classes[0] ^ classes[1])[:5])
                raise ValueError(
                    f'--data-dir {folder}: train and val must have the same classes, at least two, got '
                    f'{len(classes[0])} and {len(classes[1])}{f", only in one of them {differ}" if differ else ""}.')
            self.num_classes = len(classes[0])
        self.train_count = len(self.train)
        # files are sorted by class: a first part of the test images must not be a few classes
        self.order = torch.randperm(len(self.test), generator=torch.Generator().manual_seed(0)).tolist()

    def describe(self) -> str:
        return f'{self.train_count:,} images of {self.num_classes} classes to train on, {len(self.test):,} to test with'

    def train_batches(self, seed: int, first: int, steps: int, batch_size: int, size: int) -> Batches:
        """The images of a step do not depend on where training was taken up, their augmentation does."""
        per_epoch = steps_per_epoch(self.train_count, batch_size)
        self.train.transform = create_transform(
            (3, size, size), is_training=True, auto_augment='3a', color_jitter=.3, interpolation='bicubic')
        for epoch in range(first // per_epoch, -(-steps // per_epoch)):
            number = 1_000_003 * (seed + 1) + epoch
            # augmentations draw from both if no other process makes them
            random.seed(number)
            torch.manual_seed(number)
            loader = DataLoader(
                self.train, batch_size, shuffle=True, drop_last=True, num_workers=self.workers,
                pin_memory=self.device.type == 'cuda', generator=torch.Generator().manual_seed(number))
            for step, (images, labels) in enumerate(loader, epoch * per_epoch):
                if first <= step < steps:
                    yield images.to(self.device, non_blocking=True), labels.to(self.device, non_blocking=True)

    def test_batches(self, size: int, limit: int, degrees: float = 0.) -> Batches:
        self.test.transform = create_transform(
            (3, size, size), interpolation='bicubic', crop_pct=1. if self.cifar else .875)
        for images, labels in DataLoader(Subset(self.test, self.order[:limit]), BATCH, num_workers=self.workers):
            yield turn(images.to(self.device), degrees), labels.to(self.device)
