"""A model with its encoding changed: a copy, everything else untouched, saved under its new name, and it learns."""
import copy

import pytest
import timm
import torch
from exact_changes import PAIRS, WIDE, error, model_of
from tiny import make
from torch import nn

import timm_rope
from timm_rope import convert_encoding
from timm_rope._timm import save_for_hf
from timm_rope.encodings import ENCODINGS


def test_the_model_is_a_copy_with_another_encoding():
    model = model_of('axial', reg_tokens=1).train()
    model.blocks[0].requires_grad_(False)
    before, places = {k: v.clone() for k, v in model.state_dict().items()}, list(model._modules)
    rope, random = model.rope, torch.get_rng_state()
    converted = convert_encoding(model, 'mixed')
    assert torch.equal(torch.get_rng_state(), random), 'the random state is left alone'
    assert model.rope is rope and all(block.attn.rotation is rope.rotation for block in model.blocks)
    assert all(torch.equal(before[k], v) for k, v in model.state_dict().items())
    assert model.pretrained_cfg['architecture'] == 'vit_tiny_rope_axial'
    assert type(converted) is type(model) and list(converted._modules) == places
    assert all(block.attn.rotation is converted.rope.rotation for block in converted.blocks)
    assert all(module.training for module in converted.modules())
    assert not any(p.requires_grad for p in converted.blocks[0].parameters())
    assert converted.rope.freqs.requires_grad and converted.blocks[1].attn.qkv.weight.requires_grad
    ours = {t.data_ptr() for t in [*model.parameters(), *model.buffers()]}
    assert not ours & {t.data_ptr() for t in [*converted.parameters(), *converted.buffers()]}
    assert not any(module.training for module in convert_encoding(model.eval(), 'mixed').modules())


def test_frozen_frequencies_stay_frozen():
    model = model_of('mixed').requires_grad_(False)
    assert not any(p.requires_grad for p in convert_encoding(model, 'liere').parameters())


def test_dtypes():
    double = model_of('mixed').double()
    converted = convert_encoding(double, 'liere')
    assert all(t.dtype == torch.float64 for t in converted.parameters())
    assert error(double, converted, 48, 40) < 1e-12
    axial = model_of('axial').double()
    assert error(axial, convert_encoding(axial, 'mixed'), 48, 40) < 1e-12, 'frequencies at full precision'
    half = convert_encoding(model_of('axial').to(torch.bfloat16), 'mixed')
    assert half.rope.freqs.dtype == torch.float32 and half.head.weight.dtype == torch.bfloat16


def test_a_model_with_blocks_of_its_own_copy_of_the_rotation():
    model = model_of('mixed')
    model.blocks = copy.deepcopy(model.blocks)  # as pruning or surgery leaves it
    assert error(model, convert_encoding(model, 'liere'), 32, 40) < 1e-5


def test_pruned_models():
    model = model_of('axial_learned')
    model.prune_intermediate_layers([1], prune_head=False)
    converted = convert_encoding(model, 'mixed')
    assert converted.rope.freqs.shape[1] == 2
    assert error(model, converted, 32, 32) < 1e-5


def test_in_inference_mode():
    model = model_of('axial')
    with torch.inference_mode():
        converted = convert_encoding(model, 'mixed')
    assert not any(t.is_inference() for t in [*converted.parameters(), *converted.buffers()])
    converted(torch.randn(1, 3, 32, 32)).sum().backward()


def test_meta_models_are_refused():
    for name in ('axial', 'mixed'):
        with pytest.raises(ValueError, match='on the meta device'):
            convert_encoding(make(f'vit_tiny_rope_{name}', device='meta'), 'liere', block=2)


def test_wrapped_models_are_refused():
    plain = make('vit_tiny_rope_axial')
    for wrapped, words in (
            (nn.DataParallel(plain), r'got DataParallel: pass its \.module'),
            (torch.compile(plain, backend='eager'), r'got OptimizedModule: pass its \._orig_mod'),
            (torch.jit.script(plain), 'got RecursiveScriptModule'),
            (timm.create_model('vit_tiny_rope_axial', depth=3, features_only=True),
             r'got FeatureGetterNet: pass its \.model'),
            (torch.fx.GraphModule(plain, torch.fx.Graph()), 'got GraphModule'),
            (nn.Linear(2, 2), 'got Linear.'), ('vit_tiny_rope_axial', 'got str.'), (None, 'got NoneType.')):
        with pytest.raises(TypeError, match=f'plain model with a rotary encoding.*{words}'):
            convert_encoding(wrapped, 'mixed')
    with pytest.raises(ValueError, match='The model has no rotary encoding'):
        convert_encoding(make('vit_tiny_ape'), 'mixed')


def test_sharded_models_are_refused():
    from torch import distributed
    if not hasattr(pytest.importorskip('torch.distributed.fsdp'), 'fully_shard'):
        pytest.skip('fully_shard is public from torch 2.6')
    from torch.distributed.fsdp import fully_shard
    from torch.distributed.tensor import init_device_mesh
    distributed.init_process_group('gloo', store=distributed.HashStore(), rank=0, world_size=1)
    try:
        model = make('vit_tiny_rope_axial', depth=1)
        fully_shard(model, mesh=init_device_mesh('cpu', (1,)))
        with pytest.raises(TypeError, match='convert before fully_shard'):
            convert_encoding(model, 'mixed')
    finally:
        distributed.destroy_process_group()


def test_models_without_a_registered_name():
    model = timm_rope.RopeVisionTransformer(
        img_size=32, patch_size=8, embed_dim=48, depth=2, num_heads=2, num_classes=5, rope_encoding='uniform').eval()
    converted = convert_encoding(model, 'mixed')
    assert error(model, converted, 32, 48) < 1e-5 and not hasattr(converted, 'pretrained_cfg')


