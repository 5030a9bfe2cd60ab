"""Sines of positions: the operator of compiled graphs is the formula."""
import pytest
import torch

import timm_rope
from timm_rope.rotations import sines


def frequencies(*shape, dtype=torch.float32):
    return 3 * torch.randn(*shape, dtype=dtype, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize('dtype,bound', [(torch.float32, 6e-8), (torch.float64, 1e-15)])
def test_values_are_those_of_float64(dtype, bound):
    freqs, position = frequencies(2, 3, 4, dtype=dtype), torch.arange(64, dtype=torch.float64) - 7.3
    for of in (sines.cos_sin, sines.operator):
        cos, sin = of(position, freqs)
        assert cos.shape == sin.shape == (2, 3, 64, 4) and cos.dtype == sin.dtype == dtype
        angle = torch.einsum('n,lhg->lhng', position, freqs.double())
        assert (cos - angle.cos()).abs().max() <= bound and (sin - angle.sin()).abs().max() <= bound


@pytest.mark.parametrize('requires_grad', [False, True])
@pytest.mark.parametrize('dtype', [torch.float32, torch.float64])
def test_operator_is_well_registered(dtype, requires_grad):
    freqs = frequencies(2, 3, 4, dtype=dtype).requires_grad_(requires_grad)
    torch.library.opcheck(sines.operator, (torch.arange(5, dtype=torch.float64), freqs))


def test_gradient_of_the_operator():
    position, freqs = torch.randn(5, dtype=torch.float64), frequencies(2, 3, 4, dtype=torch.float64).requires_grad_()
    assert torch.autograd.gradcheck(lambda f: sines.operator(position, f), freqs)
    assert torch.autograd.gradcheck(sines.operator, (position.requires_grad_(), freqs))


@pytest.mark.slow
@pytest.mark.parametrize('name', ['axial', 'mixed', 'spherical_learned'])
@pytest.mark.parametrize('dynamic', [False, True])
def test_compiled_tables_with_gradients(name, dynamic, monkeypatch):
    calls = []
    operator = sines.operator
    monkeypatch.setattr(sines, 'operator', lambda *args: calls.append(args) or operator(*args))
    torch._dynamo.reset()
    rope = timm_rope.create_rope(name, head_dim=12, num_heads=2, depth=2)
    compiled = torch.compile(lambda grid: rope(grid, 1), backend='aot_eager', fullgraph=True, dynamic=dynamic)
    for grid in ((3, 5), (4, 4)):
        ours, plain = compiled(grid), rope(grid, 1)
        assert all(torch.allclose(a, b, atol=1e-7) for a, b in zip(ours, plain))
        if rope.learned:
            weights = [torch.randn_like(p) for p in plain]
            gradients = [torch.autograd.grad(payloads, rope.freqs, weights)[0] for payloads in (ours, plain)]
            assert torch.allclose(*gradients, rtol=1e-5, atol=1e-5) and gradients[0].abs().min() > 0
    # fixed encodings have so few of them that the graph may make them as it likes
    assert bool(calls) == rope.learned


def test_compiled_transforms_see_the_formula():
    rope = timm_rope.create_rope('mixed', head_dim=8, num_heads=2, depth=1, dtype=torch.float64)

    def table(freqs):
        return torch.func.functional_call(rope, {'freqs': freqs}, ((2, 3),))[0].sin()

    freqs = rope.freqs.detach()
    for transformed in (
            torch.func.grad(lambda f: table(f).sum()),
            lambda f: torch.func.vmap(table)(torch.stack((f, -f))),
            lambda f: torch.func.jvp(table, (f,), (f,))[1]):
        compiled = torch.compile(transformed, backend='aot_eager', fullgraph=True)
        assert torch.allclose(compiled(freqs), transformed(freqs))
