"""Pairs turned as complex numbers are pairs turned by the formula, and only where nothing is recorded."""
import pytest
import timm
import torch
from tiny import TINY, make

import timm_rope
from timm_rope import rotation


@pytest.fixture
def routes(monkeypatch):
    """Names of the routes that rotations take, in order."""
    taken, original = [], rotation.takes_complex

    def noticed(x, payload):
        taken.append('complex' if original(x, payload) else 'formula')
        return taken[-1] == 'complex'

    monkeypatch.setattr(rotation, 'takes_complex', noticed)
    return taken


def formula(rope, x, payload, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(rotation, 'takes_complex', lambda x, payload: False)
        return rope.rotation(x, payload)


def queries(batch, heads, tokens, head_dim, dtype):
    """A view of the packed output of a projection, as attention has it."""
    torch.manual_seed(0)
    packed = torch.randn(batch, tokens, 3 * heads * head_dim, dtype=dtype, requires_grad=True)
    return packed, packed.view(batch, tokens, 3, heads, head_dim).permute(2, 0, 3, 1, 4)[0]


@pytest.mark.parametrize('dtype', [torch.float32, torch.float64])
@pytest.mark.parametrize('name,head_dim', [('axial', 8), ('axial', 6), ('mixed', 8), ('mixed', 2), ('spiral', 8)])
def test_equal_to_the_formula_with_all_gradients(name, head_dim, dtype, routes, monkeypatch):
    rope = timm_rope.create_rope(name, head_dim, 3, 2, (3, 4), dtype=dtype)
    packed, x = queries(2, 3, 13, head_dim, dtype)
    results = []
    for turn in (lambda x, p: rope.rotation(x, p), lambda x, p: formula(rope, x, p, monkeypatch)):
        packed.grad = None
        rope.zero_grad()
        out = turn(x, rope((3, 4), num_prefix_tokens=1)[1])
        (out * torch.arange(out.numel(), dtype=dtype).view_as(out).cos()).sum().backward()
        results.append((out.detach(), packed.grad.clone(), rope.freqs.grad.clone() if rope.learned else None))
    assert routes == ['complex']
    for got, expected in zip(*results):
        if expected is not None:
            assert expected.abs().max() > 0.1 or head_dim == 2
            assert torch.allclose(got, expected, rtol=1e-5, atol=1e-5 if dtype == torch.float32 else 1e-13)
    assert torch.equal(results[0][0][:, :, 0], x[:, :, 0]), 'prefix tokens do not turn'


def test_a_payload_for_each_image(routes, monkeypatch):
    rope = timm_rope.create_rope('mixed', 8, 3, 1, (3, 4))
    _, x = queries(2, 3, 5, 8, torch.float32)
    payload = timm_rope.encoding.keep_tokens(rope((3, 4))[0], torch.tensor([[0, 2, 3, 5, 7], [1, 4, 6, 8, 9]]), 0)
    assert torch.allclose(rope.rotation(x, payload), formula(rope, x, payload, monkeypatch), atol=1e-6)
    assert routes == ['complex']


def test_what_complex_numbers_cannot_view_takes_the_formula(routes, monkeypatch):
    rope = timm_rope.create_rope('mixed', 5, 3, 1, (3, 4))  # odd strides
    _, x = queries(2, 3, 12, 5, torch.float32)
    even = timm_rope.create_rope('mixed', 4, 3, 1, (3, 4))
    _, y = queries(2, 3, 12, 4, torch.float32)
    shifted = torch.randn(1 + y.numel())[1:].view_as(y)  # odd offset
    scattered = y.transpose(-1, -2).contiguous().transpose(-1, -2)
    for encoding, values in ((rope, x), (even, shifted), (even, scattered), (even, y.bfloat16()), (even, y.double())):
        out = encoding.rotation(values, encoding((3, 4))[0])
        assert out.dtype == values.dtype
        reference = formula(encoding, values, encoding((3, 4))[0], monkeypatch)
        assert torch.equal(out, reference)
    assert routes == ['formula'] * 5


def test_nothing_is_changed_in_place():
    rope = timm_rope.create_rope('axial', 8, 3, 1, (3, 4))
    packed, x = queries(2, 3, 12, 8, torch.float32)
    before = packed.detach().clone()
    with torch.no_grad():
        rope.rotation(x, rope((3, 4))[0])
    assert torch.equal(packed, before)


def test_recorded_graphs_hold_no_complex_numbers(routes):
    model = make('vit_tiny_rope_mixed')
    x = torch.randn(1, 3, 32, 32)
    expected = model(x)
    assert routes and set(routes) == {'complex'}
    routes.clear()
    graphs = []

    def backend(graph, inputs):
        graphs.append(graph)
        return graph.forward

    torch._dynamo.reset()
    compiled = torch.compile(model, backend=backend, fullgraph=True)
    assert torch.allclose(compiled(x), expected, atol=1e-5)
    traced = torch.jit.trace(model, x, check_trace=False)
    exported = torch.export.export(model, (x,))
    traced_fx = torch.fx.symbolic_trace(timm.create_model('vit_tiny_rope_mixed', **TINY))
    assert 'complex' not in routes
    for text in (str([str(graph.graph) for graph in graphs]), str(traced.inlined_graph), str(exported.graph),
                 str(traced_fx.graph)):
        assert 'complex' not in text and len(text) > 1000
