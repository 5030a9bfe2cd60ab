"""Spiral RoPE: its waves, the clamp of its published weights, and their normalisation."""
import copy
import functools
import json
import math
import warnings

import numpy as np
import oracle
import pytest
import timm
import torch
import torch.nn.functional as F
from timm.layers import LayerNorm, RmsNorm
from timm.optim import param_groups_weight_decay
from tiny import make
from torch import nn

import timm_rope
from timm_rope._timm import save_for_hf
from timm_rope.models.norms import SpiralRmsNorm, get_norm
from timm_rope.models.vit import RopeVisionTransformer

GRIDS = [(1, 1), (3, 3), (2, 5), (7, 4), (1, 6)]
# (head_dim, directions): those of the paper, one third, and layouts whose pairs go round through both halves
LAYOUTS = [(64, 2), (64, 4), (64, 8), (64, 16), (64, 32), (72, 6), (12, 6)]


def spiral(head_dim=64, reference_grid=(14, 14), dtype=torch.float64, depth=1, **options):
    return timm_rope.create_rope('spiral', head_dim, 2, depth, reference_grid, dtype=dtype, **options)


def waves(rope):
    """Every pair of every patch as e^(i angle): (N, pairs)."""
    def of(grid):
        payload = rope(grid)[0][0]
        return torch.view_as_complex(payload.unflatten(-1, (-1, 2)))
    return of


def score_change(rope, grid, rows, columns):
    """Largest change of a pair's score, over all pairs of patches, when both patches move by (rows, columns)."""
    z = waves(rope)(grid).reshape(*grid, -1)
    near = z[:grid[0] - rows, :grid[1] - columns].flatten(0, 1)
    far = z[rows:, columns:].flatten(0, 1)
    return (near[:, None] * near[None].conj() - far[:, None] * far[None].conj()).abs().max().item()


# -- waves

