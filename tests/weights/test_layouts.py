"""Checkpoints of other projects: recognised, converted, and equal to their own models."""
import logging

import foreign
import pytest
import timm
import torch

from timm_rope.weights.layouts import LAYOUTS, recognise
from timm_rope.weights.layouts.naver import is_trained

SIZES = dict(embed_dim=128, depth=2, num_heads=2, patch_size=8, img_size=32, num_classes=5)


def load(name, checkpoint, tmp_path, **kwargs):
    torch.save(checkpoint, tmp_path / 'weights.pth')
    overlay = dict(file=str(tmp_path / 'weights.pth'), num_classes=5, input_size=(3, 32, 32))
    return timm.create_model(name, pretrained=True, pretrained_cfg_overlay=overlay, **kwargs).eval()


def agree(model, x, expected):
    with torch.no_grad():
        got = model(x)
    assert expected.std() > 0.1, 'the comparison must not be between silent models'
    return (got - expected).abs().max() < 2e-5 * expected.abs().max()


# -- whole models against float64

@pytest.mark.parametrize('encoding,ape', [('axial', ''), ('mixed', ''), ('axial', '_ape'), ('mixed', '_ape'), ('', '')])
def test_naver_vit(encoding, ape, tmp_path):
    checkpoint = foreign.naver_vit(encoding == 'mixed', ape == '_ape' or not encoding)
    name = f'vit_small_rope_{encoding}{ape}' if encoding else 'vit_small_ape'
    model = load(name, checkpoint, tmp_path, **SIZES)
    for size in [(32, 32)] if 'pos_embed' in checkpoint['model'] else [(32, 32), (48, 80), (16, 16)]:
        x = torch.randn(2, 3, *size)
        assert agree(model, x, foreign.forward_naver(checkpoint, x, encoding == 'axial')), size
        if encoding == 'axial':
            assert not agree(model, x, foreign.forward_naver(checkpoint, x)), 'the rotation matters'
    if encoding:
        assert model.rope.reference_grid.tolist() == [4, 4]


def test_a_naver_file_by_load_state_dict(tmp_path):
    checkpoint = foreign.naver_vit()
    model = timm.create_model('vit_small_rope_mixed', **SIZES).eval()
    model.load_state_dict(checkpoint['model'])
    x = torch.randn(1, 3, 48, 32)
    assert agree(model, x, foreign.forward_naver(checkpoint, x))
    torch.save(checkpoint, tmp_path / 'naver.pth')
    other = timm.create_model('vit_small_rope_mixed', checkpoint_path=tmp_path / 'naver.pth', **SIZES).eval()
    assert torch.equal(other(x), model(x))


def test_other_options_of_the_same_encoding_are_refused(tmp_path):
    eva = timm.create_model('vit_small_patch16_rope_mixed_224', **SIZES)
    for checkpoint in (foreign.naver_vit(), eva.state_dict()):
        load('vit_small_rope_mixed', checkpoint, tmp_path, **SIZES)
        with pytest.raises(RuntimeError, match='coords is index there and cells here'):
            load('vit_small_rope_mixed', checkpoint, tmp_path, rope_coords='cells', **SIZES)


def test_the_grid_of_a_naver_file_is_that_of_its_tables(tmp_path):
    model = load('vit_small_rope_mixed', foreign.naver_vit(grid=(3, 5)), tmp_path, **SIZES)
    assert model.rope.reference_grid.tolist() == [3, 5]


@pytest.mark.parametrize('rotate', [1, 2, 4])
def test_spiral(rotate, tmp_path):
    checkpoint = foreign.spiral_deit(rotate)
    sizes = {key: SIZES[key] for key in ('embed_dim', 'depth', 'num_heads', 'patch_size', 'num_classes')}
    model = load('vit_small_rope_spiral', checkpoint, tmp_path, **sizes)
    assert model.rope.options['directions'] == 2 * rotate and model.rope.options['clamp']
    assert model.rope.reference_grid.tolist() == [4, 4] and model.patch_embed.img_size == (32, 32)
    x = torch.randn(2, 3, 32, 32)
    assert agree(model, x, foreign.forward_spiral(checkpoint, x))
    wide = load('vit_small_rope_spiral', foreign.spiral_deit(rotate, side=6), tmp_path, **sizes)
    assert wide.rope.reference_grid.tolist() == [6, 6] and wide.patch_embed.img_size == (48, 48)
    raw = foreign.forward_spiral({**checkpoint, 'model_ema': checkpoint['model']}, x)
    assert not agree(model, x, raw), 'the averaged weights are the published ones'


