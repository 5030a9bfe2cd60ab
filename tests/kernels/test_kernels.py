"""The op in front of attention: every route computes what the formula says, forward and backward, and is taken when."""
import pytest
import torch
from tiny import make
from torch import nn

import timm_rope
from timm_rope.kernels import rotate, routes, unpack
from timm_rope.kernels.cpu import derived_cache, packing, space
from timm_rope.rotations import BlockRotation
from timm_rope.rotations.grid_exponentials import skew

HEADS, GRID, PREFIX = 3, (3, 4), 1
TOKENS = PREFIX + GRID[0] * GRID[1]

# name, head_dim, options: with and without unrotated channels, every engine, shared heads
CASES = [
    ('axial', 8, {}), ('axial', 6, {}), ('spiral', 8, dict(directions=2)), ('axial_learned', 8, {}),
    ('mixed', 8, {}), ('mixed', 2, {}), ('mixed', 8, dict(share_heads=True)),
    ('spherical', 8, {}), ('spherical', 10, dict(order='xy')),
    ('spherical_learned', 10, {}), ('spherical_learned', 6, dict(order='xy', share_heads=True)),
    *(('liere', 12, dict(block=block)) for block in (2, 3, 4, 5, 6, 8, 12)),
    ('liere', 12, dict(block=3, share_heads=True)), ('liere', 12, dict(block=6, share_heads=True)),
    ('liere', 32, dict(block=32)), ('comrope', 12, dict(block=6)), ('comrope', 12, dict(block=3, variant='ap')),
    ('geope', 10, {}), ('quatro', 9, {}), ('quatro', 10, dict(order='xy', share_heads=True)),
    *((name, 24, {}) for name in timm_rope.list_ropes()),
]
IDS = [f'{name}-{dim}-{"-".join(map(str, options.values()))}' for name, dim, options in CASES]


@pytest.fixture
def choose(monkeypatch):
    """Sets the route."""
    return lambda route: monkeypatch.setenv(routes.VARIABLE, route)


@pytest.fixture
def taken(monkeypatch):
    """Names of the routes that `rotate` takes, in order."""
    names, original = [], routes.find_route

    def noticed(*args):
        route = original(*args)
        names.append('formula' if route is None else route.NAME)
        return route

    monkeypatch.setattr(routes, 'find_route', noticed)
    return names


def encoding(name, head_dim, options, dtype=torch.float64):
    torch.manual_seed(0)
    return timm_rope.create_rope(name, head_dim, HEADS, 2, GRID, dtype=dtype, **options)


def projection(head_dim, dtype=torch.float64, batch=2):
    torch.manual_seed(1)
    return torch.randn(batch, TOKENS, 3 * HEADS * head_dim, dtype=torch.float64).to(dtype).requires_grad_()


def results(rope, leaf, upstream=None):
    """Queries, keys, values, the gradient of the projection and of the frequencies."""
    leaf.grad, rope.freqs.grad = None, None
    outputs = rotate(leaf * 1, rope(GRID, PREFIX)[1], rope.rotation, HEADS)
    torch.manual_seed(2)
    upstream = upstream or [torch.randn(out.shape, dtype=torch.float64).to(out.dtype) for out in outputs]
    torch.autograd.backward(outputs, upstream)
    return [*(out.detach() for out in outputs), leaf.grad, rope.freqs.grad if rope.learned else None]


@pytest.mark.parametrize('case', CASES, ids=IDS)
@pytest.mark.parametrize('dtype,tolerance', [(torch.float64, 1e-13), (torch.float32, 2e-6)])
def test_in_place_is_the_formula(case, dtype, tolerance, choose, taken):
    rope, leaf = encoding(*case, dtype), projection(case[1], dtype)
    choose('formula')
    expected = results(rope, leaf)
    choose('inplace')
    got = results(rope, leaf)
    assert taken == ['formula', 'inplace']
    if case[0] == 'liere':
        tolerance *= 5  # the exponentials and their gradient, made in float32 while they learn
    for a, b in zip(got, expected):
        assert (a is None) == (b is None)
        if b is not None:
            assert b.abs().max() > 0.1
            assert (a - b).abs().max() <= tolerance * b.abs().max()