# -- names and files

@pytest.mark.parametrize('source,kwargs,target,options,name', [
    ('vit_small_rope_axial_ape', dict(rope_temperature=30., img_size=48), 'mixed', {}, 'vit_small_rope_mixed_ape'),
    ('vit_tiny_rope_mixed', dict(rope_share_heads=True), 'liere', dict(block=4), 'vit_tiny_rope_liere'),
    ('vit_tiny_rope_mixed', dict(rope_encoding='uniform', rope_coords='ends', pos_embed='learn'), 'axial_learned', {},
     'vit_tiny_rope_axial_learned'),
    ('vit_tiny_ape', dict(rope_encoding='spherical', rope_order='xy', rope_reference_grid=[3, 5]), 'spherical_learned',
     dict(rope_share_layers=True), 'vit_tiny_rope_spherical_learned_ape'),
])
def test_saved_under_the_name_of_the_new_architecture(source, kwargs, target, options, name, tmp_path):
    model = make(source, **{**WIDE, **kwargs})
    model.set_input_size((40, 64))
    model.reset_classifier(3, 'avg')
    converted = convert_encoding(model, target, **options)
    assert converted.pretrained_cfg['architecture'] == name and converted.default_cfg is converted.pretrained_cfg
    save_for_hf(converted, tmp_path, safe_serialization=True)
    back = timm.create_model(f'local-dir:{tmp_path}', pretrained=True).eval()
    x = torch.randn(2, 3, 40, 64)
    assert torch.equal(back(x), converted(x)) and back.rope.options == converted.rope.options
    assert repr(back.rope) == repr(converted.rope) and (back(x) - model(x)).abs().max() < 1e-5


def test_the_origin_of_the_weights_is_not_claimed():
    model = model_of('axial')
    origin = dict(
        tag='in1k', hf_hub_id='someone/axial', hf_hub_filename='a.bin', url='https://x', file='/a', source='file')
    model.pretrained_cfg = model.default_cfg = {**model.pretrained_cfg, **origin, 'mean': (0.1, 0.2, 0.3)}
    model.pretrained_model_args = dict(rope_temperature=3.)
    converted = convert_encoding(model, 'mixed')
    assert not set(origin) & set(converted.pretrained_cfg)
    assert converted.pretrained_cfg['mean'] == (0.1, 0.2, 0.3) and not converted.pretrained_model_args
    assert model.pretrained_cfg['tag'] == 'in1k' and model.pretrained_model_args == dict(rope_temperature=3.)


def test_an_architecture_of_others_keeps_its_name():
    model = model_of('axial')
    model.pretrained_cfg = {**model.pretrained_cfg, 'architecture': 'my_vit'}
    converted = convert_encoding(model, 'mixed', coords='index')
    assert converted.pretrained_cfg['architecture'] == 'my_vit'
    assert converted._model_args['rope_encoding'] == 'mixed' and 'rope_encoding' not in model._model_args


# -- training

@pytest.mark.parametrize('source,target', PAIRS)
def test_converted_frequencies_learn(source, target):
    model = convert_encoding(model_of(source), target).train()
    assert [n for n, _ in model.named_parameters()].count('rope.freqs') == 1
    before = model.rope.freqs.detach().clone()
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    loss = nn.functional.cross_entropy(model(torch.randn(4, 3, 32, 32)), torch.arange(4))
    loss.backward()
    optimizer.step()
    moved = (model.rope.freqs - before).abs()
    assert moved.isfinite().all() and (moved.sum((0, -1)) > 0).all(), 'of every layer and head'
    if target == 'mixed' and not ENCODINGS[source].oblique:
        zero = before == 0
        assert zero.sum() == zero.numel() // 2 and (moved[zero] > 0).all(), 'the components across the axes learn too'
    if target == 'liere' and (before == 0).any():
        assert (moved[before == 0] > 0).float().mean() > 0.5, 'and the generators beyond the pairs'


# -- Swin

@pytest.mark.parametrize('bias', [False, True])
def test_every_block_of_a_swin_is_converted(bias, tmp_path):
    torch.manual_seed(0)
    name = f'swin_tiny_rope_axial{"_rpb" if bias else ""}'
    small = dict(img_size=32, embed_dim=16, depths=(2, 1), num_heads=(1, 2), window_size=4, num_classes=5)
    model = timm.create_model(name, **small).eval()
    with torch.no_grad():
        for block in (block for layer in model.layers for block in layer.blocks):
            block.attn.qkv.weight.mul_(20)
    x = torch.randn(2, 3, 32, 32)
    expected = model(x)
    for target, architecture in (('axial_learned', name), ('mixed', name.replace('axial', 'mixed')), ('liere', name)):
        options = dict(coords='index') if target == 'liere' else {}
        converted = convert_encoding(model, target, **options)
        ropes = [block.attn.rope for layer in converted.layers for block in layer.blocks]
        assert {rope.name for rope in ropes} == {target} and len({id(rope) for rope in ropes}) == 3
        assert (converted(x) - expected).abs().max() <= 1e-5 * expected.abs().max()
        converted(x).square().sum().backward()
        assert all(rope.freqs.grad.abs().max() > 0 for rope in ropes)
        assert converted.pretrained_cfg['architecture'] == architecture
        save_for_hf(converted, tmp_path / target, safe_serialization=True)
        again = timm.create_model(f'local-dir:{tmp_path / target}', pretrained=True).eval()
        assert torch.equal(again(x), converted(x))
    assert model.rope.name == 'axial' and torch.equal(model(x), expected)
    with pytest.raises(ValueError, match='every block of a Swin has one: load these weights and pass the model'):
        convert_encoding(model.state_dict(), 'mixed')
