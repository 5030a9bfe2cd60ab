"""What the tests of `sweep` share: checkpoints, the command, and an evaluation of its own.

It builds models at each size and crops images by hand, with nothing of the command."""
import argparse
import json
import math

import numpy as np
import timm
import torch
from PIL import Image
from timm.models import load_checkpoint

from timm_rope.__main__ import main

CLASSES, PER_CLASS = 7, 8
KWARGS = dict(patch_size=8, embed_dim=24, depth=2, num_heads=2, init_values=1.)
SPHERICAL, APE = 'vit_tiny_rope_spherical', 'vit_tiny_rope_spherical_ape'
MEAN, STD = (.485, .456, .406), (.229, .224, .225)
SIZES = [(48, 48), (32, 32), (96, 96), (40, 72)]
TEXTS = ['48', '32', '96', '40x72']


def make(name, size, seed=0, **kwargs):
    """A model whose answers differ from image to image, and depend on positions."""
    torch.manual_seed(seed)
    model = timm.create_model(name, img_size=size, num_classes=CLASSES, **{**KWARGS, **kwargs}).eval()
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            if parameter.ndim > 1 and 'rope' not in key:
                parameter.normal_(std=.4 if 'qkv' not in key else 1.)
    return model


def save(path, name, size, seed=0, ema=None, **args):
    """A checkpoint as train.py writes it, of a model that was trained at `size`."""
    kwargs = args.pop('model_kwargs', {})
    model = make(name, size, seed, **kwargs)
    checkpoint = dict(
        arch=name, epoch=1, state_dict=model.state_dict(),
        args=argparse.Namespace(model=name, img_size=size, model_kwargs={**KWARGS, **kwargs}, num_classes=None, **args))
    if ema is not None:
        checkpoint['state_dict_ema'] = make(name, size, ema, **kwargs).state_dict()
    torch.save(checkpoint, path)
    return f'{name}={path}'


def sweep(*args):
    return main(['sweep', '-j', '0', '--device', 'cpu', *map(str, args)])


def rows_of(path):
    return json.loads(path.read_text())['results']


def images_at(folder, size, crop_pct=1., mean=MEAN, std=STD):
    """Images (N, 3, height, width) and labels: enlarged to cover size / crop_pct, the middle of it, normalised."""
    images, labels = [], []
    resampling = Image.Resampling.BICUBIC
    if size[0] != size[1]:  # before 1.0.31, timm takes the default of a class of its own there
        resize = timm.data.create_transform((3, *size), interpolation='bicubic').transforms[0]
        resampling = Image.Resampling[getattr(resize.interpolation, 'value', resize.interpolation).upper()]
    target = [math.floor(side / crop_pct) for side in size]
    for path in sorted((folder / 'val').glob('*/*.png')):
        image = Image.open(path).convert('RGB')
        factor = max(target[0] / image.height, target[1] / image.width)
        # torchvision truncates the longer side, timm rounds
        longer = math.floor if size[0] == size[1] else round
        image = image.resize([longer(side * factor + 1e-9) for side in image.size], resampling)
        top, left = round((image.height - size[0]) / 2), round((image.width - size[1]) / 2)
        pixels = torch.from_numpy(np.array(image)[top:top + size[0], left:left + size[1]]).permute(2, 0, 1) / 255
        images.append((pixels - torch.tensor(mean)[:, None, None]) / torch.tensor(std)[:, None, None])
        labels.append(int(path.parent.name[1:]))
    return torch.stack(images), torch.tensor(labels)


@torch.no_grad()
def count(model, folder, size, autocast=None, **preparation):
    """(right by the first answer, among the first five) of all images at (height, width)."""
    images, labels = images_at(folder, size, **preparation)
    with torch.autocast('cpu', autocast or torch.bfloat16, enabled=autocast is not None):
        order = model(images).float().argsort(1, descending=True)
    return int((order[:, 0] == labels).sum()), int((order[:, :5] == labels[:, None]).any(1).sum())


def counts_of(rows):
    return {(row['height'], row['width']): (row['right_top1'], row['right_top5']) for row in rows}


def at_sizes(source, sizes, folder, use_ema=False, options=(), **preparation):
    """The route of validate.py: a model built at each size with these options, the checkpoint loaded into it."""
    name, path = source.split('=')
    out = {}
    for size in sizes:
        model = timm.create_model(name, img_size=size, num_classes=CLASSES, **KWARGS, **dict(options)).eval()
        load_checkpoint(model, path, use_ema=use_ema)
        out[size] = count(model, folder, size, **preparation)
    return out
