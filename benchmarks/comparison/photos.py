"""Real photographs, those of Debian's package mate-backgrounds: on which side of one crop lay the other?

An image has one square cut out of a photograph in its upper left quarter and in its lower right one the square that
lay beside it: to the right, below, to the left or above. Which, can be seen where the edges of the two go on in each
other, so a model has to relate places (after Doersch et al., "Unsupervised Visual Representation Learning by Context
Prediction", arXiv 1505.05192; there the squares are apart and there are eight sides). Crops are grey, with mean 0 and
deviation 1.

Every photograph is cut into quarters; training sees two opposite ones, tests the other two. A crop shows the same part
of a photograph whatever its size in pixels, and nothing is ever enlarged: a larger test image has the finer details
that the photograph really holds, and one that is turned is cut out of the turned photograph.
"""
import math
import sys
from pathlib import Path
from typing import Dict, Iterator, List, Optional, Sequence, Tuple

import torch
import torch.nn.functional as F
from PIL import Image, UnidentifiedImageError
from torch import Tensor

from timm_rope.cli.demo.images import NoImages

from .images import turn
from .training import Classification

DEBIAN_FOLDER = Path('/usr/share/backgrounds/mate/nature')
FIELDS = (1 / 6, 1 / 5, 1 / 4)  # three squares side by side, parts of the picture's height
SIDES = ((1, 2), (2, 1), (1, 0), (0, 1))  # of the square in the middle of three times three: right, below, left, above
TEST_SEED = 2**40  # not reached by the seeds of training
BATCH = 250


