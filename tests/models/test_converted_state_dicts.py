"""A state dict with its encoding changed without a model: the tensors of the changed model, read from shapes."""
import re

import pytest
import torch
from exact_changes import PAIRS, WIDE, error, model_of
from safetensors.torch import load_file
from tiny import make

from timm_rope import convert_encoding
from timm_rope.encodings._saved import read_encoding
from timm_rope.encodings._signature import read_signature


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


def named(text):
    return {'rope.signature': torch.tensor(list(text.encode()), dtype=torch.uint8)}


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
