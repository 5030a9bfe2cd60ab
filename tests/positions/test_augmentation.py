"""Random coordinates in training: what is drawn, when, and that nothing of it remains."""
import math

import pytest
import timm
import torch
from tiny import make

import timm_rope
from timm_rope.encodings import ENCODINGS

NAMES = timm_rope.list_ropes()
LEARNED = [name for name, encoding in ENCODINGS.items() if encoding.learned]
ALL = dict(shift=.3, jitter=1.2, rescale=2.)
GRID, REFERENCE = (5, 8), (4, 6)
SWIN = dict(img_size=32, patch_size=4, embed_dim=16, depths=(1, 1), num_heads=(1, 2), window_size=4, num_classes=3)


def rope(name='axial', **kwargs):
    torch.manual_seed(0)
    return timm_rope.create_rope(name, 16, 2, 2, REFERENCE, **kwargs)


def coordinates(encoding):
    """Rows (5,) and columns (8,) as one call of an axial encoding sees them; its slowest pair turns far below pi."""
    payload = encoding(GRID)[0].detach()[0].unflatten(0, GRID)
    angles = torch.atan2(payload[..., 1::2], payload[..., 0::2])
    slowest = encoding.frequencies()[:, 0, 0].double()
    half = angles.shape[-1] // 2
    return angles[:, 0, -1] / slowest[1, -1], angles[0, :, half - 1] / slowest[0, half - 1]


def draws(count=400, coords='cells', **amounts):
    """Shift of the middle and stretch of the coordinates of many calls, (count, 2) each, rows first."""
    encoding = rope(coords=coords, temperature=1e8, dtype=torch.float64, **amounts).train()
    plain = coordinates(rope(coords=coords, temperature=1e8, dtype=torch.float64).eval())
    moved, stretched = [], []
    for _ in range(count):
        got = coordinates(encoding)
        for axis in got:
            steps = axis.diff()
            assert torch.allclose(steps, steps[:1].expand_as(steps), rtol=1e-6), 'evenly spaced'
        moved.append([axis.mean() - before.mean() for axis, before in zip(got, plain)])
        stretched.append([(axis[1] - axis[0]) / (before[1] - before[0]) for axis, before in zip(got, plain)])
    return torch.tensor(moved), torch.tensor(stretched)


def assert_uniform(values, limit):
    """Values fill [-limit, limit] and nothing beyond, as much on one side as on the other."""
    assert values.abs().max() <= limit * (1 + 1e-6) and values.max() > .95 * limit and values.min() < -.95 * limit
    # three and a half standard errors of the mean and of the mean square of a uniform distribution
    assert abs(values.mean()) < 3.5 * limit * math.sqrt(1 / 3 / len(values))
    assert abs(values.square().mean() - limit ** 2 / 3) < 3.5 * limit ** 2 * math.sqrt(4 / 45 / len(values))


def correlation(values):
    return float(torch.corrcoef(values.T)[0, 1])


@pytest.mark.parametrize('coords,sides', [
    ('cells', (2 * math.pi, 2 * math.pi)), ('ends', (2 * math.pi, 2 * math.pi)), ('index', REFERENCE)])
def test_shift_is_a_part_of_half_the_reference_image(coords, sides):
    moved, stretched = draws(coords=coords, shift=.3)
    for axis, side in enumerate(sides):
        assert_uniform(moved[:, axis], .3 * side / 2)
    assert abs(correlation(moved)) < .2, 'rows and columns move apart'
    assert torch.allclose(stretched, torch.ones_like(stretched), atol=1e-6)


@pytest.mark.parametrize('coords', ['cells', 'index'])
def test_jitter_stretches_each_axis(coords):
    moved, stretched = draws(coords=coords, jitter=1.5)
    for axis in (0, 1):
        assert_uniform(stretched[:, axis].log(), math.log(1.5))
    assert abs(correlation(stretched.log())) < .2
    assert moved.abs().max() < 1e-6, 'about the middle of the grid'


@pytest.mark.parametrize('coords', ['cells', 'index'])
def test_rescale_stretches_both_axes_alike(coords):
    moved, stretched = draws(coords=coords, rescale=2.)
    assert_uniform(stretched[:, 0].log(), math.log(2))
    assert torch.allclose(stretched[:, 0], stretched[:, 1], atol=1e-6) and moved.abs().max() < 1e-6


def test_together_they_shift_before_they_stretch():
    moved, stretched = draws(100, **ALL)
    assert bool((moved.abs() <= .3 * math.pi * stretched * (1 + 1e-6)).all())
    assert (moved / stretched).abs().max() > .9 * .3 * math.pi
    assert stretched.max() <= 2.4 + 1e-6 and stretched.min() >= 1 / 2.4 - 1e-6


