"""Promises of every encoding: its formula, what it declares, gradients, precision, the module."""
import numpy as np
import oracle
import pytest
import torch
from rotating import make, matrices, shift_errors

import timm_rope
from timm_rope.encodings import ENCODINGS

NAMES = timm_rope.list_ropes()
LEARNED = [name for name, encoding in ENCODINGS.items() if encoding.learned]
VARIANTS = [(name, {}) for name in NAMES] + [
    ('axial', {'temperature': 50.}), ('axial', {'coords': 'cells'}), ('axial', {'coords': 'ends'}),
    ('axial_learned', {'share_heads': True}), ('mixed', {'share_layers': True, 'coords': 'cells'}),
    ('uniform', {'coords': 'ends'}), ('uniform', {'coords': 'dinov3'}), ('golden', {'coords': 'dinov3'}),
    ('axial', {'coords': 'dinov3', 'scale': 2.}), ('axial', {'coords': 'dinov3_min', 'scale': 2., 'offset': .25}),
    ('axial', {'coords': 'eva', 'temperature': 1e4, 'offset': 1}), ('mixed', {'coords': 'dinov3_max', 'scale': 2.}),
    ('axial_learned', {'coords': 'index', 'offset': -2.5}), ('spiral', {'coords': 'eva', 'directions': 4}),
    ('comrope', {'coords': 'dinov3', 'offset': -.5}), ('nd', {'coords': 'dinov3', 'scale': 2.}),
    ('liere', {'coords': 'eva'}), ('spherical', {'coords': 'dinov3_min'}), ('mixed', {'coords': 'cells', 'offset': .5}),
    ('spherical', {'order': 'xy'}), ('spherical', {'temperature': 1e4, 'coords': 'ends'}),
    ('spherical_learned', {'order': 'xy', 'share_heads': True, 'share_layers': True}),
    ('golden', {'coords': 'ends', 'max_freq': 5.}), ('golden', {'p_zero_freqs': 0.25, 'min_freq': 1.}),
    ('nd', {'seed': 7, 'temperature': 20.}), ('nd', {'coords': 'cells'}),
    ('string', {'basis': 'circulant'}), ('string', {'basis': 'circulant', 'block': 5, 'share_layers': True}),
    ('string', {'block': 4, 'share_heads': True}), ('string', {'block': 5, 'coords': 'cells'}),
    ('string', {'block': 64}),
    ('spiral', {'directions': 4, 'scale': 1., 'temperature': 100.}),
    ('liere', {'block': 2}), ('liere', {'block': 3}), ('liere', {'block': 4}), ('liere', {'block': 5}),
    ('liere', {'block': 64}), ('liere', {'share_heads': True, 'coords': 'ends'}),
    ('comrope', {'block': 2}), ('comrope', {'variant': 'ap', 'block': 4}), ('comrope', {'block': 5, 'coords': 'index'}),
    ('comrope', {'variant': 'ap', 'block': 3, 'share_layers': True, 'coords': 'ends'}),
    ('geope', {'temperature': 1e4, 'coords': 'ends'}), ('geope', {'coords': 'index'}),
    ('quatro', {'order': 'xy', 'coords': 'index'}), ('quatro', {'share_heads': True, 'share_layers': True}),
]
IDS = ['-'.join([name, *map(str, options.values())]) for name, options in VARIANTS]


# -- the formula

@pytest.mark.parametrize('name,options', VARIANTS, ids=IDS)
@pytest.mark.parametrize('grid,reference', [((2, 5), (14, 14)), ((6, 3), (4, 7)), ((1, 1), (14, 14))])
@torch.no_grad()  # generators that learn are squared in float32, see test_exponential.py
def test_formula(name, options, grid, reference):
    rope = make(name, options, reference_grid=reference)
    payloads = rope(grid)
    x = torch.randn(2, 2, grid[0] * grid[1], 64)
    for layer in range(2):
        got = rope.rotate(x, payloads[layer])
        for head in range(2):
            expected = oracle.rotate(x[1, head].double().numpy(), oracle.rotations(rope, grid, layer, head))
            assert np.abs(got[1, head].double().detach().numpy() - expected).max() < 3e-6


@pytest.mark.parametrize('name', NAMES)
@pytest.mark.parametrize('reference', [(14, 14), (64, 64)])
@torch.no_grad()  # generators that learn are squared in float32, see test_exponential.py
def test_formula_on_a_large_grid(name, reference):
    # the oracle visits a sample of the rows of a 64x64 grid, the far corner included
    rope = make(name, head_dim=32, num_heads=1, depth=1, reference_grid=reference)
    got = rope.rotate(torch.ones(1, 1, 4096, 32), rope((64, 64))[0]).detach()[0, 0].double().numpy()
    exact = make(name, head_dim=32, num_heads=1, depth=1, reference_grid=reference, dtype=torch.float64)
    if rope.learned:
        exact.freqs.data.copy_(rope.freqs.data)
    whole = exact.rotate(torch.ones(1, 1, 4096, 32, dtype=torch.float64), exact((64, 64))[0]).detach()[0, 0].numpy()
    assert np.abs(got - whole).max() < 3e-6
    corner = oracle.rotations_at(rope, [(63, 61), (63, 62), (63, 63)], (64, 64), 0, 0)
    assert np.abs(got[-3:] - corner.sum(-1)).max() < 3e-6


