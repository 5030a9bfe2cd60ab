"""`python -m timm_rope convert`: which model, image size and config."""
import json
import pickle
from pathlib import Path

import foreign
import pytest
import timm
import torch
from converting import CASES, SIZES, agree, load, naver, refused, save_torch
from huggingface_hub import ModelCard

from timm_rope._timm import save_for_hf
from timm_rope.cli.convert.architecture import match
from timm_rope.encodings._signature import read_signature
from timm_rope.models.rope_vit import MODEL_ARGS
from timm_rope.weights.layouts import Weights

# --

@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    (tmp_path / 'work').mkdir()
    monkeypatch.chdir(tmp_path / 'work')
    return tmp_path / 'work'


# -- which model

@pytest.mark.parametrize('size', ['small', 'base'])
@pytest.mark.parametrize('encoding,ape', [('mixed', ''), ('mixed', '_ape'), ('none', '_ape')])
def test_a_standard_size_needs_no_arguments(size, encoding, ape):
    name = f'vit_{size}_rope_{encoding}{ape}' if encoding != 'none' else f'vit_{size}_ape'
    tensors = timm.create_model(name, device='meta', num_classes=21).state_dict()
    tensors = {key: value for key, value in tensors.items() if not key.endswith(('grid', 'signature'))}
    layout = 'timm VisionTransformer' if ape else 'timm Eva'
    arch = match(Weights(layout, tensors, encoding=encoding))
    assert arch.model == name and arch.args == dict(in_chans=3, num_classes=21, img_size=224)
    assert arch.heads == MODEL_ARGS[name]['num_heads']


def test_vit5_needs_no_arguments(convert):
    source = save_torch(foreign.vit5())
    code, out, _ = convert(source, 'out')
    assert code == 0 and 'vit_small_rope_vit5' in out
    model, x = timm.create_model('local-dir:out', pretrained=True).eval(), torch.randn(1, 3, 48, 32)
    expected = foreign.forward_vit5(foreign.vit5(), x)
    assert model.rope.options['registers'] == 4 and (model(x) - expected).abs().max() < 2e-5 * expected.abs().max()


def test_nothing_is_guessed(convert):
    source = save_torch(CASES['ape'][0])
    refused(convert, ['no trace', 'vit_tiny_rope_axial_ape or vit_tiny_ape', '--model'], source, 'out')
    refused(convert, ['encoding'], source, 'out', '--model', 'vit_tiny_rope_spherical_ape')
    refused(convert, ['position embedding'], source, 'out', '--model', 'vit_tiny_rope_axial')
    refused(convert, ["rotary encoding 'mixed'"], save_torch(naver()), 'out', '--model', 'vit_tiny_rope_axial')
    registers = {**naver(mixed=False)['model'], 'reg_token': torch.zeros(1, 1, 128)}
    refused(convert, ['unexpected reg_token'], save_torch({'model': registers}), 'out')


def test_what_the_file_leaves_open_is_asked(convert):
    source = save_torch(foreign.liere_lightning())
    refused(convert, ['rope_share_layers must be chosen', 'oversight', '-args rope_share_layers='], source, 'out')
    spiral = foreign.spiral_deit()
    del spiral['args']
    source = save_torch(spiral)
    refused(convert, ['rope_directions must be chosen', '16 directions'], source, 'out')
    assert convert(source, 'out', '--model-args', 'rope_directions=4')[0] == 0
    x = torch.randn(1, 3, 32, 32)
    assert agree(load(), x, foreign.forward_spiral(foreign.spiral_deit(), x))
    theirs = timm.create_model('vit_tiny_patch16_224', **{**SIZES, 'embed_dim': 72})
    refused(convert, ['num_heads=...'], save_torch(theirs.state_dict()), 'other')