@pytest.mark.parametrize('name', NAMES)
def test_off_by_default_and_in_evaluation(name):
    plain, augmented = rope(name).train(), rope(name, **ALL)
    state = torch.get_rng_state()
    expected = plain(GRID, 1)
    augmented.eval()
    for a, b in zip(augmented(GRID, 1), expected):
        assert torch.equal(a, b)
    assert torch.equal(torch.get_rng_state(), state), 'no random number is used up'
    augmented.train()
    first, second = augmented(GRID, 1), augmented(GRID, 1)
    for payload in (first, second):
        assert not torch.equal(payload[0], expected[0]) and torch.equal(payload[0][:, :1], expected[0][:, :1])
    assert not torch.equal(first[0], second[0]), 'drawn anew in every call'
    augmented.eval()
    assert torch.equal(augmented(GRID, 1)[0], expected[0]), 'the cache holds none of it'
    augmented.train()
    assert not torch.equal(augmented(GRID, 1)[0], expected[0]), 'nor does training take from the cache'
    with torch.no_grad():
        assert not torch.equal(augmented(GRID, 1)[0], expected[0])


@pytest.mark.parametrize('name', NAMES)
def test_reproducible_and_one_draw_for_all_blocks(name):
    encoding = rope(name, **ALL).train()
    if name in LEARNED:
        encoding.freqs.data.copy_(encoding.freqs.data[:, :1].expand_as(encoding.freqs))
    torch.manual_seed(3)
    first = encoding(GRID)
    torch.manual_seed(3)
    assert all(torch.equal(a, b) for a, b in zip(first, encoding(GRID)))
    assert torch.equal(first[0], first[1])


@pytest.mark.parametrize('name', LEARNED)
def test_gradients(name):
    encoding = rope(name, scaling='interpolate', **ALL).train()
    payload = encoding(GRID)[1]
    (payload * torch.randn_like(payload)).sum().backward()
    assert bool(encoding.freqs.grad.isfinite().all()) and bool(encoding.freqs.grad[:, 1].any())


def test_rotations_stay_rotations():
    for name in NAMES:
        encoding = rope(name, **ALL).train()
        x = torch.randn(2, 2, 40, 16)
        turned = encoding.rotate(x, encoding(GRID)[0])
        assert torch.allclose(turned.norm(dim=-1), x.norm(dim=-1), atol=1e-5)


def test_usage_says_what_was_chosen_and_no_checkpoint_does():
    encoding = rope(**ALL, scaling='yarn', log_n=True)
    assert encoding.usage == dict(ALL, scaling='yarn', log_n=True)
    assert 'rescale=2.0' in repr(encoding) and 'rescale' not in repr(rope())
    rope().load_state_dict(encoding.state_dict())
    assert rope().usage == dict(scaling=None, log_n=False, shift=None, jitter=None, rescale=None)
    assert rope(**rope().usage).usage == rope().usage


@pytest.mark.parametrize('option,value', [
    ('shift', -.1), ('shift', float('inf')), ('shift', '1'), ('shift', True), ('jitter', .9), ('jitter', float('nan')),
    ('rescale', 0.), ('rescale', [2.])])
def test_bad_amounts(option, value):
    with pytest.raises(ValueError, match=f'{option} must be None or a finite number of at least [01], got'):
        rope(**{option: value})
    with pytest.raises(ValueError, match=f'{option} must be'):
        make(**{f'rope_{option}': value})


# -- models

def swin(**kwargs):
    return timm.create_model('swin_tiny_rope_mixed', **SWIN, **kwargs)


@pytest.mark.parametrize('build', [make, swin], ids=['vit', 'swin'])
def test_gradient_checkpointing_recomputes_with_the_same_draw(build):
    results = []
    for checkpointing in (False, True):
        torch.manual_seed(0)
        model = build(rope_rescale=2., rope_shift=.5).train()
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if name.endswith('attn.qkv.weight'):
                    parameter.mul_(20)  # attention that is not uniform
        model.set_grad_checkpointing(checkpointing)
        torch.manual_seed(1)
        loss = model(torch.randn(2, 3, 32, 32)).square().sum()
        loss.backward()
        results.append({n: p.grad for n, p in model.named_parameters() if p.grad is not None})
    for name, grad in results[0].items():
        assert torch.allclose(grad, results[1][name], rtol=1e-4, atol=1e-6 * float(grad.abs().max())), name
    assert any(bool(grad.any()) for name, grad in results[0].items() if name.endswith('rope.freqs'))


@pytest.mark.parametrize('build', [make, swin], ids=['vit', 'swin'])
def test_models_augment_in_training_only(build):
    torch.manual_seed(0)
    plain, augmented = build().eval(), build(rope_jitter=1.5, rope_rescale=2.).eval()
    augmented.load_state_dict(plain.state_dict())
    x = torch.randn(1, 3, 32, 32)
    with torch.no_grad():
        assert torch.equal(plain(x), augmented(x))
        for model in (plain, augmented):
            for module in model.modules():
                if isinstance(module, timm_rope.RotaryEncoding):
                    module.train()  # and nothing else, so that only positions can differ
        assert torch.equal(plain(x), plain(x))
        assert not torch.equal(augmented(x), augmented(x))


def test_compiled_training_draws_anew():
    torch._dynamo.reset()
    model = make('vit_tiny_rope_axial', depth=1, rope_rescale=2., rope_shift=.3).train()
    compiled = torch.compile(model, backend='eager', fullgraph=True)
    x = torch.randn(1, 3, 32, 32)
    assert not torch.equal(compiled(x), compiled(x))
    torch.manual_seed(5)
    expected = model(x)
    torch.manual_seed(5)
    assert torch.allclose(compiled(x), expected, atol=1e-5)
