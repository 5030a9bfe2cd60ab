"""Rules for grids larger than the reference grid: against their formulas, number by number, and in whole models."""
import math
import sys
import warnings
from pathlib import Path

import numpy as np
import oracle
import pytest
import timm
import torch
from tiny import TINY, make

import timm_rope
from timm_rope._timm import save_for_hf
from timm_rope.encodings import ENCODINGS
from timm_rope.positions.coordinates import grid_axes
from timm_rope.positions.scaling import ALPHA, BETA, interpolate, ntk, yarn
from timm_rope.rotations import PairRotation, TripletRotation

NAMES = timm_rope.list_ropes()
RULES = ('extrapolate', 'interpolate', 'ntk', 'yarn')
BY_FREQUENCY = [n for n in NAMES if 'ntk' in ENCODINGS[n].scalings]
CASES = [(name, rule) for name in NAMES for rule in RULES if rule in RULES[:2] or name in BY_FREQUENCY]
SWIN = dict(img_size=32, patch_size=4, embed_dim=16, depths=(1, 2), num_heads=(1, 2), window_size=4, num_classes=3)


def rope(name, reference=(6, 4), head_dim=16, depth=2, **kwargs):
    torch.manual_seed(0)
    return timm_rope.create_rope(name, head_dim, 2, depth, reference, **kwargs).eval()


def turned(encoding, grid, layer=0, head=0):
    """What an encoding makes of a fixed vector at every position, (N, head_dim)."""
    x = torch.linspace(-1, 1, encoding.head_dim, dtype=encoding.freqs.dtype).expand(
        1, encoding.num_heads, grid[0] * grid[1], -1)
    return encoding.rotate(x, encoding(grid)[layer])[0, head].detach()


def scaled(rule, wx, wy, s, side, apart):
    """Frequencies of one head by the formulas, in plain numbers. `wx`, `wy`: lists; `s`, `side`: of (x, y)."""
    if apart:
        vectors = [[(w, 0.) for w in wx], [(0., w) for w in wy]]
    else:
        vectors = [list(zip(wx, wy))]
    out = []
    for group in vectors:
        norms = [math.hypot(*w) for w in group]
        turns = [math.hypot(w[0] * side[0], w[1] * side[1]) / (2 * math.pi) for w in group]
        rows = []
        for w, norm, r in zip(group, norms, turns):
            if rule == 'ntk':
                exponent = math.log(max(norms) / norm) / math.log(max(norms) / min(norms))
                rows.append([w[a] / s[a] ** exponent for a in (0, 1)])
            else:
                ramp = min(max((r - ALPHA) / (BETA - ALPHA), 0), 1)
                rows.append([w[a] * ramp + w[a] / s[a] * (1 - ramp) for a in (0, 1)])
        out.append(np.array(rows))
    table = sum(out)
    return table[:, 0].tolist(), table[:, 1].tolist()


@pytest.mark.parametrize('rule', ['ntk', 'yarn'])
@pytest.mark.parametrize('name', BY_FREQUENCY)
@pytest.mark.parametrize('coords', ['index', 'cells'])
def test_frequencies_follow_the_formula(name, rule, coords):
    if coords not in ENCODINGS[name].coords_choices:
        pytest.skip(f'{name} has no {coords} coordinates')
    grid, reference, dim = (9, 12), (6, 4), 24
    encoding = rope(name, reference, dim, coords=coords, scaling=rule, dtype=torch.float64)
    assert encoding.scaling == rule
    frame = oracle.FRAMES[name]
    side = (reference[1], reference[0]) if coords == 'index' else frame[:1] * 2
    ys = oracle.coordinates(grid[0], reference[0], coords, *frame)
    xs = oracle.coordinates(grid[1], reference[1], coords, *frame)
    triplets = name.startswith('spherical')
    vector = np.linspace(-1, 1, dim)
    for layer in range(2):
        freqs = encoding.frequencies().detach()
        wx, wy = freqs[:, layer if freqs.shape[1] > 1 else 0, 0].tolist()
        wx, wy = scaled(rule, wx, wy, (3., 1.5), side, triplets)
        got = turned(encoding, grid, layer).reshape(*grid, dim)
        for i, j in ((0, 0), (8, 11), (3, 7)):
            if triplets:
                matrix = oracle.triplets(dim, [[xs[j] * w for w in wx], [ys[i] * w for w in wy]], 'yx')
            else:
                matrix = oracle.pairs(dim, [xs[j] * u + ys[i] * v for u, v in zip(wx, wy)])
            assert np.abs(got[i, j].numpy() - matrix @ vector).max() < 1e-10


