"""Operators that compiled graphs hold on a GPU, tried on a CPU, where they call the route of the CPU."""
import copy

import pytest
import torch
from tiny import make
from torch._dynamo.testing import CompileCounterWithBackend
from torch.library import opcheck

from timm_rope import create_rope, list_ropes
from timm_rope.kernels import graph, guard, rotate, routes


@pytest.fixture(autouse=True)
def operators_on_a_cpu(monkeypatch):
    monkeypatch.setitem(graph.ROUTES, 'cpu', 'inplace')
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()
    assert guard.switched_off() == []


def described(rope):
    return 'inplace', rope.num_heads, *graph.describe(rope.rotation)


def inputs(name, dtype=torch.float32):
    torch.manual_seed(0)
    rope = create_rope(name, 16, 2, 1, (3, 2))
    payload = rope((3, 2), 1)[0].detach()
    return rope, torch.randn(2, 7, 3 * 2 * 16).to(dtype), payload


@pytest.mark.parametrize('name', list_ropes())
def test_operators_are_well_formed(name):
    rope, qkv, payload = inputs(name)
    given = described(rope)
    opcheck(torch.ops.timm_rope.turn_.default, (qkv, payload, *given))
    learned = payload.requires_grad_(rope.learned)
    opcheck(torch.ops.timm_rope.turned.default, (qkv.requires_grad_(), learned, *given))


@pytest.mark.parametrize('dtype', [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize('name', list_ropes())
def test_operators_are_the_formula(name, dtype):
    rope, qkv, payload = inputs(name, dtype)
    old = copy.deepcopy(qkv)
    leaf, table = qkv.clone().requires_grad_(), payload.clone().requires_grad_()
    split = routes.packed_view(leaf.double(), 2).permute(2, 0, 3, 1, 4).unbind(0)
    wide = table.double()
    expected = rope.rotation(split[0], wide), rope.rotation(split[1], wide), split[2]
    grads = [torch.randn_like(x) for x in expected]
    expected_grads = torch.autograd.grad(expected, (leaf, table), grads)

    expected = [x.detach() for x in expected]
    got = graph.turned(leaf, table, *described(rope))
    got_grads = torch.autograd.grad(got, (leaf, table), [g.to(dtype) for g in grads])
    graph.turn_(qkv, payload, *described(rope))
    in_place = routes.packed_view(qkv, 2).permute(2, 0, 3, 1, 4)
    share = 1e-5 if dtype == torch.float32 else 2e-2
    for x, y, z in zip((x.detach() for x in got), expected, in_place):
        assert float((x.double() - y).abs().max()) < share * float(y.abs().max())
        assert float((z.double() - y).abs().max()) < share * float(y.abs().max())
    assert torch.equal(leaf.detach(), old)
    assert float((got_grads[0].double() - expected_grads[0]).abs().max()) < share * float(expected_grads[0].abs().max())
    assert got_grads[1].shape == expected_grads[1].shape  # its values: through the models, below


def ops_of(model, x, train):
    """What the model returns when compiled, its gradients, and the names of the operators in its graphs."""
    seen = []

    def backend(graph_module, example_inputs):
        seen.extend(str(node.target) for node in graph_module.graph.nodes)
        return graph_module

    compiled = torch.compile(model, backend=CompileCounterWithBackend('aot_eager'), fullgraph=True)
    watched = torch.compile(model, backend=backend, fullgraph=True)
    with torch.set_grad_enabled(train):
        watched(x)
        out = compiled(x)
    if train:
        model.zero_grad()
        out.square().mean().backward()
    return out.detach(), {k: p.grad for k, p in model.named_parameters() if p.grad is not None}, seen


@pytest.mark.parametrize('train', [False, True], ids=['eval', 'train'])
@pytest.mark.parametrize('name', ['axial', 'mixed', 'spherical_learned', 'liere'])
def test_compiled_models_hold_the_operators(name, train):
    model = make(rope_encoding=name)
    x = torch.randn(2, 3, 32, 32)
    with torch.set_grad_enabled(train):
        expected = model(x)
    grads = {}
    if train:
        expected.square().mean().backward()
        grads = {k: p.grad.clone() for k, p in model.named_parameters() if p.grad is not None}
    got, got_grads, seen = ops_of(model, x, train)
    held = [name for name in seen if 'timm_rope.turn' in name]
    assert held == ['timm_rope.turned.default' if train else 'timm_rope.turn_.default'] * 3
    torch.testing.assert_close(got, expected.detach(), atol=1e-4, rtol=1e-4)
    assert grads.keys() == got_grads.keys() or not train
    for key, grad in grads.items():
        torch.testing.assert_close(got_grads[key], grad, atol=1e-4, rtol=1e-3)


def test_the_formula_where_it_is_asked_for_or_the_route_does_not_work(monkeypatch):
    x = torch.randn(2, 3, 32, 32)
    monkeypatch.setenv(routes.VARIABLE, 'formula')
    assert not any('timm_rope.turn' in name for name in ops_of(make(), x, False)[2])
    monkeypatch.delenv(routes.VARIABLE)
    torch._dynamo.reset()
    monkeypatch.setattr(guard, 'may_turn', lambda *args: False)
    assert not any('timm_rope.turn' in name for name in ops_of(make(), x, False)[2])


def test_exported_models_hold_the_formula():
    program = torch.export.export(make(), (torch.randn(2, 3, 32, 32),))
    assert not any('timm_rope.turn' in str(node.target) for node in program.graph.nodes)


def test_inductor_turns_in_place():
    """No copy of the projection is made before it is turned."""
    from torch._inductor.utils import run_and_get_code

    rope, qkv, payload = inputs('axial')
    weight = torch.randn(96, 8)

    def attention(x):
        q, k, v = rotate(x @ weight.T, payload, rope.rotation, 2)
        return torch.nn.functional.scaled_dot_product_attention(q, k, v)

    with torch.no_grad():
        x = torch.randn(2, 7, 8)
        out, codes = run_and_get_code(torch.compile(attention, fullgraph=True), x)
        torch.testing.assert_close(out, attention(x))
    code = ''.join(codes)
    assert code.count('torch.ops.timm_rope.turn_.default(') == 1
    assert 'cpp_fused' not in code.split('def call(')[1], 'the product, the turning and attention, no kernel between'