def swin():
    """{'model': ...} with NAVER's keys: merging at the end of a stage, frequencies in every block."""
    torch.manual_seed(0)
    args = dict(embed_dim=32, depths=(2, 1), num_heads=(1, 2), num_classes=5)
    ours = timm.create_model('swin_tiny_rope_mixed', **args).eval()
    out = {}
    for key, value in ours.state_dict().items():
        if '.attn.rope.' in key:
            if key.endswith('.freqs'):
                out[key.replace('rope.freqs', 'rope_freqs')] = value[:, 0]
            continue
        key = key.replace('layers.1.downsample', 'layers.0.downsample').replace('head.fc', 'head')
        out[key] = value
    return {'model': {**out, 'layers.0.blocks.1.attn_mask': torch.zeros(64, 49, 49)}}, ours


def test_swin_is_refused_where_there_is_no_model_of_it(convert, monkeypatch):
    vit = {name: args for name, args in MODEL_ARGS.items() if name.startswith('vit')}
    monkeypatch.setattr('timm_rope.cli.convert.architecture.known_models', lambda: vit)
    refused(convert, ['NAVER RoPE-Swin', 'mixed', 'no Swin model in this version yet'], save_torch(swin()[0]), 'out')


def test_swin(convert):
    checkpoint, ours = swin()
    status, out, err = convert(save_torch(checkpoint), 'out')
    assert status == 0, err
    assert '32 wide, 3 blocks, (1, 2) heads' in out and 'layers.*.blocks.*.attn_mask' in out
    assert json.loads(Path('out/config.json').read_text())['architecture'] == 'swin_tiny_rope_mixed'
    x = torch.randn(1, 3, 224, 224)
    with torch.no_grad():
        assert torch.equal(load()(x), ours(x)) and ours(x).std() > 0
    assert convert('out', 'again')[0] == 0 and convert(save_torch(ours.state_dict()), 'bare')[0] == 0
    for name in ('again', 'bare'):
        assert Path(name, 'model.safetensors').read_bytes() == Path('out/model.safetensors').read_bytes()


