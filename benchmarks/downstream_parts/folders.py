"""Real images: folders laid out as COCO (boxes) and as ADE20k (a label for every pixel)."""
import json
from pathlib import Path
from typing import Any, Dict, Iterator, List, Tuple

import torch
from PIL import Image, UnidentifiedImageError
from torch import Tensor
from torch.utils.data import DataLoader

from .tasks import BATCH, Detection, Segmentation

COCO = (
    'COCO: annotations/instances_trainNAME.json and instances_valNAME.json, and the images in trainNAME and valNAME '
    '(NAME is 2017, or anything)')
ADE = 'ADE20k: images/training/*.jpg with annotations/training/*.png of the same names, and the same in validation'
ADE_CLASSES = 150
IMAGENET = ((.485, .456, .406), (.229, .224, .225))


class Files:
    """Gives batches of numbered images of both sets; a subclass loads one. Everything random follows from the step."""

    contents = ('enlarged',)

    def __init__(self, folder: Path, device: torch.device, workers: int) -> None:
        super().__init__(device)  # type: ignore[call-arg]
        self.folder, self.workers = folder, workers
        if not folder.is_dir():
            raise ValueError(f'--data-dir {folder} is no folder. It must be laid out as {self.layout}.')
        self.sets = {name: self.find(name) for name in ('train', 'val')}
        for name, found in self.sets.items():
            if not found:
                raise self.wrong(f'there are no images with annotations for {name}')
        self.train_count = len(self.sets['train'])
        self.test_order = torch.randperm(len(self.sets['val']), generator=torch.Generator().manual_seed(0)).tolist()

    def wrong(self, reason: str) -> ValueError:
        return ValueError(f'--data-dir {self.folder} is not laid out as {self.layout}: {reason}.')

    def describe(self) -> str:
        return (
            f'{self.train_count:,} images of {self.num_classes} classes to train on, {len(self.sets["val"]):,} to test '
            f'with')

    def train_batches(self, seed: int, first: int, steps: int, batch_size: int, size: int) -> Iterator[Any]:
        per_epoch, wanted = self.train_count // batch_size, []
        for epoch in range(first // per_epoch, -(-steps // per_epoch)):
            shuffle = torch.Generator().manual_seed(1_000_003 * (seed + 1) + epoch)
            order = torch.randperm(self.train_count, generator=shuffle).tolist()
            for number in range(per_epoch):
                step = epoch * per_epoch + number
                if first <= step < steps:
                    images = order[number * batch_size:(number + 1) * batch_size]
                    wanted.append([('train', i, size, 2_000_003 * (seed + 1) + step * batch_size + j)
                                   for j, i in enumerate(images)])
        return self.loaded(wanted)

    def test_batches(self, size: int, limit: int, content: str, trained: int) -> Iterator[Any]:
        wanted = [('val', i, size, -1) for i in self.test_order[:limit]]
        return self.loaded([wanted[i:i + BATCH] for i in range(0, len(wanted), BATCH)])

    def loaded(self, wanted: List[List[Tuple[str, int, int, int]]]) -> Iterator[Any]:
        for pairs in DataLoader(self, batch_sampler=wanted, num_workers=self.workers, collate_fn=list):  # type: ignore
            yield self.on_device(*zip(*pairs))

    def image(self, path: Path, mode: str = 'RGB') -> Image.Image:
        try:
            return Image.open(path).convert(mode)
        except (OSError, UnidentifiedImageError) as error:
            raise ValueError(f'{path} cannot be read as an image: {error}') from None

    def __len__(self) -> int:
        return self.train_count


class Coco(Files, Detection):
    """Boxes of a folder laid out as COCO. Images are flipped in training; the detector resizes them into a square."""

    layout = COCO
    normalise = True

    def find(self, name: str) -> List[Tuple[Path, Dict[str, Tensor]]]:
        files = sorted((self.folder / 'annotations').glob(f'instances_{name}*.json'))
        if not files:
            raise self.wrong(f'there is no annotations/instances_{name}*.json')
        try:
            content = json.loads(files[-1].read_text())
            known = {one['id']: one['file_name'] for one in content['images']}
            ids = sorted(one['id'] for one in content['categories'])
            objects: Dict[Any, List[Any]] = {}
            for one in content['annotations']:
                x, y, width, height = one['bbox']
                if width >= 1 and height >= 1 and not (name == 'train' and one.get('iscrowd')):
                    objects.setdefault(one['image_id'], []).append(
                        (x, y, x + width, y + height, ids.index(one['category_id']), one.get('iscrowd', 0)))
            images = self.folder / files[-1].stem.removeprefix('instances_')
            if name == 'train':
                self.ids = ids
            elif ids != self.ids:
                raise self.wrong(f'the categories of {files[-1].name} are not those of the images to train with')
            found = [(images / known[number], self.target(rows)) for number, rows in sorted(objects.items())]
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            if str(error).startswith('--data-dir'):
                raise
            raise self.wrong(f'{files[-1].name} is no file of instances ({type(error).__name__}: {error})') from None
        if found and not found[0][0].is_file():
            raise self.wrong(f'there is no {found[0][0].relative_to(self.folder)}')
        return found

    @property
    def num_classes(self) -> int:
        return len(self.ids)

    @staticmethod
    def target(rows: List[Any]) -> Dict[str, Tensor]:
        values = torch.tensor(rows, dtype=torch.float32)
        return dict(boxes=values[:, :4], labels=values[:, 4].long(), crowd=values[:, 5].long())

    def __getitem__(self, which: Tuple[str, int, int, int]) -> Tuple[Tensor, Dict[str, Tensor]]:
        from torchvision.transforms import functional as vision

        name, number, _, seed = which
        path, target = self.sets[name][number]
        image, target = vision.pil_to_tensor(self.image(path)) / 255, dict(target)
        if name == 'train' and torch.rand((), generator=torch.Generator().manual_seed(seed)) < .5:
            width = image.shape[-1]
            image = image.flip(-1)
            target['boxes'] = torch.stack([
                width - target['boxes'][:, 2], target['boxes'][:, 1], width - target['boxes'][:, 0],
                target['boxes'][:, 3]], 1)
        return image, target

    def on_device(self, images: Any, targets: Any) -> Tuple[List[Tensor], List[Dict[str, Tensor]]]:
        return [image.to(self.device) for image in images], [
            {key: value.to(self.device) for key, value in one.items()} for one in targets]


class Ade(Files, Segmentation):
    """Labels of a folder laid out as ADE20k: 0 does not count, the classes are 1 .. 150 or as many as objectInfo150.txt
    has lines below its first one. Crops at random scales and flips in training, centre crops for the test.
    """

    layout = ADE

    def find(self, name: str) -> List[Tuple[Path, Path]]:
        part = 'training' if name == 'train' else 'validation'
        images, labels = self.folder / 'images' / part, self.folder / 'annotations' / part
        for folder in (images, labels):
            if not folder.is_dir():
                raise self.wrong(f'there is no folder {folder.relative_to(self.folder)}')
        found = [(path, labels / f'{path.stem}.png') for path in sorted(images.glob('*.jpg'))]
        for _, path in found:
            if not path.is_file():
                raise self.wrong(f'there is no {path.relative_to(self.folder)}')
        return found

    @property
    def num_classes(self) -> int:
        info = self.folder / 'objectInfo150.txt'
        return len(info.read_text().splitlines()) - 1 if info.is_file() else ADE_CLASSES

    def __getitem__(self, which: Tuple[str, int, int, int]) -> Tuple[Tensor, Tensor]:
        from torchvision.transforms import functional as vision

        name, number, size, seed = which
        path, label_path = self.sets[name][number]
        image, labels = self.image(path), self.image(label_path, 'L')
        if labels.size != image.size:
            raise ValueError(f'{label_path} is not as large as {path}: {labels.size} and {image.size} pixels')
        scale, left, top, flip = torch.rand(4, generator=torch.Generator().manual_seed(seed)).tolist() if (
            name == 'train') else (0, .5, .5, 1)
        factor = size * (1 + scale) / min(image.size)
        shape = [max(size, round(side * factor)) for side in (image.height, image.width)]
        image = vision.resize(image, shape)
        labels = vision.resize(labels, shape, vision.InterpolationMode.NEAREST)
        corner = round(top * (shape[0] - size)), round(left * (shape[1] - size))
        image, labels = (vision.pil_to_tensor(vision.crop(x, *corner, size, size)) for x in (image, labels))
        if flip < .5:
            image, labels = image.flip(-1), labels.flip(-1)
        labels = labels[0].long() - 1
        if labels.max() >= self.num_classes:
            raise ValueError(
                f'{label_path} has the label {int(labels.max()) + 1}, there are {self.num_classes} classes: list '
                f'them in {self.folder / "objectInfo150.txt"}, one a line below a first line')
        return vision.normalize(image / 255, *IMAGENET), labels.where(labels >= 0, -100)

    def on_device(self, images: Any, labels: Any) -> Tuple[Tensor, Tensor]:
        return torch.stack(images).to(self.device), torch.stack(labels).to(self.device)
