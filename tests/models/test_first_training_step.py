"""The reference grid of a model without weights is that of its first training step."""
import copy
import logging

import pytest
import timm
import torch
from timm.layers import HybridEmbed
from timm.utils import ModelEma, ModelEmaV3
from tiny import TINY, make
from torch import nn

import timm_rope

NAMES = ['vit_tiny_rope_spherical', 'vit_tiny_rope_uniform', 'vit_tiny_rope_liere', 'vit_tiny_rope_mixed_ape']


def images(side=48, other=None):
    torch.manual_seed(1)
    return torch.randn(2, 3, side, other or side)


def train(model, x):
    model.train()
    model(x).square().sum().backward()
    return model.eval()


@pytest.mark.parametrize('name', NAMES)
def test_without_img_size_as_with_it(name):
    forgotten, told = make(name, img_size=224), make(name, img_size=48)
    if forgotten.pos_embed is None:
        assert not torch.equal(forgotten(images()), told(images())) or name.endswith('mixed')
        forgotten.load_state_dict({k: v for k, v in told.state_dict().items() if 'rope' not in k}, strict=False)
        if told.rope.learned:
            forgotten.rope.freqs.data.copy_(told.rope.freqs)
        a, b = train(forgotten, images()), train(told, images())
        assert torch.equal(a(images()), b(images()))
        for p, q in zip(a.parameters(), b.parameters()):
            assert torch.equal(p.grad, q.grad)
    else:
        train(forgotten, images())
    assert forgotten.rope.reference_grid.tolist() == [6, 6]
    assert forgotten.state_dict()['rope.reference_grid'].tolist() == [6, 6]


def test_it_is_said_once(caplog):
    model = make('vit_tiny_rope_spherical')
    with caplog.at_level(logging.INFO, 'timm_rope'):
        train(train(train(model, images(48, 56)), images(64)), images(32))
    assert model.rope.reference_grid.tolist() == [6, 7]
    assert caplog.text.count('The reference grid is now 6 x 7 patches') == 1 and 'instead of 4 x 4' in caplog.text


@pytest.mark.parametrize('step', ['evaluation', 'no gradients', 'inference', 'frozen in evaluation'])
def test_what_is_no_training_step(step):
    model = make('vit_tiny_rope_spherical')
    if step == 'evaluation':
        model(images()).sum().backward()
    elif step == 'no gradients':
        with torch.no_grad():
            model.train()(images())
    elif step == 'inference':
        with torch.inference_mode():
            model.train()(images())
    else:
        model.rope.eval()
        model(images())
    assert model.rope.reference_grid.tolist() == [4, 4] and model.rope.undecided


@pytest.mark.parametrize('what', ['argument', 'weights', 'weights, other head', 'scripted'])
def test_what_settles_it_before(what):
    model = make('vit_tiny_rope_spherical', **(dict(rope_reference_grid=(5, 5)) if what == 'argument' else {}))
    expected = [5, 5] if what == 'argument' else [8, 8]
    if what != 'argument':
        saved = make('vit_tiny_rope_spherical', img_size=64).state_dict()
        if what == 'weights, other head':
            saved = {k: v for k, v in saved.items() if not k.startswith('head')}
        model.load_state_dict(saved, strict=what == 'weights')
    if what == 'scripted':
        torch.jit.script(model).train()(images())
    assert train(model, images()).rope.reference_grid.tolist() == expected


def test_a_new_input_size_before_training():
    model = make('vit_tiny_rope_spherical')
    model.set_input_size(96)
    assert model.rope.reference_grid.tolist() == [12, 12]
    assert torch.equal(model(images()), make('vit_tiny_rope_spherical', img_size=96)(images()))
    train(model, images())
    model.set_input_size(96)
    assert model.rope.reference_grid.tolist() == [6, 6], 'now it belongs to the weights'


