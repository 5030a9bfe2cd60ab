"""Batches of images of several shapes, as timm's NaFlex loader makes them."""
import torch
from timm.data.naflex_dataset import NaFlexCollator
from timm.data.naflex_transforms import Patchify

SHAPES = [(4, 4), (3, 7), (2, 5), (9, 2)]  # rows and columns of patches


def images_of(shapes=SHAPES, patch=8):
    torch.manual_seed(1)
    return [torch.randn(3, patch * rows, patch * columns) for rows, columns in shapes]


def batch_of(images, length=22, patch=8, fill=50., **kwargs):
    """The dictionary of a loader, with numbers in the padding that would be seen if anything looked at them."""
    patchify = Patchify(patch, **kwargs)
    batch, _ = NaFlexCollator(length)([(patchify(image), 0) for image in images])
    padding = ~batch['patch_valid']
    batch['patches'][padding] = fill * torch.randn_like(batch['patches'][padding])
    batch['patch_coord'][padding] = torch.randint(-9, 99, batch['patch_coord'][padding].shape)
    return batch