def test_spiral_weights_alone_into_a_model_that_is_built():
    checkpoint = foreign.spiral_deit(4)
    weights = checkpoint['model_ema']  # without the training arguments
    sizes = dict(SIZES, pos_embed='learn', rope_directions=8)
    good = dict(norm_layer='spiral_rms', rope_clamp=True)
    for wrong, words in [
            (dict(good, rope_clamp=False), 'clamp is True there and False here'),
            (dict(good, rope_scale=1.), 'scale is 1.5 there and 1 here'),
            (dict(good, norm_layer='rmsnorm'), "Spiral RoPE weights need .* norm_layer='spiral_rms'")]:
        model = timm.create_model('vit_small_rope_spiral', **sizes, **wrong)
        before = {key: value.clone() for key, value in model.state_dict().items()}
        with pytest.raises(RuntimeError, match=words):
            model.load_state_dict(weights)
        assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    model = timm.create_model('vit_small_rope_spiral', **sizes, **good).eval()
    model.load_state_dict(weights)
    x = torch.randn(2, 3, 32, 32)
    assert agree(model, x, foreign.forward_spiral(checkpoint, x))


@pytest.mark.parametrize('registers', [4, 9])
def test_vit5(registers, tmp_path):
    checkpoint = foreign.vit5(registers=registers)
    sizes = {key: SIZES[key] for key in ('embed_dim', 'depth', 'patch_size', 'num_classes')}
    more = {} if registers == 4 else dict(reg_tokens=9, rope_registers=9)
    model = load('vit_small_rope_vit5', checkpoint, tmp_path, num_heads=2, **sizes, **more)
    by_arguments = load('vit_small_rope_axial_ape', checkpoint, tmp_path, **sizes)  # the file tells the rest
    assert model.rope.reference_grid.tolist() == [4, 4] and model.patch_embed.img_size == (32, 32)
    assert by_arguments.rope.options == model.rope.options and model.num_prefix_tokens == 1 + registers
    for size in (32, 32), (48, 80), (16, 64):
        x = torch.randn(2, 3, *size)
        expected = foreign.forward_vit5(checkpoint, x)
        assert agree(model, x, expected) and agree(by_arguments, x, expected), size
        assert not agree(model, x, foreign.forward_vit5(checkpoint, x, 'model_ema')), 'the raw weights are evaluated'
    with torch.no_grad():
        built_for = load('vit_small_rope_vit5', checkpoint, tmp_path, num_heads=2, **sizes, **more)
        built_for.set_input_size((48, 80))
        x = torch.randn(1, 3, 48, 80)
        assert torch.allclose(built_for(x), model(x), atol=1e-5)


def test_vit5_by_load_state_dict():
    checkpoint = foreign.vit5()
    model = timm.create_model('vit_small_rope_vit5', **SIZES).eval()
    model.load_state_dict(checkpoint['model'])
    x = torch.randn(2, 3, 48, 32)
    assert agree(model, x, foreign.forward_vit5(checkpoint, x))
    for wrong, words in [
            (dict(rope_temperature=100.), 'temperature is 10000 there and 100 here'),
            (dict(rope_registers=0), 'registers is 4 there and 0 here'),
            (dict(num_heads=4), r'q_norm.weight is \(64,\)'), (dict(norm_layer='layernorm'), 'missing blocks.0.norm1')]:
        with pytest.raises(RuntimeError, match=words):
            timm.create_model('vit_small_rope_vit5', **{**SIZES, **wrong}).load_state_dict(checkpoint['model'])
    checkpoint['model']['blocks.1.attn.rope.freqs'] += 1
    with pytest.raises(RuntimeError, match='frequencies that no model here computes'):
        recognise(checkpoint)


