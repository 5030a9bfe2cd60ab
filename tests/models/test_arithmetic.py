"""What people do to weights: averages, casts, the meta device, memory formats. The model stays the same function."""
import copy

import numpy as np
import pytest
import timm
import torch
from timm.utils import ModelEma, ModelEmaV2, ModelEmaV3
from tiny import make
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

import timm_rope

# 22 and 29 are sides that a moving average in integers would have changed by its first update
SIZES = dict(img_size=(176, 232), patch_size=8)
NAMES = ['vit_tiny_rope_spherical', 'vit_tiny_rope_mixed_ape', 'vit_tiny_rope_uniform', 'vit_tiny_rope_liere', 'swin']


def build(name, **kwargs):
    if name != 'swin':
        return make(name, **{**SIZES, **kwargs})
    torch.manual_seed(0)
    return timm.create_model('swin_tiny_rope_axial', **{**dict(
        img_size=56, patch_size=4, window_size=7, embed_dim=24, depths=(1, 1), num_heads=(2, 4), num_classes=5),
        **kwargs}).eval()


def logits(model):
    torch.manual_seed(1)
    size = model.patch_embed.img_size
    with torch.no_grad():
        return model.eval()(torch.randn(2, 3, *size))


def metadata(model):
    return {k: v for k, v in model.state_dict().items() if k.endswith(('grid', 'signature'))}


def assert_same_metadata(model, other):
    a, b = metadata(model), metadata(other)
    assert a.keys() == b.keys() and len(a) > 1
    assert all(torch.equal(a[key].round(), b[key].round()) for key in a)


@pytest.mark.parametrize('name', NAMES)
@pytest.mark.parametrize('average', [
    lambda m: ModelEma(m, 0.9999), lambda m: ModelEma(m, 0.9995), lambda m: ModelEmaV2(m, 0.9999),
    lambda m: ModelEmaV3(m, 0.9998), lambda m: ModelEmaV3(m, 0.9998, foreach=False)],
    ids=['ModelEma', 'ModelEma faster', 'ModelEmaV2', 'ModelEmaV3', 'ModelEmaV3 one by one'])
def test_moving_averages_of_timm(name, average):
    model = build(name)
    ema = average(model)
    for _ in range(30):
        ema.update(model)
    averaged = ema.ema if hasattr(ema, 'ema') else ema.module
    assert torch.allclose(logits(averaged), logits(model), atol=1e-3)
    assert_same_metadata(averaged, model)
    fresh = build(name)
    fresh.load_state_dict(averaged.state_dict())
    assert torch.equal(logits(fresh), logits(averaged))


@pytest.mark.parametrize('name', NAMES)
@pytest.mark.parametrize('kwargs', [{}, dict(multi_avg_fn=get_ema_multi_avg_fn(0.9999)), dict(
    avg_fn=lambda old, new, count: 0.999 * old + 0.001 * new)], ids=['mean', 'foreach', 'one by one'])
def test_averaged_model_with_its_buffers(name, kwargs):
    model = build(name)
    averaged = AveragedModel(model, use_buffers=True, **kwargs)
    for _ in range(20):
        averaged.update_parameters(model)
    assert torch.allclose(logits(averaged.module), logits(model), atol=1e-3)
    assert_same_metadata(averaged.module, model)


ARITHMETIC = {
    'mean of two': lambda s: {k: v * 0.5 + v * 0.5 for k, v in s.items()},
    'mean of three in bfloat16': lambda s: {
        k: sum(v.bfloat16() * (1 / 3) for _ in range(3)) if k.endswith(('grid', 'signature')) else v
        for k, v in s.items()},
    'mean of ten in float16': lambda s: {
        k: sum(v.half() * 0.1 for _ in range(10)).float() if k.endswith(('grid', 'signature')) else v
        for k, v in s.items()},
    'numpy': lambda s: {k: torch.from_numpy(np.mean([v.numpy()] * 3, axis=0)) for k, v in s.items()},
    'double': lambda s: {k: v.double() for k, v in s.items()},
    'written by hand, in place': lambda s: {k: v.clone().mul_(0.9999).add_(v, alpha=0.0001) for k, v in s.items()},
    'lerp': lambda s: {k: v.clone().lerp_(v, 0.3) for k, v in s.items()},
    'task arithmetic': lambda s: {k: v + 0.7 * (v - v) for k, v in s.items()},
}