@pytest.mark.parametrize('name,rule', CASES)
def test_nothing_changes_up_to_the_reference_grid(name, rule):
    plain, other = rope(name), rope(name, scaling=rule)
    for grid in ((6, 4), (3, 4), (6, 2), (1, 1)):
        for a, b in zip(plain(grid, 1), other(grid, 1)):
            assert torch.equal(a, b) and a.dtype == b.dtype
    if rule != 'extrapolate':
        assert not torch.equal(plain((7, 4))[0], other((7, 4))[0])
        assert not torch.equal(plain((6, 5))[0], other((6, 5))[0])


@pytest.mark.parametrize('name,rule', [
    case for case in CASES if isinstance(rope(case[0]).rotation, TripletRotation) or not ENCODINGS[case[0]].oblique])
def test_an_axis_that_has_not_grown_keeps_its_angles(name, rule):
    plain, other = (rope(name, scaling=r)((3, 12), 0)[0].detach().unflatten(1, (3, 12)) for r in ('extrapolate', rule))
    half = plain.shape[-1] // 2
    # pairs: columns turn the first half of the channels; triplets: the roll by rows comes first
    rows, columns = slice(half, None), slice(half)
    if isinstance(rope(name).rotation, TripletRotation):
        rows, columns = columns, rows
    assert torch.equal(plain[..., rows], other[..., rows])
    assert torch.equal(plain[..., columns], other[..., columns]) == (rule == 'extrapolate')


@pytest.mark.parametrize('name', [n for n in NAMES if 'cells' in ENCODINGS[n].coords_choices])
@pytest.mark.parametrize('coords', ['cells', 'ends'])
def test_interpolation_is_training_on_the_larger_grid(name, coords):
    # normalised coordinates: a finer grid over the same image
    small, large = rope(name, (6, 4), coords=coords, scaling='interpolate'), rope(name, (15, 12), coords=coords)
    assert torch.allclose(turned(small, (15, 12)), turned(large, (15, 12)), atol=2e-6)


@pytest.mark.parametrize('coords,centered', [('index', False), ('cells', True), ('cells', False), ('ends', True)])
@pytest.mark.parametrize('size', [14, 15, 28, 64, 301])
def test_interpolated_patches_lie_in_the_reference_image(coords, centered, size):
    reference = torch.tensor([14, 14])
    y, _ = grid_axes([size, 14], reference, torch.zeros(()), coords, 1., centered)
    got = interpolate(y, torch.tensor(size / 14, dtype=torch.float64), coords)
    low, high = {'index': (-.5, 13.5)}.get(coords, (-.5, .5) if centered else (0., 1.))
    assert low - 1e-12 <= got[0] and got[-1] <= high + 1e-12 and bool((got.diff() > 0).all())
    assert abs(got.mean() - (low + high) / 2) < 1e-12, 'the middle of the image stays in the middle'


@pytest.mark.parametrize('name', [
    n for n in NAMES if isinstance(rope(n).rotation, PairRotation) and 'index' in ENCODINGS[n].coords_choices])
def test_interpolated_index_coordinates_average_to_those_of_training(name):
    angles = [torch.atan2(p[..., 1::2], p[..., 0::2]).detach() for p in (
        rope(name, (6, 4), coords='index', dtype=torch.float64)((6, 4))[0],
        rope(name, (6, 4), coords='index', dtype=torch.float64, scaling='interpolate')((12, 8))[0])]
    # four small patches for each patch of training; turns are averaged as unit vectors, whose mean has their angle
    mean = torch.polar(torch.ones_like(angles[1]), angles[1]).unflatten(1, (6, 2, 4, 2)).mean((2, 4)).flatten(1, 2)
    assert torch.allclose(mean / mean.abs(), torch.polar(torch.ones_like(angles[0]), angles[0]), atol=1e-10)


@pytest.mark.parametrize('coords', ['index', 'cells'])
def test_ntk_is_a_change_of_base_for_geometric_frequencies(coords):
    # arXiv 2309.00071: b' = b s^(d / (d - 2)) for d channels of one axis
    d, base, grid = 16, 100., (9, 12)
    by_rule = rope('axial', (6, 4), 2 * d, scaling='ntk', coords=coords, dtype=torch.float64)(grid)[0]
    for s, columns in ((12 / 4, slice(d)), (9 / 6, slice(d, None))):
        changed = base * s ** (d / (d - 2))
        expected = rope('axial', (6, 4), 2 * d, temperature=changed, coords=coords, dtype=torch.float64)(grid)[0]
        assert torch.allclose(by_rule[..., columns], expected[..., columns], atol=1e-10)


