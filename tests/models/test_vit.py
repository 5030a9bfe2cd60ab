"""The model: any resolution, the reference grid, options, initialisation, parameter groups, bad input."""
import re

import pytest
import timm
import torch
from tiny import TINY, make
from torch import nn
from torch._dynamo.testing import CompileCounter

import timm_rope
from timm_rope import RopeVisionTransformer
from timm_rope._timm import save_for_hf

ENCODINGS = timm_rope.list_ropes()
NAMES = [f'vit_tiny_rope_{e}' for e in ENCODINGS] + ['vit_tiny_ape', 'vit_tiny_rope_mixed_ape']


# -- any resolution

@pytest.mark.parametrize('name', NAMES)
@pytest.mark.parametrize('size', [(32, 32), (64, 64), (48, 24), (8, 8), (8, 80)])
def test_any_multiple_of_the_patch_without_a_flag(name, size):
    model = make(name)
    x = torch.randn(2, 3, *size)
    y = model(x)
    assert y.shape == (2, 5) and torch.isfinite(y).all()
    final, maps = model.forward_intermediates(x)
    assert maps[0].shape == (2, 24, size[0] // 8, size[1] // 8)
    resized = make(name)
    resized.load_state_dict(model.state_dict())  # until weights are loaded or trained, the grid follows the size
    resized.set_input_size(size)
    assert torch.allclose(resized(x), y, atol=1e-5), 'the nominal size changes nothing'


@pytest.mark.parametrize('name', NAMES)
def test_images_are_padded_on_request(name):
    model = make(name, dynamic_img_pad=True)
    x = torch.randn(1, 3, 33, 47)
    assert torch.equal(model(x), model(nn.functional.pad(x, (0, 1, 0, 7))))
    assert make(name, dynamic_img_pad=True, img_size=(30, 31)).patch_embed.grid_size == (4, 4)


@pytest.mark.parametrize('name', ['vit_tiny_rope_spherical', 'vit_tiny_rope_mixed_ape'])
def test_fixed_size_on_request(name):
    model = make(name, dynamic_img_size=False)
    x = torch.randn(1, 3, 32, 32)
    assert torch.equal(model(x), make(name)(x))
    with pytest.raises(ValueError, match='40x32 does not match the model.*32x32.*dynamic_img_size=True'):
        model(torch.randn(1, 3, 40, 32))
    model.set_input_size((40, 32))
    assert torch.isfinite(model(torch.randn(1, 3, 40, 32))).all()


@pytest.mark.parametrize('name', ['vit_tiny_rope_spherical', 'vit_tiny_rope_uniform', 'vit_tiny_rope_liere'])
def test_the_reference_grid_belongs_to_the_weights(name):
    trained = make(name, img_size=48)
    x = torch.randn(1, 3, 96, 96)
    assert trained.rope.reference_grid.tolist() == [6, 6]
    bigger = make(name, img_size=96)
    assert bigger.rope.reference_grid.tolist() == [12, 12]
    bigger.load_state_dict(trained.state_dict())
    assert bigger.rope.reference_grid.tolist() == [6, 6]
    assert torch.equal(bigger(x), trained(x))
    bigger.set_input_size(192)
    assert bigger.rope.reference_grid.tolist() == [6, 6]
    stretched = make(name, img_size=96)
    stretched.load_state_dict({**trained.state_dict(), 'rope.reference_grid': torch.tensor([12, 12])})
    assert (stretched(x) - trained(x)).abs().max() > 1e-3, 'silently stretching would have been seen'


def test_the_reference_grid_can_be_given():
    model = make('vit_tiny_rope_spherical', rope_reference_grid=[3, 5])
    assert model.rope.reference_grid.tolist() == [3, 5]
    assert make('vit_tiny_rope_spherical', img_size=(16, 48)).rope.reference_grid.tolist() == [2, 6]


@pytest.mark.parametrize('name', ['vit_tiny_ape', 'vit_tiny_rope_mixed_ape'])
def test_a_position_embedding_is_resized_when_weights_of_another_size_are_loaded(name):
    small = make(name, img_size=(16, 64))  # 2x8 = 16 tokens, as many as 4x4
    for size in (32, 96, (64, 16)):
        other = make(name, img_size=size)
        before = {k: v.clone() for k, v in small.state_dict().items()}
        other.load_state_dict(small.state_dict())
        assert all(torch.equal(before[k], v) for k, v in small.state_dict().items()), 'the source is not changed'
        x = torch.randn(1, 3, *other.patch_embed.img_size)
        assert torch.allclose(other(x), small(x), atol=1e-5)
        assert other.pos_embed_grid.tolist() == list(other.patch_embed.grid_size)


def test_a_position_embedding_of_unknown_grid_is_refused():
    model, source = make('vit_tiny_ape', img_size=64), make('vit_tiny_ape', img_size=(16, 24)).state_dict()
    del source['pos_embed_grid']
    with pytest.raises(RuntimeError, match='pos_embed of the checkpoint has 6 positions, which form no square grid'):
        model.load_state_dict(source)


@pytest.mark.parametrize('no_embed_class', [True, False])
def test_ape_over_prefix_tokens(no_embed_class):
    model = make('vit_tiny_rope_axial_ape', no_embed_class=no_embed_class, reg_tokens=2)
    assert model.pos_embed.shape[1] == 16 + (0 if no_embed_class else 3)
    assert model(torch.randn(1, 3, 40, 16)).shape == (1, 5)


# -- what the rotation does inside the model

@pytest.mark.parametrize('name', [n for n in NAMES if 'rope' in n])
def test_rotation_matters_and_prefix_tokens_do_not_turn(name):
    model = make(name, reg_tokens=2)
    payloads = model.rope((4, 4), model.num_prefix_tokens)
    q = torch.randn(1, 2, 19, 12)
    assert torch.equal(model.rope.rotate(q, payloads[0])[:, :, :3], q[:, :, :3])
    assert (model.rope.rotate(q, payloads[0])[:, :, 3:] - q[:, :, 3:]).abs().max() > 0.1
    x = torch.randn(1, 3, 32, 32)
    plain = make('vit_tiny_ape', reg_tokens=2, pos_embed='learn' if name.endswith('_ape') else 'none')
    plain.load_state_dict({k: v for k, v in model.state_dict().items() if not k.startswith('rope.')})
    assert (plain(x) - model(x)).abs().max() > 1e-3


def test_relative_encodings_do_not_see_a_shift_of_the_whole_image():
    model = make('vit_tiny_rope_mixed', class_token=False, global_pool='avg', img_size=32)
    tokens = torch.randn(1, 16, 24)
    payloads = model.rope((6, 6))

    def run(rows, columns):
        index = (torch.arange(rows, rows + 4)[:, None] * 6 + torch.arange(columns, columns + 4)).flatten()
        x = tokens
        for block, payload in zip(model.blocks, payloads):
            x = block(x, payload=payload[:, index])
        return x

    assert torch.allclose(run(0, 0), run(2, 1), atol=1e-4)


def test_patch_dropout_keeps_the_positions_of_what_it_keeps():
    model = make('vit_tiny_rope_mixed', patch_drop_rate=0.5, reg_tokens=1).train()
    x = torch.randn(3, 3, 32, 32)
    torch.manual_seed(3)
    got = model.forward_features(x)
    assert got.shape[1] == 2 + 8
    torch.manual_seed(3)
    keep = torch.argsort(torch.randn(3, 16), dim=-1)[:, :8]
    tokens = model._pos_embed(model.patch_embed(x))
    payloads = model.rope((4, 4), 2)
    for image in range(3):
        index = torch.cat((torch.arange(2), keep[image] + 2))
        y = tokens[image:image + 1, index]
        for block, payload in zip(model.blocks, payloads):
            y = block(y, payload=payload[:, index])
        assert torch.allclose(model.norm(y)[0], got[image], atol=1e-5)
    got.sum().backward()
    assert model.rope.freqs.grad.abs().sum() > 0


def test_a_block_does_not_silently_run_without_its_payload():
    block = make().blocks[0]
    with pytest.raises(ValueError, match=r'takes all tokens of the grid of its model, 1 \+ 4 x 4, got 18'):
        block(torch.randn(1, 18, 24))
    block.attn.positions = None  # of no model
    with pytest.raises(ValueError, match='needs the payload'):
        block(torch.randn(1, 17, 24))


@pytest.mark.parametrize('name', ['vit_tiny_rope_spherical_learned', 'vit_tiny_rope_liere'])
def test_unfused_attention_and_qk_norm(name):
    model = make(name, qk_norm=True)
    x = torch.randn(2, 3, 32, 48)
    expected = model(x)
    mask = torch.rand(1, 1, 25, 25) > 0.3
    mask |= torch.eye(25, dtype=torch.bool)
    masked, causal = model(x, attn_mask=mask), model(x, is_causal=True)
    for block in model.blocks:
        block.attn.fused_attn = False  # read in forward: explainers switch it on a built model
    assert torch.allclose(model(x), expected, atol=1e-5)
    assert torch.allclose(model(x, attn_mask=mask), masked, atol=1e-5)
    assert torch.allclose(model(x, is_causal=True), causal, atol=1e-5)
    assert (masked - expected).abs().max() > 1e-3


@pytest.mark.parametrize('name', NAMES)
def test_bfloat16_model(name):
    model = make(name)
    x = torch.randn(2, 3, 64, 64)
    expected = model(x)
    got = model.to(torch.bfloat16)(x.bfloat16())
    assert got.dtype == torch.bfloat16
    assert (got.float() - expected).abs().max() < 0.15 * expected.abs().max()
    if model.rope is not None:
        assert model.rope.freqs.dtype == torch.float32


# -- training

@pytest.mark.parametrize('name', [n for n in NAMES if 'rope' in n])
def test_parameter_groups(name):
    from timm.optim import create_optimizer_v2
    model = make(name)
    # timm's gradient clipping takes the last two parameters for the head
    assert [n for n, _ in model.named_parameters()][-2:] == ['head.weight', 'head.bias']
    children = [n for n, _ in model.named_children()]
    assert children.index('rope') < children.index('blocks') and children[-2:] == ['head_drop', 'head']
    optimizer = create_optimizer_v2(model, 'adamw', lr=1.0, weight_decay=0.1, layer_decay=0.5)
    groups = {id(p): g for g in optimizer.param_groups for p in g['params']}
    stem, head = groups[id(model.cls_token)], groups[id(model.head.bias)]
    assert stem['lr_scale'] < head['lr_scale'] == 1
    for freqs in model.rope.parameters():
        assert groups[id(freqs)]['weight_decay'] == 0
        assert groups[id(freqs)]['lr_scale'] == stem['lr_scale']
    assert groups[id(model.blocks[0].attn.qkv.weight)]['weight_decay'] == 0.1


def test_uniform_drop_path():
    ramp = [b.drop_path1.drop_prob for b in make(drop_path_rate=0.3).blocks[1:]]
    assert ramp == pytest.approx([0.15, 0.3])
    assert isinstance(make(drop_path_rate=0.3).blocks[0].drop_path1, nn.Identity)
    uniform = make(drop_path_rate=0.3, drop_path_uniform=True)
    assert [b.drop_path2.drop_prob for b in uniform.blocks] == pytest.approx([0.3, 0.3, 0.3])


def test_naver_initialisation():
    wide = dict(embed_dim=256, num_heads=4)
    naver, ours = make(weight_init='naver', **wide), make(**wide)
    assert naver.cls_token.std().item() == pytest.approx(0.02, rel=0.2)
    assert ours.cls_token.abs().max() < 1e-4
    assert naver.blocks[0].mlp.fc1.weight.std().item() == pytest.approx(0.02, rel=0.1)
    assert naver.head.weight.std().item() == pytest.approx(0.02, rel=0.1)
    assert make(init_values=0.5).blocks[0].ls1.gamma.unique().item() == 0.5
    torch.manual_seed(0)
    assert timm.create_model('vit_tiny_rope_mixed', depth=1).blocks[0].ls1.gamma.unique().item() == pytest.approx(1e-4)


@pytest.mark.parametrize('name', NAMES)
@pytest.mark.parametrize('weight_init', ['', 'naver', 'jax', 'reset'])
def test_init_weights_after_to_empty(name, weight_init):
    model = make(name, device='meta', weight_init=weight_init).to_empty(device='cpu')
    for t in [*model.parameters(), *model.buffers()]:
        t.data.fill_(float('nan') if t.is_floating_point() else 0)
    model.init_weights()
    assert all(torch.isfinite(t).all() for t in [*model.parameters(), *model.buffers()])
    if model.rope is not None:
        assert model.rope.reference_grid.tolist() == [4, 4]
    assert torch.isfinite(model(torch.randn(1, 3, 32, 32))).all()


@pytest.mark.parametrize('name', [n for n in NAMES if 'rope' in n])
def test_pruned_models_drop_the_frequencies_of_dropped_blocks(name):
    model, whole = make(name).train(), make(name).train()
    x = torch.randn(1, 3, 32, 32)
    model.prune_intermediate_layers([1])
    assert len(model.rope((4, 4))) == 2
    if model.rope.learned:
        assert model.rope.freqs.shape[1] == 2
    assert torch.allclose(
        model.forward_intermediates(x, [1], intermediates_only=True)[0],
        whole.forward_intermediates(x, [1], intermediates_only=True)[0], atol=1e-6)


# -- checkpoints

def test_another_encoding_is_refused_before_anything_is_written():
    for source, target in (('axial', 'spherical'), ('spherical', 'uniform'), ('mixed', 'axial'), ('axial', 'mixed'),
                           ('axial_learned', 'mixed')):
        model = make(f'vit_tiny_rope_{target}')
        before = {k: v.clone() for k, v in model.state_dict().items()}
        saved = timm.create_model(f'vit_tiny_rope_{source}', **TINY).state_dict()
        for strict in (True, False):
            with pytest.raises(RuntimeError, match=f"{source!r} is not {target!r}"):
                model.load_state_dict(saved, strict=strict)
        assert all(torch.equal(before[k], v) for k, v in model.state_dict().items())


@pytest.mark.parametrize('name,options', [
    ('spherical', {'rope_order': 'xy'}), ('spherical', {'rope_temperature': 50.}), ('liere', {'rope_block': 4}),
    ('mixed', {'rope_coords': 'cells'}), ('uniform', {'rope_coords': 'ends'}),
])
def test_other_options_are_refused(name, options):
    key = next(iter(options)).removeprefix('rope_')
    saved = make(f'vit_tiny_rope_{name}', **options).state_dict()
    with pytest.raises(RuntimeError, match=f'{key} is {options["rope_" + key]:g} there' if key == 'temperature'
                       else f'{key} is {options["rope_" + key]} there'):
        make(f'vit_tiny_rope_{name}').load_state_dict(saved)
    make(f'vit_tiny_rope_{name}', **options).load_state_dict(saved)


@pytest.mark.parametrize('name', [
    'vit_tiny_rope_axial', 'vit_tiny_rope_spherical', 'vit_tiny_rope_mixed', 'vit_tiny_rope_liere'])
def test_another_number_of_heads_is_refused(name):
    """Where nothing is learned, and in LieRE, no shape tells it."""
    saved = make(name, num_heads=1).state_dict()
    with pytest.raises(RuntimeError, match='head_dim is 24 there and 8 here'):
        make(name, num_heads=3).load_state_dict(saved)
    make(name, num_heads=1).load_state_dict(saved)


def test_options_that_only_matter_for_initialisation_are_not_compared():
    make('vit_tiny_rope_mixed').load_state_dict(make('vit_tiny_rope_mixed', rope_temperature=50.).state_dict())


@pytest.mark.parametrize('change,words', [
    (dict(embed_dim=48, num_heads=4), 'the checkpoint is 48 wide, the model 24'),
    (dict(depth=2), 'the checkpoint has 2 blocks, the model 3'),
    (dict(num_classes=7), 'head.weight is (7, 24), the model needs (5, 24)'),
    (dict(rope_encoding='none'), "holds no rotary encoding, the model has 'mixed'"),
    (dict(pos_embed='learn'), 'unexpected pos_embed (1, 16, 24)'),
])
def test_a_checkpoint_that_does_not_fit_says_why(change, words):
    model = make()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    with pytest.raises(RuntimeError, match=re.escape(words)):
        model.load_state_dict(make(**change).state_dict())
    assert all(torch.equal(before[k], v) for k, v in model.state_dict().items()), 'nothing was written'


def test_a_rotary_checkpoint_is_refused_by_the_baseline():
    with pytest.raises(RuntimeError, match='the checkpoint holds a rotary encoding, the model has none'):
        make('vit_tiny_ape').load_state_dict(make('vit_tiny_rope_axial_ape').state_dict())


@pytest.mark.parametrize('key,value,words', [
    ('rope.freqs', float('nan'), 'freqs of the checkpoint has 72 non-finite of 72 values'),
    ('rope.reference_grid', 0, r'reference_grid of the checkpoint must be two positive integers.*\[0, 0\]'),
])
def test_damaged_checkpoints(key, value, words):
    saved = make().state_dict()
    saved[key] = torch.full_like(saved[key], value)
    for target in (make(), make(num_classes=3)):
        with pytest.raises(ValueError, match=words):
            target.load_state_dict(saved, strict=False)


def test_reference_grid_of_another_form():
    saved = make().state_dict()
    for bad in (torch.tensor([14., 14.]), torch.tensor([14]), torch.tensor([-3, 4])):
        with pytest.raises(ValueError, match=r'rope\.reference_grid'):
            make().load_state_dict({**saved, 'rope.reference_grid': bad})


def test_pretrained_route_refuses_what_does_not_rotate(tmp_path):
    plain = make('vit_tiny_ape', pos_embed='none')
    torch.save(plain.state_dict(), tmp_path / 'plain.pth')
    for num_classes in (5, 7):  # another head makes timm's loading non-strict
        overlay = dict(file=str(tmp_path / 'plain.pth'), num_classes=num_classes, input_size=(3, 32, 32))
        for name, words in (('mixed', 'no rotary encoding.*mixed'), ('spherical', 'no rotary encoding')):
            with pytest.raises(RuntimeError, match=words):
                timm.create_model(f'vit_tiny_rope_{name}', pretrained=True, pretrained_cfg_overlay=overlay, **TINY)


@pytest.mark.parametrize('name', ['vit_tiny_rope_axial', 'vit_tiny_rope_spherical', 'vit_tiny_rope_liere'])
def test_weights_without_a_reference_grid_get_that_of_their_cfg(name, tmp_path):
    source = make(name, img_size=48)
    saved = {k: v for k, v in source.state_dict().items() if k != 'rope.reference_grid'}
    torch.save(saved, tmp_path / 'weights.pth')
    overlay = dict(file=str(tmp_path / 'weights.pth'), num_classes=5, input_size=(3, 48, 56))
    model = timm.create_model(
        name, pretrained=True, pretrained_cfg_overlay=overlay, **{**TINY, 'img_size': 96}).eval()
    assert model.rope.reference_grid.tolist() == [6, 7]
    plain = make(name, img_size=96, pretrained_cfg_overlay=dict(input_size=(3, 48, 56)))
    plain.load_state_dict(saved)
    assert plain.rope.reference_grid.tolist() == [6, 7]
    direct = RopeVisionTransformer(**{**TINY, 'rope_encoding': name.rsplit('_', 1)[1]})
    with pytest.raises(RuntimeError, match='missing rope.reference_grid'):  # it has no cfg to tell
        direct.load_state_dict(saved)


@pytest.mark.parametrize('num_classes', [5, 3])  # another head makes timm's loading non-strict
@pytest.mark.parametrize('name', ['vit_tiny_rope_mixed_ape', 'vit_tiny_ape'])
def test_pretrained_position_embedding_of_a_non_square_grid(name, num_classes, tmp_path):
    source = make(name, img_size=(16, 64))
    torch.save(source.state_dict(), tmp_path / 'weights.pth')
    overlay = dict(file=str(tmp_path / 'weights.pth'), num_classes=5)
    model = timm.create_model(
        name, pretrained=True, pretrained_cfg_overlay=overlay, **{**TINY, 'num_classes': num_classes}).eval()
    x = torch.randn(1, 3, 32, 32)
    assert torch.allclose(model.forward_features(x), source.forward_features(x), atol=1e-5)


@pytest.mark.parametrize('name', ['vit_tiny_rope_spherical', 'vit_tiny_rope_mixed_ape', 'vit_tiny_rope_liere'])
def test_pretrained_file_with_another_head_and_size(name, tmp_path):
    source = make(name, img_size=48)
    torch.save({'state_dict': source.state_dict()}, tmp_path / 'weights.pth')
    overlay = dict(file=str(tmp_path / 'weights.pth'), num_classes=-1)
    model = timm.create_model(
        name, pretrained=True, pretrained_cfg_overlay=overlay, **{**TINY, 'img_size': 96, 'num_classes': 3}).eval()
    assert model.rope.reference_grid.tolist() == [6, 6]
    x = torch.randn(1, 3, 96, 96)
    assert torch.allclose(model.forward_features(x), source.forward_features(x), atol=1e-5)


@pytest.mark.parametrize('name,options', [
    ('vit_tiny_rope_spherical', dict(rope_order='xy', rope_temperature=30.)),
    ('vit_tiny_rope_liere', dict(rope_block=3)), ('vit_tiny_rope_mixed_ape', dict(reg_tokens=1)), ('vit_tiny_ape', {}),
])
def test_hub_folder_round_trip(name, options, tmp_path):
    model = make(name, img_size=48, **options)
    model.set_input_size((64, 96))
    model.reset_classifier(3, 'avg')
    save_for_hf(model, tmp_path, safe_serialization=True)
    back = timm.create_model(f'local-dir:{tmp_path}', pretrained=True).eval()
    x = torch.randn(2, 3, 64, 96)
    assert torch.equal(back(x), model(x))
    assert back.patch_embed.img_size == (64, 96)
    assert repr(back.rope) == repr(model.rope)


# -- bad input

@pytest.mark.parametrize('kwargs,error,words', [
    (dict(rope_encoding='helix'), ValueError, "Unknown rotary encoding 'helix'"),
    (dict(rope_order='xy'), ValueError, "'mixed' takes no option 'order'"),
    (dict(rope_colour=1), TypeError, "'colour'"),
    (dict(rope_encoding='none', rope_order='xy', pos_embed='learn'), ValueError, 'takes no rope_order'),
    (dict(order='xy'), TypeError, 'order is an option of the encoding, which a model takes as rope_order'),
    (dict(scaling='yarn'), TypeError, 'takes as rope_scaling'),
    (dict(drop_path_uniform='false'), ValueError, "drop_path_uniform must be True or False, got 'false'"),
    (dict(dynamic_img_pad='no'), ValueError, "dynamic_img_pad must be True or False, got 'no'"),
    (dict(use_naflex='yes'), ValueError, "use_naflex must be True or False, got 'yes'"),
    (dict(no_such_argument=1), TypeError, 'no_such_argument'),
    (dict(attn_layer='attn'), TypeError, 'attn_layer is set by'),
    (dict(img_size=0), ValueError, 'img_size must be an integer of at least 1, got 0'),
    (dict(img_size=(32, -8)), ValueError, 'img_size.*-8'),
    (dict(img_size=36), ValueError, 'img_size must be a multiple of the patch 8x8.*got 36x36'),
    (dict(img_size=(32, 32, 3)), ValueError, r'img_size must be an integer or \(height, width\)'),
    (dict(patch_size=0), ValueError, 'patch_size must be an integer of at least 1, got 0'),
    (dict(embed_dim=25), ValueError, 'embed_dim must be a multiple of num_heads, got 25 and 2'),
    (dict(num_heads=0), ValueError, 'num_heads'),
    (dict(embed_dim=2), ValueError, 'head_dim must be at least 2'),
    (dict(depth=0), ValueError, 'depth'),
    (dict(rope_reference_grid=(14, 0)), ValueError, r'reference_grid.*\(14, 0\)'),
    (dict(pos_embed='sincos'), ValueError, "pos_embed must be one of 'learn', 'none', '', got 'sincos'"),
    (dict(weight_init='kaiming'), ValueError, "weight_init must be one of.*'kaiming'"),
])
def test_bad_arguments(kwargs, error, words):
    with pytest.raises(error, match=words):
        make(**kwargs)


@pytest.mark.parametrize('size', [(36, 32), (32, 4), (7, 7)])
def test_bad_images(size):
    with pytest.raises(ValueError, match=f'Image of {size[0]}x{size[1]} must be a positive multiple of the patch 8x8'):
        make()(torch.randn(1, 3, *size))
    model = make()
    with pytest.raises(ValueError, match='img_size must be a multiple'):
        model.set_input_size(size)
    assert model.patch_embed.img_size == (32, 32), 'nothing was changed'


def test_a_failed_resize_loses_nothing():
    model = make('vit_tiny_ape')
    for size in (0, (32, 0), -8):
        with pytest.raises(ValueError, match='img_size must be an integer of at least 1'):
            model.set_input_size(size)
    with pytest.raises(ValueError, match='patch_size must be an integer of at least 1, got 0'):
        model.set_input_size(patch_size=0)
    assert model.pos_embed is not None and model(torch.randn(1, 3, 32, 32)).shape == (1, 5)


# -- graphs

@pytest.mark.slow
@pytest.mark.parametrize('name', [  # one of each rotation
    'vit_tiny_rope_mixed_ape', 'vit_tiny_rope_spherical', 'vit_tiny_rope_liere'])
def test_compile_takes_new_sizes_with_one_recompilation(name):
    torch._dynamo.reset()
    model = make(name, depth=2)
    counter = CompileCounter()
    compiled = torch.compile(model, backend=counter, fullgraph=True)
    with torch.no_grad():
        for size in ((32, 32), (48, 40), (64, 56), (40, 80), (72, 48)):
            x = torch.randn(2, 3, *size)
            assert torch.allclose(compiled(x), model(x), atol=1e-5)
    assert counter.frame_count <= 2


@pytest.mark.parametrize('name', NAMES)
def test_export(name):
    model = make(name)
    x = torch.randn(2, 3, 32, 32)
    program = torch.export.export(model, (x,))
    assert torch.allclose(program.module()(x), model(x), atol=1e-5)
    assert not any('complex' in str(node.meta.get('val', '')) for node in program.graph.nodes)


def test_direct_construction_needs_no_entry_point():
    model = RopeVisionTransformer(**{**TINY, 'rope_encoding': 'uniform'})
    assert model(torch.randn(1, 3, 32, 32)).shape == (1, 5)
