"""`python -m timm_rope convert`: the folder computes what the checkpoint did, says where it is from, and is whole."""
import argparse
import hashlib
import json
import os
import pickle
import resource
import signal
from pathlib import Path

import foreign
import pytest
import timm
import torch
import torch.nn.functional as F
from hub_server import HubServer
from huggingface_hub import ModelCard
from safetensors.torch import load_file, save, save_file

import timm_rope.cli.convert.command as command
from timm_rope.__main__ import main
from timm_rope.cli.convert.architecture import match
from timm_rope.cli.convert.hub_folder import CheckFailed
from timm_rope.cli.convert.originals import _resized
from timm_rope.encodings._signature import read_signature
from timm_rope.models.rope_vit import MODEL_ARGS
from timm_rope.weights.layouts import Weights

SIZES = dict(embed_dim=128, depth=2, num_heads=2, patch_size=8, img_size=32, num_classes=5)


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    (tmp_path / 'work').mkdir()
    monkeypatch.chdir(tmp_path / 'work')
    return tmp_path / 'work'


@pytest.fixture
def convert(capsys):
    """Run the command; exit status, its lines, its standard error."""
    def run(*args):
        status = main(['convert', *map(str, args)])
        out, err = capsys.readouterr()
        assert err.count('\n') == (1 if status else 0), 'an error is one line, success none'
        return status, out, err
    return run


def refused(convert, words, *args, status=2):
    """The command fails with these words and leaves everything as it was."""
    before = snapshot()
    got, _, err = convert(*args)
    assert got == status, err
    for word in words:
        assert word in err, err
    assert snapshot() == before


def snapshot():
    return {str(p): p.read_bytes() if p.is_file() else None for p in sorted(Path('.').rglob('*'))}


def save_torch(checkpoint, name='weights.pth'):
    torch.save(checkpoint, name)
    return name


def load(out='out', **kwargs):
    return timm.create_model(f'local-dir:{out}', pretrained=True, **kwargs).eval()


def agree(model, x, expected):
    with torch.no_grad():
        got = model(x)
    assert expected.std() > 0.1, 'the comparison must not be between silent models'
    return (got - expected).abs().max() < 2e-5 * expected.abs().max()


def naver(ape=False, **kwargs):
    return foreign.naver_vit(ape=ape, **kwargs)


def stray(checkpoint):
    """With an embedding that was never trained, as one published file has."""
    return {'model': {**checkpoint['model'], 'pos_embed': .02 * torch.randn(1, 16, 128)}}


def axial(checkpoint, x):
    unused = {key: value for key, value in checkpoint['model'].items() if key != 'pos_embed'}
    return foreign.forward_naver({'model': unused}, x, axial=True)


# -- the weights of others

SHARED, OWN = ('--model-args', 'rope_share_layers=True'), ('--model-args', 'rope_share_layers=False')
CASES = {
    'mixed': (naver(), (), foreign.forward_naver, (32, 48)),
    'mixed_ape': (naver(True), (), foreign.forward_naver, (32, 32)),
    'axial': (naver(mixed=False), ('--img-size', '32'), axial, (48, 32)),
    'axial with a stray embedding': (stray(naver(mixed=False)), (), axial, (32, 40)),
    'axial_ape': (
        naver(True, mixed=False), ('--model', 'vit_tiny_rope_axial_ape'),
        lambda c, x: foreign.forward_naver(c, x, axial=True), (32, 32)),
    'ape': (naver(True, mixed=False), ('--model', 'vit_tiny_ape'), foreign.forward_naver, (32, 32)),
    'spiral': (foreign.spiral_deit(), (), foreign.forward_spiral, (32, 32)),
    'liere, as computed': (foreign.liere_lightning(), SHARED, foreign.forward_liere, (24, 16)),
    'liere, per layer': (
        foreign.liere_lightning(4), OWN, lambda c, x: foreign.forward_liere(c, x, first_layer=False), (16, 24)),
    'liere, one layer': (foreign.liere_lightning(layers=1), (), foreign.forward_liere, (16, 16)),
    'liere, absolute': (foreign.liere_lightning(None), (), foreign.forward_liere, (16, 16)),
}