@pytest.mark.parametrize('rule', RULES)
def test_wave_vectors_on_the_axes_follow_the_rule_of_axial(rule):
    axial = rope('axial', scaling=rule, dtype=torch.float64)
    mixed = rope('mixed', scaling=rule, dtype=torch.float64)
    mixed.freqs.data.copy_(axial.freqs.expand_as(mixed.freqs))
    assert torch.allclose(turned(axial, (9, 12)), turned(mixed, (9, 12)), atol=1e-12)


def test_wave_vectors_keep_their_direction_where_both_axes_grow_alike():
    torch.manual_seed(0)
    freqs, s, side = torch.randn(2, 3, 2, 8).double(), torch.full((2,), 2.5).double(), torch.full((2,), 4.).double()
    for out in (ntk(freqs, s, False), yarn(freqs, s, side, False)):
        factor = out / freqs
        assert torch.allclose(factor[0], factor[1], atol=1e-12)
        assert factor.max() - factor.min() > .3, 'but not all alike'
        assert factor.min() >= 1 / 2.5 - 1e-12 and factor.max() <= 1 + 1e-12
        length, order = freqs.norm(dim=0).sort(-1)
        assert bool((factor[0].gather(-1, order).diff() >= -1e-12).all()), 'the faster a wave, the less it changes'


def test_ntk_keeps_the_highest_and_interpolates_the_lowest():
    torch.manual_seed(0)
    freqs, s = torch.randn(2, 3, 2, 8, dtype=torch.float64), torch.tensor([2., 3.])
    lengths, out = freqs.norm(dim=0), ntk(freqs, torch.tensor([2., 3.]), False)
    for index, factor in ((lengths.argmax(-1), torch.ones(2)), (lengths.argmin(-1), 1 / s)):
        at = index[None, ..., None].expand(2, -1, -1, 1)
        assert torch.allclose(out.gather(-1, at), freqs.gather(-1, at) * factor[:, None, None, None].double())


def test_ntk_of_zero_and_of_equal_frequencies_is_finite():
    s = torch.tensor([2., 2.])
    for values in ([0., 0., 0., 0.], [1., 1., 1., 1.], [0., 1., .1, 0.]):
        freqs = torch.tensor([values, [0.] * 4], dtype=torch.float64).reshape(2, 1, 1, 4).requires_grad_()
        out = ntk(freqs, s, False)
        out.sum().backward()
        assert bool(freqs.grad.isfinite().all())
        expected = [0., 1., .05, 0.] if len(set(values)) == 3 else values
        assert torch.allclose(out[0, 0, 0], torch.tensor(expected, dtype=torch.float64), atol=1e-15)


def test_yarn_between_its_thresholds():
    # turns over the reference grid of 8 patches: below, at, between, at, above
    turns = torch.tensor([.1, ALPHA, (ALPHA + BETA) / 2, BETA, 3.], dtype=torch.float64)
    freqs = torch.stack((turns * 2 * math.pi / 8, torch.zeros(5))).reshape(2, 1, 1, 5)
    out = yarn(freqs, torch.tensor([4., 1.]), torch.tensor([8., 8.]), False)
    assert torch.allclose((out / freqs)[0, 0, 0], torch.tensor([.25, .25, .625, 1., 1.]).double(), atol=1e-6)
    all_slow = yarn(freqs, torch.tensor([4., 1.]), torch.tensor([8., 8.]), False, 10., 20.)
    assert torch.allclose(all_slow, freqs / 4), 'with high thresholds it interpolates'


@pytest.mark.parametrize('name,rule', [
    case for case in CASES if ENCODINGS[case[0]].learned and case[1] != 'extrapolate'])
def test_gradients_of_learned_frequencies(name, rule):
    encoding = rope(name, (2, 3), 8, 1, scaling=rule, dtype=torch.float64)

    def payload(freqs):
        return torch.func.functional_call(encoding, {'freqs': freqs}, ((5, 4),))[0]

    torch.manual_seed(1)
    freqs = (encoding.freqs.detach() * (1 + .2 * torch.rand_like(encoding.freqs))).requires_grad_()  # no ties
    # of the others, which have many frequencies, a rule changes only the coordinates
    assert torch.autograd.gradcheck(payload, (freqs,), fast_mode=name not in BY_FREQUENCY)


