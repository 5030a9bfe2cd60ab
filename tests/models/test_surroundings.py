"""What a program switches on around a model, for a whole process or a block of code: modes, patches, devices."""
import functools

import pytest
import timm
import torch
from tiny import make
from torch import nn
from torch.overrides import TorchFunctionMode

from timm_rope._tracing import unobserved, writable

SWIN = dict(img_size=56, patch_size=4, window_size=7, embed_dim=24, depths=(1, 1), num_heads=(2, 4), num_classes=5)


def swin(encoding='mixed', **kwargs):
    torch.manual_seed(0)
    return timm.create_model('swin_tiny_rope_mixed', **SWIN, rope_encoding=encoding, **kwargs).eval()


MODELS = {'vit': make, 'swin': swin}


def image(model):
    return torch.randn(2, 3, *model.patch_embed.img_size, generator=torch.Generator().manual_seed(1))


# -- who looks on for the whole process

class Keep(TorchFunctionMode):
    """Keeps the result of every projection, with a copy."""

    def __init__(self):
        super().__init__()
        self.kept = []

    def __torch_function__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        if func is torch.nn.functional.linear:
            self.kept.append((out, out.clone()))
        return out


def put(monkeypatch, owner, name):
    """Put a function that keeps results, with copies, into a class or module; returns what it keeps."""
    old, kept = getattr(owner, name), []

    @functools.wraps(old)
    def function(*args, **kwargs):
        out = old(*args, **kwargs)
        if isinstance(out, torch.Tensor):
            kept.append((out, out.detach().clone()))
        return out

    monkeypatch.setattr(owner, name, function)
    return kept


PATCHED = [(nn.Linear, 'forward'), (nn.Module, '__call__'), (nn.functional, 'linear')]
PATCHED_IDS = ['Linear.forward', 'Module.__call__', 'F.linear']


@pytest.mark.parametrize('family', MODELS)
@pytest.mark.parametrize('training', [False, True])
@pytest.mark.parametrize('owner,name', PATCHED, ids=PATCHED_IDS)
def test_what_a_patch_of_torch_keeps_stays_as_it_was(family, training, owner, name, monkeypatch):
    model = MODELS[family]().train(training)
    x = image(model)
    with torch.set_grad_enabled(training):
        expected = model(x)
        kept = put(monkeypatch, owner, name)
        assert torch.allclose(model(x), expected, atol=1e-5)
    assert len(kept) > 4 and all(torch.equal(out, copy) for out, copy in kept)


@pytest.mark.parametrize('family', MODELS)
@pytest.mark.parametrize('training', [False, True])
def test_what_a_function_mode_keeps_stays_as_it_was(family, training):
    model = MODELS[family]().train(training)
    x = image(model)
    with torch.set_grad_enabled(training):
        expected = model(x)
        with Keep() as mode, torch.device('cpu'):
            assert torch.allclose(model(x), expected, atol=1e-5)
    assert len(mode.kept) > 4 and all(torch.equal(out, copy) for out, copy in mode.kept)


def test_a_patched_identity_is_called(monkeypatch):
    model = make()
    kept = put(monkeypatch, nn.Identity, 'forward')
    model(image(model))
    queries = [out for out, _ in kept if out.shape[:2] == (2, 2)]  # images, heads
    assert len(queries) == 2 * len(model.blocks), 'norms of queries and keys'


def test_where_nobody_looks_on_queries_turn_in_place():
    assert unobserved(nn.Linear(2, 2)) and unobserved(nn.Identity()) and writable(torch.ones(2))
    with torch.device('cpu'):
        assert writable(torch.ones(2)), 'a device as a context keeps nothing'
    nodes = torch.fx.symbolic_trace(make()).graph.nodes
    assert not any(node.target in ('clone', torch.clone) for node in nodes), 'the tracer of FX patches torch, too'
