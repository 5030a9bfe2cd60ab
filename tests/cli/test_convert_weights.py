"""`python -m timm_rope convert`: the weights of others, and which model computes them."""
import argparse
import json
from pathlib import Path

import foreign
import pytest
import timm
import torch
from converting import CASES, SHARED, SIZES, agree, load, naver, refused, save_torch
from safetensors.torch import load_file, save_file

from timm_rope._timm import save_for_hf
from timm_rope.models.rope_vit import MODEL_ARGS


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    (tmp_path / 'work').mkdir()
    monkeypatch.chdir(tmp_path / 'work')
    return tmp_path / 'work'


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
    save_for_hf(theirs, 'theirs', safe_serialization=True, model_args=SIZES)
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
    extra = []
    if config and {'in_chans', 'img_size'} & set(args) and not hasattr(timm.models, 'get_model_args'):
        pytest.skip('before 1.0.31, config.json does not say what images a model takes')
    args = {**SIZES, **args}
    theirs = timm.create_model(name, **args).eval()
    if config:
        source = 'theirs'
        save_for_hf(theirs, source, safe_serialization=True, model_args=args)
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
    save_for_hf(ours, 'saved', safe_serialization=True)
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
