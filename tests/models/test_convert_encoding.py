"""Exact changes of encoding: the same function, everything else untouched, and a reason where there is none."""
import copy
import itertools
import math
import re

import numpy as np
import oracle
import pytest
import timm
import torch
from safetensors.torch import load_file
from tiny import make
from torch import nn

import timm_rope
from timm_rope import convert_encoding
from timm_rope._timm import save_for_hf
from timm_rope.encodings import ENCODINGS
from timm_rope.encodings._saved import read_encoding
from timm_rope.encodings._signature import read_signature
from timm_rope.rotations import AxesRotation, BlockRotation, PairRotation, PlanesRotation, TripletRotation

NAMES = timm_rope.list_ropes()
LEARNED = [name for name in NAMES if ENCODINGS[name].learned]


def is_exact(source, target):
    """Whether an encoding is a special case of another with default options, by what the two state about themselves."""
    a, b = (timm_rope.create_rope(name, 24, 2, 2) for name in (source, target))
    kinds = [BlockRotation if type(r.rotation) is PlanesRotation else type(r.rotation) for r in (a, b)]
    if not b.learned or a.coords not in b.coords_choices or (a.coords != 'index' and a.centered != b.centered):
        return False
    if target == 'comrope' or (target == 'string' and kinds[0] is BlockRotation):  # blocks whose generators commute
        return source == target
    if kinds[0] is kinds[1]:
        return b.oblique or not a.oblique
    if kinds == [TripletRotation, AxesRotation]:
        return True
    return kinds == [PairRotation, BlockRotation] and a.head_dim % b.rotation.size == 0


EXACT = {source: {target for target in NAMES if is_exact(source, target)} for source in NAMES}
PAIRS = [(source, target) for source in NAMES for target in sorted(EXACT.get(source, ()))]
OTHERS = [pair for pair in itertools.product(NAMES, NAMES) if pair not in PAIRS]
WIDE = dict(embed_dim=48)  # heads of 24 channels: blocks of 8 fit


def rope_of(name, head_dim=24, num_heads=2, depth=2, reference_grid=(3, 4), **options):
    torch.manual_seed(0)
    rope = timm_rope.create_rope(name, head_dim, num_heads, depth, reference_grid, **options)
    if rope.learned:
        with torch.no_grad():
            rope.freqs.add_(0.1 * torch.randn_like(rope.freqs))
    return rope


def model_of(name, **kwargs):
    model = make(f'vit_tiny_rope_{name}', **{**WIDE, **kwargs})
    with torch.no_grad():
        for parameter in model.rope.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model