@pytest.mark.parametrize('name,options', VARIANTS, ids=IDS)
@torch.no_grad()  # generators that learn are squared in float32, see test_exponential.py
def test_rotations_are_orthogonal_and_start_at_the_identity(name, options):
    rope = make(name, options)
    r = matrices(rope, (9, 17)).detach()
    eye = torch.eye(64)
    assert (r.mT @ r - eye).abs().max() < 1e-5
    assert (torch.linalg.det(r[:, ::37]) - 1).abs().max() < 1e-4
    payload = rope((2, 2), 3)[1]
    x = torch.randn(1, 2, 7, 64)
    assert torch.equal(rope.rotate(x, payload)[:, :, :3], x[:, :, :3]), 'prefix tokens must not turn'


@pytest.mark.parametrize('name', NAMES)
def test_larger_grids_extrapolate_with_an_unchanged_step(name):
    rope = make(name, num_heads=1, depth=1, head_dim=24, dtype=torch.float64)
    small = matrices(rope, (14, 14))[0].detach().reshape(14, 14, 24, 24)
    large = matrices(rope, (28, 21))[0].detach().reshape(28, 21, 24, 24)
    if rope.centered and rope.coords != 'index':  # the origin stays in the middle
        large = large[7:21]
    if rope.relative == 'xy':  # scores between neighbours are the same wherever the origin is
        for a, b in (((0, 0), (0, 1)), ((0, 0), (1, 0))):
            assert torch.allclose(small[a].mT @ small[b], large[a].mT @ large[b], atol=1e-10)
    elif rope.relative == '':
        start = 7 if rope.centered else 0
        large = matrices(rope, (28, 28))[0].detach().reshape(28, 28, 24, 24)
        assert torch.allclose(small, large[start:start + 14, start:start + 14], atol=1e-10)
    else:
        small_x, large_x = small[3, :2], large[3, :2]  # relative along x, at the same y
        assert torch.allclose(small_x[0].mT @ small_x[1], large_x[0].mT @ large_x[1], atol=1e-10)


@pytest.mark.parametrize('name', NAMES)
def test_remainder_passes_unrotated(name):
    try:
        rope = make(name, head_dim=31)
    except ValueError as error:
        assert 'head_dim must be a multiple' in str(error)
        return
    rotated = rope.rotation.rotated
    assert 0 < rotated < 31
    x = torch.randn(2, 2, 6, 31)
    y = rope.rotate(x, rope((2, 3))[0])
    assert torch.equal(y[..., rotated:], x[..., rotated:])
    assert (y[..., :rotated] != x[..., :rotated]).any(0).any(0).any(0).all()


# -- what is declared

@pytest.mark.parametrize('name,options', VARIANTS, ids=IDS)
def test_relativity_is_as_declared(name, options):
    rope = make(name, options, head_dim=64 if options.get('block', 0) == 64 else 24, dtype=torch.float64)
    along_y, along_x = shift_errors(rope)
    if rope.relative == 'xy' or options.get('block') == 2:
        assert max(along_y, along_x) < 1e-10
    elif rope.relative == 'last':
        last, first = (along_x, along_y) if rope.options['order'] == 'yx' else (along_y, along_x)
        assert last < 1e-10, 'the score must depend on the offset along the axis that acts last'
        assert first > 1e-2, 'and not along the axis that acts first'
    else:
        assert min(along_y, along_x) > 1e-2


@pytest.mark.parametrize('name,options', VARIANTS, ids=IDS)
def test_oblique_encodings_turn_a_group_with_both_axes(name, options):
    rope = make(name, options)
    size, groups = rope.rotation.size, rope.rotation.groups
    r = matrices(rope, (3, 3))[0].detach().reshape(3, 3, 64, 64)
    both = []
    for g in range(groups):
        block = r[:, :, g * size:(g + 1) * size, g * size:(g + 1) * size]
        with_y = (block[1, 1] - block[2, 1]).abs().max() > 1e-6
        with_x = (block[1, 1] - block[1, 2]).abs().max() > 1e-6
        both.append(bool(with_x and with_y))
    # in every direction but that of an axis itself, which may be one of many
    assert any(both) == (rope.oblique and options.get('variant') != 'ap')


