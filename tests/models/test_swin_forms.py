"""Swin models in training, copied, scripted, traced, in low precision and as feature pyramids."""
import copy
import io
import math

import pytest
import timm
import torch
from timm.models import _manipulate
from tiny_swin import SMALL, blocks, make, ropes, same

import timm_rope
from timm_rope.encodings import ENCODINGS, RotaryEncoding
from timm_rope.models.window_attention import RopeWindowAttention

# -- training

def test_gradients_reach_every_block():
    for encoding in (name for name in timm_rope.list_ropes() if ENCODINGS[name].learned):
        model = make(encoding, rel_pos_bias=True).train()
        model(torch.randn(2, 3, 32, 32)).square().sum().backward()
        assert all(rope.freqs.grad.abs().max() > 0 for rope in ropes(model)), encoding
        assert all(p.grad is not None for p in model.parameters())
        freqs = {f'layers.{i}.blocks.{j}.attn.rope.freqs' for i in (0, 1) for j in (0, 1)}
        tables = {name.replace('rope.freqs', 'relative_position_bias_table') for name in freqs}
        assert model.no_weight_decay() == freqs | tables
    assert make('axial').no_weight_decay() == set()
    assert torch.jit.script(make()).no_weight_decay() == freqs


def test_frequencies_are_initialised_apart_and_decay_with_their_block():
    model = make(depths=(2, 3))
    assert len({tuple(rope.freqs[0, 0, 0].tolist()) for rope in ropes(model)}) == 5
    layers = {name: timm.models.group_parameters(model, model.group_matcher(), reverse=True)[name]
              for name, _ in model.named_parameters()}
    for i, j in ((0, 0), (0, 1), (1, 2)):
        block = f'layers.{i}.blocks.{j}.attn'
        assert layers[f'{block}.rope.freqs'] == layers[f'{block}.qkv.weight']
    assert layers['layers.0.blocks.0.attn.rope.freqs'] < layers['layers.1.blocks.2.attn.rope.freqs']


def test_checkpointing_changes_no_gradient():
    grads = []
    for enable in (False, True):
        model = make().train()
        model.set_grad_checkpointing(enable)
        torch.manual_seed(0)
        model(torch.randn(2, 3, 32, 32)).square().sum().backward()
        grads.append([p.grad for p in model.parameters()])
    torch.testing.assert_close(*grads)


def test_a_changed_frequency_is_seen_in_eval():
    model = make()
    x = torch.randn(1, 3, 32, 32)
    with torch.no_grad():
        before = model(x)
        for rope in ropes(model):
            rope.freqs.add_(0.5)
        assert not torch.allclose(model(x), before, atol=1e-3)
        for rope in ropes(model):
            rope.freqs.sub_(0.5)
        torch.testing.assert_close(model(x), before)


# -- forms of the model

@pytest.mark.parametrize('encoding', ['mixed', 'spherical', 'none'])
def test_copies_scripts_and_graphs(encoding):
    model = make(encoding, rel_pos_bias=encoding != 'spherical', window_rule='naver')
    x = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        expected = model(x)
        buffer = io.BytesIO()
        torch.save(model, buffer)
        buffer.seek(0)
        forms = dict(
            copy=copy.deepcopy(model), pickle=torch.load(buffer, weights_only=False), script=torch.jit.script(model),
            export=torch.export.export(model, (x,)).module())
        if encoding == 'mixed':  # half of the time of this test
            forms['compile'] = torch.compile(model, backend='eager', fullgraph=True)
        for name, form in forms.items():
            torch.testing.assert_close(form(x), expected, msg=name)
    rotary = [module for module in model.modules() if isinstance(module, RotaryEncoding)]
    assert len({id(rope) for rope in rotary}) == len(rotary) == (0 if encoding == 'none' else 4)
    owners = [id(child) for module in model.modules() for child in module.children()]
    assert len(owners) == len(set(owners)), 'no module has two owners'


