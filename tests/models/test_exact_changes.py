"""Exact changes of encoding: the same function, and a reason where there is none."""
import copy
import math

import numpy as np
import oracle
import pytest
import timm
import torch
from exact_changes import EXACT, NAMES, OTHERS, PAIRS, error, model_of, rope_of

from timm_rope import convert_encoding
from timm_rope.encodings import ENCODINGS

LEARNED = [name for name in NAMES if ENCODINGS[name].learned]


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
