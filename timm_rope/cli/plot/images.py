"""The images that attention is measured on: of a folder, or a picture of our own that needs no file."""
import math
from pathlib import Path
from typing import Any, List, Tuple

import timm
import torch
from torch import Tensor, nn

SUFFIXES = ('.png', '.jpg', '.jpeg', '.webp', '.bmp')


def find_images(folder: Path, limit: int) -> List[Path]:
    """The first images of a folder and the folders in it, by name.

    Raises:
        ValueError: There are none.
    """
    found = sorted(path for path in folder.rglob('*') if path.suffix.lower() in SUFFIXES) if folder.is_dir() else []
    if not found:
        raise ValueError(f'--images must be a folder that holds images ({" ".join(SUFFIXES)}), got {str(folder)!r}.')
    return found[:limit]


def load_images(model: nn.Module, data: Any, paths: List[Path]) -> Tuple[Tensor, Tensor]:
    """Images as the model takes them, (B, C, H, W), and as one sees them, (B, H, W, 3) from 0 to 1.

    Args:
        model: Says size, crop, mean and spread, as its pretrained_cfg has them.
        data: What is to be used instead of that, see `Subject`.
        paths: Image files; the picture of our own where there are none.

    Raises:
        ValueError: A file cannot be read as an image.
    """
    from PIL import Image

    config = {**timm.data.resolve_model_data_config(model), **data}
    nominal = getattr(getattr(model, 'patch_embed', None), 'img_size', None)
    if nominal is not None:
        config['input_size'] = (config['input_size'][0], *nominal)
    transform: Any = timm.data.create_transform(**config)
    pictures = []
    for path in paths:
        try:
            with Image.open(path) as image:
                pictures.append(image.convert('RGB'))
        except OSError as error:
            raise ValueError(f'{path} cannot be read as an image: {error}.') from None
    if not pictures:
        pixels = (scene(max(config['input_size'][1:])) * 255).round().byte()
        pictures.append(Image.fromarray(pixels.numpy()))
    taken = torch.stack([transform(picture) for picture in pictures])
    mean, std = [torch.tensor(config[key]).view(1, -1, 1, 1) for key in ('mean', 'std')]
    seen = (taken * std + mean).clamp(0, 1).permute(0, 2, 3, 1)
    if taken.shape[1] != config['input_size'][0]:
        taken = taken.mean(1, keepdim=True).expand(-1, config['input_size'][0], -1, -1)
    return taken, seen


def scene(size: int) -> Tensor:
    """A landscape: sky, sun, hills, a house and a row of trees. (size, size, 3) from 0 to 1."""
    y, x = torch.meshgrid(torch.linspace(0, 1, size), torch.linspace(0, 1, size), indexing='ij')
    image = torch.stack((0.45 + 0.35 * y, 0.65 + 0.2 * y, 0.95 - 0.1 * y), dim=-1)

    def paint(where: Tensor, red: float, green: float, blue: float) -> None:
        image[where] = torch.tensor([red, green, blue])

    paint(torch.hypot(x - 0.78, y - 0.2) < 0.09, 1., 0.88, 0.35)
    paint(y > 0.55 + 0.08 * torch.sin(2 * math.pi * (x + 0.1)), 0.42, 0.6, 0.38)
    paint(y > 0.7 + 0.04 * torch.sin(3 * math.pi * x), 0.3, 0.5, 0.25)
    paint((x - 0.32).abs().lt(0.13) & y.gt(0.52) & y.lt(0.75), 0.8, 0.72, 0.6)
    paint((x - 0.32).abs().lt(0.17 * (y - 0.38) / 0.14) & y.gt(0.38) & y.lt(0.52), 0.65, 0.25, 0.2)
    paint((x - 0.32).abs().lt(0.03) & y.gt(0.62) & y.lt(0.75), 0.35, 0.22, 0.15)
    for place in (0.6, 0.72, 0.84, 0.94):
        paint((x - place).abs().lt(0.01) & y.gt(0.66) & y.lt(0.8), 0.35, 0.25, 0.15)
        paint(torch.hypot(x - place, y - 0.62) < 0.055, 0.15, 0.4, 0.18)
    return image