@pytest.mark.parametrize('name', CASES)
def test_weights_of_others(name, convert):
    checkpoint, args, reference, size = CASES[name]
    source = save_torch(checkpoint)
    before = Path(source).read_bytes()
    status, out, _ = convert(source, 'out', *args)
    assert status == 0 and Path(source).read_bytes() == before
    assert {p.name for p in Path('out').iterdir()} == {'model.safetensors', 'config.json', 'README.md'}
    model = load()
    x = torch.randn(2, 3, *size)
    assert agree(model, x, reference(checkpoint, x))

    written, state = load_file('out/model.safetensors'), model.state_dict()
    assert set(written) == set(state)
    assert all(torch.equal(value, state[key]) for key, value in written.items())
    inner = checkpoint.get('model_ema', checkpoint.get('model', {}))
    for key in ('cls_token', 'patch_embed.proj.weight', 'blocks.1.attn.qkv.weight', 'head.bias'):
        if key in inner:
            assert torch.equal(written[key], inner[key])
    config = json.loads(Path('out/config.json').read_text())
    assert config['architecture'] in MODEL_ARGS and config['num_classes'] == 5
    assert config['pretrained_cfg']['input_size'] == [3, *model.patch_embed.img_size]
    assert not {'license', 'hf_hub_id', 'tag', 'origin_url', 'state_dict'} & set(config['pretrained_cfg'])
    encoding = MODEL_ARGS[config['architecture']]['rope_encoding']
    assert f'  encoding           {encoding}' in out and f'{config["architecture"]} with' in out


def test_the_same_from_safetensors_and_with_wrappers(convert):
    checkpoint = naver()
    save_file(checkpoint['model'], 'a.safetensors')
    wrapped = {'state_dict': {f'module.{k}': v for k, v in checkpoint['model'].items()}, 'epoch': 3}
    for source in ('a.safetensors', save_torch(checkpoint, 'b.bin'), save_torch(wrapped, 'c.ckpt')):
        assert convert(source, f'out_{source[0]}')[0] == 0
    first = Path('out_a/model.safetensors').read_bytes()
    assert Path('out_b/model.safetensors').read_bytes() == first == Path('out_c/model.safetensors').read_bytes()
    assert Path('out_a/config.json').read_text() == Path('out_b/config.json').read_text()


def test_a_shared_generator_is_written_once(convert):
    convert(save_torch(foreign.liere_lightning()), 'out', *SHARED)
    assert load_file('out/model.safetensors')['rope.freqs'].shape[1] == 1


@pytest.mark.parametrize('kind', ['cat', 'mixed'])
@pytest.mark.parametrize('ape', ['', '_ape'])
def test_timm_eva(kind, ape, convert):
    torch.manual_seed(0)
    name = f'vit_small_patch16_rope{"_mixed" if kind == "mixed" else ""}{ape}_224'
    theirs = timm.create_model(name, **SIZES).eval()
    timm.models.save_for_hf(theirs, 'theirs', safe_serialization=True)
    status, out, err = convert('theirs', 'out', '--check')
    assert status == 0, err
    assert out.count("logits differ from timm's Eva") == 2
    with torch.no_grad():
        x = torch.randn(1, 3, 32, 32)
        torch.testing.assert_close(load()(x), theirs(x), rtol=0, atol=1e-5 * float(theirs(x).abs().max()))
    config = json.loads(Path('out/config.json').read_text())
    assert config['architecture'] == f'vit_tiny_rope_{"mixed" if kind == "mixed" else "axial"}{ape}'


@pytest.mark.parametrize('name,args', [
    ('deit3_small_patch16_224', {}), ('vit_small_patch16_224', {}), ('vit_small_patch16_224', dict(global_pool='avg')),
    ('deit3_small_patch16_224', dict(reg_tokens=2)), ('deit3_small_patch16_224', dict(num_classes=0)),
    ('vit_small_patch16_224', dict(in_chans=1)), ('deit3_small_patch16_224', dict(img_size=(24, 40))),
    ('vit_small_patch16_224', dict(qkv_bias=False, mlp_ratio=2., img_size=(24, 40)))])