@pytest.mark.parametrize('check', [(), ('--check',)])
def test_swin_with_fixed_frequencies(check, convert):
    checkpoint, _ = swin()
    for key, freqs in checkpoint['model'].items():
        if key.endswith('rope_freqs'):  # of window 4, and with a temperature that is not the published one
            w = 20. ** (-torch.arange(8) / 8)
            freqs[0], freqs[1] = torch.cat((w, 0 * w)), torch.cat((0 * w, w))
    for key in [key for key in checkpoint['model'] if key.endswith('rope_freqs')]:
        place = torch.arange(16.)
        name = key.removesuffix('freqs')
        checkpoint['model'].update({f'{name}t_x': place % 4, f'{name}t_y': place // 4})
    status, out, err = convert(save_torch(checkpoint), 'out', *check)
    assert status == 0, err
    assert 'image size: 128 x 128, 32 times the window' in out and '(1, 2) heads' in out
    assert ('no other implementation of NAVER RoPE-Swin' in out) == bool(check)
    model = load()
    assert model.layers[0].blocks[0].window_size == (4, 4) and model.patch_embed.img_size == (128, 128)
    direct = timm.create_model(
        'swin_tiny_rope_axial', pretrained=True, embed_dim=32, depths=(2, 1), img_size=128, window_size=4,
        pretrained_cfg_overlay=dict(state_dict=checkpoint, num_classes=5), num_classes=5).eval()
    x = torch.randn(1, 3, 128, 128)
    with torch.no_grad():
        assert torch.equal(model(x), direct(x)) and model(x).std() > 0
    assert direct.rope.options['temperature'] == 20


def test_bare_weights_of_a_swin_of_ours(convert):
    args = dict(depths=(1, 1, 1, 1), num_classes=5)  # the widths of Swin-T
    for name in ('swin_tiny_rope_axial', 'swin_tiny_rope_mixed_rpb'):
        ours = timm.create_model(name, **args).eval()
        status, out, err = convert(save_torch(ours.state_dict()), name, '--check')
        assert status == 0, err
        assert json.loads(Path(name, 'config.json').read_text())['architecture'] == name
        assert 'assumed            heads' not in out
        x = torch.randn(1, 3, 224, 224)
        with torch.no_grad():
            assert torch.equal(load(name)(x), ours(x))
    narrow = timm.create_model('swin_tiny_rope_axial', embed_dim=32, num_heads=(1, 2, 4, 8), **args)
    state = narrow.state_dict()
    assert convert(save_torch(state), 'told')[0] == 0
    for key in [key for key in state if key.endswith('rope.signature')]:  # as weights of other tools may lack it
        text = read_signature(state[key]).replace(',head_dim=32', '')
        state[key] = torch.tensor(list(text.encode()), dtype=torch.uint8)
    source = save_torch(state)
    refused(convert, ['32 wide, do not tell their heads', 'num_heads=...'], source, 'other')
    assert convert(source, 'other', '--model-args', 'num_heads=(1, 2, 4, 8)')[0] == 0
    configs = [json.loads(Path(name, 'config.json').read_text())['model_args'] for name in ('told', 'other')]
    assert configs[0] == configs[1] and configs[0]['num_heads'] == [1, 2, 4, 8]
    shared = timm.create_model('swin_tiny_rope_mixed', rope_share_heads=True, **args)
    assert convert(save_torch(shared.state_dict()), 'shared', '--model-args', 'rope_share_heads=True')[0] == 0
    assert [stage.blocks[0].attn.num_heads for stage in load('shared').layers] == [3, 6, 12, 24]


# -- image size and the config

def test_image_size(convert):
    source = save_torch(foreign.naver_vit(ape=True, grid=(3, 5)))
    assert convert(source, 'out')[0] == 0
    assert load().patch_embed.img_size == (24, 40)
    refused(convert, ['position embedding', '3 x 5'], source, 'other', '--img-size', '64')
    square = save_torch(naver(True), 'square.pth')
    refused(convert, ['position embedding', '4 x 4'], square, 'other', '--img-size', '64')
    # without one, a nominal size is free and does not change what the weights were trained on
    assert convert(save_torch(naver()), 'rotary', '--img-size', '64', '96')[0] == 0
    model = load('rotary')
    assert model.patch_embed.img_size == (64, 96) and model.rope.reference_grid.tolist() == [4, 4]
    assert 'assumed            image size: 224' in convert(save_torch(naver(mixed=False)), 'axial')[1]
    assert load('axial').rope.reference_grid.tolist() == [28, 28]


def test_a_config_does_not_resize_the_position_embedding(convert):
    model = timm.create_model('vit_tiny_rope_mixed_ape', **SIZES)
    save_for_hf(model, 'saved', safe_serialization=True)
    config = json.loads(Path('saved/config.json').read_text())
    config['model_args']['img_size'] = 64
    Path('saved/config.json').write_text(json.dumps(config))
    assert convert('saved', 'out')[0] == 0
    assert torch.equal(load().pos_embed, model.pos_embed)


def test_data_config(convert):
    source = save_torch(naver())
    args = ['--mean', '.5', '--std', '.1', '.2', '.3', '--crop-pct', '.9', '--interpolation', 'bilinear']
    status, out, _ = convert(source, 'out', *args, '--license', 'mit')
    data = timm.data.resolve_model_data_config(load())
    assert list(data['mean']) == [.5, .5, .5] and list(data['std']) == [.1, .2, .3]
    assert data['crop_pct'] == .9 and data['interpolation'] == 'bilinear' and list(data['input_size']) == [3, 32, 32]
    assert status == 0 and 'assumed            mean' not in out and 'assumed            heads' not in out
    assert json.loads(Path('out/config.json').read_text())['pretrained_cfg']['license'] == 'mit'
    assert ModelCard.load('out/README.md').data.license == 'mit'
    save_for_hf(load(), 'again', safe_serialization=True, model_config=dict(label_names=list('abcde')))
    assert convert('again', 'copy')[0] == 0
    copied = json.loads(Path('copy/config.json').read_text())
    assert copied['pretrained_cfg']['mean'] == [.5, .5, .5] and copied['label_names'] == list('abcde')
    assert 'license' not in copied['pretrained_cfg'], 'timm copies a licence to whatever is saved: it is no statement'


@pytest.mark.parametrize('args,words', [
    (['--mean', '.5', '.5'], ['mean', '1 or 3']), (['--std', '0'], ['std must be positive']),
    (['--crop-pct', '1.5'], ['crop_pct', '1.5']), (['--img-size', '1', '2', '3'], ['img_size', '[1, 2, 3]']),
    (['--img-size', '33'], ['multiple']), (['--license', 'my own\nlicense'], ['license', 'apache-2.0']),
    (['--model-args', 'depth'], ['KEY=VALUE', "'depth'"]), (['--model-args', 'nonsense=1'], ['nonsense']),
    (['--model-args', 'checkpoint_path=x'], ['checkpoint_path']), (['--model-args', 'img_size=48'], ['--img-size']),
    (['--model', 'vit_tiny_rope_mixd'], ['vit_tiny_rope_mixd', 'list']),
    (['--model', 'vit_small_rope_mixed.nobody'], ["'nobody'", 'naver_in1k']),
    (['--model-args', 'embed_dim=64'], ['patch_embed.proj', '128']), (['--filename', 'other.pth'], ['other.pth']),
    (['--model-args', 'num_heads=3'], ['num_heads'])])
def test_bad_arguments(args, words, convert):
    refused(convert, words, save_torch(naver()), 'out', *args)


def test_bad_sources(convert):
    refused(convert, ['no weight file', 'missing.pth'], 'missing.pth', 'out')
    refused(convert, ['hf-hub:org/name'], 'org/name', 'out')
    Path('text.pth').write_text('hello')
    refused(convert, ['text.pth', 'no weight file'], 'text.pth', 'out')
    refused(convert, ['none of the known layouts'], save_torch({'a.weight': torch.ones(2)}), 'out')
    Path('many').mkdir()
    for i in range(2):
        save_torch(naver(seed=i), f'many/{i}.pth')
    refused(convert, ['several', '0.pth'], 'many', 'out')
    assert convert('many', 'out', '--filename', '1.pth')[0] == 0
    assert torch.equal(load().head.weight, naver(seed=1)['model']['head.weight'])


@pytest.mark.parametrize('text,words', [
    ('{"architecture": ', ['config.json', 'JSON']),
    (json.dumps(dict(architecture='deit3_small_patch16_224')), ['deit3_small', '384', '128']),
    (json.dumps(dict(architecture='resnet18')), ['resnet18']),
    (json.dumps(dict(architecture='vit_tiny_rope_mixed', model_args=dict(checkpoint_path='x'))), ['checkpoint_path']),
    (json.dumps(dict(architecture='vit_tiny_rope_mixed', model_args=dict(rope_warm_start=True))), ['rope_warm_start']),
    (json.dumps(dict(architecture='vit_tiny_rope_axial')), ['mixed', 'axial'])])
def test_bad_configs(text, words, convert):
    source = save_torch(naver())
    Path('config.json').write_text(text)
    refused(convert, words, source, 'out')


def test_a_rotation_that_is_not_ours_is_refused(convert):
    args = dict(SIZES, rope_grid_indexing='ij')
    theirs = timm.create_model('vit_small_patch16_rope_mixed_224', **args)
    save_for_hf(theirs, 'theirs', safe_serialization=True, model_args=args)
    config = json.loads(Path('theirs/config.json').read_text())
    assert config['model_args']['rope_grid_indexing'] == 'ij'
    refused(convert, ['whose rotation no model of this version computes'], 'theirs', 'out')


@pytest.mark.parametrize('text', ['{}', '[]', json.dumps(dict(architecture='unheard_of'))])
def test_configs_that_say_nothing(text, convert):
    source = save_torch(naver())
    Path('config.json').write_text(text)  # NAVER's own is {}
    assert convert(source, 'out')[0] == 0


def test_malicious_pickle(convert):
    class Evil:
        def __reduce__(self):
            return Path.touch, (Path('marker'),)

    torch.save({'model': {**naver()['model'], 'x': Evil()}}, 'evil.pth')
    refused(convert, ['refused', 'evil.pth'], 'evil.pth', 'out')
    Path('plain.bin').write_bytes(pickle.dumps({'model': Evil()}))
    refused(convert, ['refused', 'plain.bin'], 'plain.bin', 'out')
    assert not Path('marker').exists()
