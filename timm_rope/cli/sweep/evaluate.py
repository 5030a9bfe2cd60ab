"""One evaluation of a sweep: a model on the images of a folder, at one size and with one rule for larger grids.

Images are prepared as by timm's validate.py. In come a loaded model, a size and a rule, out comes a row of results.
"""
import copy
import sys
import time
from contextlib import nullcontext
from pathlib import Path
from typing import Any, ContextManager, Dict, List, Optional, Set, Tuple

import torch
from PIL import Image
from timm.data import ImageDataset, create_dataset, create_loader
from torch import nn
from tqdm import tqdm

from ..._timm import resolve_input_data_config
from .._models import Subject
from .rules import set_rule

Size = Tuple[int, int]


def open_images(folder: Path) -> Any:
    """Dataset of a folder with one folder for each class, or with such a folder called val or validation.

    Raises:
        ValueError: No folder, no images in it, images to train with alone, or images of a single class.
    """
    if not folder.is_dir():
        raise ValueError(f'{folder} is no folder: expected one with a folder of images for each class.')
    try:
        dataset = create_dataset('', root=str(folder), split='validation')
    except RuntimeError as error:
        raise ValueError(f'{folder} holds no images in folders, one for each class: {error}') from None
    if Path(dataset.reader.root) == folder and any(path.is_dir() for path in folder.glob('train/*')):
        # for a split that has no folder, timm takes all images, those of training too
        raise ValueError(f'{folder} holds train and no val or validation: name the folder that is to be evaluated.')
    classes = dataset.reader.class_to_idx
    if len(classes) < 2:
        raise ValueError(
            f'{folder} holds images of a single class, {next(iter(classes), "")!r}, on which every answer is right: '
            f'expected a folder of images for each class.')
    dataset.__class__ = Images  # create_dataset finds the folder of the split, but always makes timm's own class
    return dataset


class Images(ImageDataset):
    """Images and classes of a folder; what cannot be read is black, of class -1 - index.

    timm's own puts the next image in its place, which would count twice.
    """

    def __getitem__(self, index: int) -> Tuple[Any, int]:
        path, target = self.reader.samples[index]
        try:
            with Image.open(path) as file:
                image = file.convert(self.input_img_mode)
        except MemoryError:
            raise
        except Exception:  # of any decoder
            image, target = Image.new(self.input_img_mode, (1, 1)), -1 - index
        return self.transform(image), target


