"""Some of the patches of an image, or points anywhere, through the blocks of a model."""
import math

import pytest
import timm
import torch
from masked_autoencoder import MaskedAutoencoder
from tiny import make

import timm_rope

NAMES = ['vit_tiny_rope_spherical', 'vit_tiny_rope_mixed', 'vit_tiny_rope_liere', 'vit_tiny_rope_axial_ape',
         'vit_tiny_ape']
CROP = torch.arange(6 * 8).reshape(6, 8)[2:6, 3:7].flatten()  # 4 x 4 patches out of 6 x 8


def through_blocks(model, tokens, payloads):
    for block, payload in zip(model.blocks, payloads):
        tokens = block(tokens, payload=payload)
    return model.norm(tokens)


def embedded(model, x):
    return model._pos_embed(model.patch_embed(x))


@pytest.mark.parametrize('name', NAMES)
def test_patches_keep_their_places_in_any_order(name):
    model, x = make(name, reg_tokens=1), torch.randn(2, 3, 32, 48)
    tokens, expected = embedded(model, x), model.forward_features(x)
    order = torch.stack([torch.randperm(24), torch.randperm(24)])
    index = torch.cat((torch.arange(2).expand(2, -1), order + 2), dim=1)
    for where, keep in ((index[:1].expand(2, -1), order[0]), (index, order)):
        where = where.unsqueeze(-1).expand(-1, -1, 24)
        out = through_blocks(model, tokens.gather(1, where), model.rope_payloads((4, 6), keep))
        assert torch.allclose(out, expected.gather(1, where), atol=1e-5)
    assert torch.allclose(through_blocks(model, tokens, model.rope_payloads((4, 6))), expected, atol=1e-6)