def error(a, b, *size):
    x = torch.randn(2, 3, *size, dtype=next(a.parameters()).dtype, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        return (a(x) - b(x)).abs().max().item()


# -- the same function

FORMS = [(source, {}, target, {}) for source, target in PAIRS] + [
    ('axial', dict(coords='ends', temperature=30.), 'mixed', {}),
    ('axial', dict(head_dim=14), 'mixed', {}),  # 12 channels turn there, 14 here
    ('axial', dict(head_dim=14), 'liere', dict(block=4)),  # 12 and 12
    ('mixed', dict(head_dim=15), 'liere', dict(block=15)),
    ('mixed', dict(head_dim=15), 'liere', dict(block=7)),  # pair 3 would be split
    ('mixed', {}, 'liere', dict(block=2)), ('mixed', {}, 'liere', dict(block=4)), ('mixed', {}, 'liere', dict(block=6)),
    ('mixed', {}, 'liere', dict(block=24)), ('axial_learned', {}, 'liere', dict(block=12)),
    ('mixed', dict(share_heads=True), 'liere', {}),
    ('mixed', dict(share_layers=True), 'mixed', dict(share_layers=False)),
    ('liere', dict(block=2, coords='index'), 'mixed', {}), ('liere', dict(block=2), 'liere', dict(block=8)),
    ('liere', dict(block=2, coords='ends'), 'liere', dict(block=6)),
    ('liere', dict(block=3, share_heads=True), 'liere', dict(share_heads=False)),
    ('spherical', dict(order='xy', coords='index'), 'spherical_learned', {}),
    ('spherical', dict(temperature=50.), 'spherical_learned', dict(share_heads=True)),
    ('mixed', {}, 'comrope', dict(block=2)), ('axial', {}, 'comrope', dict(block=4)),
    ('comrope', dict(variant='ap'), 'comrope', dict(variant='ld')), ('comrope', dict(block=4), 'liere', dict(block=4)),
    ('comrope', dict(variant='ap', coords='index', share_heads=True), 'liere', {}),
    ('geope', dict(coords='index'), 'liere', dict(block=3)),
    ('spherical', dict(coords='index', reference_grid=(4,)), 'liere', dict(block=3)),
    ('spherical_learned', dict(coords='index', reference_grid=(4,)), 'liere', dict(block=3)),
    ('quatro', dict(coords='index', reference_grid=(4,)), 'liere', dict(block=3)),
    ('spherical', dict(reference_grid=(2, 3, 4), order='yzx'), 'quatro', {}),
    ('spherical', dict(reference_grid=(4,)), 'quatro', {}),
    *((source, dict(reference_grid=grid), target, {}) for source, target in (
        ('axial', 'mixed'), ('golden', 'mixed'), ('nd', 'mixed'), ('axial', 'axial_learned'), ('mixed', 'liere'),
        ('comrope', 'liere'), ('axial_learned', 'string'), ('uniform', 'axial_learned')) for grid in ((4,), (2, 3, 4))),
    ('spherical', dict(order='xy'), 'quatro', dict(share_layers=True)), ('spherical', dict(head_dim=14), 'quatro', {}),
]


@pytest.mark.parametrize('source,given,target,options', FORMS, ids=[
    '-'.join(map(str, [s, *g.values(), t, *o.values()])) for s, g, t, o in FORMS])
def test_turns_as_the_formula_of_the_source(source, given, target, options):
    rope = rope_of(source, **given)
    if given.get('head_dim') == 15 and options['block'] == 7:
        with torch.no_grad():
            rope.freqs[..., 3] = 0
    converted = convert_encoding(rope, target, **options)
    reference = given.get('reference_grid', (3, 4))
    assert converted.name == target and converted.reference_grid.tolist() == list(reference)
    for grid in ((2, 2, 5)[-len(reference):], (1, 7, 3)[-len(reference):]):
        x = torch.randn(1, 2, math.prod(grid) + 2, rope.head_dim)
        for layer, payload in enumerate(converted(grid, 2)):
            got = converted.rotate(x, payload).detach()
            assert torch.equal(got[:, :, :2], x[:, :, :2]), 'prefix tokens do not turn'
            for head in range(2):
                expected = oracle.rotate(x[0, head, 2:].double().numpy(), oracle.rotations(rope, grid, layer, head))
                assert np.abs(got[0, head, 2:].double().numpy() - expected).max() < 5e-6


@pytest.mark.parametrize('source,target', PAIRS)
@pytest.mark.parametrize('kwargs', [dict(reg_tokens=2), dict(pos_embed='learn'),
                                    dict(class_token=False, global_pool='avg', img_size=(16, 48))])
def test_logits(source, target, kwargs):
    model = model_of(source, **kwargs)
    converted = convert_encoding(model, target)
    for size in ((32, 32), (48, 24), (96, 80)):
        assert error(model, converted, *size) < 1e-5
    if model.rope.learned:
        exact = 1e-12 if source != 'comrope' else 1e-6  # its products were rounded to float32
        model = model.double()
        assert error(model, convert_encoding(model, target), 48, 40) < exact, 'only rounding differs'


STRINGS = [dict(), dict(rope_basis='circulant'), dict(rope_block=5), dict(rope_basis='circulant', rope_block=7),
           dict(rope_share_heads=True, rope_share_layers=True, qkv_bias=False, class_token=False, global_pool='avg')]


@pytest.mark.parametrize('kwargs', STRINGS)
def test_string_becomes_mixed_by_folding_its_basis_into_queries_and_keys(kwargs):
    model = model_of('string', reg_tokens=1, **kwargs).double()
    before = copy.deepcopy(model.state_dict())
    converted = convert_encoding(model, 'mixed')
    assert converted.rope.name == 'mixed' and error(model, converted, 48, 40) < 1e-12
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items()), 'a copy'
    weights = convert_encoding(model.state_dict(), 'mixed', num_heads=2)
    assert all(torch.allclose(v, weights[k], atol=1e-15) for k, v in converted.state_dict().items())
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    single = model_of('string', **kwargs)
    assert error(single, convert_encoding(single, 'mixed'), 64, 64) < 1e-5
    with pytest.raises(ValueError, match="from 'string' to 'mixed': its generators commute, but in another"):
        convert_encoding(model.rope, 'mixed')  # alone it has no queries and keys


