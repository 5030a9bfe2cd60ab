"""The stand-ins for what older releases of timm lack do what the newest timm does.

`python tests/versions.py` runs whole models with older releases; here the parts are compared where timm has both.
"""
import pytest
import timm.layers
import torch
from timm.models import swin_transformer, vision_transformer
from torch import nn

from timm_rope import _timm
from timm_rope._timm import _common, creation, swin, vit

newest = pytest.mark.skipif(not hasattr(swin_transformer, 'resolve_stage_window_sizes'), reason='compares with 1.0.31')


@newest
def test_the_newest_timm_is_used_as_it_is():
    assert _timm.SwinTransformer is swin_transformer.SwinTransformer
    assert _timm.WindowAttention is swin_transformer.WindowAttention
    assert _timm.VisionTransformer is vision_transformer.VisionTransformer and _timm.Block is vision_transformer.Block
    for name in ('Attention', 'resample_abs_pos_embed', 'resolve_self_attn_mask'):
        assert getattr(_timm, name) is getattr(timm.layers, name)


@newest
@pytest.mark.parametrize(
    'window', [7, (7, 14), [(7, 14), (3, 4)], [7, (3, 4), 5], (7, 14, 7), 0, (4, 0), [(1, 2), (0, 1)]])
@pytest.mark.parametrize('stages', [1, 2, 3])
def test_windows_by_stage(window, stages):
    results = []
    for function in (swin._window_sizes, swin_transformer.resolve_stage_window_sizes):
        try:
            results.append(function(window, stages))
        except AssertionError:
            results.append('refused')
    assert results[0] == results[1]


@newest
@pytest.mark.parametrize('ratio', [8, 20, (8, 4), (1, 2, 3), 0])
@pytest.mark.parametrize('stages', [2, 3])
def test_windows_by_ratio(ratio, stages):
    results = []
    for function in (swin._window_ratios, swin_transformer.window_sizes_from_ratio):
        try:
            results.append(function((56, 14), ratio, stages))
        except AssertionError:
            results.append('refused')
    assert results[0] == results[1]


@pytest.mark.parametrize('mask,causal', [
    (None, False), (None, True), (torch.eye(5, dtype=torch.bool), False),
    (torch.linspace(-1, 1, 50, dtype=torch.float64).reshape(2, 1, 5, 5), False)])
def test_masks_mean_what_they_mean_to_torch(mask, causal):
    q, k, v = torch.randn(3, 2, 3, 5, 8, dtype=torch.float64).unbind()
    scores = q @ k.mT * 8 ** -.5
    added = vit._self_attn_mask(5, scores, mask, causal)
    out = (scores if added is None else scores + added).softmax(-1) @ v
    expected = nn.functional.scaled_dot_product_attention(q, k, v, mask, is_causal=causal)
    torch.testing.assert_close(out, expected)


@newest
@pytest.mark.parametrize('old,new', [((4, 16), (8, 8)), ((8, 8), (4, 16)), ((4, 6), (9, 5)), ((4, 4), (4, 4))])
@pytest.mark.parametrize('prefix', [0, 2])
def test_positions_are_resized(old, new, prefix):
    args = torch.randn(1, old[0] * old[1] + prefix, 12), list(new), list(old), prefix
    expected = timm.layers.resample_abs_pos_embed(*args, antialias=False)
    torch.testing.assert_close(vit._resample(*args, antialias=False), expected, rtol=0, atol=0)


@newest
@pytest.mark.parametrize('device', ['cpu', 'meta'])
@pytest.mark.parametrize('old,new', [((4, 4), (7, 7)), ((3, 5), (6, 4)), ((6, 2), (3, 4)), ((4, 4), (4, 4))])
def test_biases_of_windows_are_resized(old, new, device):
    torch.manual_seed(0)
    theirs = swin_transformer.WindowAttention(12, 3, window_size=old, device=device)
    theirs.relative_position_bias_table.requires_grad_(False)
    ours = swin._WindowAttentionResized(12, 3, window_size=old, device=device)
    ours.load_state_dict(theirs.state_dict())
    ours.relative_position_bias_table.requires_grad_(False)
    for attention in (ours, theirs):
        attention.set_window_size(new)
    a, b = ours.relative_position_bias_table, theirs.relative_position_bias_table
    assert ours.window_size == new and a.shape == b.shape and a.device == b.device and not a.requires_grad
    if device == 'cpu':
        torch.testing.assert_close(a, b)
        assert torch.equal(ours.relative_position_index, theirs.relative_position_index)
        x = torch.randn(2, new[0] * new[1], 12)
        theirs.load_state_dict(ours.state_dict())
        torch.testing.assert_close(ours(x), theirs(x))


@newest
@pytest.mark.parametrize('classes', [0, 3])
@pytest.mark.parametrize('window', [4, (2, 4)])
def test_checkpoints_of_a_swin_are_read(classes, window):
    model = swin_transformer.SwinTransformer(
        32, 4, embed_dim=16, depths=(1, 1), num_heads=(1, 2), window_size=window, num_classes=classes)
    state = model.state_dict()
    read = swin._filter_swin(dict(state), model)
    assert read.keys() == state.keys()
    for key, value in swin_transformer.checkpoint_filter_fn(dict(state), model).items():
        assert torch.equal(read[key], value), key


@newest
def test_images_are_prepared_as_by_the_newest():
    for channels in (1, 2, 3):
        model = timm.create_model('vit_tiny_rope_axial', img_size=32, in_chans=channels, device='meta')
        wanted = dict(input_size=(channels, 32, 32), crop_pct=.7)
        expected = timm.data.resolve_input_data_config(model, wanted, use_test_size=True)
        found = creation._input_data_config(model, wanted, use_test_size=True)
        for key in ('input_size', 'crop_pct', 'interpolation', 'crop_mode'):
            assert found[key] == expected[key]
        for key in ('mean', 'std'):
            assert found[key] == pytest.approx(expected[key])


def test_modules_without_a_device_are_built_on_one(monkeypatch):
    monkeypatch.setattr(_common, 'takes', lambda *args: False)

    class Old(nn.Module):
        def __init__(self, rate):
            super().__init__()
            self.rates = [float(x) for x in torch.linspace(0, rate, 3)]
            self.layer = nn.Linear(2, 3)

    built = _common.on_device(Old)(.5, device='meta', dtype=torch.float16)
    assert built.layer.weight.is_meta and built.layer.weight.dtype == torch.float16
    assert built.rates == [0, .25, .5] and isinstance(built, Old)
    assert _common.on_device(Old)(.5).layer.weight.device.type == 'cpu'