@pytest.mark.parametrize('name', NAMES[:-1])
def test_kept_patches_have_the_payloads_of_their_places(name):
    model, keep = make(name), torch.tensor([[3, 17, 4], [0, 23, 11]])
    places = torch.stack((keep // 6, keep % 6), dim=-1)
    for a, b, c in zip(
            model.rope_payloads((4, 6), keep), model.rope.at(places, 1, (4, 6)), model.rope_payloads((4, 6), keep[1])):
        assert a.shape == b.shape and a.shape[0] == 2 and torch.allclose(a, b, atol=5e-6)
        assert torch.equal(a[1], c)
    assert all(payload is None for payload in make('vit_tiny_ape').rope_payloads((4, 6), keep))


@pytest.mark.parametrize('encoding', timm_rope.list_ropes())
def test_a_crop_is_where_it_is_in_the_whole(encoding):
    # no prefix tokens: they do not turn, and so see where the crop is
    model = make(f'vit_tiny_rope_{encoding}', class_token=False, global_pool='avg', embed_dim=32)
    x = torch.randn(2, 3, 48, 64)
    crop = x[..., 16:48, 24:56]
    alone = model.forward_features(crop)
    if model.rope.relative == 'last':  # a crop of all rows
        of_columns = model.rope.at(torch.cartesian_prod(torch.arange(4), torch.arange(3, 7)), 0, (4, 8))
        assert torch.allclose(through_blocks(model, embedded(model, crop), of_columns), alone, atol=1e-5)
    if model.rope.relative != 'xy':
        of_both = through_blocks(model, embedded(model, crop), model.rope_payloads((6, 8), CROP))
        assert (of_both - alone).abs().max() > 1e-3
        return
    places = torch.cartesian_prod(torch.arange(2, 6), torch.arange(3, 7))
    for payloads in (model.rope_payloads((6, 8), CROP), model.rope.at(places, 0, (6, 8)), model.rope.at(places)):
        assert torch.allclose(through_blocks(model, embedded(model, crop), payloads), alone, atol=1e-5)
    moved = model.rope.at(places * torch.tensor([1, 2]))
    assert (through_blocks(model, embedded(model, crop), moved) - alone).abs().max() > 1e-3


@pytest.mark.parametrize('encoding', timm_rope.list_ropes())
def test_images_of_two_shapes_in_one_batch(encoding):
    model, grids = make(f'vit_tiny_rope_{encoding}', embed_dim=32), [(3, 6), (5, 4)]
    images = [torch.randn(1, 3, 8 * rows, 8 * columns) for rows, columns in grids]
    places = [torch.cartesian_prod(torch.arange(rows), torch.arange(columns)) for rows, columns in grids]
    if model.rope.coords == 'cells' and model.rope.centered:  # the middle of each is that of the reference grid
        places = [p - (torch.tensor(grid) - torch.tensor([4, 4])) / 2 for p, grid in zip(places, grids)]
    padded = [torch.nn.utils.rnn.pad_sequence(parts, batch_first=True) for parts in (
        places, [embedded(model, image)[0] for image in images])]
    mask = torch.tensor([[True] * 19 + [False] * 2, [True] * 21])[:, None, None]
    tokens = padded[1]
    for block, payload in zip(model.blocks, model.rope.at(padded[0], 1)):
        tokens = block(tokens, attn_mask=mask, payload=payload)
    for image, out, count in zip(images, model.norm(tokens), (19, 21)):
        assert torch.allclose(out[:count], model.forward_features(image)[0], atol=1e-5)


def test_in_a_compiled_graph():
    torch._dynamo.reset()
    model = make('vit_tiny_rope_mixed')
    compiled = torch.compile(lambda keep: model.rope_payloads((4, 6), keep), backend='aot_eager', fullgraph=True)
    keep = torch.tensor([[3, 17, 4], [0, 23, 11]])
    for a, b in zip(compiled(keep), model.rope_payloads((4, 6), keep)):
        assert torch.allclose(a, b, atol=1e-6)


@pytest.mark.parametrize('keep,error,words', [
    ([0, 1], TypeError, 'keep must be a tensor of integers.*got list'),
    (torch.ones(24, dtype=torch.bool), TypeError, 'got torch.bool'),
    (torch.zeros(1, 1, 1, dtype=torch.long), ValueError, r'keep must be \(K,\) or \(batch, K\), got \(1, 1, 1\)'),
    (torch.tensor([0, 24]), ValueError, 'from 0 to 23, the patches of 4 x 6, got 0 to 24'),
    (torch.tensor([[-1, 3]]), ValueError, 'got -1 to 3'),
])
def test_bad_patches(keep, error, words):
    with pytest.raises(error, match=words):
        make().rope_payloads((4, 6), keep)


def test_what_the_error_of_a_block_advises_works():
    model, keep = make(), torch.tensor([1, 5, 7])
    tokens = torch.randn(2, 4, 24)
    with pytest.raises(ValueError, match=r'model\.rope_payloads\(\(rows, columns\), keep=\.\.\.\)\[2\]'):
        model.blocks[2](tokens)
    assert model.blocks[2](tokens, payload=model.rope_payloads((4, 4), keep=keep)[2]).shape == tokens.shape


# -- the example

def waves(count, side=48):
    """Images of a plane wave each, whose hidden parts follow from the visible ones."""
    y, x = torch.meshgrid(torch.arange(side), torch.arange(side), indexing='ij')
    direction, length, phase = 2 * math.pi * torch.rand(3, count, 1, 1)
    turns = (0.05 + length / 60) * (x * direction.cos() + y * direction.sin()) + phase
    return turns.cos().unsqueeze(1).expand(-1, 3, -1, -1)


@pytest.mark.parametrize('name', ['vit_tiny_rope_axial', 'vit_tiny_rope_mixed', 'vit_tiny_rope_spherical_learned'])
def test_a_masked_autoencoder_learns(name):
    torch.manual_seed(0)
    options = dict(img_size=48, patch_size=8, num_heads=2, num_classes=0, init_values=None)
    model = MaskedAutoencoder(
        timm.create_model(name, embed_dim=48, depth=2, **options),
        timm.create_model('vit_tiny_rope_axial', embed_dim=32, depth=1, **options))
    optimizer, losses = torch.optim.AdamW(model.parameters(), lr=4e-3), []
    for _ in range(60):
        loss = model(waves(32))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert sum(losses[-5:]) < 0.5 * sum(losses[:5])
    if model.encoder.rope.learned:
        assert model.encoder.rope.freqs.grad.abs().max() > 0
