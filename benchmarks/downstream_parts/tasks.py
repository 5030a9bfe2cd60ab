"""What models are trained and tested on: scenes in which shapes are to be found, or pixels to be labelled."""
import sys
from typing import Any, Dict, Iterator, List, Optional, Tuple

import torch
import torch.nn.functional as F
from comparison.recipe import Recipe
from comparison.training import loss_of
from torch import Tensor, nn

from timm_rope.cli.demo.command import autocast

from .measures import Intersections, average_precision
from .models import detector, linear_segmenter, segmenter
from .scenes import CLASSES, COLOURS, Drawn, draw_placed, draw_scenes, render

Row = Dict[str, Any]
BATCH = 10  # test images at a time
RULES = ('extrapolate', 'interpolate')
TEST_SEED = 0  # no step of training has it


class Dense:
    """What detection and segmentation share: when and by which rules a model is tested.

    A subclass gives `train_batches` and `test_batches`, as the tasks of `comparison` do, `contents`, which may be
    'same' (larger images show more, as large as in training) and 'enlarged', `build`, `loss` and `measure`.
    """

    compiled = False
    train_count = sys.maxsize
    contents: Tuple[str, ...] = ('same', 'enlarged')

    def __init__(self, device: torch.device) -> None:
        self.device = device

    def placed(self, model: Any) -> nn.Module:
        """A new model on the device; timm's optimizers hear from it what its ViT does not let decay."""
        vit = self.vit_of(model)
        inside = next(name for name, module in model.named_modules() if module is vit)
        names = {f'{inside}.{name}' for name in vit.no_weight_decay()}
        model.no_weight_decay = lambda: names
        return model.to(self.device)

    def score(self, model: nn.Module, recipe: Recipe) -> Row:
        return {}  # the loss says enough while a model learns

    @torch.inference_mode()
    def tests(self, model: Any, recipe: Recipe) -> Iterator[Row]:
        """At the size of training, and at each larger one by every rule and with every content."""
        vit = self.vit_of(model)
        for number, size in enumerate(recipe.sizes):
            for content in self.contents if number else self.contents[:1]:
                for rule in (None,) if vit.rope is None else RULES if number else RULES[:1]:
                    if rule is not None:
                        vit.set_rope_scaling(rule)
                    limit = recipe.test_images if number == 0 else recipe.test_images // 2
                    model.eval()
                    figures = self.measure(model, self.test_batches(size, limit, content, recipe.sizes[0]), size)
                    yield dict(size=size, content=content, rule=rule, **figures)


class Detection(Dense):
    """Boxes; the figure is COCO's average precision."""

    figure, title = 'ap', 'AP'
    normalise = False
    maps: Optional[int] = None
    convs = 2

    def build(self, method: str, recipe: Recipe, seed: int) -> nn.Module:
        return self.placed(detector(method, recipe, self.num_classes, self.normalise, seed, self.maps, self.convs))

    def vit_of(self, model: Any) -> Any:
        return model.backbone.body.model

    @staticmethod
    def loss(forward: Any, images: List[Tensor], targets: List[Dict[str, Tensor]]) -> Tensor:
        return torch.stack(list(forward(images, targets).values())).sum()

    def measure(self, model: Any, batches: Iterator[Tuple[Any, Any]], size: int) -> Row:
        # torchvision resizes the images: the shorter side to the first, unless the longer would be above the second
        model.transform.min_size, model.transform.max_size = (size,), size
        found, right = [], []
        for images, targets in batches:
            found += [{k: v.cpu() for k, v in one.items()} for one in model(images)]
            right += [{k: v.cpu() for k, v in one.items()} for one in targets]
        return dict(images=len(found), **average_precision(found, right))


class Segmentation(Dense):
    """A label for every pixel; the figure is the mean intersection over union."""

    figure, title = 'miou', 'mIoU'
    loss = staticmethod(loss_of)
    segmenter = staticmethod(segmenter)

    def build(self, method: str, recipe: Recipe, seed: int) -> nn.Module:
        return self.placed(self.segmenter(method, recipe, self.num_classes, seed))

    def vit_of(self, model: Any) -> Any:
        return model.encoder.model

    def measure(self, model: Any, batches: Iterator[Tuple[Any, Any]], size: int) -> Row:
        counts, images = Intersections(self.num_classes), 0
        for x, labels in batches:
            with autocast(self.device):
                counts.add(model(x).argmax(1), labels)
            images += len(x)
        return dict(images=images, miou=counts.mean())