@pytest.mark.parametrize('name,rule', CASES)
@torch.no_grad()  # generators that learn are squared in float32, see test_exponential.py
def test_single_precision(name, rule):
    single = rope(name, (14, 14), 16, 1, scaling=rule)
    double = rope(name, (14, 14), 16, 1, scaling=rule, dtype=torch.float64)
    double.freqs.data.copy_(single.freqs.data)
    if not double.learned:
        double.init_non_persistent_buffers()
    payload = single((40, 56), 1)[0]
    assert payload.dtype == torch.float32
    # frequencies are rounded to float32 once more: half of 2^-23 of an angle of up to 56 rad
    assert (payload.double() - double((40, 56), 1)[0]).abs().max() < (3e-6 if rule in RULES[:2] else 6.5e-6)


# -- refusals and the switch

@pytest.mark.parametrize('name,options,rule,reason', [
    ('liere', {}, 'ntk', 'mixture of frequencies'), ('liere', {}, 'yarn', 'mixture of frequencies'),
    ('comrope', {}, 'ntk', 'several frequencies'), ('geope', {}, 'yarn', 'depends on the direction'),
    ('quatro', {}, 'ntk', 'depends on the direction'),
    ('uniform', {}, 'ntk', 'one frequency'), ('uniform', {}, 'yarn', 'one frequency'),
    ('spiral', {'clamp': True}, 'interpolate', 'clamp'), ('spiral', {'clamp': True}, 'ntk', 'clamp'),
    ('axial', {}, 'pi', "'extrapolate', 'interpolate', 'ntk', 'yarn'"), ('mixed', {}, 3, "'ntk'"),
    ('spiral', {'clamp': True}, 'NTK', "'ntk'")])
def test_rules_without_meaning_are_refused(name, options, rule, reason):
    with pytest.raises(ValueError, match=f'scaling must be .*got {rule!r}[.:]') as error:
        rope(name, scaling=rule, **options)
    assert reason in str(error.value)
    encoding = rope(name, **options)
    with pytest.raises(ValueError, match='scaling'):
        encoding.set_scaling(rule)
    assert encoding.scaling == 'extrapolate'


def test_the_switch_is_seen_at_once_and_leaves_no_trace():
    encoding = rope('axial')
    before, keys = encoding((9, 12), 1)[0].clone(), list(encoding.state_dict())
    for rule in ('interpolate', 'ntk', 'yarn'):
        encoding.set_scaling(rule)
        assert torch.equal(encoding((9, 12), 1)[0], rope('axial', scaling=rule)((9, 12), 1)[0])
        assert not torch.equal(encoding((9, 12), 1)[0], before)
        assert f'scaling={rule}' in repr(encoding)
    encoding.set_scaling('extrapolate')
    assert torch.equal(encoding((9, 12), 1)[0], before) and list(encoding.state_dict()) == keys
    assert 'scaling' not in repr(encoding)
    with pytest.raises(ValueError, match='log_n must be True or False'):
        encoding.set_scaling('ntk', log_n=1)
    assert encoding.scaling == 'extrapolate' and encoding.log_n is False


# -- models

@pytest.mark.parametrize('rule', RULES)
def test_a_rule_is_a_choice_at_evaluation_and_not_of_the_weights(rule):
    plain, other = make(num_classes=3), make(num_classes=3, rope_scaling=rule, rope_log_n=True)
    other.load_state_dict(plain.state_dict())  # strict, with the signature
    plain.load_state_dict(other.state_dict())
    images, larger = torch.randn(2, 3, 32, 32), torch.randn(2, 3, 64, 48)
    with torch.no_grad():
        assert torch.equal(plain(images), other(images))
        assert (plain(larger) - other(larger)).abs().max() > 1e-4
        plain.set_rope_scaling(rule, log_n=True)
        assert torch.equal(plain(larger), other(larger))
        plain.set_input_size((64, 48), rope_scaling='extrapolate')
        assert plain.rope.scaling == 'extrapolate' and plain.rope.log_n


