"""Weights of Swin models of ours and of timm, what is refused, and what is registered."""
import logging
import math
import re
from functools import lru_cache
from pathlib import Path

import pytest
import timm
import torch
from tiny_swin import SMALL, blocks, load, loud, make, ropes, same

from timm_rope._timm import save_for_hf
from timm_rope.models.rope_swin import MODEL_ARGS, PUBLISHED
from timm_rope.weights.layouts import recognise

# --

@lru_cache(None)
def shape_of(name):
    """A model of the registry without memory."""
    return timm.create_model(name, device='meta')


def swap(state, **changes):
    return {**state, **{key.replace('__', '.'): value for key, value in changes.items()}}


# -- weights of ours, of timm

@pytest.mark.parametrize('resize', [
    None, dict(img_size=(48, 64)), dict(img_size=64, window_size=4), dict(window_size=3)])
@pytest.mark.parametrize('encoding,name,kwargs', [
    ('mixed', 'swin_tiny_rope_mixed_rpb', dict(window_rule='naver')),
    ('liere', 'swin_tiny_rope_axial', dict(rope_block=4, rope_share_heads=True)),
    ('spherical', 'swin_small_rope_mixed', dict(window_size=None, window_ratio=2, rope_reference_grid=(3, 5))),
])
def test_round_trip_through_a_folder(encoding, name, kwargs, resize, tmp_path):
    model = make(encoding, name, **kwargs)
    if resize:
        model.set_input_size(**resize)
    save_for_hf(model, tmp_path, safe_serialization=True)
    other = timm.create_model(f'local-dir:{tmp_path}', pretrained=True).eval()
    state = other.state_dict()
    assert state.keys() == model.state_dict().keys()
    assert all(torch.equal(state[key], value) for key, value in model.state_dict().items())
    assert [b.window_size for b in blocks(other)] == [b.window_size for b in blocks(model)]
    assert same(model, other, model.patch_embed.img_size)
    assert recognise(model.state_dict()).encoding == encoding
    del state['layers.0.blocks.0.attn.rope.signature']
    with pytest.raises(RuntimeError, match='none of the known layouts'):
        recognise(state)  # and not for a Swin without rotation


def test_weights_of_ours_bring_the_window_of_their_training(tmp_path):
    model = make('spherical', 'swin_tiny_rope_mixed_rpb')
    other = load(model.state_dict(), tmp_path, 'swin_tiny_rope_mixed_rpb', img_size=48, window_size=6,
                 rope_encoding='spherical')
    assert [rope.reference_grid.tolist() for rope in ropes(other)] == [[4, 4]] * 4
    model.set_input_size(img_size=48)  # interpolates the bias as well
    assert same(model, other, (48, 48))
    with pytest.raises(RuntimeError, match="'spherical'.*'mixed'"):
        load(model.state_dict(), tmp_path)


@pytest.mark.parametrize('bias', [False, True])
def test_a_swin_of_timm(bias, tmp_path, caplog):
    name = 'swin_tiny_rope_spherical'.replace('spherical', 'mixed_rpb' if bias else 'mixed')
    theirs = loud(timm.create_model('swin_tiny_patch4_window7_224', **SMALL))
    state = theirs.state_dict()
    with pytest.raises(RuntimeError, match=r"timm SwinTransformer\) holds no rotary encoding.*rope_warm_start=True"):
        load(state, tmp_path, name)
    with caplog.at_level(logging.WARNING):
        model = load(state, tmp_path, name, rope_warm_start=True)
    said = caplog.text
    assert 'layers.*.blocks.*.attn.rope.freqs' in said.partition('Left as initialised')[2]
    assert ('relative_position_bias_table' in said.partition('Left as initialised')[0]) != bias
    for key, value in model.state_dict().items():
        assert '.rope.' in key or torch.equal(value, state[key]), key
    assert model.rel_pos_bias == bias and 'rope_warm_start' not in model._model_args
    if bias:  # and without rotation it is theirs
        plain = load(state, tmp_path, name, rope_encoding='none')
        assert same(plain, theirs)


@pytest.mark.parametrize('original', [False, True])
def test_a_swin_of_timm_or_microsoft_with_the_tables_of_old_files(original, tmp_path):
    theirs = loud(timm.create_model('swin_tiny_patch4_window7_224', **SMALL))
    state = theirs.state_dict()
    if original:
        state = {
            key.replace('layers.1.downsample', 'layers.0.downsample').replace('head.fc', 'head'): value
            for key, value in state.items()}
    tables = {'layers.0.blocks.0.attn.relative_position_index': torch.zeros(16, 16, dtype=torch.long),
              'layers.0.blocks.1.attn_mask': torch.zeros(4, 16, 16)}
    weights = recognise({'model': {**state, **tables}})
    assert (weights.encoding, set(weights.left_out)) == ('none', set(tables))
    plain = load({'model': {**state, **tables}}, tmp_path, 'swin_tiny_rope_mixed_rpb', rope_encoding='none')
    assert same(plain, theirs)


def test_warm_start_into_a_bias_and_from_another_encoding(tmp_path, caplog):
    model = make('spherical')
    with caplog.at_level(logging.WARNING):
        other = load(model.state_dict(), tmp_path, 'swin_tiny_rope_mixed_rpb', rope_warm_start=True)
    assert 'spherical' in caplog.text and 'attn.rope.reference_grid' in caplog.text.partition('Left as')[0]
    assert 'relative_position_bias_table' in caplog.text.partition('Left as')[2]
    assert torch.equal(other.head.fc.weight, model.head.fc.weight)
    caplog.clear()
    load(model.state_dict(), tmp_path, rope_encoding='spherical', rope_warm_start=True)
    assert 'Warm start' not in caplog.text, 'nothing was left out'
    model = make(rope_coords='cells')
    other = load(model.state_dict(), tmp_path, rope_warm_start=True)
    assert not torch.equal(other.rope.freqs, model.rope.freqs), 'of other options'