@pytest.mark.parametrize('config', [True, False])
def test_timm_vision_transformer(name, args, config, convert):
    torch.manual_seed(0)
    args = {**SIZES, **args}
    theirs = timm.create_model(name, **args).eval()
    extra = []
    if config:
        source = 'theirs'
        timm.models.save_for_hf(theirs, source, safe_serialization=True)
    else:
        source = save_torch(theirs.state_dict())
        extra = ['--model-args', 'num_heads=2', '--mean', '.5', '--std', '.5']
        extra += ['--img-size', '24', '40'] if isinstance(args['img_size'], tuple) else []
    status, out, err = convert(source, 'out', '--check', *extra)
    assert status == 0, err
    assert 'much of the code is the same' in out
    x = torch.randn(1, theirs.patch_embed.proj.in_channels, *theirs.patch_embed.img_size)
    with torch.no_grad():
        expected = theirs(x)
        assert expected.abs().max() > 0
        torch.testing.assert_close(load()(x), expected, rtol=0, atol=1e-5 * float(expected.abs().max()))


@pytest.mark.parametrize('name,args', [
    ('vit_tiny_rope_spherical', dict(rope_order='xy', rope_coords='ends')), ('vit_tiny_rope_axial_learned_ape', {}),
    ('vit_tiny_rope_spiral', dict(rope_directions=8)), ('vit_tiny_rope_mixed', dict(rope_share_heads=True)),
    ('vit_tiny_rope_liere', dict(rope_block=4, rope_share_layers=True)), ('vit_tiny_ape', dict(no_embed_class=False)),
    ('vit_tiny_rope_axial', dict(rope_temperature=50., norm_eps=1e-3)), ('vit_tiny_rope_uniform', dict(reg_tokens=1))])
def test_ours(name, args, convert):
    """From a bare state dict and from a folder; what stands in no tensor needs the config or the user."""
    torch.manual_seed(0)
    ours = timm.create_model(name, **{**SIZES, 'img_size': (32, 48)}, **args).eval()
    timm.models.save_for_hf(ours, 'saved', safe_serialization=True)
    extra = [f'norm_eps={args["norm_eps"]}'] if 'norm_eps' in args else []
    assert convert('saved', 'a', '--check')[0] == 0
    status, _, err = convert(save_torch(ours.state_dict()), 'b', '--model-args', 'num_heads=2', *extra)
    assert status == 0, err
    x = torch.randn(1, 3, 40, 32)
    for out in 'ab':
        model = load(out)
        assert json.loads(Path(out, 'config.json').read_text())['architecture'] == name
        assert all(torch.equal(value, model.state_dict()[key]) for key, value in ours.state_dict().items())
        with torch.no_grad():
            assert torch.equal(model(x), ours(x))


@pytest.mark.parametrize('average', [False, True])
def test_a_checkpoint_of_timm_train(average, convert):
    """What train.py was started with stands beside the weights: heads, norm and data need not be said again."""
    torch.manual_seed(0)
    kwargs = dict(SIZES, norm_eps=1e-3, num_heads=4)
    kwargs.pop('img_size'), kwargs.pop('num_classes')
    ours = timm.create_model('vit_tiny_rope_axial', img_size=(32, 40), num_classes=5, **kwargs).eval()
    state = ours.state_dict()
    other = {**state, 'head.bias': state['head.bias'] + 1}
    args = argparse.Namespace(
        model='vit_tiny_rope_axial', img_size=None, mean=[.1, .2, .3], std=None, crop_pct=None, interpolation='',
        model_kwargs=kwargs)
    checkpoint = {'epoch': 3, 'arch': args.model, 'state_dict': other if average else state, 'args': args, 'version': 2}
    save_torch({**checkpoint, **({'state_dict_ema': state} if average else {})}, 'last.pth.tar')
    status, out, err = convert('last.pth.tar', 'out')
    assert status == 0, err
    assert 'assumed            std' in out and 'assumed            mean' not in out and 'heads:' not in out
    model, x = load(), torch.randn(1, 3, 24, 48)
    with torch.no_grad():
        assert torch.equal(model(x), ours(x))
    assert list(timm.data.resolve_model_data_config(model)['mean']) == [.1, .2, .3]
    assert model.patch_embed.img_size == (32, 40) and ('averaged' in out) == average


@pytest.mark.parametrize('bad', [dict(model_kwargs=['num_heads']), dict(mean=5), dict(input_size=3)])
def test_arguments_that_train_py_never_writes(bad, convert):
    state = timm.create_model('vit_tiny_rope_axial', **SIZES).state_dict()
    args = argparse.Namespace(**{'model': 'vit_tiny_rope_axial', **bad})
    save_torch({'arch': args.model, 'state_dict': state, 'args': args}, 'last.pth.tar')
    refused(convert, ['args', *bad], 'last.pth.tar', 'out')


