"""Blocks that somebody else runs, as `model.blocks(tokens)`."""
import copy
import pickle

import pytest
import torch
from naflex_batch import batch_of, images_of
from timm.models import checkpoint_seq
from tiny import make

NAMES = ['vit_tiny_rope_spherical', 'vit_tiny_rope_mixed_ape', 'vit_tiny_rope_liere', 'vit_tiny_ape']


def tokens_of(model, x):
    return model.norm_pre(model.pos_drop(model._pos_embed(model.patch_embed(x))))


def finish(model, x):
    return model.forward_head(model.norm(x))


@pytest.mark.parametrize('name', NAMES)
def test_a_full_set_of_tokens_just_works(name):
    model = make(name)
    x = torch.randn(2, 3, 32, 32)
    expected = make(name)(x)
    assert torch.equal(finish(model, model.blocks(tokens_of(model, x))), expected)
    one_by_one = tokens_of(model, x)
    for block in model.blocks:
        one_by_one = block(one_by_one)
    assert torch.equal(finish(model, one_by_one), expected)


@pytest.mark.parametrize('size', [(48, 32), (16, 64)])
def test_the_grid_seen_last(size):
    model = make('vit_tiny_rope_spherical')
    x = torch.randn(1, 3, *size)
    expected = model(x)
    assert torch.equal(finish(model, model.blocks(tokens_of(model, x))), expected)


@pytest.mark.parametrize('ask', [
    lambda model: model.rope((8, 8), 1), lambda model: model.rope_payloads((8, 8)),
    lambda model: model(batch_of(images_of([(4, 4), (3, 7)]))),  # looked up in the payloads of 8 x 8
], ids=['grid', 'payloads', 'patches'])
@torch.no_grad()
def test_grids_that_no_image_had_are_not_taken(ask):
    """The nominal grid has as many patches as the one that somebody asks the encoding for."""
    model = make('vit_tiny_rope_mixed', img_size=(16, 256), use_naflex=True)
    tokens = torch.randn(1, 65, 24)
    expected = model.blocks(tokens)
    ask(model)
    assert torch.equal(model.blocks(tokens), expected)


def test_other_tokens_are_refused_with_what_to_do():
    model = make('vit_tiny_rope_spherical')
    tokens, kept = tokens_of(model, torch.randn(2, 3, 32, 32)), torch.tensor([0, 1, 5, 7, 16])
    with pytest.raises(ValueError, match=r'1 \+ 4 x 4, got 5.*payload=model\.rope\(\(rows, columns\), 1\)\[0\]'):
        model.blocks(tokens[:, kept])
    payloads = model.rope((4, 4), 1)
    out = tokens[:, kept]
    for block, payload in zip(model.blocks, payloads):
        out = block(out, payload=payload[:, kept])
    assert out.shape == (2, 5, 24)


def test_gradients_reach_the_frequencies():
    model = make('vit_tiny_rope_mixed').train()
    x = torch.randn(2, 3, 32, 32)
    model(x).square().sum().backward()
    expected = model.rope.freqs.grad.clone()
    model.zero_grad()
    finish(model, model.blocks(tokens_of(model, x))).square().sum().backward()
    assert torch.allclose(model.rope.freqs.grad, expected, atol=1e-5)


@pytest.mark.parametrize('copied', [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_a_copy_has_blocks_of_its_own(copied):
    model = make('vit_tiny_rope_mixed')
    other = copied(model)
    assert all(block.attn.positions.model is other for block in other.blocks)
    with torch.no_grad():
        model.rope.freqs.mul_(3)
    x = torch.randn(1, 3, 32, 32)
    assert torch.equal(finish(other, other.blocks(tokens_of(other, x))), other(x))
    block = copy.deepcopy(model.blocks[0])
    assert block.attn.positions.model is model


@pytest.mark.parametrize('size', [(48, 48), (24, 40)])
def test_the_grid_of_the_image_that_was_embedded_last(size):
    model, x = make('vit_tiny_rope_spherical'), torch.randn(1, 3, *size)
    model(torch.randn(1, 3, *size[::-1]))
    assert torch.equal(finish(model, model.blocks(tokens_of(model, x))), make('vit_tiny_rope_spherical')(x))


def test_kept_patches_are_not_taken_for_a_smaller_image():
    model = make('vit_tiny_rope_spherical')
    model(torch.randn(1, 3, 32, 32))
    tokens = tokens_of(model, torch.randn(1, 3, 64, 64))
    with pytest.raises(ValueError, match=r'1 \+ 8 x 8, got 17.*rope_payloads'):
        model.blocks(tokens[:, :17])


def test_blocks_of_large_crops_are_run_again_after_small_ones():
    torch.manual_seed(0)
    gradients, crops = [], [torch.randn(2, 3, size, size) for size in (48, 16)]
    for run in (lambda model, t: model.blocks(t), lambda model, t: checkpoint_seq(model.blocks, t), None):
        model = make('vit_tiny_rope_mixed').train()
        outs = [model(x) if run is None else finish(model, run(model, tokens_of(model, x))) for x in crops]
        sum(out.square().sum() for out in outs).backward()
        gradients.append([p.grad for p in model.parameters()])
    for other in gradients[:-1]:
        assert all(torch.allclose(a, b, rtol=1e-4, atol=1e-5) for a, b in zip(other, gradients[-1]))


def test_a_compiled_graph_does_not_take_the_grid_of_an_older_image():
    torch._dynamo.reset()
    model, x = make('vit_tiny_rope_spherical'), torch.randn(1, 3, 32, 32)
    expected = model(x)
    model(torch.randn(1, 3, 16, 64))
    run = torch.compile(lambda x: finish(model, model.blocks(tokens_of(model, x))), backend='aot_eager', fullgraph=True)
    assert torch.allclose(run(x), expected, atol=1e-5)


def test_a_new_nominal_size_forgets_the_images_before():
    model = make('vit_tiny_rope_spherical')
    model(torch.randn(1, 3, 64, 64))
    model.set_input_size((16, 32))
    tokens = torch.randn(1, 1 + 2 * 4, 24)
    expected = tokens
    for block, payload in zip(model.blocks, model.rope_payloads((2, 4))):
        expected = block(expected, payload=payload)
    assert torch.equal(model.blocks(tokens), expected)
