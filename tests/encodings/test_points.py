"""Points anywhere: `rope.at(coordinates)`, of which the patches of a grid are a special case; in 1 to 3 dimensions."""
import math

import numpy as np
import oracle
import pytest
import torch

import timm_rope
from timm_rope.encodings import ENCODINGS
from timm_rope.encodings._base import ORDERS
from timm_rope.kernels import rotate
from timm_rope.rotations import BlockRotation, PlanesRotation

NAMES = timm_rope.list_ropes()
LEARNED = [name for name in NAMES if ENCODINGS[name].learned]
OPTIONS = [(name, {}) for name in NAMES] + [
    ('axial', {'coords': 'cells'}), ('axial', {'coords': 'ends'}), ('mixed', {'share_layers': True, 'coords': 'ends'}),
    ('axial', {'coords': 'dinov3'}), ('axial', {'coords': 'dinov3_min'}), ('mixed', {'coords': 'eva', 'offset': 1}),
    ('uniform', {'coords': 'ends'}), ('spiral', {'clamp': True}),
    ('string', {'basis': 'circulant', 'block': 7}), ('string', {'block': 4, 'coords': 'ends'}),
    ('liere', {'block': 3}), ('liere', {'block': 4}), ('liere', {'share_heads': True, 'coords': 'ends'}),
    ('comrope', {'variant': 'ap', 'block': 4}), ('geope', {'coords': 'index'})]
VARIANTS = [(name, options, dims) for name, options in OPTIONS for dims in ENCODINGS[name].dimensions] + [
    (name, {'order': order}, dims) for name in NAMES if 'order' in ENCODINGS[name].defaults
    for dims in ENCODINGS[name].dimensions for order in ORDERS[dims][1:]]
IDS = ['-'.join([name, *map(str, options.values()), str(dims)]) for name, options, dims in VARIANTS]
EVERY = [(name, dims) for name in NAMES for dims in ENCODINGS[name].dimensions]
RULES = [(name, rule, dims) for name, dims in EVERY for rule in ENCODINGS[name].scalings if rule != 'extrapolate']


GRIDS = {1: (8,), 2: (5, 7), 3: (4, 5, 7)}


def make(name, head_dim=32, dims=2, reference_grid=None, **kwargs):
    torch.manual_seed(0)
    return timm_rope.create_rope(name, head_dim, 2, 2, reference_grid or GRIDS[dims], **kwargs)


def patches(*grid):
    return torch.cartesian_prod(*map(torch.arange, grid)).reshape(-1, len(grid))


def has_equal_bits(rope):
    # larger blocks come from products of matrices, whose order of summing depends on their shapes
    planes = isinstance(rope.rotation, PlanesRotation)
    return not planes and (not isinstance(rope.rotation, BlockRotation) or rope.rotation.size <= 4)


def points(*shape, dims=2, dtype=torch.float32, low=-3., high=12., seed=1):
    generator = torch.Generator().manual_seed(seed)
    return low + (high - low) * torch.rand(*shape, dims, dtype=dtype, generator=generator)


def scores(rope, payload, seed=2):
    """q R(p_i)^T R(p_j) k between all points, with the same q and the same k at each of them."""
    generator = torch.Generator().manual_seed(seed)
    q, k = torch.randn(2, 1, rope.num_heads, 1, rope.head_dim, generator=generator, dtype=payload.dtype)
    shape = payload.shape[0] if payload.ndim == 4 else 1, -1, payload.shape[-2], -1
    return rope.rotate(q.expand(shape), payload) @ rope.rotate(k.expand(shape), payload).mT


# -- values

@pytest.mark.parametrize('name,options,dims', VARIANTS, ids=IDS)
@pytest.mark.parametrize('extent', [None, (3, 9, 4), (1, 1, 6)])
@torch.no_grad()  # generators that learn are squared in float32, see test_exponential.py
def test_formula(name, options, dims, extent):
    rope, extent = make(name, dims=dims, **options), extent and extent[-dims:]
    at = points(2, 6, dims=dims)
    payloads = rope.at(at, 1, extent)
    x = torch.randn(2, 2, 7, 32)
    for layer in range(2):
        assert payloads[layer].shape[:-1] == (2, rope.frequencies().shape[2], 7)
        got = rope.rotate(x, payloads[layer])
        assert torch.equal(got[:, :, 0], x[:, :, 0]), 'prefix tokens do not turn'
        for image in range(2):
            for head in range(2):
                matrices = oracle.rotations_at(rope, at[image].tolist(), extent or GRIDS[dims], layer, head)
                expected = oracle.rotate(x[image, head, 1:].double().numpy(), matrices)
                assert np.abs(got[image, head, 1:].double().numpy() - expected).max() < 3e-6