def test_string_of_a_swin_becomes_mixed():
    torch.manual_seed(0)
    small = dict(img_size=32, embed_dim=16, depths=(2, 1), num_heads=(1, 2), window_size=4, num_classes=5)
    model = timm.create_model('swin_tiny_rope_axial', rope_encoding='string', **small).eval().double()
    assert error(model, convert_encoding(model, 'mixed'), 32, 32) < 1e-12


def test_a_basis_does_not_pass_a_norm_of_queries_and_keys():
    model = model_of('string', qk_norm=True)
    for source in (model, model.state_dict()):
        with pytest.raises(ValueError, match='q_norm.* scales each by itself'):
            convert_encoding(source, 'mixed', num_heads=2)


def test_a_chain_of_steps_keeps_the_function():
    model = model_of('axial', reg_tokens=1)
    chain = model
    for name in ('axial_learned', 'mixed', 'liere'):
        chain = convert_encoding(chain, name)
    assert error(model, chain, 64, 40) < 1e-5
    assert error(model, convert_encoding(chain, 'mixed'), 64, 40) < 1e-5, 'and back while nothing was trained'
    assert error(model, convert_encoding(chain, 'axial_learned'), 64, 40) < 1e-5


def test_logits_of_a_large_grid():
    model = model_of('mixed', depth=2, num_classes=3)
    converted = convert_encoding(model, 'liere')
    assert error(model, converted, 256, 256) < 1e-5


def test_the_unit_of_the_coordinates_is_converted(monkeypatch):
    class Turns(ENCODINGS['mixed']):
        span = 1.0

    monkeypatch.setitem(ENCODINGS, 'turns', Turns)
    for coords in ('cells', 'ends', 'index'):
        rope = rope_of('mixed', coords=coords)
        converted = convert_encoding(rope, 'turns')
        x = torch.randn(1, 2, 35, 24)
        for a, b in zip(rope((5, 7)), converted((5, 7))):
            assert (rope.rotate(x, a) - converted.rotate(x, b)).abs().max() < 5e-6


# -- what has no exact form

@pytest.mark.parametrize('source,target', OTHERS)
def test_everything_else_is_refused(source, target):
    rope = rope_of(source)
    with pytest.raises(ValueError, match=f'No exact way from {source!r} to {target!r}: .*default options: ') as caught:
        convert_encoding(rope, target)
    offered = str(caught.value).split('default options: ')[1].rstrip('.')
    expected = sorted(EXACT.get(source, set()) - {source})
    assert offered == (', '.join(map(repr, expected)) or 'none')