@pytest.mark.parametrize('average', [lambda m: ModelEma(m, 0.99), lambda m: ModelEmaV3(m, 0.99)])
@pytest.mark.parametrize('updates', [0, 1, 5])
def test_a_moving_average_that_began_before(average, updates):
    model = make('vit_tiny_rope_spherical')
    ema = average(model)
    train(model, images())
    for _ in range(updates):
        ema.update(model)
    averaged = ema.ema if hasattr(ema, 'ema') else ema.module
    assert torch.allclose(averaged(images(64)), model(images(64)), atol=1e-4)
    other = make('vit_tiny_rope_spherical')
    other.load_state_dict(averaged.state_dict())
    assert other.rope.reference_grid.tolist() == [6, 6]


def test_copies_that_are_trained_themselves_decide_themselves():
    model = make('vit_tiny_rope_spherical')
    other = copy.deepcopy(model)
    train(model, images(48))
    train(other, images(64))
    assert [m.rope.reference_grid.tolist() for m in (model, other)] == [[6, 6], [8, 8]]


@pytest.mark.slow
@pytest.mark.parametrize('name', NAMES[:2])
def test_compiled_whole(name):
    model, plain = make(name), make(name)
    compiled = torch.compile(model, fullgraph=True, backend='aot_eager')
    for x in (images(48), images(64), images(48)):
        model.train(), plain.train()
        assert torch.allclose(compiled(x), plain(x), atol=1e-4)
    assert model.rope.reference_grid.tolist() == [6, 6] and not model.rope.undecided


def test_a_recorded_graph_decides_nothing():
    model = make('vit_tiny_rope_spherical').train()
    torch.export.export(model, (images(),))
    torch.fx.symbolic_trace(model)
    assert model.rope.undecided and model.rope.reference_grid.tolist() == [4, 4]


def test_a_data_parallel_replica_tells_the_model():
    model = make('vit_tiny_rope_spherical').train()
    replica = model.rope._replicate_for_data_parallel()
    for key, value in model.rope._buffers.items():
        replica._buffers[key] = value.clone()
    replica((6, 6))
    assert model.state_dict()['rope.reference_grid'].tolist() == [6, 6]


class OverlappingStem(nn.Module):
    """7 x 7 patches at a stride of 4, as in many hybrid models."""

    def __init__(self, img_size=224, patch_size=16, in_chans=3, embed_dim=24, **kwargs):
        super().__init__()
        self.img_size, self.patch_size, self.grid_size = img_size, (4, 4), (img_size[0] // 4, img_size[1] // 4)
        self.num_patches = self.grid_size[0] * self.grid_size[1]
        self.proj = nn.Conv2d(in_chans, embed_dim, 7, 4, 3)

    def forward(self, x):
        return self.proj(x).permute(0, 2, 3, 1)


def hybrid(img_size, patch_size, in_chans, embed_dim, **kwargs):
    backbone = nn.Conv2d(in_chans, 8, 3, 4, 1)
    backbone.num_features = 8
    return HybridEmbed(
        backbone, img_size, 1, (8, 8), 4, in_chans, embed_dim, flatten=False, output_fmt='NHWC', strict_img_size=False)


@pytest.mark.parametrize('stem,expected', [(OverlappingStem, [8, 8]), (hybrid, [8, 8])])
def test_the_grid_of_another_stem(stem, expected):
    model = timm.create_model('vit_tiny_rope_spherical', **{**TINY, 'embed_layer': stem})
    assert model.rope.reference_grid.tolist() == expected
    assert model(images(32)).shape == (2, 5)


def test_an_encoding_alone_keeps_what_it_was_given():
    rope = timm_rope.create_rope('spherical', 16, 2, 2, (3, 4)).train()
    rope((5, 6))
    assert rope.reference_grid.tolist() == [3, 4] and not rope.undecided
    rope.set_reference_grid((5, 6))
    assert rope.reference_grid.tolist() == [5, 6]
    with pytest.raises(ValueError, match='grid must be two positive integers'):
        rope.set_reference_grid((0, 6))
