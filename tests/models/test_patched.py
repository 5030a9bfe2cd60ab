"""Layers that somebody looks at, wraps or replaces: what they see is never turned behind their back."""
import functools

import pytest
import timm
import torch
from tiny import make
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts


def swin():
    torch.manual_seed(0)
    return timm.create_model(
        'swin_tiny_rope_mixed', img_size=56, patch_size=4, window_size=7, embed_dim=24, depths=(1, 1),
        num_heads=(2, 4), num_classes=5)


def models():
    return {'vit': make(), 'swin': swin()}


def projection(model):
    return (model.blocks[0] if hasattr(model, 'blocks') else model.layers[0].blocks[0]).attn.qkv


def image(model):
    torch.manual_seed(1)
    return torch.randn(2, 3, *model.patch_embed.img_size)


def gradients(model, x, run=None):
    model.zero_grad()
    out = (run or model)(x)
    out.square().sum().backward()
    return [out.detach(), *(p.grad.clone() for p in model.parameters() if p.grad is not None)]


def assert_same(a, b):
    assert len(a) == len(b)
    for x, y in zip(a, b):
        assert (x - y).abs().max() <= 1e-5 * max(1, float(y.abs().max()))


class Wrapped(nn.Module):
    def __init__(self, inner):
        super().__init__()
        self.inner = inner

    def forward(self, x):
        return self.inner(x)


class Subclass(nn.Linear):
    def forward(self, x):
        return torch.tanh(super().forward(x))


def patch(model, function):
    layer = projection(model)
    old = layer.forward
    layer.forward = lambda x: function(old(x))


def assert_sees_the_projection(model, seen):
    x = image(model)
    model.eval()
    inputs = []
    handle = projection(model).register_forward_pre_hook(lambda module, args: inputs.append(args[0].detach().clone()))
    with torch.no_grad():
        model(x)
    handle.remove()
    layer = projection(model)
    plain = torch.nn.functional.linear(inputs[0], layer.weight, layer.bias)
    assert len(seen) == 1 and torch.allclose(seen[0], plain, atol=1e-5)


@pytest.mark.parametrize('family', ['vit', 'swin'])
@pytest.mark.parametrize('how', ['patched forward', 'hook', 'global hook'])
def test_what_is_captured_stays_as_it_was(family, how):
    model, seen = models()[family], []

    def capture(out):
        seen.append(out)
        return out

    remove = lambda: None  # noqa: E731
    if how == 'patched forward':
        patch(model, capture)
    elif how == 'hook':
        projection(model).register_forward_hook(lambda module, args, out: capture(out))
    else:
        remove = nn.modules.module.register_module_forward_hook(
            lambda module, args, out: capture(out) if module is projection(model) else None).remove
    try:
        assert_sees_the_projection(model, seen)
    finally:
        remove()


@pytest.mark.parametrize('family', ['vit', 'swin'])
@pytest.mark.parametrize('how', ['patched forward', 'subclass', 'parametrised'])
def test_functions_of_the_projection_have_their_gradients(family, how, monkeypatch):
    model = models()[family].train()
    layer = projection(model)
    if how == 'patched forward':
        patch(model, torch.tanh)
    elif how == 'subclass':
        layer.__class__ = Subclass
    else:
        nn.utils.parametrizations.orthogonal(layer)
    x = image(model)
    got = gradients(model, x)
    monkeypatch.setenv('TIMM_ROPE_KERNEL', 'formula')
    assert_same(got, gradients(model, x))


@pytest.mark.parametrize('family', ['vit', 'swin'])
@pytest.mark.parametrize('policy', [CheckpointPolicy.MUST_SAVE, CheckpointPolicy.PREFER_RECOMPUTE])
def test_selective_activation_checkpointing(family, policy):
    model = models()[family].train()
    x = image(model)
    expected = gradients(model, x)

    def choose(ctx, op, *args, **kwargs):
        products = (torch.ops.aten.mm.default, torch.ops.aten.addmm.default, torch.ops.aten.bmm.default)
        return policy if op in products else CheckpointPolicy.PREFER_RECOMPUTE

    contexts = functools.partial(create_selective_checkpoint_contexts, choose)
    assert_same(gradients(model, x, lambda x: checkpoint(model, x, use_reentrant=False, context_fn=contexts)), expected)


def test_activations_kept_elsewhere():
    model = make().train()
    x = image(model)
    expected = gradients(model, x)
    with torch.autograd.graph.save_on_cpu():
        assert_same(gradients(model, x), expected)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: t.clone(), lambda t: t):
        assert_same(gradients(model, x), expected)


def test_a_dispatch_mode_keeps_what_it_saw():
    class Keep(TorchDispatchMode):
        kept = []

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            out = func(*args, **(kwargs or {}))
            if func is torch.ops.aten.addmm.default:
                self.kept.append((out, out.clone()))
            return out

    model = make()
    expected = model(image(model))
    with torch.no_grad(), Keep() as mode:
        assert torch.allclose(model(image(model)), expected, atol=1e-5)
    assert len(mode.kept) >= 9 and all(torch.equal(out, copy) for out, copy in mode.kept)


@pytest.mark.parametrize('operators', [False, True], ids=['formula', 'operators'])
def test_compiled_models_see_what_was_put_into_a_layer(operators, monkeypatch):
    """A norm that was an identity, and a projection whose output somebody keeps."""
    from timm_rope.kernels import graph

    if operators:  # as graphs on a GPU have them
        monkeypatch.setitem(graph.ROUTES, 'cpu', 'inplace')
    x, kept = torch.randn(2, 3, 32, 32), []
    model = make()
    old = model.blocks[0].attn.qkv.forward

    def keep(y):
        kept.append(old(y))
        return kept[-1]

    model.blocks[0].attn.qkv.forward = keep
    model.blocks[1].attn.q_norm.forward = lambda q: 0.5 * q
    with torch.no_grad():
        expected, held = model(x), kept.pop()
        torch._dynamo.reset()
        got = torch.compile(model, backend='aot_eager')(x)
    torch.testing.assert_close(got, expected, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(kept.pop(), held, atol=1e-4, rtol=1e-4)
