"""segmentation_models_pytorch: our ViTs in DPT, at any size, and our Swins in the decoders that take pyramids."""
import pytest
import torch
from backbones import FAMILIES, assert_learns, image, loud

smp = pytest.importorskip('segmentation_models_pytorch', minversion='0.5')  # the first with DPT

# DPT's decoder halves the grid of patches, so that it has to be even
SIZES = {'vit': [(32, 32), (64, 48)], 'swin': [(64, 64), (96, 160)]}
DECODERS = ['Unet', 'UnetPlusPlus', 'FPN', 'UPerNet', 'Segformer', 'Linknet', 'MAnet', 'PSPNet']


def segmenter(kind, family, **kwargs):
    torch.manual_seed(0)
    name, options = FAMILIES[family]
    options = {k: v for k, v in options.items() if k != 'depth'}  # that is the encoder's, in smp
    encoder = dict(encoder_name=f'tu-{name}', encoder_weights=None, classes=3)
    return loud(getattr(smp, kind)(**encoder, **{**options, **kwargs}))


def dpt(**kwargs):
    outputs = dict(encoder_depth=3, encoder_output_indices=[1, 5, 9], decoder_intermediate_channels=(8, 8, 8))
    return segmenter('DPT', 'vit', **{**outputs, **kwargs})


def assert_segments(model, sizes):
    for size in sizes:
        with torch.no_grad():
            assert model.eval()(image(*size)).shape == (2, 3, *size)
        assert_learns(model, smp.losses.DiceLoss('multiclass')(
            model.train()(image(*size)), torch.randint(3, (2, *size))))


def test_dpt_learns_from_images_of_any_size():
    assert_segments(dpt(), SIZES['vit'])


@pytest.mark.parametrize('options', [
    dict(reg_tokens=4), dict(class_token=False, global_pool='avg'), dict(rope_encoding='spherical_learned'),
    dict(encoder_output_indices=[0, 1, 2])])
def test_dpt_takes_other_tokens_and_encodings(options):
    model = dpt(**options)
    assert model(image(64, 48)).shape == (2, 3, 64, 48)


@torch.no_grad()
def test_dpt_gets_the_features_of_the_model():
    model, x = dpt(encoder_output_indices=[0, 1, 2]), image(64, 48)
    body = model.encoder.model
    features, prefix = model.encoder(x)
    expected = body.forward_intermediates(x, indices=[0, 1, 2], intermediates_only=True)
    assert len(features) == len(expected) == 3 and all(map(torch.equal, features, expected))
    assert all(tokens.shape[-1] == 24 for tokens in prefix if tokens is not None)
    kept = []
    body.blocks[1].attn.qkv.register_forward_hook(lambda module, args, out: kept.append((out, out.clone())))
    assert torch.allclose(model(x), model(x), atol=1e-6) and all(torch.equal(a, b) for a, b in kept)


@pytest.mark.parametrize('kind', DECODERS)
def test_a_swin_learns_from_images_of_any_size(kind):
    assert_segments(segmenter(kind, 'swin'), SIZES['swin'])


@torch.no_grad()
def test_a_decoder_gets_the_stages_of_the_swin():
    model, x = segmenter('UPerNet', 'swin'), image(96, 160)
    features = model.encoder(x)[-4:]
    expected = [y.permute(0, 3, 1, 2) for y in model.encoder.model(x)]
    assert len(expected) == 4 and all(map(torch.equal, features, expected))
    assert [y.shape[2:] for y in expected] == [(24, 40), (12, 20), (6, 10), (3, 5)]


@pytest.mark.parametrize('kind', ['DPT', 'UPerNet'])
def test_saved_and_loaded(kind, tmp_path):
    model = dpt() if kind == 'DPT' else segmenter(kind, 'swin')
    model.save_pretrained(tmp_path)
    loaded = smp.from_pretrained(tmp_path).eval()
    x = image(64, 64)
    assert torch.equal(loaded(x), model(x))


@pytest.mark.parametrize('kind', ['FPN', 'UPerNet'])
def test_pyramids_do_not_take_a_plain_vit(kind):
    # as any plain ViT of timm: all its maps are of one size
    with pytest.raises(ValueError, match='Unsupported model downsampling pattern'):
        segmenter(kind, 'vit')