@pytest.mark.parametrize('case', CASES, ids=IDS)
@pytest.mark.parametrize('dtype', [torch.bfloat16, torch.float16])
def test_half_precision_is_rounded_once(case, dtype, choose, taken):
    """By value, under autocast and not: neither the angles nor the sums may be in half precision."""
    rope, leaf = encoding(*case, torch.float32), projection(case[1], dtype)
    exact = encoding(*case)
    with torch.no_grad():
        exact.freqs.copy_(rope.freqs)
    choose('formula')
    wide = leaf.detach().double().requires_grad_()
    torch.manual_seed(2)
    upstream = [torch.randn(2, HEADS, TOKENS, case[1], dtype=torch.float64).to(dtype) for _ in range(3)]
    expected = results(exact, wide, [u.double() for u in upstream])
    choose('inplace')
    ulp = torch.finfo(dtype).eps / 2
    slack = 1e-4 if case[1] == 32 else 1e-6  # dense generators that learn are squared in float32
    for autocast in (False, True):
        with torch.autocast('cpu', dtype, enabled=autocast):
            got = results(rope, leaf, upstream)
        for a, b in zip(got[:4], expected):
            assert a.dtype == dtype
            assert ((a.double() - b).abs() <= 1.01 * ulp * b.abs() + slack).all()
        if rope.learned:  # from queries and keys that were rounded
            assert (got[4] - expected[4]).abs().max() <= 4 * ulp * expected[4].abs().max()
    assert taken == ['formula', 'inplace', 'inplace']


@pytest.mark.parametrize('route', ['inplace', 'formula'])
@pytest.mark.parametrize('case', CASES[:-1], ids=IDS[:-1])
def test_gradcheck(case, route, choose, taken):
    name, head_dim, options = case
    rope, leaf = encoding(*case), projection(head_dim, batch=1)
    choose(route)

    def turned(leaf, freqs):
        replaced = torch.nn.utils.stateless._reparametrize_module(rope, {'freqs': freqs}) if rope.learned else None
        if replaced is None:
            return rotate(leaf * 1, rope(GRID, PREFIX)[1], rope.rotation, HEADS)
        with replaced:
            return rotate(leaf * 1, rope(GRID, PREFIX)[1], rope.rotation, HEADS)

    freqs = rope.freqs.detach().clone().requires_grad_(rope.learned)
    assert torch.autograd.gradcheck(turned, (leaf, freqs), fast_mode=True)
    assert torch.autograd.gradgradcheck(turned, (leaf, freqs), fast_mode=True)
    assert set(taken) == {route}


@pytest.mark.parametrize('case', CASES, ids=IDS)
def test_what_must_not_change(case, choose, taken):
    rope, leaf = encoding(*case, torch.float32), projection(case[1], torch.float32)
    choose('inplace')
    qkv = leaf.detach().clone()
    before = unpack(qkv.clone(), HEADS)
    address = qkv.data_ptr()
    outputs = rotate(qkv, rope(GRID, PREFIX)[0], rope.rotation, HEADS)
    assert outputs[0].data_ptr() == address and len({out.untyped_storage().data_ptr() for out in outputs}) == 1
    q, k, v = outputs
    assert torch.equal(v, before[2])
    for now, then in ((q, before[0]), (k, before[1])):
        assert torch.equal(now[:, :, :PREFIX], then[:, :, :PREFIX]), 'prefix tokens'
        rest = rope.rotation.rotated
        assert torch.equal(now[..., rest:], then[..., rest:]), 'channels that belong to no group'
        assert not torch.equal(now[..., :rest], then[..., :rest])
    upstream = [torch.randn_like(out).transpose(1, 2).contiguous().transpose(1, 2) for out in outputs]
    copies = [u.clone() for u in upstream]
    payload = rope(GRID, PREFIX)[1]
    table = payload.detach().clone()
    results(rope, leaf, upstream)
    assert all(torch.equal(u, c) for u, c in zip(upstream, copies)), 'gradients from above are not ours to write to'
    assert torch.equal(payload, table)