def test_a_rule_given_at_creation_travels_with_a_saved_model(tmp_path):
    chosen = dict(rope_scaling='yarn', rope_log_n=True)
    model = make(**chosen)
    save_for_hf(model, str(tmp_path), model_config=dict(num_classes=5), model_args={**TINY, **chosen})
    again = timm.create_model(f'local-dir:{tmp_path}', pretrained=True).eval()
    images = torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        assert again.rope.scaling == 'yarn' and again.rope.log_n and torch.equal(again(images), model(images))
    plain = timm.create_model(f'local-dir:{tmp_path}', pretrained=True, rope_scaling='extrapolate').eval()
    assert plain.rope.scaling == 'extrapolate'


def test_models_refuse_before_they_change_anything():
    model = make('vit_tiny_rope_liere')
    with pytest.raises(ValueError, match='mixture of frequencies'):
        model.set_input_size(64, rope_scaling='ntk')
    assert model.patch_embed.img_size == (32, 32) and model.rope.scaling == 'extrapolate'
    swin = timm.create_model('swin_tiny_rope_axial', rope_encoding='uniform', **SWIN)
    with pytest.raises(ValueError, match='one frequency'):
        swin.set_input_size(64, rope_scaling='yarn')
    assert swin.patch_embed.img_size == (32, 32) and swin.rope.scaling == 'extrapolate'
    for name, kwargs in (('vit_tiny_ape', TINY), ('swin_tiny_rope_axial', dict(SWIN, rope_encoding='none'))):
        model = timm.create_model(name, **kwargs)
        with pytest.raises(ValueError, match='needs a rotary encoding'):
            model.set_rope_scaling('ntk')
        with pytest.raises(ValueError, match='needs a rotary encoding'):
            model.set_input_size(64, rope_scaling='ntk')
        assert model.patch_embed.img_size == (32, 32)
    with pytest.raises(ValueError, match='scaling must be one of'):
        make(rope_scaling='linear')


@pytest.mark.parametrize('rule', RULES)
def test_swin_scales_the_windows_of_every_block(rule):
    torch.manual_seed(0)
    swin = timm.create_model('swin_tiny_rope_mixed', **SWIN).eval()
    images = torch.randn(1, 3, 64, 64)
    swin.set_input_size(64)
    with torch.no_grad():
        before = swin(images)
        swin.set_input_size(64, rope_scaling=rule)
        ropes = [module for module in swin.modules() if isinstance(module, timm_rope.RotaryEncoding)]
        assert len(ropes) == 3 and all(each.scaling == rule for each in ropes)
        assert torch.equal(swin(images), before) == (rule == 'extrapolate')
        torch.manual_seed(0)
        created = timm.create_model('swin_tiny_rope_mixed', rope_scaling=rule, **SWIN).eval()
        created.set_input_size(64)
        assert torch.equal(created(images), swin(images))


def sharpened(attention, factor):
    """Multiply the scores of an attention by way of its weights: the queries are linear in them."""
    width = attention.qkv.weight.shape[0] // 3
    with torch.no_grad():
        attention.qkv.weight[:width] *= factor
        attention.qkv.bias[:width] *= factor


@pytest.mark.parametrize('fused', [True, False])
def test_log_n_multiplies_the_scores(fused):
    # 16 patches and 3 prefix tokens in training, 48 and 3 now
    plain = make('vit_tiny_rope_axial', reg_tokens=2)
    log_n = make('vit_tiny_rope_axial', reg_tokens=2, rope_log_n=True)
    log_n.load_state_dict(plain.state_dict())
    for block in [*plain.blocks, *log_n.blocks]:
        block.attn.fused_attn = fused
    small, large = torch.randn(1, 3, 16, 32), torch.randn(1, 3, 48, 64)
    with torch.no_grad():
        assert torch.equal(plain(small), log_n(small)), 'fewer tokens: nothing changes'
        unscaled = plain(large)
        for block in plain.blocks:
            sharpened(block.attn, math.log(51) / math.log(19))
        assert torch.allclose(plain(large), log_n(large), atol=1e-5)
        assert (unscaled - log_n(large)).abs().max() > 1e-3
        assert log_n.bfloat16()(large.bfloat16()).dtype == torch.bfloat16
    assert abs(float(log_n.rope.score_scale(51, 3)) - math.log(51) / math.log(19)) < 1e-6
    assert float(rope('axial', (1, 1)).score_scale(4)) == 2., 'a single token of reference counts as two'