def test_half_precision_stays_as_it_is(convert):
    model = {k: v.bfloat16() for k, v in naver()['model'].items()}
    assert 'bfloat16' in convert(save_torch({'model': model}), 'out')[1]
    written = load_file('out/model.safetensors')
    assert torch.equal(written['head.weight'], model['head.weight']) and load().head.weight.dtype == torch.float32


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
    timm.models.save_for_hf(model, 'saved', safe_serialization=True)
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
    timm.models.save_for_hf(load(), 'again', safe_serialization=True, model_config=dict(label_names=list('abcde')))
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
    theirs = timm.create_model('vit_small_patch16_rope_224', **SIZES, rope_grid_indexing='ij')
    timm.models.save_for_hf(theirs, 'theirs', safe_serialization=True)
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


# -- what it says

def test_card(convert):
    name = 'a |`<b>` [x](y)\n# heading.pth'
    save_torch(CASES['spiral'][0], name)
    status, out, _ = convert(name, 'my_model')
    card = ModelCard.load('my_model/README.md')
    assert card.data.library_name == 'timm' and card.data.license is None
    assert {'timm', 'timm_rope', 'image-classification'} <= set(card.data.tags)
    assert card.data.pipeline_tag == 'image-classification'
    assert hashlib.sha256(Path(name).read_bytes()).hexdigest() in card.text
    assert name.replace('\n', ' ') in card.text.replace('\\', ''), 'on one line'
    assert '# my_model' in card.text.replace('\\', '') and '\n# heading' not in card.text and '<b>' not in card.text
    for said in ('Spiral RoPE', 'directions=4', 'averaged', '4 x 4 patches', '424,197', 'blocks.*.attn.rope.freqs',
                 "timm.create_model('hf-hub:<you>/<name>', pretrained=True)", "'local-dir:"):
        assert said in card.text.replace('\\', ''), said
    assert status == 0 and 'averaged' in out and out.count('blocks.*.attn.rope.freqs') == 1


def test_parameters_and_averages_of_the_card(convert):
    checkpoint = {**naver(), 'model_ema': naver(seed=1)['model']}
    _, out, _ = convert(save_torch(checkpoint), 'out')
    assert 'the raw ones' in out and torch.equal(load().head.weight, checkpoint['model']['head.weight'])
    assert f'{sum(p.numel() for p in load().parameters()):,}' in Path('out/README.md').read_text()


def test_published_weights_keep_their_licence(convert):
    source = save_torch(CASES['ape'][0])
    assert convert(source, 'out', '--model', 'vit_small_ape.naver_in1k')[0] == 0
    cfg = json.loads(Path('out/config.json').read_text())['pretrained_cfg']
    assert cfg['license'] == 'bsd-3-clause' and cfg['tag'] == 'naver_in1k' and 'hf_hub_id' not in cfg
    assert ModelCard.load('out/README.md').data.license == 'bsd-3-clause'


def test_from_the_hub(convert, monkeypatch, tmp_path):
    """Published repositories tell what their files do not."""
    weights = CASES['ape'][0]['model']
    with HubServer() as server:
        hub = server.serve(monkeypatch, tmp_path / 'cache')
        hub.add('naver-ai/deit_small_patch16_LS', {'model.safetensors': save(weights), 'config.json': b'{}'})
        hub.add('me/mine', {'sub/w.safetensors': save(naver()['model'])})
        assert convert('hf-hub:naver-ai/deit_small_patch16_LS', 'out')[0] == 0
        hub.add('me/damaged', {'model.safetensors': save(weights), 'config.json': b'{"architecture": "vit_tiny"}'})
        hub.fault('GET /me/damaged/resolve', body=lambda data: data.replace(b'tiny', b'base'))
        refused(convert, ['config.json of me/damaged', 'corrupt'], 'hf-hub:me/damaged', 'other')
        refused(convert, ['me/mine', 'no file'], 'hf-hub:me/mine', 'other')
        assert convert('hf-hub:me/mine@main', 'mine', '--filename', 'sub/w.safetensors')[0] == 0
    config = json.loads(Path('out/config.json').read_text())
    assert config['architecture'] == 'vit_small_ape' and config['pretrained_cfg']['license'] == 'bsd-3-clause'
    assert 'naver-ai/deit_small_patch16_LS' in Path('out/README.md').read_text()
    assert torch.equal(load().head.weight, weights['head.weight'])
    assert 'hf-hub:me/mine@main, w.safetensors' in Path('mine/README.md').read_text()
    assert ModelCard.load('mine/README.md').data.license is None