@pytest.mark.parametrize('case', [CASES[4], CASES[7], CASES[9], CASES[16]], ids=lambda case: case[0])
def test_gradients_of_any_layout(case, choose):
    rope, leaf = encoding(*case), projection(case[1])
    shape = (2, HEADS, TOKENS, case[1])
    for upstream in (
            [torch.ones(()).double().expand(shape)] * 3,
            [torch.randn(*reversed(shape)).double().permute(3, 2, 1, 0) for _ in range(3)],
            [torch.randn(2, HEADS, TOKENS, case[1] + 1).double()[..., 1:] for _ in range(3)],
            [None, torch.randn(shape).double(), None]):
        both = []
        for route in ('formula', 'inplace'):
            choose(route)
            if None in upstream:
                leaf.grad, rope.freqs.grad = None, None
                rotate(leaf * 1, rope(GRID, PREFIX)[1], rope.rotation, HEADS)[1].backward(upstream[1])
                both.append([leaf.grad, rope.freqs.grad if rope.learned else None])
            else:
                both.append(results(rope, leaf, upstream)[3:])
        for a, b in zip(*both):
            assert a is b is None or torch.allclose(a, b, atol=1e-12)


def test_a_payload_for_each_image(choose, taken):
    index = torch.tensor([[0, 2, 3, 5, 7], [1, 4, 6, 8, 9]])
    for name, expected in (('mixed', {'inplace'}), ('spherical', {'inplace'}), ('spherical_learned', {'inplace'}),
                           ('liere', {'formula'})):
        rope, leaf = encoding(name, 8, {}), projection(8)
        both = []
        for route in ('formula', 'auto'):
            choose(route)
            leaf.grad, rope.freqs.grad = None, None
            payload = timm_rope.encodings._payloads.keep_tokens(rope(GRID)[1], index, 0)
            taken.clear()
            q, k, v = rotate(leaf[:, :5] * 1, payload, rope.rotation, HEADS)
            (q * torch.arange(q.numel()).view_as(q)).sum().backward()
            both.append((q.detach(), k.detach(), leaf.grad, rope.freqs.grad if rope.learned else None))
        assert set(taken) == expected
        for a, b in zip(*both):
            assert a is b is None or torch.allclose(a, b, atol=1e-11)


@pytest.mark.parametrize('parts', [2, 3])
def test_queries_and_keys_are_found_where_they_lie(parts):
    images, heads, tokens, width = 2, 3, 5, 8
    packed = torch.randn(images, tokens, parts, heads, width)
    q, k, *rest = packed.permute(2, 0, 3, 1, 4).unbind(0)
    found = packing.packed_of(q, k)
    assert torch.equal(found, packed) and found.data_ptr() == packed.data_ptr()
    inner = torch.randn(4, tokens, parts, heads, width)[1:3]
    assert torch.equal(packing.packed_of(*inner.permute(2, 0, 3, 1, 4)[:2]), inner)
    # memory that holds something else than it seems to
    elsewhere = torch.randn_like(packed)[:, :, 1].transpose(1, 2)
    others = [
        (q.clone(), k.clone()), (q.contiguous(), k.contiguous()), (k, q), (q, k.clone()), (q, q), (q, elsewhere),
        (q[..., :4], k[..., :4]), (q[:, :, 1:], k[:, :, 1:]), (q[:, 1:], k[:, 1:])]
    others += [(k, v) for v in rest]  # the third part of the last image would lie beyond the end
    for a, b in others:
        found = packing.packed_of(a, b)
        assert torch.equal(found[:, :, 0], a.transpose(1, 2)) and torch.equal(found[:, :, 1], b.transpose(1, 2))


