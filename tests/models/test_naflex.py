"""Images of several shapes in one batch of timm's NaFlex loader: each gives what it gives alone."""
import copy
import importlib
import pickle

import oracle
import pytest
import timm
import torch
from naflex_batch import SHAPES, batch_of, images_of
from tiny import TINY, make
from torch import nn
from torch.nn.utils import prune

import timm_rope
from timm_rope._timm import save_for_hf
from timm_rope.models.naflex import RopeNaFlexVit
from timm_rope.models.patch_embed import GridPatchEmbed
from timm_rope.models.vit import RopeVisionTransformer

ENCODINGS = timm_rope.list_ropes()
NAMES = ['vit_tiny_rope_spherical_learned', 'vit_tiny_rope_mixed_ape', 'vit_tiny_rope_liere', 'vit_tiny_ape']


def pair(name='vit_tiny_rope_mixed', **kwargs):
    """A plain model and the NaFlex model of the same weights."""
    plain, naflex = make(name, **kwargs), make(name, use_naflex=True, **kwargs)
    assert type(plain) is RopeVisionTransformer and type(naflex) is RopeNaFlexVit
    assert naflex.load_state_dict(plain.state_dict(), strict=True)
    return plain, naflex


def alone(model, images):
    return torch.cat([model(image[None]) for image in images])


# -- equality with the plain model

@pytest.mark.parametrize('ape', ['', '_ape'])
@pytest.mark.parametrize('encoding', ENCODINGS)
def test_an_image_gives_what_it_gives_alone(encoding, ape):
    plain, naflex = pair(f'vit_tiny_rope_{encoding}{ape}', embed_dim=32, reg_tokens=1)
    images = images_of()
    expected = alone(plain, images)
    assert (expected[0] - expected[1]).abs().max() > 1e-2
    assert torch.allclose(naflex(batch_of(images)), expected, atol=1e-5)
    # on a full grid too, as patches and as an image, though not all of its neighbours are whole
    square = torch.stack([images[0], images[0].flip(1)])
    for x in (batch_of(square, 16), batch_of(square, 20), square):
        assert torch.allclose(naflex(x), plain(square), atol=1e-5)


@pytest.mark.parametrize('name', NAMES)
def test_images_of_one_shape_share_their_payload(name, monkeypatch):
    """So that one image, or a batch sorted by shape, turns as fast as in the plain model."""
    plain, naflex = pair(name, global_pool='avg')
    seen, attend = [], naflex.blocks[0].attn.forward
    monkeypatch.setattr(naflex.blocks[0].attn, 'forward', lambda *args: seen.append(args[3]) or attend(*args))
    images = images_of([(3, 7)] * 2)
    cut = {key: value[:, :20] for key, value in batch_of(images).items() if key != 'seq_len'}  # as a loader cuts them
    behind = {key: value.roll(1, dims=1) for key, value in batch_of(images).items() if key != 'seq_len'}
    for batch, axes in ((batch_of(images, 21), 3), (batch_of(images), 3), (batch_of(images[:1], 30), 3), (behind, 4)):
        seen.clear()
        assert torch.allclose(naflex(batch), alone(plain, images)[:len(batch['patches'])], atol=1e-5)
        assert seen[0] is None or seen[0].ndim == axes
    assert torch.allclose(naflex(cut), naflex({**behind, 'patch_valid': behind['patch_valid'] & (
        torch.arange(22) < 21)}), atol=1e-5)


@pytest.mark.parametrize('kwargs', [
    dict(global_pool='avg'), dict(global_pool='avgmax', reg_tokens=2), dict(global_pool='max', class_token=False),
    dict(global_pool='map'), dict(global_pool='map', pool_include_prefix=True),
    dict(global_pool='avg', pool_include_prefix=True), dict(class_token=False, global_pool='avg'),
    dict(no_embed_class=False, pos_embed='learn', reg_tokens=1), dict(qk_norm=True), dict(norm_layer='spiral_rms'),
    dict(patch_size=(8, 16)),
], ids=str)
def test_pools_and_tokens(kwargs):
    plain, naflex = pair('vit_tiny_rope_spherical', **kwargs)
    size = kwargs.get('patch_size', 8)
    images = images_of([(4, 4), (3, 6), (2, 8)])
    assert torch.allclose(naflex(batch_of(images, 20, size)), alone(plain, images), atol=1e-5)


