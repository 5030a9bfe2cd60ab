"""One model: trained by a recipe, taken up where it was interrupted, and tested at every size by every rule."""
import itertools
import os
import sys
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any, Callable, Dict, Iterator, List, Optional, Tuple

import timm
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import tqdm

from timm_rope.cli._training import set_up
from timm_rope.cli.demo.command import autocast

from .recipe import Recipe

Row = Dict[str, Any]
POINTS = 10  # of a learning curve; after each of them training can be taken up
CURVE_IMAGES = 1000


def model_name(method: str) -> str:
    """Entry point of a method: an encoding, 'ape' for a learned position embedding, 'none' for no positions at all."""
    return 'vit_tiny_ape' if method == 'ape' else f'vit_tiny_rope_{"axial" if method == "none" else method}'


def vit_arguments(method: str, recipe: Recipe) -> Dict[str, Any]:
    """Arguments of timm.create_model, `model_name` too."""
    none = dict(rope_encoding='none') if method == 'none' else {}
    return dict(model_name=model_name(method), **recipe.model_kwargs(), **none)


def build(method: str, task: Any, recipe: Recipe, seed: int) -> Any:
    """The model in training mode; weights depend on the seed and, as encodings draw theirs first, on the method."""
    torch.manual_seed(seed)
    model: Any = timm.create_model(
        **vit_arguments(method, recipe), in_chans=task.in_chans, num_classes=task.num_classes)
    return model.to(task.device).train()


def loss_of(forward: Callable[[Tensor], Tensor], images: Tensor, labels: Tensor) -> Tensor:
    """Cross entropy of logits (N, classes, ...) and labels (N, ...); labels of -100 do not count."""
    with autocast(images.device):
        logits = forward(images)
    return F.cross_entropy(logits.float(), labels, reduction='sum') / (labels >= 0).sum().clamp(min=1)


class Classification:
    """What tasks with one label for each image share; other tasks have these four of their own.

    Attributes:
        compiled: Whether models can be compiled as a whole.
    """

    compiled = True
    loss = staticmethod(loss_of)

    def build(self, method: str, recipe: Recipe, seed: int) -> nn.Module:
        """A model in training mode."""
        return build(method, self, recipe, seed)

    def score(self, model: nn.Module, recipe: Recipe) -> Row:
        """Figures of one point of a learning curve."""
        right, count = test(model, self, recipe.sizes[0], min(CURVE_IMAGES, recipe.test_images))
        return dict(accuracy=right / count)

    def tests(self, model: nn.Module, recipe: Recipe) -> Iterator[Row]:
        """Rows of all tests of a model that is trained."""
        return test_rules(model, self, recipe)