class Photos(Classification):
    """The task for `training.run`.

    Args:
        folder: With pictures (jpg, jpeg, png); None for where Debian's package puts its own.
        device: Where batches are put.

    Raises:
        timm_rope.cli.demo.images.NoImages: The package is not installed.
        ValueError: The folder is wrong, or a picture cannot be read.
    """

    num_classes = len(SIDES)
    in_chans = 1
    turnable = True
    train_count = sys.maxsize  # crops are drawn anew in every step
    groups: Dict[str, Tuple[int, ...]] = {}

    def __init__(self, folder: Optional[Path], device: torch.device) -> None:
        if folder is None and not DEBIAN_FOLDER.is_dir():
            raise NoImages(
                f'There are no photographs: {DEBIAN_FOLDER} is missing. `apt-get install mate-backgrounds` (Debian, '
                f'Ubuntu) puts some there, or name a folder with pictures: --data-dir DIR.')
        self.folder = DEBIAN_FOLDER if folder is None else folder
        self.device = device
        self.pictures = read_pictures(self.folder)
        self._scaled: Dict[Tuple[int, float], List[Tensor]] = {}

    def describe(self) -> str:
        return f'two squares of one of {len(self.pictures)} photographs, on which side of the first the second lay'

    def check_sizes(self, sizes: Sequence[int]) -> None:
        """Raise a ValueError if images of one of the sizes cannot be had: it is odd, or larger than pictures hold."""
        for size in sizes:
            if size % 2:
                raise ValueError(f'images of two squares need an even size, got {size}: --sizes')
            for field in FIELDS:
                self._pictures_for(3 * size // 2, field)

    def train_batches(self, seed: int, first: int, steps: int, batch_size: int, size: int) -> Iterator[
            Tuple[Tensor, Tensor]]:
        for step in range(first, steps):
            yield self._batch(batch_size, size, 1_000_003 * (seed + 1) + step, test=False, degrees=0.)

    def test_batches(self, size: int, limit: int, degrees: float = 0.) -> Iterator[Tuple[Tensor, Tensor]]:
        """The same places at every size."""
        for number, done in enumerate(range(0, limit, BATCH)):
            yield self._batch(min(BATCH, limit - done), size, TEST_SEED + number, test=True, degrees=degrees)

    def _batch(self, count: int, size: int, seed: int, test: bool, degrees: float) -> Tuple[Tensor, Tensor]:
        """Images (count, 1, size, size) and labels (count), the same scenes at every even size."""
        half = size // 2
        random = torch.Generator().manual_seed(seed)
        labels = torch.randint(len(SIDES), (count,), generator=random)
        crops = self._crops(count, 3 * half, random, test, degrees).to(self.device)
        deviation, mean = torch.std_mean(crops, dim=(1, 2), keepdim=True)
        # a level of 256 more: an even sky is not blown up to its noise
        squares = ((crops - mean) / (deviation + 1)).view(count, 3, half, 3, half)
        rows, columns = torch.tensor(SIDES, device=self.device)[labels.to(self.device)].unbind(1)
        images = squares.new_zeros(count, 1, size, size)
        images[:, 0, :half, :half] = squares[:, 1, :, 1]
        images[:, 0, half:, half:] = squares[torch.arange(count, device=self.device), rows, :, columns]
        return images, labels.to(self.device)

    def _crops(self, count: int, size: int, random: torch.Generator, test: bool, degrees: float) -> Tensor:
        """Squares (count, size, size) of the pictures, cut out turned by `degrees`."""
        chosen = torch.randint(len(self.pictures), (count,), generator=random).tolist()
        fields = torch.randint(len(FIELDS), (count,), generator=random).tolist()
        lower = torch.randint(2, (count,), generator=random).tolist()
        places = torch.rand(count, 2, generator=random).tolist()
        angle = math.radians(degrees)
        # the upright square that holds a turned one
        side = math.ceil(size * (abs(math.cos(angle)) + abs(math.sin(angle))) - 1e-9)
        side += (side - size) % 2
        squares = []
        for number, field, low, (y, x) in zip(chosen, fields, lower, places):
            picture = self._pictures_for(size, FIELDS[field])[number]
            height, width = picture.shape[0] // 2, picture.shape[1] // 2
            right = low != test  # training has the quarters of one diagonal, the test those of the other
            top, left = low * height + int(y * (height - side + 1)), right * width + int(x * (width - side + 1))
            squares.append(picture[top:top + side, left:left + side])
        crops = torch.stack(squares)
        cut = (side - size) // 2
        return turn(crops[:, None], degrees)[:, 0, cut:cut + size, cut:cut + size] if degrees else crops

    def _pictures_for(self, size: int, field: float) -> List[Tensor]:
        """All pictures at the resolution at which `field` of their height is `size` pixels.

        Raises:
            ValueError: A picture has fewer pixels than that.
        """
        if (size, field) not in self._scaled:
            height = round(size / field)
            small = [name for name, picture in self.pictures.items() if len(picture) < height]
            if small:
                raise ValueError(
                    f'images of {2 * size // 3} px need pictures of {height} px height, and {small[0]} in '
                    f'{self.folder} has {len(self.pictures[small[0]])}: --sizes, --data-dir')
            self._scaled[size, field] = [
                F.interpolate(
                    picture[None, None].float(), (height, round(height * picture.shape[1] / picture.shape[0])),
                    mode='bilinear', antialias=True)[0, 0] for picture in self.pictures.values()]
        return self._scaled[size, field]


def read_pictures(folder: Path) -> Dict[str, Tensor]:
    """Grey pictures (height, width), uint8, by the names of their files.

    Raises:
        ValueError: There is none, one cannot be read, or one is upright, whose quarters are too narrow.
    """
    paths = sorted(p for p in folder.glob('*') if p.suffix.lower() in ('.jpg', '.jpeg', '.png'))
    if not paths:
        raise ValueError(f'{folder} holds no pictures (jpg, jpeg, png).')
    pictures = {}
    for path in paths:
        try:
            with Image.open(path) as image:
                grey = image.convert('L')
        except (OSError, UnidentifiedImageError) as error:
            raise ValueError(f'{path} cannot be read as a picture: {error}') from None
        if grey.width < grey.height:
            raise ValueError(f'{path} is upright ({grey.width} x {grey.height}): pictures must be as wide as high.')
        pictures[path.name] = torch.frombuffer(bytearray(grey.tobytes()), dtype=torch.uint8).view(
            grey.height, grey.width)
    return pictures