@pytest.mark.parametrize('name,dims', EVERY)
@pytest.mark.parametrize('reference', [(14, 14, 14), (64, 64, 64)])
@torch.no_grad()
def test_float32_is_exact_far_away(name, dims, reference):
    reference = reference[:dims]
    rope = make(name, reference_grid=reference)
    corners = torch.tensor([[64., 64., 64.], [-64., 64., -64.], [63.5, 0., 64.]])[:, :dims]
    at = torch.cat((points(40, dims=dims, low=-64., high=64.), corners))
    got = rope.rotate(torch.ones(1, 2, 43, 32), rope.at(at)[1])[0, 1]
    expected = oracle.rotations_at(rope, at.tolist(), reference, 1, 1).sum(-1)
    assert np.abs(got.double().numpy() - expected).max() < 3e-6


@pytest.mark.parametrize('name,options,dims', VARIANTS, ids=IDS)
@pytest.mark.parametrize('dtype', [torch.float32, torch.float64])
@torch.no_grad()
def test_a_grid_is_the_special_case(name, options, dims, dtype):
    rope = make(name, dims=dims, dtype=dtype, **options)
    exact, reference = has_equal_bits(rope), GRIDS[dims]
    for grid in (None, reference, (2, 3, 9)[-dims:], (1, 1, 1)[-dims:]):
        grid, extent = grid or reference, grid
        of_grid, of_points = rope(grid, 2), rope.at(patches(*grid).to(dtype), 2, extent)
        assert len(of_points) == 2
        for a, b in zip(of_grid, of_points):
            assert a.shape == b.shape and a.dtype == b.dtype
            assert torch.equal(a, b) if exact else (a - b).abs().max() < (3e-7 if dtype == torch.float32 else 1e-13)


@pytest.mark.parametrize('name,dims', EVERY)
@torch.no_grad()
def test_a_batch_is_its_images(name, dims):
    rope = make(name, dims=dims)
    at = points(3, 4, dims=dims)
    together, apart = rope.at(at, 1), [rope.at(image, 1) for image in at]
    for layer in range(2):
        assert together[layer].shape == (3, *apart[0][layer].shape)
        for a, b in zip(together[layer], apart):
            assert torch.allclose(a, b[layer], rtol=0, atol=3e-7)
    assert rope.at(at[:, :0], 1)[0].shape[-2] == 1, 'an image of which nothing was kept'
    assert rope.at(at[0, :0])[0].shape[-2] == 0


@pytest.mark.parametrize('dtype', [torch.int64, torch.int32, torch.uint8, torch.float16, torch.bfloat16, torch.float64])
@torch.no_grad()
def test_numbers_of_any_kind(dtype):
    rope, at = make('spherical'), patches(4, 5)
    assert torch.equal(rope.at(at.to(dtype))[0], rope.at(at.float())[0])
    precise = at.double() + 1e-9
    moved = make('spherical', dtype=torch.float64).at(precise)[0] - make('spherical', dtype=torch.float64).at(at)[0]
    assert moved.abs().max() > 1e-11, 'float64 coordinates are not rounded to float32'


@pytest.mark.parametrize('dtype', [torch.int64, torch.uint8])
@pytest.mark.parametrize('name', NAMES)
def test_patches_are_looked_up(name, dtype, monkeypatch):
    rope = make(name)
    at = torch.stack([torch.randint(0, side, (3, 30)) for side in (9, 40)], dim=-1)
    made, table = [], rope.rotation.table

    def counted(freqs, y, x):
        made.append(len(y) * x.shape[-1])
        return table(freqs, y, x)

    monkeypatch.setattr(rope.rotation, 'table', counted)
    for grad in (False, True):
        with torch.set_grad_enabled(grad):
            expected = rope.at(at.float(), 1, (9, 40))
            for coordinates in (at, at[0]):
                made.clear()
                got, again = (rope.at(coordinates.to(dtype), 1, (9, 40)) for _ in range(2))
                if coordinates.ndim == 3 and not (grad and rope.learned):
                    assert sum(made) in (0, 1 + 9 * 40), 'once for all calls'
                else:  # 30 patches are not worth a grid of 360, nor 90 if it is not kept
                    assert max(made) < 100
                for a, b, c in zip(got, again, expected):
                    c = c if coordinates.ndim == 3 else c[0]
                    assert a.shape == c.shape and torch.equal(a, b) and torch.allclose(a, c, rtol=0, atol=5e-6)
    far = torch.tensor([[-1, 3], [4, 90]]).repeat(200, 1)
    assert torch.allclose(rope.at(far, 0, (9, 40))[0], rope.at(far.float(), 0, (9, 40))[0], rtol=0, atol=5e-6)