# -- --check

@pytest.mark.parametrize('name', ['mixed', 'mixed_ape', 'axial', 'axial_ape', 'ape'])
def test_check_against_timm(name, convert):
    checkpoint, args, _, _ = CASES[name]
    status, out, _ = convert(save_torch(checkpoint), 'out', '--check', *args)
    lines = [line for line in out.splitlines() if "logits differ from timm's Eva" in line]
    assert status == 0 and len(lines) == 2 and '32 x 32' in lines[0] and '48 x 40' in lines[1]
    assert all(float(line.split(' by ')[1].split()[0]) < 1e-5 for line in lines)
    assert 'much of the code' not in out


@pytest.mark.parametrize('other', [0, 1])
def test_check_compares_the_weights_that_are_used(other, convert):
    theirs = [timm.create_model('deit3_small_patch16_224', **SIZES).state_dict() for _ in range(2)]
    source = save_torch({'state_dict': theirs[other], 'state_dict_ema': theirs[1 - other]})
    status, _, err = convert(source, 'out', '--check', '--model-args', 'num_heads=2')
    assert status == 0, err
    assert torch.equal(load().head.weight, theirs[1 - other]['head.weight'])


@pytest.mark.parametrize('name', ['spiral', 'liere, one layer'])
def test_check_says_what_it_did_not_check(name, convert):
    checkpoint, args, _, _ = CASES[name]
    _, out, _ = convert(save_torch(checkpoint), 'out', '--check', *args)
    assert 'only that what was written is what was read' in out and 'logits' not in out


@pytest.mark.parametrize('key,change', [
    ('blocks.1.attn.proj.weight', lambda t: 1.001 * t), ('rope.freqs', lambda t: t.flip(0)),
    ('head.bias', lambda t: t * float('nan')), ('pos_embed', lambda t: t.flip(1))])
def test_check_finds_a_wrong_conversion(key, change, convert, monkeypatch):
    fit = command.fit
    monkeypatch.setattr(command, 'fit', lambda *args: {k: change(v) if k == key else v for k, v in fit(*args).items()})
    source = save_torch(CASES['mixed_ape'][0])
    refused(convert, ['logits differ', 'nothing was written'], source, 'out', '--check', status=1)
    assert convert(source, 'out')[0] == 0, 'only --check can find it'


def test_an_embedding_is_resized_as_the_original_does():
    table = torch.randn(1, 17, 3)
    got = _resized(table, (4, 4), (6, 5), 1)
    image = table[0, 1:].T.view(1, 3, 4, 4)
    expected = F.interpolate(image, (6, 5), mode='bicubic', align_corners=False, antialias=False)
    assert torch.equal(got[:, :1], table[:, :1]) and torch.equal(got[0, 1:].T.view(1, 3, 6, 5), expected)


def damaged(save_for_hf, change):
    def save(model, folder, **kwargs):
        save_for_hf(model, folder, **kwargs)
        change(Path(folder))
    return save


def flip(folder):
    data = bytearray((folder / 'model.safetensors').read_bytes())
    data[-1] ^= 1
    (folder / 'model.safetensors').write_bytes(data)


def other_args(folder):
    config = json.loads((folder / 'config.json').read_text())
    config['model_args']['depth'] = 3
    (folder / 'config.json').write_text(json.dumps(config))


def less(folder):
    tensors = load_file(folder / 'model.safetensors')
    tensors.pop('head.bias')
    save_file(tensors, folder / 'model.safetensors')


@pytest.mark.parametrize('change,words', [
    (flip, ['not read back']), (other_args, ['config.json', 'blocks.2']), (less, ['other keys', 'head.bias'])])
def test_what_was_written_is_read_back(change, words, convert, monkeypatch):
    monkeypatch.setattr(timm.models, 'save_for_hf', damaged(timm.models.save_for_hf, change))
    refused(convert, words, save_torch(naver()), 'out', status=1)


def test_nan_weights_are_equal_to_themselves(convert):
    model = naver()['model']
    model['head.bias'][0] = float('nan')
    assert convert(save_torch({'model': model}), 'out')[0] == 0
    assert load().head.bias.isnan().sum() == 1


# -- whole or not at all