def test_places_count_and_not_their_order():
    plain, naflex = pair('vit_tiny_rope_spherical_ape')
    batch = batch_of(images_of())
    order = torch.stack([torch.randperm(22) for _ in SHAPES])
    shuffled = {key: torch.stack([row[o] for row, o in zip(batch[key], order)]) for key in (
        'patches', 'patch_coord', 'patch_valid')}
    assert torch.allclose(naflex(shuffled), naflex(batch), atol=1e-5)
    # the same keys without a dictionary, and without padding
    assert torch.equal(naflex(
        batch['patches'], patch_coord=batch['patch_coord'], patch_valid=batch['patch_valid']), naflex(batch))
    whole = batch_of(images_of([(3, 4)]), 12)
    assert torch.equal(naflex(whole['patches'], patch_coord=whole['patch_coord']), naflex(whole))
    small = batch['patch_coord'].clamp(0, 99)
    for dtype in (torch.int32, torch.int8, torch.uint8):
        assert torch.equal(naflex({**batch, 'patch_coord': small.to(dtype)}), naflex(batch))


@pytest.mark.parametrize('encoding,options', [
    ('mixed', dict(coords='cells')), ('mixed', dict(coords='ends')), ('spiral', dict(clamp=True)),
    ('liere', dict(coords='ends')), ('spherical', dict(coords='index')), ('comrope', dict(block=4)),
    ('comrope', dict(offset=-.5)), ('comrope', dict(offset=.3, coords='index')),
    ('axial', dict(offset=1., coords='eva')),
    ('axial_learned', dict(share_layers=True, share_heads=True)),
], ids=str)
def test_options_of_encodings(encoding, options):
    plain, naflex = pair(
        f'vit_tiny_rope_{encoding}', embed_dim=32, **{f'rope_{key}': value for key, value in options.items()})
    images = images_of()
    assert torch.allclose(naflex(batch_of(images)), alone(plain, images), atol=1e-5)


@pytest.mark.parametrize('encoding', timm_rope.list_ropes())
@pytest.mark.parametrize('usage', [
    dict(rope_scaling='interpolate'), dict(rope_scaling='ntk'), dict(rope_scaling='yarn'), dict(rope_log_n=True),
    dict(rope_scaling='interpolate', rope_log_n=True)], ids=str)
def test_rules_go_by_the_grid_of_each_image(encoding, usage):
    if usage.get('rope_scaling') not in (None, *timm_rope.encodings.ENCODINGS[encoding].scalings):
        pytest.skip('the encoding has no such rule')
    plain, naflex = pair(f'vit_tiny_rope_{encoding}', rope_reference_grid=(3, 3), **usage)
    images = images_of()
    batch = batch_of(images)
    assert torch.allclose(naflex(batch), alone(plain, images), atol=1e-5)
    assert (make(f'vit_tiny_rope_{encoding}', rope_reference_grid=(3, 3), use_naflex=True)(batch)
            - naflex(batch)).abs().max() > 1e-3


@pytest.mark.parametrize('encoding', ['mixed', 'spherical'])
def test_a_rule_in_the_formula(encoding):
    rope = timm_rope.create_rope(encoding, 12, 2, 1, (3, 4), dtype=torch.float64).eval()
    rope.set_scaling('interpolate')
    grids = [(2, 5), (6, 2)]
    tables, places = rope.of_grids(grids, 1)
    x = torch.randn(2, 12, dtype=torch.float64)
    for grid, (start, step) in zip(grids, places):
        s = [max(grid[0] / 3, 1.), max(grid[1] / 4, 1.)]
        for row, column in ((1, 1), (grid[0] - 1, 0), (0, grid[1] - 1)):
            # where it lies in the image once that is squeezed into the size of training
            place = [(row + .5) / s[0] - .5, (column + .5) / s[1] - .5]
            extent = tuple(side / grown for side, grown in zip(grid, s))
            matrices = oracle.rotations_at(rope, torch.tensor([place], dtype=torch.float64).numpy(), extent, 0, 1)
            payload = tables[0][:, start + row * step + column]
            turned = rope.rotation(x[None, :, None], payload[:, None])[0, 1, 0]
            assert torch.allclose(turned, torch.as_tensor(oracle.rotate(x[1:].numpy(), matrices)[0]), atol=1e-9)


# -- padding