@pytest.mark.parametrize('head_dim', [4, 6, 10, 12])
def test_every_rotation_of_space(head_dim):
    """None, half turns and turns in one plane too, where the angles of the three turns are not determined."""
    rotation = BlockRotation(head_dim, 3)
    torch.manual_seed(0)
    axes = torch.cat((torch.eye(3), -torch.eye(3), torch.tensor([[0., 1., 1.], [1., 0., 1.], [1., 1., 0.]])))
    axes = torch.cat((nn.functional.normalize(axes, dim=-1), nn.functional.normalize(torch.randn(9, 3), dim=-1)))
    angles = torch.tensor([0., 1e-30, 1e-9, 1e-4, 1., torch.pi / 2, 3.1415, torch.pi, torch.pi * 2])
    turns = (axes[:, None] * angles[:, None]).double().flatten(0, 1)[:, [2, 1, 0]] * torch.tensor([-1., 1., -1.])
    matrices = torch.linalg.matrix_exp(skew(turns, 3))
    places = torch.randint(len(matrices), (1, len(matrices), rotation.groups))
    places[0, :, 0] = torch.arange(len(matrices))
    for dtype, tolerance in ((torch.float64, 1e-14), (torch.float32, 1e-6)):
        payload = matrices[places].flatten(2).to(dtype)
        x = torch.randn(2, len(matrices), 3, 2, head_dim, dtype=dtype)
        turned = x.clone()
        space.turn_(turned, payload, rotation)
        expected = rotation(x[:, :, :2].movedim(1, 3), payload).movedim(3, 1)
        assert (turned[:, :, :2] - expected).abs().max() < tolerance * x.abs().max()
        assert torch.equal(turned[:, :, 2], x[:, :, 2])


@pytest.mark.parametrize('images,limit,route', [(1, 9, 'formula'), (2, 9, 'inplace'), (1, 10 ** 6, 'inplace')])
def test_turns_that_are_not_kept_are_not_found_for_one_image(images, limit, route, taken, monkeypatch):
    monkeypatch.setattr(derived_cache, 'LARGEST', limit)
    rope = encoding('quatro', 12, {})
    with torch.no_grad():
        rotate(projection(12, batch=images) * 1, rope(GRID, PREFIX)[0], rope.rotation, HEADS)
    assert taken == [route]


def test_a_single_image_whose_heads_share_one_matrix(choose):
    """Its rows can be viewed as they are, without a copy."""
    rope, leaf = encoding('liere', 32, dict(block=32, share_heads=True)), projection(32, batch=1)
    both = []
    for route in ('formula', 'inplace'):
        choose(route)
        both.append(results(rope, leaf))
    for a, b in zip(*both):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize('images', [1, 2, 3, 5, 9])
@pytest.mark.parametrize('case', [CASES[4], CASES[6], CASES[9]], ids=['mixed', 'shared', 'spherical_learned'])
def test_pieces_cover_every_image(case, images, choose, monkeypatch):
    rope, leaf = encoding(*case), projection(case[1], batch=5)
    choose('formula')
    expected = results(rope, leaf)
    choose('inplace')
    monkeypatch.setattr(packing, 'PIECE', images * TOKENS * HEADS * case[1] + 1)
    for a, b in zip(results(rope, leaf), expected):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize('case', [CASES[8], CASES[9], CASES[12], CASES[14]], ids=lambda case: case[0])