class Scenes:
    """Gives scenes to either of the two."""

    def describe(self) -> str:
        return f'scenes with {", ".join(CLASSES)}, new ones in every step'

    def train_batches(self, seed: int, first: int, steps: int, batch_size: int, size: int) -> Iterator[Any]:
        for step in range(first, steps):
            yield self.batch(batch_size, size, 1., 1_000_003 * (seed + 1) + step)

    def test_batches(self, size: int, limit: int, content: str, trained: int) -> Iterator[Any]:
        extent = size / trained if content == 'same' else 1.
        for number in range(0, limit, BATCH):
            yield self.batch(min(BATCH, limit - number), size, extent, TEST_SEED + number)

    def drawn(self, count: int, size: int, extent: float, seed: int) -> Drawn:
        return render(draw_scenes(count, extent, seed), size, extent, seed)

    def batch(self, count: int, size: int, extent: float, seed: int) -> Any:
        raise NotImplementedError


class Placed(Scenes):
    """Scenes in which classes are a matter of places.

    Only pixels of discs count: among all of them models would long learn nothing but what is background.
    """

    def describe(self) -> str:
        return f'scenes with white discs of the class of the nearest mark, {", ".join(COLOURS)}, new ones in every step'

    def drawn(self, count: int, size: int, extent: float, seed: int) -> Drawn:
        drawn = render(draw_placed(count, extent, seed), size, extent, seed, shaded=False)
        return drawn._replace(labels=(drawn.labels - 1).where(drawn.labels > 0, -100))


class SceneDetection(Scenes, Detection):
    num_classes = len(CLASSES)

    def batch(self, count: int, size: int, extent: float, seed: int) -> Tuple[List[Tensor], List[Dict[str, Tensor]]]:
        drawn = self.drawn(count, size, extent, seed)
        return list(drawn.images.to(self.device)), [
            dict(boxes=boxes.to(self.device), labels=classes.to(self.device), pixels=pixels.to(self.device))
            for boxes, classes, pixels in zip(drawn.boxes, drawn.classes, drawn.labels)]


class SceneSegmentation(Scenes, Segmentation):
    num_classes = 1 + len(CLASSES)

    def batch(self, count: int, size: int, extent: float, seed: int) -> Tuple[Tensor, Tensor]:
        drawn = self.drawn(count, size, extent, seed)
        return drawn.images.to(self.device), drawn.labels.to(self.device)


class PlacedDetection(Placed, SceneDetection):
    """With a semantic branch as in HTC (arXiv 1901.07518): tokens of discs are taught the class by a linear layer, too.

    By the losses of boxes alone models find discs within 100 steps, and no class in 600.
    """

    num_classes = len(COLOURS)
    maps = convs = 1  # more would see further

    def build(self, method: str, recipe: Recipe, seed: int) -> nn.Module:
        model: Any = super().build(method, recipe, seed)
        model.semantic = nn.Conv2d(recipe.embed_dim, self.num_classes, 1, device=self.device)
        return model

    @staticmethod
    def loss(forward: Any, images: List[Tensor], targets: List[Dict[str, Tensor]]) -> Tensor:
        tokens: List[Tensor] = []
        with forward.backbone.body.register_forward_hook(lambda _, __, maps: tokens.extend(maps)):
            boxes = Detection.loss(forward, images, targets)
        labels = torch.stack([one['pixels'] for one in targets])[:, None].float()
        # of the pixel in the middle of a patch
        labels = F.interpolate(labels, size=tokens[0].shape[-2:], mode='nearest-exact')[:, 0].long()
        return boxes + loss_of(forward.semantic, tokens[0], labels)


class PlacedSegmentation(Placed, SceneSegmentation):
    num_classes = len(COLOURS)
    segmenter = staticmethod(linear_segmenter)  # the convolutions of DPT see all of a training image
