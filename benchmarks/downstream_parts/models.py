"""A detector and a segmenter on a ViT, as users build them."""
from collections import OrderedDict
from typing import Any, Dict, Optional, Sequence

import timm
import torch
from comparison.recipe import Recipe
from comparison.training import vit_arguments
from torch import Tensor, nn

from timm_rope.cli.demo.command import autocast


class SimplePyramid(nn.Module):
    """The pyramid of ViTDet (arXiv 2203.16527): all scales from the last map of a plain ViT.

    Args:
        body: Made with `features_only=True, out_indices=[-1]`.
        channels: Of every map of the pyramid.
        scales: Of its maps against the grid of patches, powers of two.
    """

    def __init__(self, body: Any, channels: int, scales: Sequence[float]) -> None:
        super().__init__()
        self.body, self.out_channels = body, channels
        self.scales = nn.ModuleList(_scale(body.feature_info.channels()[-1], channels, scale) for scale in scales)

    def forward(self, x: Tensor) -> Dict[str, Tensor]:
        with autocast(x.device):
            x, = self.body(x)
            maps = [scale(x) for scale in self.scales]
        return OrderedDict((str(i), y.float()) for i, y in enumerate(maps))


def _scale(width: int, channels: int, scale: float) -> nn.Module:
    layers: list = []
    while scale > 1:
        layers += [nn.ConvTranspose2d(width, width, 2, 2), nn.GroupNorm(1, width), nn.GELU()]
        scale /= 2
    if scale < 1:
        layers.append(nn.MaxPool2d(round(1 / scale)))
    return nn.Sequential(
        *layers, nn.Conv2d(width, channels, 1), nn.GroupNorm(1, channels), nn.Conv2d(channels, channels, 3, padding=1),
        nn.GroupNorm(1, channels))


def detector(
        method: str, recipe: Recipe, classes: int, normalise: bool, seed: int, maps: Optional[int] = None,
        convs: int = 2,
) -> nn.Module:
    """FCOS (arXiv 1904.01355) on a simple pyramid.

    Args:
        method: Encoding, 'ape' or 'none'.
        recipe: Of the ViT; images are resized into a square of its first size.
        classes: Number of classes, which count from 0.
        normalise: Images are within 0 .. 1 and get the mean and deviation of ImageNet; otherwise they are left as they
            are.
        seed: Of the weights.
        maps: How many of the pyramid, finest first; all of them by default.
    """
    from torchvision.models.detection import FCOS
    from torchvision.models.detection.anchor_utils import AnchorGenerator
    from torchvision.models.detection.fcos import FCOSHead

    torch.manual_seed(seed)
    channels = 32 * max(1, recipe.embed_dim // 64)  # FCOS normalises 32 groups
    # from 4 to 16 pixels, or two patches
    strides = [2 ** i for i in range(2, max(5, recipe.patch_size.bit_length() + 1))][:maps]
    pyramid = SimplePyramid(
        timm.create_model(**vit_arguments(method, recipe), features_only=True, out_indices=[-1]), channels,
        [recipe.patch_size / stride for stride in strides])
    # FCOS gives a map those boxes whose sides are 4 to 8 of its anchors away, and learns from points around the centre,
    # 1.5 strides to each side, which it counts in anchors
    anchors = tuple((stride / 4,) for stride in strides)
    generator = AnchorGenerator(anchors, ((1.,),) * len(strides))
    # torchvision rounds half a side, that of an anchor of 1 pixel to 0: its map would never be taught
    generator.cell_anchors = [torch.tensor([[-1., -1., 1., 1.]]) * side / 2 for side, in anchors]
    model = FCOS(
        pyramid, classes, min_size=recipe.sizes[0], max_size=recipe.sizes[0],
        image_mean=None if normalise else [0.] * 3, image_std=None if normalise else [1.] * 3,
        anchor_generator=generator,
        head=FCOSHead(channels, 1, classes, num_convs=convs), center_sampling_radius=6.,
        size_divisible=max(32, strides[-1]))
    return model.train()


def segmenter(method: str, recipe: Recipe, classes: int, seed: int) -> nn.Module:
    """DPT (arXiv 2103.13413) on as many evenly spaced blocks as its decoder has stages for the size of a patch."""
    import segmentation_models_pytorch as smp

    for size in recipe.sizes:
        if size % (2 * recipe.patch_size):
            raise ValueError(f'DPT takes sizes that are multiples of two patches, {2 * recipe.patch_size}, got {size}')
    torch.manual_seed(seed)
    kwargs = vit_arguments(method, recipe)
    depth, name = kwargs.pop('depth'), kwargs.pop('model_name')  # smp has no way to say how many blocks there are
    stages = recipe.patch_size.bit_length() - 1  # maps of a 4th, an 8th ... of the image, the last one half the grid
    if depth < stages:
        raise ValueError(f'--patch-size {recipe.patch_size} needs a model of {stages} blocks for DPT, not {depth}')
    blocks = [depth * (i + 1) // stages - 1 for i in range(stages)]
    width = recipe.embed_dim
    model = smp.DPT(
        f'tu-{name}', encoder_depth=stages, encoder_weights=None, encoder_output_indices=blocks, classes=classes,
        decoder_intermediate_channels=[width] * stages, decoder_fusion_channels=max(32, width // 2), **kwargs)
    model.encoder.model.prune_intermediate_layers(blocks, prune_norm=True, prune_head=True)
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.  # a run that was interrupted would draw others
    return model.train()


class LinearSegmenter(nn.Module):
    """A linear layer that says of every token what its pixels are: beyond a patch only attention sees anything.

    Args:
        encoder: Made with `features_only=True, out_indices=[-1]`.
        patch_size: In pixels.
        classes: Number of classes.
    """

    def __init__(self, encoder: Any, patch_size: int, classes: int) -> None:
        super().__init__()
        self.encoder = encoder
        self.head = nn.Conv2d(encoder.feature_info.channels()[-1], classes * patch_size ** 2, 1)
        self.shuffle = nn.PixelShuffle(patch_size)

    def forward(self, x: Tensor) -> Tensor:
        return self.shuffle(self.head(self.encoder(x)[0]))


def linear_segmenter(method: str, recipe: Recipe, classes: int, seed: int) -> nn.Module:
    torch.manual_seed(seed)
    encoder = timm.create_model(**vit_arguments(method, recipe), features_only=True, out_indices=[-1])
    return LinearSegmenter(encoder, recipe.patch_size, classes).train()