def test_log_n_in_windows():
    torch.manual_seed(0)
    plain = timm.create_model('swin_tiny_rope_axial', **SWIN).eval()
    log_n = timm.create_model('swin_tiny_rope_axial', rope_log_n=True, **SWIN).eval()
    for layer in plain.layers:
        for block in layer.blocks:
            sharpened(block.attn, 20)  # attention that is not uniform
    log_n.load_state_dict(plain.state_dict())
    images, larger = torch.randn(1, 3, 32, 32), torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        assert torch.equal(plain(images), log_n(images))
        for model in (plain, log_n):
            model.set_input_size(64)  # windows of 8 x 8
        assert (plain(larger) - log_n(larger)).abs().max() > 1e-5
        for layer in plain.layers:
            for block in layer.blocks:
                sharpened(block.attn, math.log(64) / math.log(16))
        assert torch.allclose(plain(larger), log_n(larger), atol=1e-5)


def test_gradient_checkpointing_with_a_rule():
    grads = []
    for checkpointing in (False, True):
        model = make(rope_scaling='ntk', rope_log_n=True)
        model.set_grad_checkpointing(checkpointing)
        torch.manual_seed(1)
        model.train()(torch.randn(2, 3, 64, 64)).square().sum().backward()
        grads.append(model.rope.freqs.grad)
    assert torch.allclose(*grads, rtol=1e-4, atol=1e-6) and bool(grads[0].any())


# -- graphs

@pytest.mark.parametrize('name,rule', [
    ('axial', 'interpolate'), ('mixed', 'ntk'), ('spherical_learned', 'yarn'), ('liere', 'interpolate')])
def test_torchscript_and_fx(name, rule):
    model = make(f'vit_tiny_rope_{name}', depth=1, rope_scaling=rule, rope_log_n=True)
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')
        scripted = torch.jit.script(model)
    traced = torch.fx.symbolic_trace(model)
    for size in ((32, 32), (80, 48)):
        x = torch.randn(1, 3, *size)
        with torch.no_grad():
            for graph in (scripted, traced):
                assert torch.allclose(graph(x), model(x), atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize('name,rule', [('axial', 'interpolate'), ('mixed', 'ntk')])
def test_compile_takes_any_size(name, rule):
    torch._dynamo.reset()
    model = make(f'vit_tiny_rope_{name}', depth=1, rope_scaling=rule, rope_log_n=True)
    graphs = []

    def count(graph, inputs):
        graphs.append(graph)
        return graph.forward

    compiled = torch.compile(model, backend=count, dynamic=True, fullgraph=True)
    with torch.no_grad():
        for size in ((48, 64), (64, 80), (80, 96)):
            x = torch.randn(1, 3, *size)
            assert torch.allclose(compiled(x), model(x), atol=1e-5)
        assert len(graphs) <= 2, 'one recompilation at most'
        model.set_rope_scaling('extrapolate')
        assert torch.allclose(compiled(x), model(x), atol=1e-5), 'a new rule is seen'


def test_export_with_a_rule():
    model = make('vit_tiny_rope_mixed', depth=1, rope_scaling='ntk', rope_log_n=True)
    x = torch.randn(1, 3, 64, 64)
    exported = torch.export.export(model, (x,)).module()
    assert torch.allclose(exported(x), model(x), atol=1e-5)


# -- the experiment

def test_the_experiment_counts_every_rule(monkeypatch):
    pytest.importorskip('sklearn', reason='scikit-learn is not installed (extra dev)')
    monkeypatch.syspath_prepend(str(Path(__file__).parents[2] / 'benchmarks'))
    import scaling as experiment
    threads = torch.get_num_threads()
    try:
        rows = [row for label in ('liere', 'ape') for row in experiment.run_model(label, 1, 1, (12, 24), 40)]
    finally:
        torch.set_num_threads(threads)
    rules = [('liere', rule, log_n) for rule in RULES[:2] for log_n in (False, True)] + [('ape', None, False)]
    assert [(r['model'], r['rule'], r['log_n'], r['size']) for r in rows] == [
        (*rule, size) for rule in rules for size in (12, 24)]
    assert all(0 <= r['right'] <= 40 and r['images'] == 40 for r in rows)
    assert len({r['right'] for r in rows if r['model'] == 'liere' and r['size'] == 12}) == 1, 'no rule at the own size'
    shown = experiment.table([*rows, dict(rows[0], right=rows[0]['right'] + 4)], (12, 24)).splitlines()
    low = 100 * rows[0]['right'] / 40
    assert shown[0].split() == ['1x', '2x'] and len(shown) == 1 + len(rules)
    assert f'{low + 5:.1f} ({low:.1f}-{low + 10:.1f})' in shown[1], 'mean, smallest and largest'
    sys.modules.pop('scaling')
