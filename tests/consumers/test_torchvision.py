"""torchvision: detectors on our backbones, and feature extraction by FX."""
from collections import OrderedDict

import pytest
import torch
from backbones import FAMILIES, assert_learns, build, image
from torch import nn

pytest.importorskip('torchvision', reason='torchvision is not installed')
from torchvision.models import detection, feature_extraction
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.ops import FeaturePyramidNetwork, MultiScaleRoIAlign

CHANNELS = 32  # FCOS normalises groups of 32


class SimplePyramid(nn.Module):
    """The pyramid of ViTDet: the last map of a plain ViT at three scales."""

    def __init__(self):
        super().__init__()
        self.body = build('vit', features_only=True, out_indices=[-1])
        width, self.out_channels = self.body.feature_info.channels()[-1], CHANNELS
        self.scales = nn.ModuleList([
            nn.ConvTranspose2d(width, CHANNELS, 2, 2), nn.Conv2d(width, CHANNELS, 1), nn.Conv2d(width, CHANNELS, 2, 2)])

    def forward(self, x):
        x, = self.body(x)
        return OrderedDict((str(i), scale(x)) for i, scale in enumerate(self.scales))


class IntermediatePyramid(SimplePyramid):
    """The same with `forward_intermediates` of a model without a head."""

    def __init__(self):
        super().__init__()
        self.body = build('vit', num_classes=0)

    def forward(self, x):
        x, = self.body.forward_intermediates(x, indices=[-1], norm=True, intermediates_only=True)
        return OrderedDict((str(i), scale(x)) for i, scale in enumerate(self.scales))


class SwinPyramid(nn.Module):
    """FPN on the stages of a Swin, whose maps are NHWC as those of timm's Swin."""

    def __init__(self):
        super().__init__()
        self.body = build('swin', features_only=True, out_indices=(1, 2, 3))
        self.fpn = FeaturePyramidNetwork(self.body.feature_info.channels(), CHANNELS)
        self.out_channels = CHANNELS

    def forward(self, x):
        return self.fpn(OrderedDict((str(i), y.permute(0, 3, 1, 2)) for i, y in enumerate(self.body(x))))


PYRAMIDS = {'features_only': SimplePyramid, 'intermediates': IntermediatePyramid, 'swin': SwinPyramid}
SIZES = [(48, 64), (70, 40)]  # torchvision pads a batch to multiples of 32


def detector(kind, pyramid):
    torch.manual_seed(0)
    backbone = PYRAMIDS[pyramid]()
    kwargs = dict(num_classes=4, min_size=64, max_size=96)
    anchors = AnchorGenerator(((8,), (16,), (32,)), ((0.5, 1.0, 2.0),) * 3)
    if kind == 'retinanet':
        return detection.RetinaNet(backbone, anchor_generator=anchors, **kwargs)
    if kind == 'fcos':
        return detection.FCOS(
            backbone, anchor_generator=AnchorGenerator(((8,), (16,), (32,)), ((1.0,),) * 3), **kwargs)
    return detection.FasterRCNN(
        backbone, rpn_anchor_generator=anchors, box_roi_pool=MultiScaleRoIAlign(['0', '1', '2'], 5, 2),
        rpn_pre_nms_top_n_train=50, rpn_post_nms_top_n_train=50, **kwargs)


@pytest.mark.parametrize('pyramid', PYRAMIDS)
@pytest.mark.parametrize('kind', ['retinanet', 'fcos', 'faster_rcnn'])
def test_a_detector_learns_from_images_of_several_sizes(kind, pyramid):
    model = detector(kind, pyramid).train()
    images = [image(*size)[0].sigmoid() for size in SIZES]
    targets = [dict(boxes=torch.tensor([[4., 6., 30., 36.]]), labels=torch.tensor([1 + i])) for i in range(2)]
    losses = model(images, targets)
    assert_learns(model, torch.stack(list(losses.values())))
    found = model.eval()(images)
    assert len(found) == 2 and all(bool(boxes['boxes'].isfinite().all()) for boxes in found)


@pytest.mark.parametrize('pyramid', ['features_only', 'intermediates'])
def test_what_the_pyramid_gets_is_the_features_of_the_model(pyramid):
    model, x, seen = PYRAMIDS[pyramid](), image(64, 96), []
    model.scales[1].register_forward_hook(lambda module, args, out: seen.append(args[0]))
    with torch.no_grad():
        model(x)
        bare = build('vit', **({} if pyramid == 'features_only' else dict(num_classes=0)))
        expected, = bare.forward_intermediates(
            x, indices=[-1], norm=pyramid == 'intermediates', intermediates_only=True)
    assert torch.equal(seen[0], expected) and expected.shape[2:] == (8, 12)


@pytest.mark.parametrize('family', FAMILIES)
def test_extracted_features_are_those_of_the_model(family):
    model = build(family)
    qkv = 'blocks.1.attn.qkv' if family == 'vit' else 'layers.1.blocks.0.attn.qkv'
    nodes = {qkv: 'qkv', 'norm': 'norm', 'head' if family == 'vit' else 'head.fc': 'logits'}
    extractor = feature_extraction.create_feature_extractor(model, nodes)
    x = image(*model.patch_embed.img_size)
    kept = []
    model.get_submodule(qkv).register_forward_hook(lambda module, args, out: kept.append(out.clone()))
    with torch.no_grad():
        found, expected = extractor(x), model(x)
        assert torch.allclose(found['logits'], expected, atol=1e-5)
        assert torch.allclose(found['norm'], model.forward_features(x), atol=1e-5)
    assert torch.allclose(found['qkv'], kept[-1], atol=1e-5), 'as projected, not turned'