@pytest.mark.parametrize('name', NAMES)
def test_padding_has_no_influence(name):
    model = make(name, use_naflex=True, global_pool='avg')
    images = images_of()
    batch = batch_of(images)
    batch['patches'].requires_grad_()
    out = model(batch)
    assert torch.allclose(out, model(batch_of(images, 30, fill=1e4)), atol=1e-5)
    out.square().sum().backward()
    grad = batch['patches'].grad
    assert grad[batch['patch_valid']].abs().max() > 0 and torch.isfinite(grad).all()
    assert grad[~batch['patch_valid']].abs().max() == 0


@pytest.mark.parametrize('fused', [True, False])
def test_a_mask_of_the_caller(fused):
    model = make(use_naflex=True)
    for block in model.blocks:
        block.attn.fused_attn = fused
    batch, images = batch_of(images_of()), images_of()
    assert torch.allclose(model(batch), alone(make(), images), atol=1e-5)
    seen = batch['patch_valid'].clone()
    seen[0, 8:] = False  # the last two rows of the first image
    mask = torch.cat((seen.new_ones(4, 1), seen), dim=1)[:, None, None]
    expected = alone(make(), [images[0][:, :16]])
    for out in (model({**batch, 'attn_mask': mask}), model(batch, attn_mask=mask)):
        assert torch.allclose(out[1:], model(batch)[1:], atol=1e-6)
        assert torch.allclose(out[0], expected[0], atol=1e-5)


# -- training

@pytest.mark.parametrize('name', [n for n in NAMES if n != 'vit_tiny_ape'])
def test_gradients_are_those_of_the_images_alone(name):
    plain, naflex = pair(name, rope_reference_grid=(4, 4))
    images = images_of()
    for model in (plain, naflex):
        model.train()
    naflex(batch_of(images)).square().sum().backward()
    alone(plain, images).square().sum().backward()
    for (key, a), b in zip(naflex.named_parameters(), plain.parameters()):
        assert torch.isfinite(a.grad).all()
        assert torch.allclose(a.grad, b.grad, atol=2e-4 * max(1., float(b.grad.abs().max()))), key
    assert naflex.rope.freqs.grad.abs().max() > 0


def test_everything_that_happens_in_training_only():
    torch.manual_seed(0)
    model = make('vit_tiny_rope_mixed_ape', use_naflex=True, patch_drop_rate=.25, drop_path_rate=.2, drop_rate=.1,
                 attn_drop_rate=.1, pos_drop_rate=.1, rope_shift=.1, rope_jitter=1.2, rope_rescale=2.).train()
    for reentrant in (False, True):
        model.set_grad_checkpointing(reentrant)
        model.zero_grad()
        model(batch_of(images_of())).square().sum().backward()
        assert all(p.grad is not None and torch.isfinite(p.grad).all() for p in model.parameters())
    assert model.rope.freqs.grad.abs().max() > 0


def test_checkpointing_changes_nothing():
    model, batch = make('vit_tiny_rope_liere', use_naflex=True).train(), batch_of(images_of())
    grads = []
    for enable in (False, True):
        model.set_grad_checkpointing(enable)
        model.zero_grad()
        model(batch).square().sum().backward()
        grads.append(model.rope.freqs.grad.clone())
    assert torch.allclose(*grads, atol=1e-6)