@pytest.mark.parametrize('source,given,target,options,words', [
    ('mixed', {}, 'axial', {}, "its frequencies are fixed.*: 'liere'"),
    ('mixed', {}, 'axial_learned', {}, 'the first 6 pairs of a head with x alone and the next 6 with y alone'),
    ('spherical', {}, 'mixed', {}, r'spherical\(.*\) does not turn each channel pair by one wave vector'),
    ('axial', {}, 'spherical_learned', {}, "'spherical_learned' does not turn channel pairs"),
    ('liere', dict(coords='index'), 'mixed', {}, "the generators of layer 0, head 0, block 0 do not commute"),
    ('liere', dict(block=4), 'liere', dict(block=8), 'couple more than channel pairs'),
    ('mixed', {}, 'liere', dict(block=3), 'block 3 leaves pairs .* or splits them between blocks; block 2, 4, 6'),
    ('mixed', dict(head_dim=12), 'liere', {}, 'block 8 leaves pairs of head_dim 12 unrotated.*block 2, 4, 6, 12 would'),
    ('mixed', dict(head_dim=14), 'axial_learned', {}, 'leaves the pairs beyond the first 6 of a head unrotated'),
    ('axial', {}, 'mixed', dict(coords='cells'), "'index' and 'cells' differ in origin or step, and prefix tokens"),
    ('uniform', {}, 'mixed', dict(rope_coords='ends'), "'cells' and 'ends' differ in origin or step"),
    ('mixed', dict(coords='cells'), 'liere', {}, "'cells' have their origin in the middle of the image here"),
    ('liere', dict(block=2), 'mixed', {}, 'origin in the corner of the image here and in the middle there'),
    ('spherical', {}, 'spherical_learned', dict(order='xy'), 'does not turn each channel pair'),
    ('mixed', {}, 'comrope', {}, "generators of a block of 'comrope' are parallel"),
    ('comrope', {}, 'comrope', dict(variant='ap'), 'of one axis with variant "ap"'),
    ('geope', {}, 'liere', dict(block=3), "'cells' have their origin in the middle of the image here"),
    ('quatro', {}, 'liere', {}, 'origin in the middle of the image here'),
    ('quatro', dict(coords='index'), 'liere', {}, 'its triplets are blocks of 3, not of 8'),
    ('spherical', dict(coords='index'), 'liere', dict(block=3), 'where a single one turns; .* 3 x 4 .* by up to '),
    ('spherical', dict(coords='index', reference_grid=(2, 3, 4)), 'liere', dict(block=3), r'2 x 3 x 4 .* up to [01]\.'),
    ('spherical', dict(reference_grid=(9,)), 'liere', dict(block=3), 'prefix tokens, which do not turn, see'),
    ('mixed', {}, 'quatro', {}, "'quatro' does not turn channel pairs"),
    ('spherical', {}, 'quatro', dict(order='xy'), "the order 'yx' here and 'xy' there"),
    ('mixed', {}, 'mixed', dict(share_heads=True), 'share_heads=True needs equal frequencies, these differ by up to'),
    ('mixed', {}, 'liere', dict(share_layers=True), 'share_layers=True needs equal frequencies'),
])
def test_the_reason_is_given(source, given, target, options, words):
    with pytest.raises(ValueError, match=words):
        convert_encoding(rope_of(source, **given), target, **options)


@pytest.mark.skipif('spiral' not in NAMES, reason='needs the spiral encoding')
def test_clamped_spiral_is_refused():
    state = model_of('spiral', rope_clamp=True).state_dict()
    with pytest.raises(ValueError, match='does not turn each channel pair by one wave vector'):
        convert_encoding(state, 'mixed', num_heads=2)
    for target in LEARNED:
        with pytest.raises(ValueError, match=r'spiral\(clamp=.* does not turn each channel pair by one wave vector'
                           if target in ('axial_learned', 'comrope', 'liere', 'mixed') else 'No exact way'):
            convert_encoding(rope_of('spiral', clamp=True), target)


@pytest.mark.parametrize('axis,pair', [(1, 2), (0, 9)])
def test_a_converted_model_that_has_learned_off_the_axes_cannot_go_back(axis, pair):
    mixed = convert_encoding(rope_of('axial'), 'mixed')
    convert_encoding(mixed, 'axial_learned')
    with torch.no_grad():
        mixed.freqs[axis, 0, 1, pair] = 1e-3
    with pytest.raises(ValueError, match='oblique'):
        convert_encoding(mixed, 'axial_learned')


@pytest.mark.parametrize('name,options,kind,words', [
    ('nope', {}, ValueError, "Unknown rotary encoding 'nope'"),
    ('mixed', dict(order='yx'), ValueError, "'mixed' takes no option 'order'"),
    ('mixed', dict(colour=1), TypeError, "'colour'"),
    ('mixed', dict(coords='cells', rope_coords='cells'), TypeError, "'coords' was given twice"),
    ('mixed', dict(rope_reference_grid=(3, 3)), ValueError, 'reference_grid belongs to the weights'),
    ('liere', dict(block=1), ValueError, 'block must be an integer of at least 2, got 1'),
    ('mixed', dict(share_heads=1), ValueError, 'share_heads must be True or False, got 1'),
    ('mixed', dict(num_heads=3), ValueError, 'num_heads is 2 in this model, got 3'),
])
def test_bad_options(name, options, kind, words):
    with pytest.raises(kind, match=words):
        convert_encoding(model_of('axial'), name, **options)