# -- properties

def axes_it_is_relative_along(name, options, dims):
    """Places in a position; along a line one generator turns everything."""
    if dims == 1 or (ENCODINGS[name].relative == 'xy' and not options.get('clamp')):
        return list(range(dims))
    order = options.get('order', ORDERS[dims][0])
    return [dims - 1 - 'xyz'.index(order[-1])] if ENCODINGS[name].relative == 'last' else []


@pytest.mark.parametrize('name,options,dims', VARIANTS, ids=IDS)
@torch.no_grad()
def test_scores_depend_on_differences_along_these_axes_alone(name, options, dims):
    rope, at = make(name, dims=dims, **options), points(12, dims=dims, dtype=torch.float64)
    here, relative = scores(rope, rope.at(at)[1]), axes_it_is_relative_along(name, options, dims)
    shift = torch.tensor([3.7, -11.25, 5.5])[:dims]
    for axis in range(dims):
        there = scores(rope, rope.at(at + shift * (torch.arange(dims) == axis))[1])
        assert (here - there).abs().max() < 1e-5 if axis in relative else (here - there).abs().max() > 1e-3
    if len(relative) == dims:
        assert (here - scores(rope, rope.at(at + shift)[1])).abs().max() < 1e-5
        for image in scores(rope, rope.at(at + 9 * torch.rand(4, 1, dims))[1]):  # each image of a batch by its own
            assert (image - here).abs().max() < 1e-5
    assert (here - scores(rope, rope.at(at * 1.1)[1])).abs().max() > 1e-2


@pytest.mark.parametrize('name,rule,dims', RULES)
@torch.no_grad()
def test_rules_are_those_of_a_grid_of_that_extent(name, rule, dims):
    rope, plain = make(name, head_dim=16, dims=dims, scaling=rule), make(name, head_dim=16, dims=dims)
    for extent in ((6, 12, 7)[-dims:], (4, 12, 20)[-dims:], (3, 3, 3)[-dims:]):
        for a, b in zip(rope(extent, 1), rope.at(patches(*extent).float(), 1, extent)):
            assert torch.allclose(a, b, rtol=0, atol=0 if has_equal_bits(rope) else 3e-7)
    at, extent = points(5, dims=dims), (9, 12, 20)[-dims:]
    assert torch.equal(rope.at(at)[0], plain.at(at)[0]), 'no rule up to the reference grid'
    assert not torch.equal(rope.at(at, 0, extent)[0], plain.at(at, 0, extent)[0])


@pytest.mark.parametrize('name,options,dims', VARIANTS, ids=IDS)
@torch.no_grad()
def test_random_coordinates_are_those_of_a_grid(name, options, dims):
    rope = make(name, dims=dims, shift=0.3, jitter=1.2, rescale=2., **options).train()
    got, grid = [], (3, 6, 8)[-dims:]
    for call in (lambda: rope(grid, 1), lambda: rope.at(patches(*grid).float(), 1, grid)):
        torch.manual_seed(5)
        got.append(call()[1])
    assert torch.allclose(*got, rtol=0, atol=0 if has_equal_bits(rope) else 3e-7)
    assert not torch.equal(got[0], rope.eval()(grid, 1)[1])


# -- gradients