def make_empty(bias):
    """A model whose memory holds no values yet."""
    model = make('spherical', rel_pos_bias=bias, device='meta').to_empty(device='cpu')
    for value in (*model.parameters(), *model.buffers()):
        value.data.fill_(math.nan if value.is_floating_point() else 0)
    return model


@pytest.mark.skipif(not hasattr(_manipulate, 'reinit_non_persistent_buffers'), reason='since timm 1.0.23')
@pytest.mark.parametrize('bias', [False, True])
def test_empty_memory_is_loaded(bias):
    model, other = make('spherical', rel_pos_bias=bias), make_empty(bias)
    other.load_state_dict(model.state_dict())
    _manipulate.reinit_non_persistent_buffers(other)
    assert same(model, other)


@pytest.mark.parametrize('bias', [False, True])
def test_empty_memory_is_initialised(bias):
    model, other = make('spherical', rel_pos_bias=bias), make_empty(bias)
    other.init_weights()
    assert all(torch.isfinite(value).all() for value in (*other.parameters(), *other.buffers()))
    assert not same(model, other) and other.rope.reference_grid.tolist() == [4, 4]


@pytest.mark.parametrize('bias', [False, True])
def test_window_attention_alone(bias):
    built = blocks(make(rel_pos_bias=bias, window_size=(2, 4), qkv_bias=False))[3].attn
    rope = timm_rope.create_rope('mixed', 32, 2, 1, (2, 4))
    alone = RopeWindowAttention(64, 2, rope, bias, window_size=(2, 4), qkv_bias=False)
    alone.load_state_dict(built.state_dict())
    x = torch.randn(3, 8, 64)
    with torch.no_grad():
        assert torch.equal(alone(x), built(x))
        alone.set_window_size((4, 4))
        assert alone(torch.randn(3, 16, 64)).shape == (3, 16, 64)


def test_a_traced_graph_computes_from_its_frequencies():
    model = make()
    graph = torch.fx.symbolic_trace(model)
    x = torch.randn(1, 3, 32, 32)
    with torch.no_grad():
        torch.testing.assert_close(graph(x), model(x))
        for form in (graph, model):
            for name, value in form.named_parameters():
                if name.endswith('rope.freqs'):
                    value.copy_(torch.linspace(-1, 1, value.numel()).view_as(value))
        torch.testing.assert_close(graph(x), model(x))
    graph(x).sum().backward()
    assert all(p.grad is not None for p in graph.parameters())


def test_low_precision_keeps_frequencies_and_payloads():
    model = make(rel_pos_bias=True).bfloat16()
    assert {rope.freqs.dtype for rope in ropes(model)} == {torch.float32}
    assert {p.dtype for n, p in model.named_parameters() if 'rope' not in n} == {torch.bfloat16}
    assert model(torch.randn(1, 3, 32, 32).bfloat16()).dtype == torch.bfloat16
    assert ropes(make('spherical', dtype=torch.bfloat16))[0].freqs.dtype == torch.float32


@pytest.mark.parametrize('getter', [False, True])
def test_feature_pyramids(getter):
    kwargs = dict(feature_cls='getter') if getter else {}
    features = timm.create_model('swin_tiny_rope_mixed', features_only=True, **SMALL, **kwargs).eval()
    assert features.feature_info.channels() == [32, 64] and features.feature_info.reduction() == [4, 8]
    x = torch.randn(2, 3, 32, 32)
    model = timm.create_model('swin_tiny_rope_mixed', **SMALL).eval()
    inner = getattr(features, 'model', None)
    if inner is None:
        model.load_state_dict({
            key.replace('layers_', 'layers.'): value for key, value in features.state_dict().items()}, strict=False)
    else:
        model.load_state_dict(inner.state_dict(), strict=False)
    with torch.no_grad():
        pyramid = features(x)
        expected = model.forward_intermediates(x, intermediates_only=True)
    if not getter:  # timm's list of a Swin is NHWC
        pyramid = [feature.permute(0, 3, 1, 2) for feature in pyramid]
    torch.testing.assert_close(pyramid, expected)
    assert [tuple(feature.shape) for feature in pyramid] == [(2, 32, 8, 8), (2, 64, 4, 4)]
