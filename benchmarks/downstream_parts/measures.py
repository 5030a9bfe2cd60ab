"""Average precision of boxes by COCO's own code, and the mean intersection over union of labels."""
import contextlib
import io
from typing import Any, Dict, List, Sequence

import torch
from torch import Tensor


def average_precision(found: Sequence[Dict[str, Tensor]], right: Sequence[Dict[str, Tensor]]) -> Dict[str, float]:
    """Average precision of COCO: mean over IoU 0.5 .. 0.95, 101 recalls and the classes that there are boxes of.

    Args:
        found: For each image boxes (K, 4) as x0, y0, x1, y1, labels (K) and scores (K), as torchvision's detectors give
            them.
        right: For each image boxes and labels; `crowd` (K) where an object is a crowd, which is no mistake to find.

    Returns:
        'ap', and 'ap50' at IoU 0.5 alone, in per cent; nan if there are no boxes to find.
    """
    from pycocotools.coco import COCO
    from pycocotools.cocoeval import COCOeval

    with contextlib.redirect_stdout(io.StringIO()):
        truth = COCO()
        truth.dataset = dict(
            images=[dict(id=i) for i in range(len(right))], annotations=_annotations(right, first=1),
            categories=[dict(id=k) for k in sorted({k for one in right for k in one['labels'].tolist()})])
        truth.createIndex()
        guesses = _annotations(found, first=1)
        if not guesses or not truth.dataset['annotations']:
            return dict.fromkeys(('ap', 'ap50'), 0. if truth.anns else float('nan'))
        evaluation = COCOeval(truth, truth.loadRes(guesses), 'bbox')
        evaluation.evaluate()
        evaluation.accumulate()
        evaluation.summarize()
    return {name: 100 * float(value) for name, value in zip(('ap', 'ap50'), evaluation.stats)}


def _annotations(images: Sequence[Dict[str, Tensor]], first: int) -> List[Dict[str, Any]]:
    rows: List[Dict[str, Any]] = []
    for number, one in enumerate(images):
        boxes = one['boxes'].double().cpu()
        sides = (boxes[:, 2:] - boxes[:, :2])
        crowd = one.get('crowd', torch.zeros(len(boxes), dtype=torch.long)).tolist()
        scores = one['scores'].tolist() if 'scores' in one else [None] * len(boxes)
        for box, side, label, score, many in zip(
                boxes.tolist(), sides.tolist(), one['labels'].tolist(), scores, crowd):
            rows.append(dict(
                id=first + len(rows), image_id=number, category_id=label, bbox=[*box[:2], *side],
                area=side[0] * side[1], iscrowd=int(many), **({} if score is None else dict(score=score))))
    return rows


class Intersections:
    """Mean intersection over union, over all images together and the classes that occur.

    Args:
        classes: Number of classes; labels below 0 do not count.
    """

    def __init__(self, classes: int) -> None:
        self.classes = classes
        self.counts = torch.zeros(classes, classes, dtype=torch.long)  # (right, found)

    def add(self, found: Tensor, right: Tensor) -> None:
        """Labels of the same shape, counting from 0."""
        known = right >= 0
        pairs = self.classes * right[known] + found[known]
        self.counts += torch.bincount(pairs.flatten().cpu(), minlength=self.classes ** 2).view_as(self.counts)

    def mean(self) -> float:
        """In per cent; nan if no pixel counted."""
        both = self.counts.diagonal().double()
        either = self.counts.sum(0) + self.counts.sum(1) - both
        return 100 * float((both[either > 0] / either[either > 0]).mean())