@pytest.fixture(params=['new', 'empty', 'replaced'])
def target(request, convert):
    """A target in one of the states it may have, and the arguments that allow it."""
    if request.param == 'empty':
        Path('out').mkdir()
    if request.param == 'replaced':
        convert(save_torch(naver(seed=5), 'old.pth'), 'out')
        Path('out/notes.txt').write_text('mine')
    return ['--force'] if request.param == 'replaced' else []


def fail(*args, **kwargs):
    raise OSError(28, 'No space left on device')


@pytest.mark.parametrize('step', ['write_card', 'verify', 'timm.models.save_for_hf'])
def test_failures_leave_everything_as_it_was(step, target, convert, monkeypatch):
    source = save_torch(naver())
    with monkeypatch.context() as patch:
        patch.setattr(step if '.' in step else f'timm_rope.cli.convert.command.{step}', fail)
        refused(convert, ['No space left'], source, 'out', *target)
    assert convert(source, 'out', *target)[0] == 0
    assert torch.equal(load().head.weight, naver()['model']['head.weight'])
    assert {p.name for p in Path('out').iterdir()} == {'model.safetensors', 'config.json', 'README.md'}
    assert not list(Path('.').glob('.out*')), 'nothing is left beside it'


def test_a_full_disk(target, convert):
    """What safetensors raises then is no OSError; a limit on the size of files stands in for the disk."""
    source = save_torch(naver())
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, before[1]))
    try:
        refused(convert, ['could not be written'], source, 'out', *target)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, handler)


@pytest.mark.parametrize('number', [signal.SIGTERM, signal.SIGINT])
def test_a_killed_run_cleans_up(number, target, convert, monkeypatch):
    source = save_torch(naver())
    before, handler = snapshot(), signal.getsignal(signal.SIGTERM)
    monkeypatch.setattr(command, 'write_card', lambda *args: os.kill(os.getpid(), number))
    with pytest.raises((SystemExit, KeyboardInterrupt)):
        convert(source, 'out', *target)
    assert snapshot() == before and signal.getsignal(signal.SIGTERM) == handler


def test_the_old_folder_comes_back_if_it_cannot_be_replaced(convert, monkeypatch):
    convert(save_torch(naver(seed=5), 'old.pth'), 'out')
    source, rename = save_torch(naver()), Path.rename

    def stubborn(self, new):
        if self.name.endswith('.partial'):
            raise PermissionError(13, 'not today')
        return rename(self, new)

    monkeypatch.setattr(Path, 'rename', stubborn)
    refused(convert, ['not today'], source, 'out', '--force')


def test_targets_that_are_refused(convert):
    source = save_torch(naver())
    convert(source, 'out')
    refused(convert, ['must not exist or be empty', '--force'], source, 'out')
    Path('mine').mkdir()
    Path('mine/thesis.txt').write_text('dear')
    refused(convert, ['not replaced', 'config.json'], source, 'mine', '--force')
    refused(convert, ['is a file'], source, source)
    refused(convert, ['existing folder'], source, 'no/out')
    refused(convert, ['folder of the weights'], 'out', 'out', '--force')


def test_leftovers_and_links(convert):
    Path('.out.00000000.partial').mkdir()
    Path('.out.00000000.partial/model.safetensors').write_text('half')
    Path('elsewhere').mkdir()
    Path('link').symlink_to('elsewhere')
    source = save_torch(naver())
    assert convert(source, 'out')[0] == 0 and convert(source, 'link')[0] == 0
    assert Path('link').is_symlink() and (Path('elsewhere') / 'config.json').is_file()
    assert Path('.out.00000000.partial/model.safetensors').read_text() == 'half'
    modes = {p.stat().st_mode & 0o777 for p in Path('out').iterdir()}
    assert len(modes) == 1 and Path('out').stat().st_mode & 0o666 in modes


def test_in_python(folder):
    lines = []
    source = save_torch(naver())
    out = command.convert(source, folder / 'out', img_size=64, model_args=dict(norm_eps=1e-5), say=lines.append)
    assert out == folder / 'out' and load(out).norm.eps == 1e-5 and any('verified' in line for line in lines)
    with pytest.raises(ValueError, match='img_size must be one or two positive integers'):
        command.convert('weights.pth', 'other', img_size=True)
    assert not issubclass(CheckFailed, (ValueError, RuntimeError, OSError)), 'it has an exit status of its own'