@pytest.mark.parametrize('name,options,dims', VARIANTS, ids=IDS)
def test_gradients(name, options, dims):
    head_dim = 32 if name == 'spiral' else 12 if options.get('variant') == 'ap' and dims == 3 else 8
    rope = make(name, head_dim, dims, dtype=torch.float64, **options)
    at = points(2, 2, dims=dims, dtype=torch.float64, low=0., high=5.).requires_grad_()

    def payloads(freqs, at):
        values = {'freqs': freqs} if rope.learned else {}
        return torch.cat([p.flatten() for p in torch.func.functional_call(Points(rope), {
            f'rope.{k}': v for k, v in values.items()}, (at,))])

    freqs = rope.freqs.detach().clone().requires_grad_(rope.learned)
    assert torch.autograd.gradcheck(payloads, (freqs, at), fast_mode=True)
    if rope.learned:  # LieRE has its own derivative where coordinates need none
        assert torch.autograd.gradcheck(lambda freqs: payloads(freqs, at.detach()), freqs, fast_mode=True)
    assert torch.autograd.gradcheck(lambda at: payloads(freqs.detach(), at), at, fast_mode=True)
    if name == 'liere':
        assert torch.autograd.gradgradcheck(payloads, (freqs, at), fast_mode=True)


@pytest.mark.parametrize('dims', [1, 2, 3])
def test_float32_gradients_of_learning_generators(dims):
    rope = make('liere', dims=dims)
    exact = make('liere', dims=dims, dtype=torch.float64)
    exact.freqs.data.copy_(rope.freqs.data)
    weights = torch.randn(2, 20, 256, dtype=torch.float64)
    at = points(20, dims=dims).requires_grad_()
    for wanted in (lambda r: [r.freqs], lambda r: [r.freqs, at], lambda r: [at]):
        got = [torch.autograd.grad((r.at(at)[0] * weights).sum(), wanted(r)) for r in (rope, exact)]
        for a, b in zip(*got):
            assert (a - b).abs().max() < 1e-5 * b.abs().max()
    at = points(20, dims=dims)
    assert (rope.at(at)[0] - exact.at(at)[0]).abs().max() < 5e-6


# -- who uses it

class Points(torch.nn.Module):
    def __init__(self, rope, prefix=1, extent=None):
        super().__init__()
        self.rope, self.prefix, self.extent = rope, prefix, extent

    def forward(self, coordinates):
        return self.rope.at(coordinates, self.prefix, self.extent)


@pytest.mark.parametrize('name,dims', EVERY)
@pytest.mark.parametrize('batch', [None, 2])
def test_attention_takes_them(name, dims, batch):
    # the kernels in place, of models, and the formula
    rope = make(name, dims=dims)
    shape = (6,) if batch is None else (batch, 6)
    at = points(*shape, dims=dims).requires_grad_()
    qkv = torch.randn(2, 7, 3 * 64)
    inner, results = torch.randn(2, 2, 2, 7, 32), []
    for in_place in (True, False):
        leaf = qkv.clone().requires_grad_()
        payload = rope.at(at, 1)[1]
        if in_place:
            q, k, _ = rotate(leaf * 1., payload, rope.rotation, 2)
        else:
            q, k = (rope.rotate(x, payload) for x in leaf.unflatten(2, (3, 2, 32)).permute(2, 0, 3, 1, 4)[:2])
        wanted = [leaf, at, *([rope.freqs] if rope.learned else [])]
        results.append([q, k, *torch.autograd.grad((torch.stack((q, k)) * inner).sum(), wanted)])
    for a, b in zip(*results):
        assert torch.allclose(a, b, atol=1e-5 * max(1., b.abs().max().item()))


@pytest.mark.parametrize('name,dims', EVERY)
@pytest.mark.parametrize('extent', [None, (5, 9, 10)])
def test_export_for_any_number_of_points(name, dims, extent):
    rope, extent = make(name, dims=dims, scaling='interpolate'), extent and extent[-dims:]
    count = {1: torch.export.Dim('count', min=2, max=64)}
    exported = torch.export.export(
        Points(rope, 1, extent), (points(2, 5, dims=dims),), dynamic_shapes=(count,)).module()
    with torch.no_grad():
        for at in (points(2, 5, dims=dims), points(2, 9, dims=dims)):
            for a, b in zip(exported(at), rope.at(at, 1, extent)):
                assert torch.allclose(a, b, atol=3e-5)  # what is recorded for another runtime stays in float32


@pytest.mark.slow
@pytest.mark.parametrize('name,dims', [
    *((name, 2) for name in ('axial', 'mixed', 'spherical_learned', 'liere', 'comrope', 'quatro')),
    *((name, dims) for name in ('mixed', 'spherical_learned', 'liere') for dims in (1, 3))])