def test_derived_tables_follow_their_payload(case, choose):
    """Made once for a payload that stays, anew when its values change, and forgotten with it."""
    from timm_rope.kernels.cpu import derived_cache

    rope, leaf = encoding(*case), projection(case[1]).detach()
    before = len(derived_cache._tables)
    payload = rope(GRID, PREFIX)[1].detach()

    def turned(payload):
        return rotate(leaf.clone(), payload, rope.rotation, HEADS)[0]

    choose('inplace')
    first = turned(payload)
    tables = derived_cache._tables[payload]
    assert torch.equal(turned(payload), first) and derived_cache._tables[payload] is tables
    assert len(derived_cache._tables) == before + 1
    payload.copy_(rope((3, 4), PREFIX)[0].detach().flip(1))
    changed = turned(payload)
    choose('formula')
    assert torch.allclose(turned(payload), changed, atol=1e-12) and not torch.allclose(changed, first)
    assert len(derived_cache._tables[payload]) == 1
    del payload
    assert len(derived_cache._tables) == before
    learned = rope(GRID, PREFIX)[1]
    if learned.requires_grad:
        choose('inplace')
        rotate(projection(case[1]) * 1, learned, rope.rotation, HEADS)
        assert len(derived_cache._tables) == before, 'a payload of training does not stay'


# -- which route

def test_only_plain_memory_is_turned_in_place(taken):
    rope, leaf = encoding('mixed', 8, {}), projection(8)
    payload = rope(GRID, PREFIX)[0].detach()

    def turn(qkv):
        return rotate(qkv, payload, rope.rotation, HEADS)[0]

    def expect(route, result, atol=1e-12):
        assert taken and set(taken) == {route}
        taken.clear()
        assert torch.allclose(result, expected, atol=atol)

    expected = turn(leaf.detach().clone())
    expect('inplace', expected)
    expect('formula', turn(leaf).detach())  # a leaf that needs its gradient may not be written to
    with torch.inference_mode():
        expect('inplace', turn(leaf.clone()))
    expect('formula', torch.vmap(turn)(leaf.detach().clone().unsqueeze(1)).squeeze(1))
    tangent = torch.func.jvp(turn, (leaf.detach(),), (leaf.detach(),))[1]
    expect('formula', tangent)
    pulled = torch.func.vjp(lambda x: turn(x * 1), leaf.detach())[0]
    expect('formula', pulled)
    with torch.autograd.forward_ad.dual_level():
        expect('formula', turn(leaf.detach() * 1))
    torch._dynamo.reset()
    expect('formula', torch.compile(turn, backend='eager', fullgraph=True)(leaf.detach().clone()))
    expect('formula', torch.jit.trace(turn, leaf.detach().clone(), check_trace=False)(leaf.detach().clone()))
    mode = torch._subclasses.FakeTensorMode()
    fakes = [mode.from_tensor(t.detach()) for t in (leaf, payload)]
    with mode:
        assert rotate(*fakes, rope.rotation, HEADS)[0].shape == expected.shape and taken == ['formula']


def test_other_precisions_than_the_angles_take_the_formula(taken):
    f32, f64 = torch.float32, torch.float64
    for qkv, angles in ((f32, f64), (f64, f32), (torch.bfloat16, f64)):
        rope = encoding('mixed', 8, {}, angles)
        rotate(projection(8, qkv).detach(), rope(GRID, PREFIX)[0], rope.rotation, HEADS)
    assert taken == ['formula', 'formula', 'inplace']
    for name, head_dim in (('mixed', 5), ('spherical', 9)):  # no complex view of an odd number of channels
        rope = encoding(name, head_dim, {})
        rotate(projection(head_dim).detach(), rope(GRID, PREFIX)[0], rope.rotation, HEADS)
    rope = encoding('mixed', 8, {})
    assert rotate(projection(8).detach()[:0], rope(GRID, PREFIX)[0], rope.rotation, HEADS)[0].shape == (
        0, HEADS, TOKENS, 8)
    assert taken[3:] == ['formula'] * 3