class Evaluation:
    """What is the same at all sizes.

    Args:
        dataset: Images and their classes.
        device: Where to compute.
        batch_size: Images at a time.
        workers: Processes that read images.
        crop_pct: Share of the image that is used, None for the model's own.
        amp_dtype: Lower precision of autocast, None for none.
        channels_last: Whether to use that memory layout.
    """

    def __init__(
            self,
            dataset: Any,
            device: torch.device,
            batch_size: int,
            workers: int,
            crop_pct: Optional[float] = None,
            amp_dtype: Optional[torch.dtype] = None,
            channels_last: bool = False,
    ) -> None:
        self.dataset = dataset
        self.device = device
        self.batch_size = batch_size
        self.workers = workers
        self.crop_pct = crop_pct
        self.amp_dtype = amp_dtype
        self.layout = torch.channels_last if channels_last else torch.contiguous_format
        self._told: Set[int] = set()

    def at_size(self, subject: Subject, size: Size, rule: Optional[str]) -> Tuple[nn.Module, Dict[str, Any]]:
        """A copy of the model for images of (height, width), on the device, and how these are prepared.

        Each size starts from the weights as they were loaded: a position embedding is never resized twice. The share
        that is cropped is the same at every size, as with validate.py --img-size. Without a rule the model keeps
        its own.
        """
        model: Any = copy.deepcopy(subject.model)
        if hasattr(model, 'set_input_size'):  # others take any size, or refuse the image
            model.set_input_size(img_size=size)
        if rule is not None:
            set_rule(model, rule)
        channels = getattr(model, 'in_chans', 3)
        wanted = {**subject.data, 'input_size': (channels, *size)}
        if self.crop_pct is not None:
            wanted['crop_pct'] = self.crop_pct
        config = resolve_input_data_config(model, wanted, use_test_size=True)
        return model.to(self.device).to(memory_format=self.layout), config

    @torch.inference_mode()
    def check(self, subject: Subject, size: Size, rule: Optional[str]) -> None:
        """Try a blank image.

        Raises:
            Exception: Whatever the model objects to.
        """
        model, config = self.at_size(subject, size, rule)
        with self._autocast():
            model(torch.zeros(1, *config['input_size'], device=self.device).contiguous(memory_format=self.layout))

    @torch.inference_mode()
    def run(self, subject: Subject, size: Size, rule: Optional[str], title: str) -> Dict[str, Any]:
        """Classify all images.

        Returns:
            Plain JSON values: how the images were prepared, counts of right answers (`right_top1`, `right_top5`) and
            the accuracies in per cent, `seconds` and `images_per_second`, reading images included; how many images are
            `unreadable` and left out, if any.

        Raises:
            RuntimeError: Logits that are not finite, or no image that can be read.
        """
        model, config = self.at_size(subject, size, rule)
        channels = config['input_size'][0]
        self.dataset.input_img_mode = 'RGB' if channels == 3 else 'L'
        loader = create_loader(
            self.dataset, config['input_size'], self.batch_size, use_prefetcher=True, device=self.device,
            num_workers=self.workers, interpolation=config['interpolation'], mean=config['mean'], std=config['std'],
            crop_pct=config['crop_pct'], crop_mode=config['crop_mode'], persistent_workers=self.workers > 0)
        # summed on the device: reading a number after each batch would wait for it
        sums, seen = torch.zeros(3, dtype=torch.int64, device=self.device), []
        start = time.perf_counter()
        # a terminal shows progress five times a second, a log file gets a line every 20 seconds
        interval = .2 if sys.stderr.isatty() else 20.
        with tqdm(total=len(self.dataset), desc=title, unit='img', dynamic_ncols=True, mininterval=interval) as bar:
            for images, targets in loader:
                with self._autocast():
                    logits = model(images.contiguous(memory_format=self.layout))
                right = logits.topk(min(5, logits.shape[1])).indices == targets[:, None]
                broken = ~logits.isfinite() & (targets >= 0)[:, None]
                sums += torch.stack([right[:, 0].sum(), right.sum(), broken.sum()])
                seen.append(targets)
                bar.update(len(images))
        top1, top5, count = sums.tolist()
        seconds = time.perf_counter() - start
        if count:
            raise RuntimeError(
                f'{title}: {count} logits are not finite. If the weights are sound, the precision is too low: '
                f'--amp-dtype bfloat16, or no --amp.')
        unread = sorted(-1 - i for i in torch.cat(seen).tolist() if i < 0)
        n = len(self.dataset) - len(unread)
        self._tell(unread)
        if not n:
            raise RuntimeError(f'{title}: no image can be read.')
        return dict(
            top1=100 * top1 / n, top5=100 * top5 / n, right_top1=top1, right_top5=top5, images=n,
            images_per_second=n / seconds, seconds=seconds, crop_pct=config['crop_pct'], crop_mode=config['crop_mode'],
            interpolation=config['interpolation'], mean=list(config['mean']), std=list(config['std']),
            parameters=sum(p.numel() for p in subject.model.parameters()),
            **({'unreadable': len(unread)} if unread else {}))

    def _tell(self, unread: List[int]) -> None:
        """Name images that cannot be read, once."""
        new = [self.dataset.filename(i) for i in unread if i not in self._told]
        self._told.update(unread)
        if new:
            rest = f' and {len(new) - 5} more' if len(new) > 5 else ''
            print(f'sweep: {len(new)} of {len(self.dataset)} images cannot be read and are left out: '
                  f'{", ".join(new[:5])}{rest}.', file=sys.stderr)

    def _autocast(self) -> ContextManager[Any]:
        if self.amp_dtype is None:
            return nullcontext()
        return torch.autocast(self.device.type, self.amp_dtype)