# -- options and sharing

def test_options_are_carried_over_where_both_encodings_know_them():
    assert convert_encoding(rope_of('axial', coords='ends', temperature=7.), 'mixed').options == dict(
        coords='ends', temperature=7., scale=1., offset=0., share_heads=False, share_layers=False)
    assert convert_encoding(rope_of('mixed', share_heads=True, share_layers=True), 'liere', block=4).options == dict(
        block=4, coords='index', share_heads=True, share_layers=True)
    assert convert_encoding(rope_of('spherical', order='xy'), 'spherical_learned').options['order'] == 'xy'


def test_sharing_is_expanded_or_checked():
    shared = rope_of('mixed', share_heads=True, share_layers=True)
    own = convert_encoding(shared, 'mixed', share_heads=False, share_layers=False)
    assert own.freqs.shape == (2, 2, 2, 12)
    assert torch.equal(own.freqs, shared.freqs.expand_as(own.freqs))
    again = convert_encoding(own, 'mixed', share_heads=True, share_layers=True)
    assert torch.equal(again.freqs, shared.freqs)
    with torch.no_grad():
        own.freqs[0, 1] += 0.25  # another layer, the same for both heads
    assert convert_encoding(own, 'mixed', share_heads=True).freqs.shape == (2, 2, 1, 12)
    with pytest.raises(ValueError, match='share_layers=True needs equal frequencies, these differ by up to 0.25'):
        convert_encoding(own, 'mixed', share_layers=True)
    fixed = convert_encoding(rope_of('axial'), 'mixed')
    assert fixed.freqs.shape == (2, 2, 2, 12), 'a fixed source does not share what it can learn'


# -- models

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


# -- state dicts

@pytest.mark.parametrize('source,target', PAIRS)
@pytest.mark.parametrize('prefix', ['', 'module.', '_orig_mod.', 'module._orig_mod.'])
def test_state_dict(source, target, prefix, tmp_path):
    model = model_of(source, img_size=(24, 40), pos_embed='learn', reg_tokens=1)
    whole = {f'{prefix}{k}': v for k, v in model.state_dict().items()}
    before = dict(whole)
    got = convert_encoding(whole, target, num_heads=2)
    assert list(whole) == list(before) and all(whole[k] is before[k] for k in whole), 'the source is not changed'
    assert all(got[k] is v for k, v in whole.items() if '.rope.' not in f'.{k}'), 'other tensors are shared'
    converted = convert_encoding(model, target)
    assert [k.removeprefix(prefix) for k in got] == list(converted.state_dict())
    assert all(torch.equal(v, got[f'{prefix}{k}']) for k, v in converted.state_dict().items())


def test_torch_metadata_and_types_are_kept():
    state = model_of('axial').state_dict()
    got = convert_encoding(state, 'mixed', num_heads=2)
    assert type(got) is type(state) and got._metadata == state._metadata
    double = convert_encoding(model_of('axial').double().state_dict(), 'mixed', num_heads=2)
    exact = convert_encoding(model_of('axial').double(), 'mixed').rope.freqs
    assert double['rope.freqs'].dtype == torch.float64 and torch.equal(double['rope.freqs'], exact)


@pytest.mark.parametrize('name,options,kwargs', [
    ('mixed', {}, {}), ('mixed', dict(rope_share_heads=True), {}), ('mixed', dict(rope_share_layers=True), {}),
    ('axial_learned', dict(rope_share_layers=True), dict(depth=1)), ('spherical_learned', dict(rope_order='xy'), {}),
    ('axial', {}, dict(qk_norm=True)), ('liere', {}, dict(qk_norm=True)),
])
def test_num_heads_is_read_where_the_shapes_tell_it(name, options, kwargs):
    model = model_of(name, **options, **kwargs)
    target = dict(axial='mixed').get(name, name)
    got = convert_encoding(model.state_dict(), target)
    converted = convert_encoding(model, target)
    assert all(torch.equal(v, got[k]) for k, v in converted.state_dict().items())
    with pytest.raises(ValueError, match=r'num_heads=3 does not fit the state dict of .*(freqs|q_norm)'):
        convert_encoding(model.state_dict(), target, num_heads=3)