def test_the_environment_names_the_route(choose, taken):
    rope, leaf = encoding('mixed', 8, {}), projection(8).detach()

    def turn():
        return rotate(leaf.clone(), rope(GRID, PREFIX)[0], rope.rotation, HEADS)

    for route, expected in (('formula', 'formula'), ('inplace', 'inplace'), ('auto', 'inplace'), ('', 'inplace')):
        choose(route)
        turn()
        assert taken.pop() == expected
    choose('fast')
    with pytest.raises(ValueError, match="TIMM_ROPE_KERNEL must be one of auto, formula, inplace, triton, got 'fast'"):
        turn()
    choose('inplace')
    rope = encoding('mixed', 5, {})
    with pytest.raises(RuntimeError, match='TIMM_ROPE_KERNEL=inplace cannot .* float64 queries on cpu .*head_dim of 5'):
        rotate(projection(5).detach(), rope(GRID, PREFIX)[0], rope.rotation, HEADS)
    torch._dynamo.reset()
    torch.compile(turn, backend='eager', fullgraph=True)()


def test_a_missing_route_is_no_error(monkeypatch, choose, taken):
    monkeypatch.setitem(routes.MODULES, 'inplace', '.deleted')
    routes.load_route.cache_clear()
    try:
        rope = encoding('mixed', 8, {})
        rotate(projection(8).detach(), rope(GRID, PREFIX)[0], rope.rotation, HEADS)
        assert taken == ['formula']
        choose('inplace')
        with pytest.raises(RuntimeError, match='TIMM_ROPE_KERNEL=inplace cannot'):
            rotate(projection(8).detach(), rope(GRID, PREFIX)[0], rope.rotation, HEADS)
    finally:
        routes.load_route.cache_clear()


def test_a_route_that_cannot_be_imported_is_left_with_a_warning(monkeypatch, taken):
    def broken(name, package):
        raise AttributeError("module 'triton' has no attribute 'jit'")

    monkeypatch.setattr(routes.importlib, 'import_module', broken)
    routes.load_route.cache_clear()
    try:
        rope = encoding('mixed', 8, {})
        with pytest.warns(UserWarning, match="kernels 'inplace' cannot be imported.*AttributeError: module 'triton'"):
            rotate(projection(8).detach(), rope(GRID, PREFIX)[0], rope.rotation, HEADS)
        rotate(projection(8).detach(), rope(GRID, PREFIX)[0], rope.rotation, HEADS)  # no second warning
        assert taken == ['formula', 'formula']
    finally:
        routes.load_route.cache_clear()


def test_every_row_of_the_table_names_a_route():
    for row in routes.TABLE:
        assert row.route in routes.ROUTES[1:] and row.measured
        assert issubclass(row.rotation, timm_rope.rotations.Rotation)


@pytest.mark.parametrize('encoding_name,options,images,learning,route', [
    ('liere', {}, 1, True, 'formula'), ('liere', {}, 2, True, 'inplace'), ('liere', {}, 3, True, 'inplace'),
    ('liere', {}, 1, False, 'formula'), ('liere', {}, 2, False, 'formula'), ('liere', {}, 3, False, 'inplace'),
    ('liere', dict(share_heads=True), 1, True, 'inplace'), ('liere', dict(block=16), 1, True, 'inplace'),
    ('liere', dict(block=4), 1, False, 'inplace'), ('mixed', {}, 1, False, 'inplace')])
def test_few_rows_to_a_matrix_take_the_formula(encoding_name, options, images, learning, route, taken):
    rope = encoding(encoding_name, 16, options)
    with torch.set_grad_enabled(learning):
        rotate(projection(16, batch=images) * 1, rope(GRID, PREFIX)[0], rope.rotation, HEADS)
    assert taken == [route]


# -- in models