# -- gradients and precision

@pytest.mark.parametrize('name,options', [v for v in VARIANTS if v[0] in LEARNED and v[1].get('block') != 64])
def test_gradients_in_float64(name, options):
    rope = make(name, options, head_dim=10 if name == 'liere' else 8, num_heads=1, depth=1, dtype=torch.float64)
    x = torch.randn(1, 1, 3, rope.head_dim, dtype=torch.float64, requires_grad=True)

    def rotated(freqs, x):
        out = torch.func.functional_call(rope, {'freqs': freqs}, ((2, 1), 1))
        return torch.stack([rope.rotate(x, payload) for payload in out])

    freqs = rope.freqs.detach().clone().requires_grad_()
    assert torch.autograd.gradcheck(rotated, (freqs, x), fast_mode=True)


@pytest.mark.parametrize('name', LEARNED)
def test_every_frequency_gets_a_gradient(name):
    rope = make(name, head_dim=16)
    total = sum((rope.rotate(torch.randn(1, 2, 6, 16), p) * torch.randn(1, 2, 6, 16)).sum() for p in rope((2, 3)))
    total.backward()
    assert rope.freqs.grad is not None and torch.isfinite(rope.freqs.grad).all()
    assert (rope.freqs.grad != 0).all()


@pytest.mark.parametrize('name', NAMES)
@pytest.mark.parametrize('dtype', [torch.bfloat16, torch.float16])
def test_low_precision(name, dtype):
    rope = make(name)
    expected = rope.rotate(torch.ones(1, 2, 144, 64), rope((12, 12))[1])
    half = make(name).to(dtype)
    assert half.freqs.dtype == torch.float32
    payload = half((12, 12))[1]
    assert payload.dtype == torch.float32, 'angles keep their precision'
    got = half.rotate(torch.ones(1, 2, 144, 64, dtype=dtype), payload)
    assert got.dtype == dtype
    assert (got.float() - expected).abs().max() < 2 * torch.finfo(dtype).eps
    with torch.autocast('cpu', torch.bfloat16):
        assert torch.equal(rope((12, 12))[1], rope((12, 12))[1].float())
        cast = rope.rotate(torch.ones(1, 2, 144, 64), rope((12, 12))[1])
    assert cast.dtype == torch.float32 and torch.allclose(cast, expected, atol=1e-6)


@pytest.mark.parametrize('name', NAMES)
def test_float64_module_is_exact(name):
    rope = make(name).double()
    if not rope.learned:
        assert torch.equal(rope.freqs, make(name, dtype=torch.float64).freqs), 'recomputed, not cast from float32'
    expected = oracle.rotations(rope, (3, 3), 1, 1)
    assert np.abs(matrices(rope, (3, 3), 1)[1].detach().numpy() - expected).max() < 1e-13


# -- the module

def test_nothing_is_mutated():
    for name in NAMES:
        rope = make(name)
        x, payload = torch.randn(1, 2, 4, 64), rope((2, 2))[0]
        before, table = x.clone(), payload.clone()
        rope.rotate(x, payload)
        assert torch.equal(x, before) and torch.equal(payload, table)


@pytest.mark.parametrize('name', NAMES)
def test_module_contract(name):
    rope = make(name, depth=3)
    assert len(rope((2, 3))) == 3
    assert rope.no_weight_decay() == ({'freqs'} if rope.learned else set())
    assert set(rope.state_dict()) == {'reference_grid', 'signature'} | ({'freqs'} if rope.learned else set())
    assert all(t.ndim <= 4 for t in [*rope.parameters(), *rope.buffers()]), 'channels_last refuses 5 dimensions'
    text = repr(rope)
    assert name in text and 'reference_grid=(14, 14)' in text and f'coords={rope.coords}' in text
    meta = make(name, depth=3, device='meta')
    assert all(t.is_meta for t in [*meta.parameters(), *meta.buffers()])
    empty = meta.to_empty(device='cpu')
    for t in [*empty.parameters(), *empty.buffers()]:
        t.data.fill_(float('nan') if t.is_floating_point() else 0)
    torch.manual_seed(0)
    empty.reset_parameters()
    assert all(torch.equal(a, b) for a, b in zip(empty.state_dict().values(), rope.state_dict().values()))
    assert torch.equal(empty((2, 3))[2], rope((2, 3))[2])


@pytest.mark.parametrize('name', NAMES)
def test_meta_load_then_non_persistent_buffers(name):
    # what transformers does: build on meta, materialise, load, fill what the checkpoint does not bring
    rope, other = make(name), make(name, device='meta').to_empty(device='cpu')
    other.load_state_dict(rope.state_dict())
    other.init_non_persistent_buffers()
    assert torch.equal(other((3, 2))[1], rope((3, 2))[1])