def run(
        task: Any, method: str, seed: int, recipe: Recipe, unfinished: Optional[Path] = None,
        stop: Callable[[], bool] = lambda: False, **bar: Any,
) -> Optional[Row]:
    """Train and test one model.

    Args:
        task: Gives batches, and says how its models are built, taught and tested (`Classification`).
        method: Encoding, 'ape' or 'none'.
        seed: Of initial weights and of batches, which are thus the same for every method.
        recipe: The rest.
        unfinished: File that holds the state of training until it is complete.
        stop: Asked at every point of the learning curve.
        bar: For tqdm.

    Returns:
        Plain JSON values; None if training was stopped.
    """
    begin = time.perf_counter()
    model = task.build(method, recipe, seed)
    training = Training(model, recipe, task)
    if unfinished is not None:
        training.load(unfinished)
    begin -= training.seconds
    every = max(1, recipe.steps // POINTS)
    batches = task.train_batches(seed, training.step, recipe.steps, recipe.batch_size, recipe.sizes[0])
    # in a log file a line now and then
    interval = .2 if sys.stderr.isatty() else 30.
    with tqdm(total=recipe.steps, initial=training.step, unit='step', dynamic_ncols=True, mininterval=interval,
              **bar) as progress:
        for images, labels in batches:
            training.update(images, labels)
            progress.update()
            if training.step % every == 0 or training.step == recipe.steps:
                loss = training.mean_loss()
                progress.set_postfix(loss=f'{loss:.3f}', refresh=False)
                training.curve.append(dict(step=training.step, loss=loss, **task.score(model, recipe)))
                if unfinished is not None and training.step < recipe.steps:
                    training.seconds = time.perf_counter() - begin
                    training.save(unfinished)
                    if stop():
                        return None
    tests = list(task.tests(model, recipe))
    if unfinished is not None:
        unfinished.unlink(missing_ok=True)
    return dict(
        method=method, seed=seed, curve=training.curve, tests=tests, seconds=time.perf_counter() - begin,
        parameters=sum(p.numel() for p in model.parameters()))


class Training:
    """AdamW with a warm-up over a tenth of the steps and cosine decay; on a GPU compiled and in bfloat16."""

    def __init__(self, model: nn.Module, recipe: Recipe, task: Any = Classification) -> None:
        self.model, self.recipe, self.loss = model, recipe, task.loss
        self.device = next(model.parameters()).device
        compiled = task.compiled and self.device.type == 'cuda'
        self.forward: Any = torch.compile(model, dynamic=False) if compiled else model
        self.optimizer, self.scheduler = set_up(
            model, recipe.steps, recipe.learning_rate, weight_decay=recipe.weight_decay)
        self.step = 0
        self.seconds = 0.  # before it was taken up
        self.curve: List[Row] = []
        self.losses: List[Tensor] = []

    def update(self, images: Any, labels: Any) -> None:
        self.model.train()
        loss = self.loss(self.forward, images, labels)
        loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.step += 1
        self.scheduler.step_update(self.step)
        self.losses.append(loss.detach())  # to read it here would wait for the GPU

    def mean_loss(self) -> float:
        """Of the steps since it was asked last.

        Raises:
            RuntimeError: It is not finite.
        """
        loss = float(torch.stack(self.losses).mean())
        if not loss == loss or abs(loss) == float('inf'):
            raise RuntimeError(f'the loss is {loss} after {self.step} steps')
        self.losses.clear()
        return loss

    def save(self, path: Path) -> None:
        """Write the state, so that a reader finds the whole file or the one before."""
        parts = dict(
            model=self.model.state_dict(), optimizer=self.optimizer.state_dict(), step=self.step, curve=self.curve,
            recipe=asdict(self.recipe), seconds=self.seconds)
        whole = path.with_name(f'.{path.name}.{os.getpid()}')
        try:
            torch.save(parts, whole)
            os.replace(whole, path)
        finally:
            whole.unlink(missing_ok=True)

    def load(self, path: Path) -> None:
        """Go on from a state, if there is one.

        Raises:
            ValueError: The file is damaged, or of another model or recipe.
        """
        if not path.exists():
            return
        try:
            parts = torch.load(path, map_location=self.device, weights_only=True)
            if parts['recipe'] != asdict(self.recipe):
                raise ValueError(f'it was trained by {parts["recipe"]}')
            self.model.load_state_dict(parts['model'])
            self.optimizer.load_state_dict(parts['optimizer'])
            self.step, self.curve = int(parts['step']), list(parts['curve'])
            self.seconds = float(parts.get('seconds', 0))
        except Exception as error:  # whatever a damaged file leads to
            raise ValueError(f'{path} is no state of this run, delete it to begin anew: {error}') from None
        self.scheduler.step_update(self.step)


@torch.inference_mode()
def test(
        model: Any, task: Any, size: int, limit: int, groups: Optional[Dict[str, List[int]]] = None,
        degrees: float = 0.) -> Tuple[int, int]:
    """Right answers and images at a size, turned by `degrees`; `groups` gets the same of each group of classes."""
    model.eval()
    right, count = 0, 0
    turned = dict(degrees=degrees) if degrees else {}
    for images, labels in task.test_batches(size, limit, **turned):
        with autocast(task.device):
            hits = model(images).argmax(1) == labels
        right, count = right + int(hits.sum()), count + len(labels)
        for name, classes in task.groups.items() if groups is not None else ():
            inside = torch.isin(labels, torch.tensor(classes, device=labels.device))
            total = groups.setdefault(name, [0, 0])
            total[0] += int(hits[inside].sum())
            total[1] += int(inside.sum())
    return right, count


def test_rules(model: Any, task: Any, recipe: Recipe) -> Iterator[Row]:
    """Right answers at every size, from twice that of training on by every rule that the encoding can follow.

    Where the answer is the same for a turned image, turned ones of the size of training are the last test.
    """
    plain: List[Tuple[Optional[str], bool]] = [(None if model.rope is None else 'extrapolate', False)]
    tests = [
        (size, rule, log_n, 0.) for size in recipe.sizes
        for rule, log_n in (
            plain if model.rope is None or size < 2 * recipe.sizes[0]
            else itertools.product(model.rope.scalings, (False, True)))]
    if task.turnable and recipe.turned:
        tests += [(recipe.sizes[0], rule, log_n, recipe.turned) for rule, log_n in plain]
    for size, rule, log_n, degrees in tests:
        if rule is not None:
            model.set_rope_scaling(rule, log_n=log_n)
        limit = recipe.test_images if size == recipe.sizes[0] else recipe.test_images // 2
        groups: Dict[str, List[int]] = {}
        right, count = test(model, task, size, limit, groups, degrees)
        yield dict(size=size, rule=rule, log_n=log_n, turned=degrees, right=right, images=count, groups=groups)