def test_the_projection_is_seen_as_it_was():
    """Who hooks `qkv` to look at queries and keys gets what the layer returned."""
    model = make('vit_tiny_rope_mixed', qkv_bias=True).eval()
    x, seen = torch.randn(1, 3, 32, 32), []
    with torch.no_grad():
        expected = model(x)
        layer = model.blocks[1].attn.qkv
        handle = layer.register_forward_hook(lambda module, args, output: seen.append((args, output)))
        assert torch.allclose(model(x), expected, atol=1e-6)
        handle.remove()
        (inputs, output), = seen
        assert torch.equal(output, model.blocks[1].attn.qkv(*inputs))
        attn = model.blocks[1].attn
        nn.utils.parametrizations.weight_norm(attn.qkv)
        assert torch.allclose(model(x), expected, atol=1e-5)

    class Kept(nn.Linear):
        def forward(self, x):
            self.output = super().forward(x).exp()  # its derivative needs the result
            return self.output

    layer = Kept(attn.qkv.in_features, attn.qkv.out_features)
    model.blocks[0].attn.qkv = layer
    model(x).sum().backward()
    assert torch.isfinite(layer.weight.grad).all() and layer.weight.grad.abs().max() > 0


@pytest.mark.parametrize('encoding', timm_rope.list_ropes())
@pytest.mark.parametrize('mode', ['eager', 'autocast', 'checkpointing', 'unfused', 'qk_norm'])
def test_whole_models_agree_with_the_formula(encoding, mode, choose, taken):
    model = make(f'vit_tiny_rope_{encoding}', qk_norm=mode == 'qk_norm').train()
    model.set_grad_checkpointing(mode == 'checkpointing')
    for block in model.blocks:
        block.attn.fused_attn = mode != 'unfused'
    x, both = torch.randn(2, 3, 32, 32), []
    for route in ('formula', 'auto'):
        choose(route)
        model.zero_grad()
        taken.clear()
        with torch.autocast('cpu', torch.bfloat16, enabled=mode == 'autocast'):
            model(x).float().square().sum().backward()
        both.append({name: p.grad.clone() for name, p in model.named_parameters()})
    assert set(taken) == (set() if mode == 'qk_norm' else {'inplace'})
    for name, expected in both[0].items():
        got = both[1][name]
        assert torch.isfinite(got).all() and (not name.endswith('freqs') or got.abs().max() > 0), name
        tolerance = 0.05 if mode == 'autocast' else 1e-4
        assert (got - expected).norm() <= tolerance * expected.norm() + 1e-7, name


def saved_bytes(run):
    """Bytes of all memory that the backward pass of `run` will need."""
    storages = {}

    def keep(tensor):
        storages[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        run()
    return sum(storages.values())


@pytest.mark.parametrize('encoding,allowed', [
    ('axial', 1), ('spherical', 1), ('mixed', 1.02), ('spherical_learned', 1.02)])
def test_nothing_more_is_saved_for_the_backward_pass(encoding, allowed):
    plain = make('vit_tiny_ape')
    rotary = make(f'vit_tiny_rope_{encoding}')
    x = torch.randn(64, 3, 32, 32)
    for model in (plain, rotary):
        model.train()(x)  # fills the cache
    tokens = [model.patch_embed(x).flatten(1, 2).repeat_interleave(2, 1) for model in (plain, rotary)]
    payload = rotary.rope((4, 8))[1]
    unit = saved_bytes(lambda: plain.blocks[1](tokens[0]))
    rotated = saved_bytes(lambda: rotary.blocks[1](tokens[1], payload=payload))
    assert rotated - payload.untyped_storage().nbytes() <= allowed * unit


def test_runs_are_bit_identical():
    model = make('vit_tiny_rope_spherical_learned').train()
    x, grads = torch.randn(2, 3, 32, 32), []
    for _ in range(2):
        model.zero_grad()
        model(x).square().sum().backward()
        grads.append([p.grad.clone() for p in model.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*grads))


@pytest.mark.parametrize('tokens', [1, TOKENS - 1, TOKENS + 5])
def test_a_payload_of_other_tokens_is_refused(tokens):
    rope = encoding('mixed', 8, {})
    payload = rope(GRID, PREFIX)[1]
    qkv = torch.randn(2, tokens, 3 * HEADS * 8, dtype=torch.float64)
    with pytest.raises(ValueError, match=f'payload is of {TOKENS} tokens, the queries and keys are of {tokens}'):
        rotate(qkv, payload, rope.rotation, HEADS)