@pytest.mark.parametrize('name', NAMES)
@pytest.mark.parametrize('what', ARITHMETIC)
def test_arithmetic_on_state_dicts(name, what):
    model, other = build(name), build(name)
    other.load_state_dict(ARITHMETIC[what](model.state_dict()))
    assert torch.allclose(logits(other), logits(model), atol=1e-4)
    assert_same_metadata(other, model)


@pytest.mark.parametrize('dtype', [torch.float16, torch.bfloat16])
@pytest.mark.parametrize('size', [176, 8 * 300, 8 * 301])  # bfloat16 holds 300, but not 301
def test_low_precision_holds_any_grid(dtype, size):
    model = build('vit_tiny_rope_spherical', img_size=(size, 64))
    low = {k: v.to(dtype) for k, v in model.state_dict().items()}
    other = build('vit_tiny_rope_spherical', img_size=64)
    other.load_state_dict(low)
    assert other.rope.reference_grid.tolist() == [size // 8, 8]
    assert other.rope.reference_grid.dtype == torch.float32


@pytest.mark.parametrize('a,b', [
    (dict(img_size=176), dict(img_size=192)), (dict(img_size=112), dict(img_size=128)),
    ({}, dict(rope_encoding='uniform')), ({}, dict(rope_order='xy'))])
@pytest.mark.parametrize('weight', [0.5, 0.1, 0.9])
def test_averages_of_different_models_are_refused(a, b, weight):
    one, two = (build('vit_tiny_rope_spherical', **kwargs) for kwargs in (a, b))
    mixed = {k: v * weight + w * (1 - weight) if v.shape == w.shape else v * weight
             for (k, v), w in zip(one.state_dict().items(), two.state_dict().values())}
    for target in (one, two):
        before = copy.deepcopy(target.state_dict())
        with pytest.raises((ValueError, RuntimeError), match='average of weights'):
            target.load_state_dict(mixed)
        assert all(torch.equal(before[k], v) for k, v in target.state_dict().items())


@pytest.mark.parametrize('name', NAMES)
def test_checkpoints_of_integers_still_load(name):
    model, other = build(name), build(name)
    old = model.state_dict()
    for key in [key for key in old if key.endswith('grid')]:
        old[key] = old[key].to(torch.int64)
    for key in [key for key in old if key.endswith('signature')]:
        text = next(m for m in model.modules() if isinstance(m, timm_rope.RotaryEncoding))._signature
        old[key] = torch.tensor(list(text.encode()), dtype=torch.uint8)
    other.load_state_dict(old)
    assert torch.equal(logits(other), logits(model))


def test_a_grid_changed_in_place_is_saved():
    model = build('vit_tiny_rope_spherical')
    model.rope.reference_grid.copy_(torch.tensor([5, 300]))
    other = build('vit_tiny_rope_spherical')
    other.load_state_dict(model.state_dict())
    assert other.rope.reference_grid.tolist() == [5, 300]
    other.load_state_dict({**model.state_dict(), 'rope.reference_grid': torch.tensor([6, 7])})
    assert other.rope.reference_grid.tolist() == [6, 7], 'integers put there by hand are meant'


@pytest.mark.parametrize('value,words', [
    (torch.tensor([4611686018427387904, 6]), 'at most 65535'), (torch.tensor([6., float('nan')]), 'whole numbers'),
    (torch.tensor([6.5, 6]), 'average of weights'), (torch.tensor([6 + 1j, 6]), 'two positive integers')])
def test_what_no_grid_can_be(value, words):
    model = build('vit_tiny_rope_spherical')
    with pytest.raises(ValueError, match=words):
        model.load_state_dict({**model.state_dict(), 'rope.reference_grid': value})


def test_complex_frequencies_are_refused():
    model = build('vit_tiny_rope_mixed_ape')
    state = model.state_dict()
    with pytest.raises(ValueError, match='must be real numbers, got torch.complex64'):
        model.load_state_dict({**state, 'rope.freqs': state['rope.freqs'].to(torch.complex64)})


# -- the meta device

def emptied(name):
    with torch.device('meta'):
        model = build_on_meta(name)
    model.to_empty(device='cpu')
    for tensor in [*model.parameters(), *model.buffers()]:
        tensor.data.fill_(1e25)  # what uninitialised memory may hold
    return model


def build_on_meta(name):
    if name == 'swin':
        return timm.create_model(
            'swin_tiny_rope_axial', img_size=56, patch_size=4, window_size=7, embed_dim=24, depths=(1, 1),
            num_heads=(2, 4), num_classes=5).eval()
    return timm.create_model(name, **{**SIZES, **dict(
        embed_dim=24, depth=3, num_heads=2, num_classes=5, init_values=1.0)}).eval()


def fill_buffers_of_timm(model):
    """timm's own tables of indices, which are no part of any state dict, as its loading fills them."""
    for module in model.modules():
        if module is not model and hasattr(module, 'init_non_persistent_buffers'):
            if not isinstance(module, timm_rope.RotaryEncoding):
                module.init_non_persistent_buffers()


@pytest.mark.parametrize('name', NAMES)
@pytest.mark.parametrize('road', ['emptied', 'assigned', 'emptied, assigned', 'assigned, moved'])
def test_from_the_meta_device(name, road):
    model = build(name)
    saved = model.state_dict()
    if road == 'assigned':
        with torch.device('meta'):
            other = build_on_meta(name)
        other.load_state_dict(saved, assign=True)
    elif road == 'assigned, moved':
        with torch.device('meta'):
            other = build_on_meta(name)
        other.load_state_dict(saved, assign=True)
        other = other.double().float()
    else:
        other = emptied(name)
        other.load_state_dict(saved, assign='assigned' in road)
    for rope in (m for m in other.modules() if isinstance(m, timm_rope.RotaryEncoding)):
        assert not any(t.is_meta for t in [*rope.parameters(), *rope.buffers()])
    if name == 'swin':
        fill_buffers_of_timm(other)
    assert torch.equal(logits(other), logits(model))


@pytest.mark.parametrize('name', timm_rope.list_ropes())
def test_to_meta_and_back(name):
    rope = timm_rope.create_rope(name, 16, 2, 2, (3, 4))
    saved, expected = copy.deepcopy(rope.state_dict()), rope((5, 6))[0]
    rope.to('meta')
    rope.to_empty(device='cpu')
    if rope.learned:
        rope.load_state_dict(saved)
    else:
        rope.reference_grid.copy_(torch.tensor([3, 4]))
    assert torch.equal(rope((5, 6))[0], expected)
    rope.freqs.data.fill_(7)
    rope.load_state_dict(saved)
    assert torch.equal(rope((5, 6))[0], expected)


@pytest.mark.parametrize('dtype', [torch.float16, torch.bfloat16])
def test_assigned_frequencies_stay_float32(dtype):
    model = build('vit_tiny_rope_mixed_ape')
    low = {k: v.to(dtype) for k, v in model.state_dict().items()}
    with torch.device('meta'):
        other = build_on_meta('vit_tiny_rope_mixed_ape')
    other.load_state_dict(low, assign=True)
    assert other.rope.freqs.dtype == torch.float32 and other.blocks[0].attn.qkv.weight.dtype == dtype
    assert torch.equal(other.rope.freqs, low['rope.freqs'].float())


# -- memory formats

@pytest.mark.parametrize('name', [f'vit_tiny_rope_{name}' for name in timm_rope.list_ropes()])
def test_channels_last_is_for_images(name):
    model = make(name)
    strides = {k: v.stride() for k, v in model.rope.named_buffers()} | {
        k: v.stride() for k, v in model.rope.named_parameters()}
    expected = logits(model)
    model.to(memory_format=torch.channels_last)
    after = {k: v.stride() for k, v in model.rope.named_buffers()} | {
        k: v.stride() for k, v in model.rope.named_parameters()}
    assert after == strides and 'freqs' in strides
    assert all(v.is_contiguous() for v in model.rope.state_dict().values())
    assert torch.allclose(logits(model), expected, atol=1e-5)
    assert model.patch_embed.proj.weight.is_contiguous(memory_format=torch.channels_last)