def test_patch_dropout_takes_the_same_share_of_every_image():
    model = make(use_naflex=True, patch_drop_rate=.5).train()
    batch = batch_of(images_of())
    out = model.forward_features(batch)
    assert out['patches'].shape == (4, 1 + 10, 24)
    assert out['patch_valid'].sum(1).tolist() == [rows * columns // 2 for rows, columns in SHAPES]
    assert torch.isfinite(model(batch)).all()
    assert model.eval().forward_features(batch)['patches'].shape == (4, 1 + 22, 24)


def test_kept_patches_keep_their_places(monkeypatch):
    model = make('vit_tiny_rope_spherical_ape', use_naflex=True, patch_drop_rate=.5).train()
    batch, noise = batch_of(images_of()), torch.rand(4, 22)
    monkeypatch.setattr(torch, 'rand', lambda *args, **kwargs: noise)
    out = model.forward_features(batch)
    # the same by a mask, all patches in their places
    order = noise.masked_fill(~batch['patch_valid'], 2.).argsort(1)
    seen = torch.zeros_like(batch['patch_valid'])
    for image, count in enumerate(out['patch_valid'].sum(1)):
        seen[image, order[image, :count]] = True
    mask = torch.cat((seen.new_ones(4, 1), seen), dim=1)[:, None, None]
    expected = model.eval().forward_features(batch, attn_mask=mask)['patches']
    assert torch.allclose(out['patches'][:, 0], expected[:, 0], atol=1e-5)
    assert torch.allclose(out['patches'][1, 1:], expected[1, 1 + order[1, :10]], atol=1e-5)


def test_training_keeps_the_reference_grid():
    model = make('vit_tiny_rope_spherical', use_naflex=True).train()
    average = copy.deepcopy(model)
    model(batch_of(images_of()))
    assert model.rope.reference_grid.tolist() == [4, 4] and not model.rope.undecided
    model(torch.randn(1, 3, 48, 48))
    assert model.rope.reference_grid.tolist() == [4, 4]
    average.eval()(batch_of(images_of()))
    assert not average.rope.undecided


# -- features

def test_intermediate_features():
    plain, naflex = pair('vit_tiny_rope_mixed', reg_tokens=1)
    images = images_of()
    batch = batch_of(images)
    out = naflex.forward_intermediates(
        batch, indices=[0, 2], return_prefix_tokens=True, norm=True, output_fmt='NLC', output_dict=True)
    assert torch.equal(out['patch_valid'], batch['patch_valid'])
    for image, x in enumerate(images):
        expected = plain.forward_intermediates(
            x[None], indices=[0, 2], return_prefix_tokens=True, norm=True, output_fmt='NLC', output_dict=True)
        count = int(out['patch_valid'][image].sum())
        for key in ('image_intermediates', 'image_intermediates_prefix'):
            for a, b in zip(out[key], expected[key]):
                assert torch.allclose(a[image, :count], b[0], atol=1e-5)
        assert torch.allclose(out['image_features'][image, :count + 2], expected['image_features'][0], atol=1e-5)
    final, taken = naflex.forward_intermediates(batch, 1, False, False, False, 'NLC')
    assert len(taken) == 1 and torch.equal(final, naflex.forward_features(batch)['patches'])
    assert naflex.forward_intermediates(images[0][None])[1][0].shape == (1, 24, 4, 4)
    with pytest.raises(ValueError, match="output_fmt must be 'NLC' for patches"):
        naflex.forward_intermediates(batch)


def test_head_of_features():
    model, batch = make(use_naflex=True, global_pool='avg'), batch_of(images_of())
    features = model.forward_features(batch)
    out = model.forward_head(features, pre_logits=True)
    assert out.shape == (4, 24)
    assert torch.equal(out, model.forward_head(features['patches'], True, features['patch_valid']))
    assert torch.equal(model.head(out), model(batch))
    model.reset_classifier(3, 'max')
    assert model(batch).shape == (4, 3)
    images = timm.create_model(
        'vit_tiny_rope_mixed', use_naflex=True, features_only=True, **TINY)(torch.randn(1, 3, 32, 48))
    assert images[-1].shape == (1, 24, 4, 6)


def test_what_scripts_ask():
    model = make(use_naflex=True, patch_size=(8, 16))
    assert model.get_patch_size() == (8, 16) and model.embeds.patch_size == (8, 16)
    assert 'embeds' not in dict(model.named_modules())


# -- the stem

def test_layouts_of_patches():
    plain, images = make(), images_of()
    expected = alone(plain, images)
    last, first = make(use_naflex=True), make(use_naflex=True, patchify_channels_last=False)
    batch = batch_of(images, flatten_patches=False)
    assert torch.allclose(last(batch), expected, atol=1e-5)
    colours_first = batch['patches'].movedim(-1, 2)  # as newer loaders do if they are told
    for patches in (colours_first, colours_first.flatten(2)):
        assert torch.allclose(first({**batch, 'patches': patches}), expected, atol=1e-5)
    for model, patches in ((last, colours_first), (first, batch['patches'])):
        with pytest.raises(ValueError, match='patches must be .* with patchify_channels_last='):
            model({**batch, 'patches': patches})


def test_patches_of_another_size():
    model = make(use_naflex=True)
    images = images_of(patch=12)
    out = model(batch_of(images, patch=12, flatten_patches=False))
    other = make()
    other.load_state_dict(model.state_dict())
    other.set_input_size(img_size=48, patch_size=12)
    assert torch.allclose(out, alone(other, images), atol=1e-4)
    assert list(model.state_dict()) == list(make().state_dict())


class Lora(nn.Module):
    def __init__(self, base):
        super().__init__()
        self.base, self.more = base, nn.Conv2d(3, 24, 8, 8, bias=False)

    weight, bias = property(lambda self: self.base.weight), property(lambda self: self.base.bias)

    def forward(self, x):
        return self.base(x) + self.more(x)


class Louder(GridPatchEmbed):
    def forward(self, x):
        return 2 * super().forward(x)


def louder(module, name='forward'):
    function = getattr(module, name)
    setattr(module, name, lambda x: 2 * function(x))


PATCHED = {
    'hook on the projection': lambda e: e.proj.register_forward_hook(lambda module, args, out: 2 * out),
    'hook on the stem': lambda e: e.register_forward_hook(lambda module, args, out: 2 * out),
    'hook before the stem': lambda e: e.register_forward_pre_hook(lambda module, args: (2 * args[0],)),
    'forward of the projection': lambda e: louder(e.proj),
    'forward of the stem': louder,
    'class of the stem': lambda e: setattr(e, '__class__', Louder),
    'another projection': lambda e: setattr(e, 'proj', Lora(e.proj)),
    'a chain': lambda e: setattr(e, 'proj', nn.Sequential(e.proj, nn.Tanh())),
    'pruned': lambda e: prune.random_unstructured(e.proj, 'weight', .5),
    'weight norm and a hook': lambda e: (
        nn.utils.parametrizations.weight_norm(e.proj), e.proj.register_forward_hook(lambda module, args, out: 2 * out)),
}


@pytest.mark.parametrize('change', PATCHED)
def test_a_stem_that_somebody_looks_at(change):
    """What is put into the stem acts on patches as it does on images."""
    plain, naflex = pair('vit_tiny_rope_spherical')
    images, unchanged = images_of(), naflex(batch_of(images_of()))
    for model in (plain, naflex):
        torch.manual_seed(3)
        PATCHED[change](model.patch_embed)
    naflex(images[0][None])
    seen = dict(naflex.patch_embed.seen)
    out = naflex(batch_of(images))
    assert torch.allclose(out, alone(plain, images), atol=1e-5) and (out - unchanged).abs().max() > 1e-3
    assert naflex.patch_embed.seen == seen, 'single patches are no images'
    with pytest.raises(ValueError, match='patches of 12 x 12.*need the stem as it was built'):
        naflex(batch_of(images_of(patch=12), patch=12, flatten_patches=False))


def test_a_parametrised_stem_is_resampled():
    outs, batch = [], batch_of(images_of(patch=12), patch=12, flatten_patches=False)
    for norm in (str, nn.utils.parametrizations.weight_norm):
        model = make(use_naflex=True)
        norm(model.patch_embed.proj)
        outs.append(model(batch))
    assert torch.allclose(*outs, atol=1e-5)


# -- weights

@pytest.mark.parametrize('name', NAMES)
def test_state_dicts_go_both_ways(name):
    plain, naflex = make(name), make(name, use_naflex=True, num_classes=5)
    with torch.no_grad():
        for p in naflex.parameters():
            p.add_(0.01)
    assert list(plain.state_dict()) == list(naflex.state_dict())
    plain.load_state_dict(naflex.state_dict())
    back = pickle.loads(pickle.dumps(naflex))
    back.load_state_dict(plain.state_dict())
    images = images_of()
    assert torch.allclose(naflex(batch_of(images)), alone(plain, images), atol=1e-5)
    assert torch.equal(back(batch_of(images, fill=0.)), naflex(batch_of(images, fill=0.)))


def test_a_folder_of_the_hub_remembers(tmp_path):
    model = make('vit_tiny_rope_spherical_ape', use_naflex=True, rope_order='xy', patchify_channels_last=False)
    save_for_hf(model, tmp_path, safe_serialization=True)
    back = timm.create_model(f'local-dir:{tmp_path}', pretrained=True).eval()
    assert type(back) is RopeNaFlexVit
    images = images_of()
    batch = batch_of(images, flatten_patches=False)
    batch['patches'] = batch['patches'].movedim(-1, 2)
    assert torch.allclose(back(batch), model(batch), atol=1e-6)
    plain = timm.create_model(f'local-dir:{tmp_path}', pretrained=True, use_naflex=False).eval()
    assert type(plain) is RopeVisionTransformer
    assert torch.allclose(alone(plain, images), model(batch), atol=1e-5)


@pytest.mark.parametrize('variable,value', [('TIMM_USE_NAFLEXVIT', 'true'), ('TIMM_USE_NAFLEX', '1')])
def test_environment_variables(monkeypatch, variable, value):
    monkeypatch.setenv(variable, value)
    assert type(make()) is RopeNaFlexVit
    assert type(make(use_naflex=False)) is RopeVisionTransformer
    monkeypatch.setenv(variable, '0')
    assert type(make()) is RopeVisionTransformer


# -- graphs

def test_scripted_and_traced_it_is_the_plain_model():
    plain, naflex = pair('vit_tiny_rope_mixed_ape')
    x = torch.randn(2, 3, 32, 48)
    assert torch.allclose(torch.jit.script(naflex)(x), plain(x), atol=1e-5)
    assert torch.allclose(torch.export.export(naflex, (x,)).module()(x), plain(x), atol=1e-5)
    traced = torch.fx.symbolic_trace(naflex)
    assert torch.allclose(traced(x), plain(x), atol=1e-5)
    assert torch.allclose(torch.jit.script(traced)(x), plain(x), atol=1e-5)
    assert type(naflex) is RopeNaFlexVit


def test_a_compiled_model_serves_all_shapes_of_one_length():
    from torch._dynamo.testing import CompileCounter
    torch._dynamo.reset()
    model, counter = make('vit_tiny_rope_spherical_learned', use_naflex=True), CompileCounter()
    compiled = torch.compile(model, backend=counter)
    counts = []
    for shapes in (SHAPES, [(5, 4), (2, 11), (1, 7), (3, 3)], [(4, 4)] * 4, [(2, 11)] * 4):
        batch = batch_of(images_of(shapes))
        assert torch.allclose(compiled(batch), model(batch), atol=1e-5)
        counts.append(counter.frame_count)
    assert len(set(counts)) == 1, counts


# -- bad input

def broken(**changes):
    batch = batch_of(images_of())
    return {key: value for key, value in {**batch, **changes}.items() if value is not None}


def empty(image):
    valid = batch_of(images_of())['patch_valid']
    valid[image] = False
    return valid


@pytest.mark.parametrize('changes,error,words', [
    (dict(patch_coord=None), TypeError, 'patch_coord missing'),
    (dict(patches=None, patch_coord=None), TypeError, 'patches and patch_coord missing'),
    (dict(patch_coord=torch.zeros(4, 22, 2)), TypeError, 'patch_coord must be integers.*torch.float32'),
    (dict(patch_coord=torch.zeros(4, 21, 2).long()), ValueError, r'patch_coord must be \(batch, patches, 2\)'),
    (dict(patch_valid=torch.ones(4, 21)), ValueError, r'patch_valid must be \(4, 22\), got \(4, 21\)'),
    (dict(patch_valid=empty(2)), ValueError, 'patch_valid leaves image 2 of the batch without a patch'),
    (dict(patch_coord=torch.full((4, 22, 2), -1)), ValueError, 'patch_coord must be rows and columns from 0.*-1'),
    (dict(patches=torch.zeros(4, 22, 200)), ValueError, r'patches must be \(batch, patches, 8 \* 8 \* 3\)'),
])
def test_bad_batches(changes, error, words):
    with pytest.raises(error, match=words):
        make(use_naflex=True)(broken(**changes))


def test_what_cannot_be():
    with pytest.raises(TypeError, match='a ViT that is created with use_naflex=True takes'):
        make()(batch_of(images_of()))
    with pytest.raises(TypeError, match='use_naflex=True is for ViTs: the windows of a Swin'):
        timm.create_model('swin_tiny_rope_mixed', use_naflex=True)
    with pytest.raises(ValueError, match='use_naflex must be True or False, got 3'):
        make(use_naflex=3)
    with pytest.raises(ValueError, match='is_causal'):
        make(use_naflex=True)(batch_of(images_of()), is_causal=True)
    hybrid = importlib.import_module('timm.layers').HybridEmbed
    with pytest.raises(TypeError, match='a PatchEmbed, HybridEmbed is none'):
        make(use_naflex=True, embed_layer=lambda **kw: hybrid(nn.Conv2d(3, 8, 2, 2), **kw))