@pytest.mark.parametrize('share', [True, False])
def test_liere_weights_alone_into_a_model_that_is_built(share, caplog):
    checkpoint = foreign.liere_lightning(8)
    weights = {key.removeprefix('model.'): value for key, value in checkpoint['state_dict'].items()}
    sizes = {**SIZES, 'patch_size': 4, 'img_size': 16, 'mlp_ratio': 2, 'qkv_bias': False, 'init_values': 0}
    sizes.update(rope_coords='ends', rope_share_layers=share)
    with pytest.raises(RuntimeError, match='LieRE weights need .* norm_eps=1e-05'):
        timm.create_model('vit_small_rope_liere', **sizes).load_state_dict(weights)
    model = timm.create_model('vit_small_rope_liere', norm_eps=1e-5, **sizes).eval()
    with caplog.at_level(logging.WARNING, 'timm_rope'):
        model.load_state_dict(weights)
    assert f'do not tell rope_share_layers, the model has {share}: True uses the generators' in caplog.text
    x = torch.randn(2, 3, 16, 16)
    assert agree(model, x, foreign.forward_liere(checkpoint, x, first_layer=share))


def test_lieres_baseline_needs_its_heads():
    weights = {k.removeprefix('model.'): v for k, v in foreign.liere_lightning(None)['state_dict'].items()}
    sizes = {**SIZES, 'patch_size': 4, 'img_size': 16, 'mlp_ratio': 2, 'qkv_bias': False, 'init_values': 0}
    model = timm.create_model('vit_small_ape', norm_eps=1e-5, no_embed_class=False, **{**sizes, 'num_heads': 4})
    with pytest.raises(RuntimeError, match='LieRE weights need .* num_heads=2'):
        model.load_state_dict(weights)


@pytest.mark.parametrize('block,layers,per_head', [(8, None, True), (2, 1, False), (5, 1, True), (64, None, False)])
def test_liere(block, layers, per_head, tmp_path):
    checkpoint = foreign.liere_lightning(block, layers, per_head)
    sizes = dict(depth=2, embed_dim=128, num_classes=5)
    choices = [{}] if layers == 1 else [dict(rope_share_layers=True), dict(rope_share_layers=False)]
    for choice in choices:
        model = load('vit_small_rope_liere', checkpoint, tmp_path, **sizes, **choice)
        for size in ((16, 16), (24, 16)):
            x = torch.randn(2, 3, *size)
            first = choice.get('rope_share_layers', True)
            assert agree(model, x, foreign.forward_liere(checkpoint, x, first_layer=first)), (size, choice)
            if layers != 1:
                assert not agree(model, x, foreign.forward_liere(checkpoint, x, first_layer=not first)), 'they differ'
    if layers != 1:
        with pytest.raises(ValueError, match='rope_share_layers must be chosen.*first layer in every layer') as error:
            load('vit_small_rope_liere', checkpoint, tmp_path, **sizes)
        later = checkpoint['state_dict']['model.position_encoder.generator_raw_params'][:, 1:]
        rows, columns = torch.triu_indices(block, block, 1)
        upper = later[..., rows, columns]
        assert f'mean {upper.mean():.2f}' in str(error.value), 'the user sees whether they were trained'


def test_liere_at_another_image_size_keeps_its_grid(tmp_path):
    checkpoint = foreign.liere_lightning(8, 1)
    model = load('vit_small_rope_liere', checkpoint, tmp_path, depth=2, embed_dim=128, num_classes=5, img_size=48)
    assert model.rope.reference_grid.tolist() == [4, 4] and model.patch_embed.img_size == (48, 48)
    x = torch.randn(1, 3, 48, 48)
    assert agree(model, x, foreign.forward_liere(checkpoint, x))


def test_lieres_absolute_baseline(tmp_path):
    checkpoint = foreign.liere_lightning(None)
    model = load('vit_small_ape', checkpoint, tmp_path, depth=2, embed_dim=128, num_classes=5)
    x = torch.randn(1, 3, 16, 16)
    assert agree(model, x, foreign.forward_liere(checkpoint, x))


# -- recognition

def keys_of(checkpoint):
    return {key: value for key, value in checkpoint['model'].items() if key not in ('freqs_t_x', 'freqs_t_y')}