@pytest.mark.parametrize('head_dim,directions', [(64, 2), (64, 4), (64, 8), (64, 16), (72, 6)])
def test_directions_are_evenly_spaced_and_share_the_channels(head_dim, directions):
    rope = spiral(head_dim, directions=directions)
    angle = torch.rad2deg(torch.atan2(rope.freqs[1], rope.freqs[0])).flatten() % 180
    slot = angle * directions / 180
    assert (slot - slot.round()).abs().max() < 1e-9
    counts = torch.bincount(slot.round().long() % directions, minlength=directions)
    assert counts.tolist() == [head_dim // 2 // directions] * directions


@pytest.mark.parametrize('scale,temperature', [(1.5, 1e4), (0.5, 50.)])
def test_wavelengths_fall_geometrically_and_right_angles_share_them(scale, temperature):
    rope = spiral(scale=scale, temperature=temperature)
    f = rope.freqs[:, 0, 0]
    row, column = f[:, :16], f[:, 16:]
    length = row.square().sum(0).sqrt().tolist()
    assert length == pytest.approx([scale / temperature ** (j / 16) for j in range(16)], rel=1e-12)
    assert torch.allclose(column.square().sum(0).sqrt(), row.square().sum(0).sqrt(), rtol=1e-12)
    assert (row * column).sum(0).abs().max() < 1e-12


def test_two_directions_are_axial_with_rows_first():
    ours = waves(spiral(directions=2, scale=1., temperature=100.))((4, 5))
    axial = waves(timm_rope.create_rope('axial', 64, 2, 1, dtype=torch.float64))((4, 5))
    assert torch.allclose(ours, axial.roll(16, -1), atol=1e-12)


@pytest.mark.parametrize('clamp', [False, True])
@pytest.mark.parametrize('head_dim,directions', LAYOUTS)
def test_formula(head_dim, directions, clamp):
    rope = spiral(head_dim, directions=directions, clamp=clamp)
    for grid in GRIDS:
        x = torch.randn(2, 2, grid[0] * grid[1], head_dim, dtype=torch.float64)
        expected = oracle.rotate(x[1, 0].numpy(), oracle.rotations(rope, grid, 0, 0))
        assert np.abs(rope.rotate(x, rope(grid)[0])[1, 0].numpy() - expected).max() < 1e-12


@pytest.mark.parametrize('clamp', [False, True])
def test_float32_on_a_large_grid(clamp):
    rope, exact = spiral(dtype=torch.float32, clamp=clamp), spiral(clamp=clamp)
    single = rope((64, 64))[0]
    assert single.dtype == torch.float32
    assert (single - exact((64, 64))[0]).abs().max() < 3e-6
    exact.freqs.copy_(rope.freqs)
    assert (single - exact((64, 64))[0]).abs().max() < 3e-7, 'only the frequencies are rounded before the sines'
    half = spiral(dtype=torch.float32, clamp=clamp).bfloat16()
    assert torch.equal(half((64, 64))[0], single)


@pytest.mark.parametrize('head_dim,directions', LAYOUTS)
def test_the_formula_is_relative(head_dim, directions):
    rope = spiral(head_dim, directions=directions)
    assert rope.relative == 'xy'
    for rows, columns in ((1, 0), (0, 1), (3, 2)):
        assert score_change(rope, (6, 7), rows, columns) < 1e-12


def test_directions_that_are_not_given_fit_the_head():
    # 4 K divides head_dim, as far as that is possible, and K is at most 16
    for head_dim, directions in ((64, 16), (128, 16), (256, 16), (32, 8), (16, 4), (72, 6), (24, 6), (12, 6), (4, 2)):
        assert spiral(head_dim).options['directions'] == directions
    assert 'directions=6' in repr(spiral(72))


# -- clamp

def turned_maps(rope, n):
    """Angles by turning their image, as the authors do: bilinear samples of the angle map, border values outside."""
    half, turns = rope.head_dim // 4, rope.options['directions'] // 2
    theta = [rope.options['scale'] / rope.options['temperature'] ** (j / half) for j in range(half)]
    index = torch.arange(n, dtype=torch.float64)
    columns = []
    for pair in range(2 * half):
        image = theta[pair % half] * (index[:, None].expand(n, n) if pair < half else index.expand(n, n))
        a = math.pi / 2 * (pair // 2 % turns) / turns
        turn = torch.tensor([[[math.cos(a), -math.sin(a), 0], [math.sin(a), math.cos(a), 0]]], dtype=torch.float64)
        where = F.affine_grid(turn, [1, 1, n, n], align_corners=True)
        columns.append(F.grid_sample(image[None, None], where, 'bilinear', 'border', align_corners=True).flatten())
    return torch.stack(columns, -1)


@pytest.mark.parametrize('head_dim,directions', LAYOUTS)
def test_clamp_is_a_turned_image_of_the_angles(head_dim, directions):
    rope = spiral(head_dim, directions=directions, clamp=True)
    for n in (2, 5, 14):
        angle = turned_maps(rope, n)
        assert (waves(rope)((n, n)) - torch.polar(torch.ones_like(angle), angle)).abs().max() < 1e-11


def test_clamp_acts_beyond_the_border_only():
    grid = (9, 9)
    plain, clamped = spiral(), spiral(clamp=True)
    f = plain.freqs[:, 0, 0]
    index = torch.arange(9, dtype=torch.float64) - 4
    position = (index[:, None, None] * f[1] + index[:, None] * f[0]) / f.square().sum(0).sqrt()
    inside = (position.abs() <= 4).reshape(81, -1)
    # both turn by the same angle up to a constant of the pair, its angle at the centre
    change = waves(clamped)(grid) * waves(plain)(grid).conj()
    change = change * change[40].conj()
    assert (change - 1).abs()[inside].max() < 1e-12
    assert (change - 1).abs()[~inside].min() > 1e-6
    assert 0.05 < (~inside).double().mean() < 0.12
    assert inside[:, 0].all() and inside[:, 16].all(), 'waves along the axes end at the border'


def test_clamp_is_not_relative_but_leaves_axial_waves_so():
    assert score_change(spiral(clamp=True), (6, 7), 1, 0) > 1e-2
    assert score_change(spiral(clamp=True), (6, 7), 0, 1) > 1e-2
    assert score_change(spiral(clamp=True, directions=2), (6, 7), 1, 1) < 1e-12


@pytest.mark.parametrize('clamp', [False, True])
def test_prefix_tokens_do_not_turn(clamp):
    payload = spiral(clamp=clamp)((3, 5), 2)[0][0]
    assert payload.shape == (17, 64)
    assert torch.equal(payload[:2, 0::2], torch.ones(2, 32, dtype=torch.float64))
    assert torch.equal(payload[:2, 1::2], torch.zeros(2, 32, dtype=torch.float64))
    assert torch.equal(payload[2:], spiral(clamp=clamp)((3, 5))[0][0])


# -- options

@pytest.mark.parametrize('options,words', [
    (dict(directions=3), 'directions must be even .*: 3 directions do not fit head_dim 64, which takes 2, 4, 8, 16'),
    (dict(directions=64), '64 directions do not fit head_dim 64'),
    (dict(directions=12), '12 directions do not fit head_dim 64, which takes 2, 4, 8, 16, 32'),
    (dict(directions=16, head_dim=72), '16 directions do not fit head_dim 72, which takes 2, 4, 6, 12, 18, 36'),
    (dict(directions=0), 'directions must be an integer of at least 2, got 0'),
    (dict(directions=8.), 'directions must be an integer of at least 2, got 8.0'),
    (dict(directions=None), 'directions must be an integer of at least 2, got None'),
    (dict(head_dim=30), "head_dim must be a multiple of 4 for 'spiral', got 30"),
    (dict(head_dim=2), "head_dim must be a multiple of 4 for 'spiral', got 2"),
    (dict(head_dim=0), 'head_dim must be an integer of at least 1, got 0'),
    (dict(scale=0), 'scale must be a positive finite number, got 0'),
    (dict(scale=math.inf), 'scale must be a positive finite number, got inf'),
    (dict(scale='1.5'), "scale must be a positive finite number, got '1.5'"),
    (dict(temperature=-1), 'temperature must be a positive finite number, got -1'),
    (dict(clamp=1), 'clamp must be True or False, got 1'),
    (dict(clamp='yes'), "clamp must be True or False, got 'yes'"),
    (dict(coords='cells'), "coords of 'spiral' must be one of 'index', 'eva', got 'cells'"),
    (dict(order='xy'), "'spiral' takes no option 'order'; its options are directions, temperature, scale, clamp"),
])
def test_bad_input(options, words):
    with pytest.raises(ValueError, match=words):
        spiral(**options)


@pytest.mark.parametrize('options,words', [
    (dict(clamp=True), 'clamp is True there and False here'), (dict(directions=8), 'directions is 8 there and 16 here'),
    (dict(scale=1.), 'scale is 1 there and 1.5 here'), (dict(temperature=100.), 'temperature is 100 there'),
])
def test_weights_of_other_waves_are_refused(options, words):
    saved = spiral(**options).state_dict()
    with pytest.raises(RuntimeError, match=words):
        spiral().load_state_dict(saved)
    spiral(**options).load_state_dict(saved)


# -- norm

def reference_norm(x, weight, eps):
    x = x.detach().double().numpy()
    root = np.sqrt((x * x).sum(-1, keepdims=True) / x.shape[-1])
    return x / (root + eps) * weight.detach().double().numpy()


def random_norm(dim=10, eps=1e-6, **kwargs):
    torch.manual_seed(0)
    norm = SpiralRmsNorm(dim, eps, **kwargs)
    nn.init.normal_(norm.weight)
    return norm


@pytest.mark.parametrize('eps', [1e-6, 0.5])
@pytest.mark.parametrize('shape', [(10,), (4, 10), (2, 3, 4, 10)])
def test_norm_formula(shape, eps):
    norm = random_norm(eps=eps, dtype=torch.float64)
    x = torch.randn(shape, dtype=torch.float64) * torch.logspace(-3, 3, 10, dtype=torch.float64)
    assert np.abs(norm(x).detach().numpy() - reference_norm(x, norm.weight, eps)).max() < 1e-12
    assert 'eps=' + str(eps) in repr(norm) and [*dict(norm.named_parameters())] == ['weight']


def test_epsilon_is_outside_the_root():
    norm = SpiralRmsNorm(4, eps=1e-6, dtype=torch.float64)
    x = torch.full((1, 4), 1e-6, dtype=torch.float64)
    assert torch.allclose(norm(x), torch.full_like(x, 0.5), atol=1e-12)  # inside it would be 1e-3


@pytest.mark.parametrize('dtype', [torch.bfloat16, torch.float16])
def test_norm_is_computed_in_float32(dtype):
    x = (300 * torch.randn(5, 10)).to(dtype)  # squares overflow float16
    low = random_norm().to(dtype)
    got = low(x)
    assert got.dtype == dtype
    exact = reference_norm(x, low.weight, 1e-6)
    assert torch.equal(got, torch.from_numpy(exact).float().to(dtype)), 'rounded once, at the end'
    norm = random_norm()
    with torch.autocast('cpu', torch.bfloat16):
        assert norm(x).dtype == dtype and norm(x.float()).dtype == torch.float32
        assert np.abs(norm(x.float()).detach().numpy() - reference_norm(x, norm.weight, 1e-6)).max() < 2e-6


def test_norm_gradients():
    norm = random_norm(5, 0.1, dtype=torch.float64)
    x = torch.randn(3, 5, dtype=torch.float64, requires_grad=True)
    weight = norm.weight.detach().clone().requires_grad_()
    assert torch.autograd.gradcheck(lambda x, w: torch.func.functional_call(norm, {'weight': w}, (x,)), (x, weight))


def test_a_token_of_zeros_has_finite_gradients():
    norm, x = random_norm(), torch.zeros(2, 10, requires_grad=True)
    out = norm(x)
    out.sum().backward()
    assert torch.equal(out, torch.zeros(2, 10))
    assert torch.isfinite(x.grad).all() and torch.isfinite(norm.weight.grad).all()


def test_norm_scripted_traced_and_on_meta():
    norm, x = random_norm(), torch.randn(3, 10)
    for other in (torch.jit.script(norm), torch.fx.symbolic_trace(norm)):
        assert torch.equal(other(x), norm(x))
        assert other(x.bfloat16()).dtype == torch.bfloat16
    assert torch.equal(torch.jit.trace(norm, x)(2 * x), norm(2 * x))
    meta = SpiralRmsNorm(10, device='meta', dtype=torch.float64)
    assert meta.weight.is_meta and meta.weight.dtype == torch.float64
    empty = meta.to_empty(device='cpu')
    nn.init.zeros_(empty.weight)
    empty.reset_parameters()
    assert torch.equal(empty.weight, torch.ones(10, dtype=torch.float64))


# -- norms by name

def test_norms_by_name():
    assert get_norm('spiral_rms') is SpiralRmsNorm and get_norm('SpiralRms') is SpiralRmsNorm
    assert get_norm() is None and get_norm('') is None, 'timm takes its LayerNorm'
    assert get_norm('layer_norm') is LayerNorm and get_norm('rmsnorm') is RmsNorm
    assert get_norm(nn.LayerNorm) is nn.LayerNorm
    for layer, kind in ((None, LayerNorm), ('', LayerNorm), ('rmsnorm', RmsNorm), ('spiral_rms', SpiralRmsNorm),
                        (nn.LayerNorm, nn.LayerNorm), (functools.partial(LayerNorm, eps=0.1), LayerNorm)):
        norm = get_norm(layer, 1e-5)(8, device='meta')
        assert type(norm) is kind and norm.eps == 1e-5 and norm.weight.is_meta


class NoEps(nn.Module):
    def __init__(self, dim, device=None, dtype=None):
        super().__init__()


@pytest.mark.parametrize('call,error,words', [
    (lambda: get_norm('spiral'), ValueError, r"norm_layer must be one of .*layernorm, .*spiral_rms, got 'spiral'"),
    (lambda: get_norm('layernrm', 1e-5), ValueError, "got 'layernrm'"),
    (lambda: get_norm(3), TypeError, 'norm_layer must be a name, a class or a function, got 3'),
    (lambda: get_norm(norm_eps=0), ValueError, 'norm_eps must be a positive finite number, got 0'),
    (lambda: get_norm(norm_eps=-1e-6), ValueError, 'norm_eps must be .* got -1e-06'),
    (lambda: get_norm(norm_eps=math.nan), ValueError, 'norm_eps must be .* got nan'),
    (lambda: get_norm('spiral_rms', True), ValueError, 'norm_eps must be .* got True'),
    (lambda: get_norm(norm_eps='1e-5'), ValueError, "norm_eps must be .* got '1e-5'"),
    (lambda: get_norm(NoEps, 1e-5), ValueError, 'norm_eps=1e-05 cannot be set: norm_layer=.*NoEps.* takes no eps'),
    (lambda: SpiralRmsNorm(0), ValueError, 'dim must be an integer of at least 1, got 0'),
    (lambda: SpiralRmsNorm(4, eps=0.), ValueError, 'eps must be a positive finite number, got 0.0'),
    (lambda: make(norm_layer='batch'), ValueError, 'norm_layer must be one of'),
    (lambda: make(norm_eps=0.), ValueError, 'norm_eps must be a positive finite number'),
])
def test_bad_norms(call, error, words):
    with pytest.raises(error, match=words):
        call()


# -- models

# as the published models, but small
PUBLISHED = dict(
    embed_dim=64, num_heads=2, depth=2, rope_clamp=True, rope_directions=8, pos_embed='learn', norm_layer='spiral_rms')


def norms_of(model):
    return {name: m for name, m in model.named_modules() if hasattr(m, 'eps')}


def test_every_norm_of_the_model_is_the_one_chosen():
    model = make('vit_tiny_rope_spiral', **PUBLISHED)
    norms = norms_of(model)
    assert list(norms) == ['blocks.0.norm1', 'blocks.0.norm2', 'blocks.1.norm1', 'blocks.1.norm2', 'norm']
    assert all(type(m) is SpiralRmsNorm and m.eps == 1e-6 for m in norms.values())
    assert {m.eps for m in norms_of(make(norm_eps=1e-5)).values()} == {1e-5}
    assert {type(m) for m in norms_of(make(norm_eps=1e-5)).values()} == {LayerNorm}
    assert {m.eps for m in norms_of(make()).values()} == {1e-6}
    assert {m.eps for m in norms_of(make(norm_layer='spiral_rms', norm_eps=0.01)).values()} == {0.01}
    qk = make(norm_layer='spiral_rms', norm_eps=0.01, qk_norm=True).blocks[0].attn
    assert qk.q_norm.eps == qk.k_norm.eps == 0.01 and type(qk.q_norm) is SpiralRmsNorm


def test_the_epsilon_and_the_norm_reach_the_output():
    x = torch.randn(2, 3, 32, 32)
    outputs = []
    for kwargs in ({}, dict(norm_eps=0.1), dict(norm_layer='spiral_rms'), dict(norm_layer='rmsnorm')):
        outputs.append(make('vit_tiny_rope_spiral', **kwargs)(x))
    for i, a in enumerate(outputs):
        assert all((a - b).abs().max() > 1e-4 for b in outputs[:i])


@pytest.mark.parametrize('options', [PUBLISHED, {}], ids=['published', 'default'])
def test_forward_backward_and_graphs(options):
    model = make('vit_tiny_rope_spiral', **options).train()
    model(torch.randn(2, 3, 48, 32)).square().sum().backward()
    assert all(p.grad is not None and torch.isfinite(p.grad).all() and p.grad.any() for p in model.parameters())
    model.eval()
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')
        graphs = [torch.jit.script(model), torch.fx.symbolic_trace(model)]
    graphs.append(copy.deepcopy(model))
    for size in ((32, 32), (16, 48)):
        x = torch.randn(1, 3, *size)
        for graph in graphs:
            assert torch.allclose(graph(x), model(x), atol=1e-6)
    x = torch.randn(2, 3, 32, 48)
    for graph in (torch.jit.trace(model, x), torch.export.export(model, (x,)).module()):
        assert torch.allclose(graph(x), model(x), atol=1e-5)  # angles of recorded graphs are float32
    with torch.autocast('cpu', torch.bfloat16):
        assert torch.isfinite(model(x)).all()
    assert model.to(torch.bfloat16)(x.bfloat16()).dtype == torch.bfloat16
    assert model.rope.freqs.dtype == torch.float32


def test_clamp_changes_what_the_model_sees():
    model, x = make('vit_tiny_rope_spiral'), torch.randn(1, 3, 64, 64)
    clamped = make('vit_tiny_rope_spiral', rope_clamp=True)
    assert (clamped(x) - model(x)).abs().max() > 1e-4
    with pytest.raises(RuntimeError, match='clamp is True there and False here'):
        model.load_state_dict(clamped.state_dict())


@pytest.mark.parametrize('options', [PUBLISHED, dict(norm_eps=1e-5)], ids=['spiral_rms', 'eps'])
def test_round_trip_through_a_folder(options, tmp_path):
    model = make('vit_tiny_rope_spiral', **options)
    with torch.no_grad():
        for norm in norms_of(model).values():
            norm.weight.normal_()
    save_for_hf(model, tmp_path, safe_serialization=True)
    recorded = json.loads((tmp_path / 'config.json').read_text())['model_args']
    assert {k: recorded[k] for k in options} == options
    other = timm.create_model(f'local-dir:{tmp_path}', pretrained=True).eval()
    assert other.rope.options == model.rope.options
    assert [(type(m), m.eps) for m in norms_of(other).values()] == [(type(m), m.eps) for m in norms_of(model).values()]
    state, restored = model.state_dict(), other.state_dict()
    assert state.keys() == restored.keys() and all(torch.equal(state[k], restored[k]) for k in state)
    x = torch.randn(2, 3, 32, 48)
    assert torch.equal(other(x), model(x))


def test_weight_decay_and_initialisation():
    model = make('vit_tiny_rope_spiral', **PUBLISHED, device='meta').to_empty(device='cpu')
    for t in [*model.parameters(), *model.buffers()]:
        t.data.fill_(float('nan') if t.is_floating_point() else 0)
    model.init_weights()
    assert all(torch.equal(m.weight, torch.ones(64)) for m in norms_of(model).values())
    assert torch.equal(model.rope.freqs, make('vit_tiny_rope_spiral', **PUBLISHED).rope.freqs)
    groups = param_groups_weight_decay(model, 0.1, model.no_weight_decay())
    decay = {id(p): group['weight_decay'] for group in groups for p in group['params']}
    assert {decay[id(m.weight)] for m in norms_of(model).values()} == {0}
    assert decay[id(model.blocks[0].mlp.fc1.weight)] == 0.1
    assert not list(model.rope.parameters())


def test_models_are_registered():
    names = timm.list_models('vit_*_rope_spiral*')
    assert sorted(names) == sorted(
        f'vit_{size}_rope_spiral{ape}' for size in ('tiny', 'small', 'base', 'large') for ape in ('', '_ape'))
    model = timm.create_model('vit_base_rope_spiral_ape', device='meta')
    assert isinstance(model, RopeVisionTransformer) and model.pos_embed is not None
    assert model.rope.options == dict(directions=16, temperature=1e4, scale=1.5, clamp=False, coords='index')


@pytest.mark.filterwarnings('ignore')
def test_onnx(tmp_path):
    onnxruntime = pytest.importorskip('onnxruntime', reason='onnxruntime is not installed (extra dev)')
    model = make('vit_tiny_rope_spiral', exportable=True, **PUBLISHED)
    x = torch.randn(2, 3, 32, 48)
    torch.onnx.export(model, (x,), str(tmp_path / 'model.onnx'), dynamo=False, input_names=['x'])
    session = onnxruntime.InferenceSession(str(tmp_path / 'model.onnx'))
    assert abs(session.run(None, {'x': x.numpy()})[0] - model(x).detach().numpy()).max() < 2e-5