@pytest.mark.parametrize('of_coordinates', [False, True])
def test_compiled(name, dims, of_coordinates):
    torch._dynamo.reset()
    rope = make(name, dims=dims)
    compiled = torch.compile(Points(rope), backend='aot_eager', fullgraph=True, dynamic=True)
    for at in (points(2, 5, dims=dims), points(2, 8, dims=dims)):
        at.requires_grad_(of_coordinates)
        wanted = [t for t in (at, rope.freqs) if t.requires_grad]
        ours, plain = compiled(at), rope.at(at, 1)
        assert all(torch.allclose(a, b, atol=5e-6) for a, b in zip(ours, plain))
        if wanted:
            weights = [torch.randn_like(p) for p in plain]
            for a, b in zip(*(torch.autograd.grad(p, wanted, weights) for p in (ours, plain))):
                assert torch.allclose(a, b, atol=2e-5 * b.abs().max().item())


@pytest.mark.parametrize('extent', [None, (9, 8)])
@pytest.mark.parametrize('name', NAMES)
@torch.no_grad()
def test_traced_by_fx(name, extent):
    model = Points(make(name, scaling='interpolate'), extent=extent)
    traced = torch.fx.symbolic_trace(model)
    for at in (points(6), points(3, 6)):
        assert torch.allclose(traced(at)[1], model(at)[1], rtol=0, atol=1e-6)


def test_another_number_of_images_is_refused():
    rope = make('mixed')
    for images in (1, 3):
        with pytest.raises(ValueError, match=f'payload is of {images} images of their own, the queries.*of 2'):
            rotate(torch.randn(2, 5, 192), rope.at(points(images, 5))[0], rope.rotation, 2)


@pytest.mark.parametrize('name', NAMES)
def test_transforms(name):
    rope, at = make(name, dtype=torch.float64, head_dim=8), points(3, 4, dtype=torch.float64)
    mapped = torch.func.vmap(lambda image: rope.at(image)[1])(at)
    assert torch.allclose(mapped, rope.at(at)[1], atol=1e-12)
    jacobian = torch.func.jacfwd(lambda image: rope.at(image)[1].sum(-1))(at[0])
    reverse = torch.func.jacrev(lambda image: rope.at(image)[1].sum(-1))(at[0])
    assert torch.allclose(jacobian, reverse, atol=1e-10) and jacobian.abs().max() > 0.1


def test_under_autocast_and_in_half_precision():
    rope = make('liere').bfloat16()
    plain = rope.at(points(5), 1)[0]
    with torch.autocast('cpu', torch.bfloat16):
        assert torch.equal(rope.at(points(5), 1)[0], plain) and plain.dtype == torch.float32
    with torch.inference_mode():
        assert torch.allclose(rope.at(points(5), 1)[0], plain, atol=5e-6)
    assert make('liere', device='meta').at(points(5).to('meta'), 1)[0].is_meta


def test_a_training_step_settles_the_reference_grid():
    for extent in ((6, 9), None):
        rope = make('spherical').train()
        rope.set_initial_grid((5, 7))
        rope.eval().at(points(3), extent=extent)
        assert rope.undecided
        rope.train().at(points(3), extent=extent)
        assert not rope.undecided and rope.reference_grid.tolist() == list(extent or (5, 7))


# -- bad input

@pytest.mark.parametrize('coordinates,error,words', [
    ([[0., 1.]], TypeError, 'coordinates must be a tensor of real numbers.*got list'),
    (torch.zeros(3, 2, dtype=torch.complex64), TypeError, 'complex64'),
    (torch.zeros(3, 2, dtype=torch.bool), TypeError, 'torch.bool'),
    (torch.zeros(3, 3), ValueError, r'coordinates must be \(N, 2\) or \(batch, N, 2\).*\(3, 3\)'),
    (torch.zeros(2), ValueError, r'\(2,\)'),
    (torch.zeros(1, 2, 3, 2), ValueError, r'\(1, 2, 3, 2\)'),
    (torch.zeros(3, 2, device='meta'), ValueError, 'device of the encoding, cpu, got meta'),
    (torch.tensor([[0., 1.], [math.nan, 2.], [math.inf, 0.]]), ValueError, 'finite, got 2 of 3 points'),
])
def test_bad_coordinates(coordinates, error, words):
    with pytest.raises(error, match=words):
        make('axial').at(coordinates)


@pytest.mark.parametrize('extent', [(0, 3), 14, (2.5, 3), (3,)])
def test_bad_extent(extent):
    with pytest.raises(ValueError, match='extent must be two positive integers'):
        make('axial').at(points(3), extent=extent)