def test_what_sharing_would_not_change_is_not_called_shared():
    for name, kwargs in (('mixed', dict(depth=1, num_heads=1, embed_dim=24)), ('spherical_learned', dict(depth=1))):
        model = model_of(name, **kwargs)
        rope = read_encoding(model.state_dict(), 'rope.', None)
        assert repr(rope) == repr(model.rope) and torch.equal(rope.freqs, model.rope.freqs)


@pytest.mark.parametrize('name,target', [('axial', 'mixed'), ('liere', 'liere')])
def test_num_heads_is_asked_for_where_nothing_tells_it(name, target):
    model = model_of(name)
    weights = model.state_dict()
    told = convert_encoding(weights, target)
    assert all(torch.equal(v, told[k]) for k, v in convert_encoding(model, target).state_dict().items())
    text = read_signature(weights['rope.signature'])
    weights.update(named(re.sub(',head_dim=[0-9]+', '', text)))
    with pytest.raises(ValueError, match='num_heads must be given: .* of width 48.* fits 1, 2, 3'):
        convert_encoding(weights, target)


def test_num_heads_that_cannot_be():
    for wrong in (5, 0, 48):
        with pytest.raises(ValueError, match=f'num_heads={wrong} does not fit'):
            convert_encoding(model_of('axial').state_dict(), 'mixed', num_heads=wrong)


def named(text):
    return {'rope.signature': torch.tensor(list(text.encode()), dtype=torch.uint8)}


@pytest.mark.parametrize('damage,words', [
    (lambda s: s.pop('rope.signature'), 'needs the key rope.signature.*load these weights into a model of their'),
    (lambda s: s.pop('rope.freqs'), r"state dict of 'mixed' has no rope\.freqs"),
    (lambda s: s.pop('rope.reference_grid'), r'has no rope\.reference_grid'),
    (lambda s: s.pop('blocks.0.attn.qkv.weight'), r'has no blocks\.0\.attn\.qkv\.weight'),
    (lambda s: s.clear(), 'needs the key rope.signature'),
    (lambda s: s.update(epoch=3, state_dict={k: s.pop(k) for k in list(s)}), "what this one has under 'state_dict'"),
    (lambda s: s.update({f'ema.{k}': v for k, v in s.items()}), 'has rope.signature, ema.rope.signature: pass'),
    (lambda s: s.update(named('helix(coords=index)')), r'helix\(coords=index\), which this version does not know'),
    (lambda s: s.update(named('mixed(tilt=3)')), r'mixed\(tilt=3\), which this version does not know'),
    (lambda s: s.update(named('?')), 'rope.signature.* cannot be read'),
    (lambda s: s.update(named('liere(block=many)')), r'liere\(block=many\), with values that no option takes'),
    (lambda s: s.update({k: v.to('meta') for k, v in s.items()}), 'rope.signature cannot be read'),
    (lambda s: s.update({'rope.freqs': s['rope.freqs'] / 0}), 'freqs of the checkpoint has 144 non-finite'),
    (lambda s: s.update({'rope.freqs': torch.zeros(2, 3, 5, 12)}), r'num_heads=None does not fit.*\(2, 3, 5, 12\)'),
    (lambda s: s.update({'rope.reference_grid': torch.tensor([0, 4])}), r'two positive integers.*\[0, 4\]'),
])
def test_damaged_state_dicts(damage, words):
    state = model_of('mixed').state_dict()
    damage(state)
    with pytest.raises(ValueError, match=words):
        convert_encoding(state, 'liere')


def test_a_file_is_converted_without_a_model(tmp_path):
    from safetensors.torch import save_file
    model = model_of('mixed')
    save_file(model.state_dict(), tmp_path / 'mixed.safetensors')
    random = torch.get_rng_state()
    converted = convert_encoding(load_file(tmp_path / 'mixed.safetensors'), 'liere', block=4)
    save_file(converted, tmp_path / 'liere.safetensors')
    assert torch.equal(torch.get_rng_state(), random)
    other = make('vit_tiny_rope_liere', **WIDE, rope_block=4, rope_coords='index')
    other.load_state_dict(load_file(tmp_path / 'liere.safetensors'))
    assert error(model, other, 40, 48) < 1e-5


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
    if target == 'mixed' and source in ('axial', 'axial_learned', 'uniform'):
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