def nested(state):
    return [
        state, {'model': state}, {'state_dict': state}, {'model': {'state_dict': state}},
        {'module.' + k: v for k, v in state.items()}, {'_orig_mod.module.' + k: v for k, v in state.items()},
        {'state_dict': {'model.' + k: v for k, v in state.items()}, 'epoch': 3, 'optimizer': {'state': {}}}]


@pytest.mark.parametrize('i', range(7))
def test_wrappers_around_a_state_dict(i):
    state = foreign.naver_vit()['model']
    weights = recognise(nested(state)[i])
    assert weights.layout == 'NAVER RoPE-ViT' and weights.encoding == 'mixed'
    assert set(weights.left_out) == {'freqs_t_x', 'freqs_t_y'}
    assert torch.equal(weights.tensors['blocks.1.ls2.gamma'], state['blocks.1.gamma_2'])


def swin_state(mixed):
    torch.manual_seed(0)
    state = timm.create_model(
        'swin_tiny_patch4_window7_224', depths=(1, 2), num_heads=(1, 2), embed_dim=32).state_dict()
    out = {}
    for key, value in state.items():
        if 'relative_position' in key:
            continue
        parts = key.split('.')
        if 'downsample' in key:
            parts[1] = str(int(parts[1]) - 1)
        out['.'.join(parts).replace('head.fc.', 'head.')] = value
        if key.endswith('attn.qkv.weight'):
            heads = value.shape[1] // 32
            freqs = torch.rand(2, heads, 16)
            if not mixed:
                freqs[0, :, 8:] = freqs[1, :, :8] = 0
            name = '.'.join(parts).replace('qkv.weight', '')
            tokens = torch.arange(5 * 7)
            out.update({f'{name}rope_freqs': freqs, f'{name}rope_t_x': tokens % 7, f'{name}rope_t_y': tokens // 7})
    out['layers.0.blocks.0.attn_mask'] = torch.zeros(64, 49, 49)
    return {'model': out}, state


@pytest.mark.parametrize('mixed', [True, False])
def test_naver_swin_becomes_timms_keys(mixed):
    checkpoint, timms = swin_state(mixed)
    weights = recognise(checkpoint)
    assert weights.layout == 'NAVER RoPE-Swin' and weights.encoding == ('mixed' if mixed else 'axial')
    plain = {key: value for key, value in weights.tensors.items() if '.rope.' not in key}
    expected = {key: value for key, value in timms.items() if 'relative_position' not in key}
    assert plain.keys() == expected.keys() and all(torch.equal(plain[key], expected[key]) for key in plain)
    for block in ('layers.0.blocks.0', 'layers.1.blocks.0', 'layers.1.blocks.1'):
        assert weights.tensors[f'{block}.attn.rope.reference_grid'].tolist() == [5, 7]
        freqs = weights.tensors.get(f'{block}.attn.rope.freqs')
        theirs = checkpoint['model'][f'{block}.attn.rope_freqs']
        assert torch.equal(freqs[:, 0], theirs) if mixed else freqs is None
    assert ('layers.0.blocks.0.attn.rope_freqs' in weights.left_out) == (not mixed)
    model = timm.create_model('vit_small_rope_mixed', **SIZES)
    with pytest.raises(RuntimeError, match='NAVER RoPE-Swin'):
        model.load_state_dict(checkpoint['model'])


@pytest.mark.parametrize('name', ['vit_tiny_rope_spherical', 'vit_tiny_rope_liere', 'vit_tiny_ape'])
def test_our_own_weights(name):
    model = timm.create_model(name, **{**SIZES, 'depth': 1})
    weights = recognise({'state_dict': model.state_dict()})
    assert weights.layout == ('timm VisionTransformer' if name == 'vit_tiny_ape' else 'timm_rope')
    assert weights.encoding == (name.split('_')[-1] if 'rope' in name else 'none')
    assert weights.tensors.keys() == model.state_dict().keys() and not weights.model_args and not weights.ask


def test_timms_own_models():
    sizes = {**SIZES, 'depth': 1}
    eva = timm.create_model('vit_small_patch16_rope_mixed_224', **sizes)
    assert recognise(eva.state_dict()).layout == 'timm Eva'
    deit = timm.create_model('deit3_small_patch16_224', **sizes)
    plain = timm.create_model('vit_small_patch16_224', **sizes)
    for model in (deit, plain):
        weights = recognise(model.state_dict())
        assert (weights.layout, weights.encoding) == ('timm VisionTransformer', 'none')


def test_evas_with_other_coordinates_are_not_taken_for_axial():
    eva = timm.create_model('vit_small_patch16_rope_224', num_reg_tokens=1, **{**SIZES, 'depth': 1})
    with pytest.raises(RuntimeError, match=r'NAVER RoPE-ViT \(unexpected reg_token'):
        recognise(eva.state_dict())


@pytest.mark.parametrize('name', [
    'vit_pe_lang_large_patch14_448',  # a rotation of its own, which shows in no key
    'vit_pe_spatial_tiny_patch16_512', 'cait_xxs24_224', 'vit_small_patch16_dinov3', 'beit_base_patch16_224'])
def test_models_with_nearly_the_same_keys_are_not_taken_for_others(name):
    sizes = {key: value for key, value in SIZES.items() if key != 'patch_size'}
    state = timm.create_model(name, **{**sizes, 'depth': 1, 'img_size': 56}).state_dict()
    with pytest.raises(RuntimeError, match='fits none of the known layouts'):
        recognise(state)


def test_weights_of_ours_without_their_signature_are_not_guessed(tmp_path):
    # uniform, spherical and axial have the same keys then
    state = timm.create_model('vit_tiny_rope_spherical', **SIZES).state_dict()
    del state['rope.signature']
    with pytest.raises(RuntimeError, match=r'timm_rope \(missing rope.signature\)'):
        load('vit_tiny_rope_axial', state, tmp_path, **SIZES)


def test_raw_or_averaged_weights_as_their_authors_report_them(caplog):
    raw, average = foreign.naver_vit(seed=1)['model'], foreign.naver_vit(seed=2)['model']
    with caplog.at_level(logging.INFO, 'timm_rope'):
        weights = recognise({'model': raw, 'model_ema': average})
    assert torch.equal(weights.tensors['cls_token'], raw['cls_token']) and 'raw ones are used' in caplog.text
    ours = [timm.create_model('vit_tiny_rope_axial', **SIZES).state_dict() for _ in range(2)]
    weights = recognise({'state_dict': ours[0], 'state_dict_ema': ours[1]})
    assert torch.equal(weights.tensors['head.weight'], ours[1]['head.weight'])
    only = recognise({'state_dict_ema': ours[1]})
    assert torch.equal(only.tensors['head.weight'], ours[1]['head.weight'])


# -- refusals

def test_what_fits_nothing_is_refused_with_the_differences():
    state = foreign.naver_vit()['model']
    state.pop('blocks.0.gamma_1')
    with pytest.raises(RuntimeError, match=r'fits none.*NAVER RoPE-ViT \(missing blocks.0.gamma_1\)'):
        recognise(state)
    resnet = {'conv1.weight': torch.zeros(2), 'fc.weight': torch.zeros(2)}
    with pytest.raises(RuntimeError, match='2 tensors: conv1.weight, fc.weight'):
        recognise({'state_dict': resnet})
    for nothing in ({}, {'model': {}}, {'epoch': 3, 'best': 0.7}):
        with pytest.raises(RuntimeError, match='holds no tensors'):
            recognise(nothing)
    with pytest.raises(RuntimeError, match='this one is a list'):
        recognise([torch.zeros(1)])


def test_weights_under_a_prefix_are_pointed_at():
    state = foreign.naver_vit()['model']
    with pytest.raises(RuntimeError, match="those that begin with 'net.vit.' are NAVER RoPE-ViT: save these alone"):
        recognise({f'net.vit.{key}': value for key, value in state.items()})
    two = {**{f'student.{k}': v for k, v in state.items()}, **{f'teacher.{k}': v for k, v in state.items()}}
    with pytest.raises(RuntimeError, match="'student.' are NAVER RoPE-ViT, those that begin with 'teacher.' are NAVER"):
        recognise({'state_dict': two})
    liere = foreign.liere_lightning()['state_dict']
    with pytest.raises(RuntimeError, match="begin with 'model.' are LieRE"):
        recognise({'state_dict': {**liere, 'criterion.weight': torch.ones(5)}})


@pytest.mark.parametrize('name', ['vit_tiny_rope_mixed', 'vit_tiny_ape', 'swin_tiny_rope_axial'])
def test_a_wrapped_state_dict_is_called_that(name):
    model = timm.create_model(name, **({} if name.startswith('swin') else SIZES))
    wrapped = {f'net.{key}': value for key, value in model.state_dict().items()}
    for given, word in ((wrapped, 'net.'), ({'state_dict': model.state_dict()}, 'state_dict')):
        with pytest.raises(RuntimeError, match=f'none of the keys of the model, but {word}.*pass the weights themselv'):
            model.load_state_dict(given)


def without(checkpoint, *keys, **changes):
    state = {key: value for key, value in checkpoint['state_dict'].items() if key.removeprefix('model.') not in keys}
    return {**checkpoint, 'state_dict': {**state, **{f'model.{key}': value for key, value in changes.items()}}}


@pytest.mark.parametrize('change,words', [
    (lambda c: without(c, pos_embedding=torch.ones(1, 17, 128)), 'whether it was added cannot be told'),
    (lambda c: without(c, 'position_encoder.generator_raw_params'), 'visionllama'),
    (lambda c: without(c, pos_embedding=torch.zeros(1, 16, 128)), 'expected a square grid'),
    (lambda c: without(c, **{'to_patch_embedding.1.weight': torch.zeros(128, 3 * 5 * 5 * 5)}), 'volumes or videos'),
    (lambda c: without(c, **{'position_encoder.generator_raw_params': torch.zeros(2, 1, 7, 8, 8)}), 'fits neither 8'),
])
def test_lieres_that_no_model_computes(change, words):
    with pytest.raises(RuntimeError, match=words):
        recognise(change(foreign.liere_lightning(8)))


@pytest.mark.parametrize('change,words', [
    (dict(freqs_t_x=torch.full((16,), float('nan'))), 'freqs_t_y and freqs_t_x must hold the row and column numbers'),
    (dict(freqs_t_x=torch.zeros(16)), 'must hold the row and column numbers'),
    (dict(freqs_t_y=torch.tensor([0., 2, 2, 3]).repeat_interleave(4)), 'must hold the row and column numbers'),
    (dict(freqs_t_x=torch.arange(14.) % 4, freqs_t_y=torch.arange(14) // 4), 'must hold the row and column numbers'),
    (dict(freqs_t_y=torch.zeros(0)), 'must hold the row and column numbers'),
    (dict(freqs_t_x=torch.zeros(0), freqs_t_y=torch.zeros(0)), 'must hold the row and column numbers'),
    (dict(freqs=torch.zeros(64)), 'freqs.*must be'),
    ({'patch_embed.proj.weight': torch.tensor(0.)}, 'has keys of NAVER RoPE-ViT, but is damaged'),
])
def test_damaged_naver_files(change, words):
    with pytest.raises(RuntimeError, match=words):
        recognise({'model': {**foreign.naver_vit()['model'], **change}})


def test_damaged_files_of_others():
    liere = foreign.liere_lightning(8)
    with pytest.raises(RuntimeError, match='has keys of LieRE, but is damaged'):
        recognise(without(liere, pos_embedding=torch.zeros(3)))
    with pytest.raises(RuntimeError, match=r'LieRE \(missing transformer.layers.0.1.fn.net.0.weight\)'):
        recognise(without(liere, 'transformer.layers.0.1.fn.net.0.weight'))
    for rotate in ('8x', None, 2.5):
        with pytest.raises(RuntimeError, match='Spiral RoPE: args.rotate must be an integer'):
            recognise(spiral_with(dict(rotate=rotate)))
    lonely = {f'blocks.{i}.attn.rope.freqs': torch.tensor([1.5]) for i in range(2)}
    assert recognise(spiral_with(tensors=lonely)).model_args['rope_scale'] == 1.5, 'any temperature is right'
    checkpoint, _ = swin_state(True)
    checkpoint['model']['layers.0.blocks.0.attn.rope_t_x'] = torch.zeros(35)
    with pytest.raises(RuntimeError, match='layers.0.blocks.0.attn.rope_t_x must hold the row and column numbers'):
        recognise(checkpoint)


def spiral_with(args=None, tensors=None):
    checkpoint = foreign.spiral_deit()
    vars(checkpoint['args']).update(args or {})
    checkpoint['model_ema'].update(tensors or {})
    return checkpoint


@pytest.mark.parametrize('kwargs,words', [
    (dict(args=dict(same_theta=True)), 'same_theta=True'),
    (dict(args=dict(truncate_percentage=0.1)), 'truncate_percentage=0.1'),
    (dict(args=dict(model='deit_base_patch16_LS_rms12h_rope')), 'normalises per head'),
    (dict(tensors={'blocks.1.attn.rope.freqs': torch.ones(16)}), 'different frequencies'),
    (dict(tensors={f'blocks.{i}.attn.rope.freqs': torch.linspace(2, 1, 16) for i in range(2)}), 'geometric'),
])
def test_spirals_that_no_model_computes(kwargs, words):
    with pytest.raises(RuntimeError, match=words):
        recognise(spiral_with(**kwargs))


def test_spiral_without_its_arguments_asks_for_the_directions(tmp_path):
    checkpoint = foreign.spiral_deit(4)
    del checkpoint['args']
    sizes = {key: SIZES[key] for key in ('embed_dim', 'depth', 'num_heads', 'patch_size', 'num_classes')}
    with pytest.raises(ValueError, match='rope_directions must be chosen.*args.rotate'):
        load('vit_small_rope_spiral', checkpoint, tmp_path, **sizes)
    model = load('vit_small_rope_spiral', checkpoint, tmp_path, rope_directions=8, **sizes)
    x = torch.randn(1, 3, 32, 32)
    expected = foreign.forward_spiral({**checkpoint, 'args': foreign.argparse.Namespace(rotate=4)}, x)
    assert agree(model, x, expected)


def test_naver_frequencies_that_fit_no_head():
    checkpoint = foreign.naver_vit()
    checkpoint['model']['freqs'] = torch.zeros(2, 3, 64)
    with pytest.raises(RuntimeError, match=r'freqs.*must be \(2, 2 blocks, 64\).*got \(2, 3, 64\)'):
        recognise(checkpoint)


def test_a_stray_position_embedding_is_told_from_a_trained_one(tmp_path, caplog):
    generator = torch.Generator().manual_seed(0)
    stray = foreign.naver_vit(False)
    stray['model']['pos_embed'] = 0.02 * torch.randn(1, 16, 128, generator=generator)
    model = load('vit_small_rope_axial', stray, tmp_path, **SIZES)
    x = torch.randn(1, 3, 32, 32)
    without_it = {'model': {k: v for k, v in stray['model'].items() if k != 'pos_embed'}}
    assert agree(model, x, foreign.forward_naver(without_it, x, axial=True))
    trained = foreign.naver_vit(False, ape=True)
    with pytest.raises(RuntimeError, match='trained position embedding, the model has none.*_ape.*rope_warm_start'):
        load('vit_small_rope_axial', trained, tmp_path, **SIZES)
    real = torch.nn.functional.interpolate(torch.randn(1, 384, 5, 5), (14, 14), mode='bicubic')
    for shape in ((1, 196, 384), (1, 64, 64)):
        assert not is_trained(0.02 * torch.randn(shape))
        assert not is_trained(torch.zeros(shape))
    assert is_trained(real.flatten(2).transpose(1, 2) + 0.1 * torch.randn(1, 196, 384))


def test_every_layout_has_a_name_and_marks():
    assert len({layout.name for layout in LAYOUTS}) == len(LAYOUTS)
    assert all(layout.marks and layout.__doc__ for layout in LAYOUTS)


def test_a_checkpoint_that_holds_itself_is_refused():
    checkpoint = {'epoch': 3}
    checkpoint['model'] = {'state_dict': checkpoint}
    with pytest.raises(RuntimeError, match='holds itself'):
        recognise(checkpoint)