@pytest.mark.parametrize('strict', [False, True])
@pytest.mark.parametrize('source,kwargs,change,error,words', [
    ('spherical', {}, {}, RuntimeError, "'spherical' is not 'mixed'"),
    ('mixed', dict(rope_coords='cells'), {}, RuntimeError, 'coords is cells there and index here'),
    ('mixed', dict(embed_dim=64, num_heads=(2, 4)), {}, RuntimeError, 'the checkpoint is 64 wide, the model 32'),
    ('mixed', {}, dict(layers__1__blocks__1__attn__rope__freqs=torch.full((2, 1, 2, 16), math.nan)), ValueError,
     r'layers\.1\.blocks\.1\.attn\.rope\.freqs of the checkpoint has 64 non-finite'),
    ('mixed', {}, dict(layers__1__blocks__1__attn__rope__reference_grid=torch.tensor([0, 4])), ValueError,
     r'layers\.1\.blocks\.1\.attn\.rope\.reference_grid'),
    ('mixed', {}, dict(norm__weight=torch.ones(63)), RuntimeError, r'norm\.weight is \(63,\)'),
])
def test_refused_before_anything_is_copied(source, kwargs, change, error, words, strict):
    state = swap(make(source, **kwargs).state_dict(), **change)
    model = make()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    holder = torch.nn.Sequential(model)
    for target, given in ((model, state), (holder, {f'0.{key}': value for key, value in state.items()})):
        with pytest.raises(error, match=words):
            target.load_state_dict(given, strict=strict)
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


def test_missing_keys(caplog):
    model, state = make(), make().state_dict()
    key = 'layers.0.blocks.1.attn.rope.freqs'
    state['layers.0.blocks.0.attn.rope.freqs'] += 1
    del state[key]
    with pytest.raises(RuntimeError, match=f'missing {key}'):
        model.load_state_dict(state)
    with caplog.at_level(logging.WARNING):
        assert model.load_state_dict(state, strict=False).missing_keys == [key]
    assert key in caplog.text
    assert torch.equal(model.rope.freqs, state['layers.0.blocks.0.attn.rope.freqs'])
    del state['layers.0.blocks.0.attn.rope.signature']  # of weights that were not saved by us
    state[key] = torch.zeros(2, 1, 1, 16)
    model.load_state_dict(state)


# -- what is registered

def test_the_twelve_models():
    kinds = ('axial', 'axial_rpb', 'mixed', 'mixed_rpb')
    names = {f'swin_{size}_rope_{kind}' for size in ('tiny', 'small', 'base') for kind in kinds}
    assert set(MODEL_ARGS) >= names == set(timm.list_models('swin_*rope*')) - set(timm.list_models('swin_test_*'))
    # arXiv 2403.13298 and its repository
    counts = dict(tiny=(28_265_032, 28_269_448), small=(49_558_600, 49_567_624), base=(87_704_680, 87_716_712))
    for size, expected in counts.items():
        for kind, count in zip(('axial', 'mixed'), expected):
            model = shape_of(f'swin_{size}_rope_{kind}')
            assert sum(p.numel() for p in model.parameters()) == count
            assert model.rope.name == kind and model.rope.head_dim == 32
        biased = timm.create_model(f'swin_{size}_rope_mixed_rpb', device='meta')
        heads = sum(block.attn.num_heads for block in blocks(model))
        assert sum(p.numel() for p in biased.parameters()) == expected[1] + 13 * 13 * heads


def test_the_published_tags():
    assert set(PUBLISHED) == {f'swin_{size}_rope_{kind}.naver_in1k' for size in ('tiny', 'small', 'base')
                              for kind in ('axial', 'mixed')}
    for name in PUBLISHED:
        arch = name.partition('.')[0]
        cfg = timm.get_pretrained_cfg(arch)  # the default of the architecture
        assert cfg.tag == 'naver_in1k' and cfg.license == 'bsd-3-clause' and cfg.paper_ids == 'arXiv:2403.13298'
        _, size, _, kind = arch.split('_')
        assert cfg.hf_hub_id == f'naver-ai/swin_rope_{kind}_{size}_patch4_window7_224'
    data = timm.data.resolve_data_config(model=shape_of('swin_tiny_rope_mixed'))
    # resize to int(256 / 224 size), crop size, as NAVER's evaluation
    assert [math.floor(size / data['crop_pct']) for size in (160, 224, 384)] == [182, 256, 438]
    assert data['interpolation'] == 'bicubic' and data['mean'] == timm.data.IMAGENET_DEFAULT_MEAN
    assert not timm.get_pretrained_cfg('swin_tiny_rope_mixed_rpb').has_weights


def test_the_table_of_weights_has_every_tag():
    readme = (Path(__file__).parents[2] / 'timm_rope/weights/README.md').read_text()
    rows = dict(re.findall(r'^\| `(swin_\w+\.\w+)` \| (.*)\|$', readme, flags=re.M))
    assert rows.keys() == PUBLISHED.keys()
    for name, row in rows.items():
        model = shape_of(name.partition('.')[0])
        assert row.startswith(f'{sum(p.numel() for p in model.parameters()) / 1e6:.2f} M |'), name
        assert f'`{model.pretrained_cfg["hf_hub_id"]}`' in row and model.pretrained_cfg['license'] in row
