"""Swin models against window attention written out token by token in float64, their sizes, weights and refusals."""
import copy
import io
import logging
import math
import re
from functools import lru_cache, partial
from pathlib import Path

import oracle
import pytest
import timm
import torch
import torch.nn.functional as F
from timm.layers import set_fused_attn
from timm.models import save_for_hf
from timm.models._manipulate import reinit_non_persistent_buffers
from timm.models.swin_transformer import SwinTransformer

import timm_rope
from timm_rope.encodings._base import RotaryEncoding
from timm_rope.models.rope_swin import MODEL_ARGS, PUBLISHED
from timm_rope.models.swin import RopeSwinTransformer
from timm_rope.models.window_attention import RopeWindowAttention
from timm_rope.weights.layouts import recognise

SMALL = dict(img_size=32, embed_dim=32, depths=(2, 2), num_heads=(1, 2), window_size=4, num_classes=5)


def loud(model):
    """Weights for which attention is far from uniform and every bias counts."""
    torch.manual_seed(1)
    with torch.no_grad():
        for name, value in model.named_parameters():
            if name.endswith(('qkv.weight', 'relative_position_bias_table')):
                value.mul_(20)
            elif name.endswith('.bias'):
                value.normal_(0, 0.2)
    return model.eval()


def make(encoding='mixed', name='swin_tiny_rope_mixed', **kwargs):
    torch.manual_seed(0)
    return loud(timm.create_model(name, **{**SMALL, **kwargs}, rope_encoding=encoding))


def blocks(model):
    return [block for stage in model.layers for block in stage.blocks]


@lru_cache(None)
def shape_of(name):
    """A model of the registry without memory."""
    return timm.create_model(name, device='meta')


def windows(model):
    return [(block.window_size, block.shift_size) for block in blocks(model)]


def ropes(model):
    return [block.attn.rope for block in blocks(model)]


def swap(state, **changes):
    return {**state, **{key.replace('__', '.'): value for key, value in changes.items()}}


# -- the oracle: NumPy's matrices of tests/oracle.py and plain loops, nothing of ours or timm's

def attend(x, weights, heads, window, shift, matrices, table=None):
    """Window attention of x (B, rows, columns, C) in float64.

    `matrices` are (heads, N, D, D), one rotation for each place in the window, row-major. A token is in the window of
    its place after a cyclic shift to the top left; what came in from the other side attends only to its like.
    """
    batch, height, width, channels = x.shape
    qkv = F.linear(x, weights['attn.qkv.weight'], weights.get('attn.qkv.bias'))
    q, k, v = qkv.reshape(batch, height, width, 3, heads, -1).unbind(3)
    windows = {}
    for row in range(height):
        for column in range(width):
            down, right = (row - shift[0]) % height, (column - shift[1]) % width
            place = down % window[0], right % window[1]
            side = row < shift[0], column < shift[1]
            windows.setdefault((down // window[0], right // window[1]), []).append((place, side, row, column))
    out = torch.zeros_like(q)
    for members in windows.values():
        assert len(members) == window[0] * window[1]
        rows, columns = [m[2] for m in members], [m[3] for m in members]
        index = [place[0] * window[1] + place[1] for place, *_ in members]
        turned = [torch.einsum('hnij,bnhj->bnhi', matrices[:, index], part[:, rows, columns]) for part in (q, k)]
        scores = torch.einsum('bnhd,bmhd->bhnm', *turned) / math.sqrt(q.shape[-1])
        for n, (place, side, *_) in enumerate(members):
            for m, (other, other_side, *_) in enumerate(members):
                if table is not None:
                    offset = (place[0] - other[0] + window[0] - 1) * (2 * window[1] - 1)
                    scores[:, :, n, m] += table[offset + place[1] - other[1] + window[1] - 1]
                if side != other_side:
                    scores[:, :, n, m] = -math.inf
        out[:, rows, columns] = torch.einsum('bhnm,bmhd->bnhd', scores.softmax(-1), v[:, rows, columns])
    return F.linear(out.flatten(3), weights['attn.proj.weight'], weights['attn.proj.bias'])


def norm(x, weights, name):
    return F.layer_norm(x, x.shape[-1:], weights[f'{name}.weight'], weights[f'{name}.bias'], 1e-5)


def forward_block(x, weights, *args):
    x = x + attend(norm(x, weights, 'norm1'), weights, *args)
    hidden = F.gelu(F.linear(norm(x, weights, 'norm2'), weights['mlp.fc1.weight'], weights['mlp.fc1.bias']))
    return x + F.linear(hidden, weights['mlp.fc2.weight'], weights['mlp.fc2.bias'])


def double(state, prefix=''):
    return {k[len(prefix):]: v.double() for k, v in state.items() if k.startswith(prefix)}


def matrices_of(rope, window):
    return torch.stack([torch.from_numpy(oracle.rotations(rope, window, 0, head)) for head in range(rope.num_heads)])


def check_blocks(model, window, shift):
    """Both blocks of the first stage against the oracle, the second shifted."""
    height, width = model.patch_embed.grid_size
    for block, by in zip(model.layers[0].blocks, ((0, 0), shift)):
        torch.manual_seed(2)
        x = torch.randn(2, height, width, block.dim)
        weights = double(block.state_dict())
        matrices = torch.eye(block.dim).double().expand(1, window[0] * window[1], -1, -1)
        if block.attn.rope is not None:
            matrices = matrices_of(block.attn.rope, window)
        table = weights.get('attn.relative_position_bias_table')
        expected = forward_block(x.double(), weights, len(matrices), window, by, matrices, table)
        with torch.no_grad():
            assert (block(x) - expected).abs().max() < 1e-5
        still = forward_block(
            x.double(), weights, len(matrices), window, by, torch.eye(matrices.shape[-1]).double().expand_as(matrices),
            table)
        assert block.attn.rope is None or (still - expected).abs().max() > 1e-2, 'the rotation matters'


@pytest.mark.parametrize('bias', [False, True])
@pytest.mark.parametrize('encoding', [*timm_rope.list_ropes(), 'none'])
def test_blocks_are_the_formula(encoding, bias):
    model = make(encoding, rel_pos_bias=bias, embed_dim=64, depths=(2,), num_heads=(1 if encoding == 'none' else 2,))
    check_blocks(model, (4, 4), (2, 2))


@pytest.mark.parametrize('fused', [False, True])
@pytest.mark.parametrize('bias', [False, True])
@pytest.mark.parametrize('size,window,rule,used,shift', [
    ((32, 48), 4, 'timm', (4, 4), (2, 2)),
    ((32, 48), (2, 6), 'timm', (2, 6), (1, 3)),  # rows are not columns
    ((24, 64), (3, 4), 'naver', (3, 4), (1, 2)),
    ((16, 48), 4, 'timm', (4, 4), (0, 2)),
    ((16, 48), 4, 'naver', (4, 4), (0, 0)),
    ((48, 16), 6, 'timm', (6, 4), (3, 0)),
    ((48, 16), 6, 'naver', (4, 4), (0, 0)),
    ((16, 32), 9, 'timm', (4, 8), (0, 0)),
    ((16, 32), 9, 'naver', (4, 4), (0, 0)),
])
def test_windows_of_images_that_are_not_square(size, window, rule, used, shift, bias, fused):
    set_fused_attn(fused, experimental=fused)
    try:
        model = make(
            img_size=size, window_size=window, window_rule=rule, depths=(2,), num_heads=(2,), rel_pos_bias=bias)
    finally:
        set_fused_attn(True)
    assert [block.attn.fused_attn for block in blocks(model)] == [fused] * 2
    check_blocks(model, used, shift)


@pytest.mark.parametrize('encoding,kwargs', [
    ('spherical', {}), ('mixed', dict(coords='cells')), ('uniform', dict(coords='ends')), ('liere', dict(block=4)),
    ('axial', dict(temperature=20.)), ('axial_learned', dict(share_heads=True)), ('spiral', dict(directions=4))])
def test_a_larger_window_extrapolates_from_that_of_training(encoding, kwargs):
    model = make(encoding, depths=(2,), num_heads=(2,), **{f'rope_{k}': v for k, v in kwargs.items()})
    model.set_input_size(img_size=(48, 72))
    assert [rope.reference_grid.tolist() for rope in ropes(model)] == [[4, 4]] * 2
    check_blocks(model, (6, 9), (3, 4))


# -- NAVER's files

def naver_swin(mixed=True, bias=False, window=4, seed=0):
    """{'model': ...} as NAVER saves it, two stages; axial files carry frequencies that no one reads."""
    torch.manual_seed(seed)
    state = {'patch_embed.proj.weight': torch.randn(32, 3, 4, 4) * 0.2, 'patch_embed.proj.bias': torch.randn(32)}

    def put(name, *shape, centre=0., scale=0.2):
        state[name] = centre + scale * torch.randn(*shape)

    def put_norm(name, width):
        put(f'{name}.weight', width, centre=1.)
        put(f'{name}.bias', width)

    put_norm('patch_embed.norm', 32)
    for stage, width in enumerate((32, 64)):
        for i in range(2):
            name = f'layers.{stage}.blocks.{i}'
            put_norm(f'{name}.norm1', width)
            put_norm(f'{name}.norm2', width)
            for layer, out, into in (('attn.qkv', 3, 1), ('attn.proj', 1, 1), ('mlp.fc1', 4, 1), ('mlp.fc2', 1, 4)):
                put(f'{name}.{layer}.weight', out * width, into * width)
                put(f'{name}.{layer}.bias', out * width)
            freqs = torch.randn(2, width // 32, 16)
            if not mixed:
                freqs[0, :, 8:] = freqs[1, :, :8] = 0
            state[f'{name}.attn.rope_freqs'] = freqs
            tokens = torch.arange(float(window ** 2))
            state[f'{name}.attn.rope_t_x'] = tokens % window
            state[f'{name}.attn.rope_t_y'] = (tokens / window).floor()
            if bias:
                put(f'{name}.attn.relative_position_bias_table', (2 * window - 1) ** 2, width // 32, scale=2.)
                state[f'{name}.attn.relative_position_index'] = torch.zeros(window ** 2, window ** 2, dtype=torch.long)
            if i:
                state[f'{name}.attn_mask'] = torch.zeros(4, 16, 16)
    put_norm('layers.0.downsample.norm', 128)
    put('layers.0.downsample.reduction.weight', 64, 128)
    put_norm('norm', 64)
    put('head.weight', 5, 64)
    put('head.bias', 5)
    return {'model': state}


def forward_naver(checkpoint, x, window, axial=False, theta=50.):
    """Logits of NAVER's model in float64: windows and shifts by its rule, axial angles by `theta`."""
    state = double(checkpoint['model'])
    x = F.conv2d(x.double(), state['patch_embed.proj.weight'], state['patch_embed.proj.bias'], 4).permute(0, 2, 3, 1)
    x = norm(x, state, 'patch_embed.norm')
    for stage in range(2):
        side = min(x.shape[1:3])
        used, by = (side, 0) if side <= window else (window, window // 2)
        for i in range(2):
            weights = double(state, f'layers.{stage}.blocks.{i}.')
            freqs = weights['attn.rope_freqs']
            if axial:
                w = theta ** (-torch.arange(8).double() / 8)
                freqs = torch.stack((F.pad(w, (0, 8)), F.pad(w, (8, 0)))).unsqueeze(1).expand_as(freqs)
            matrices = torch.stack([torch.stack([
                torch.from_numpy(oracle.pairs(32, n % used * head[0] + n // used * head[1])) for n in range(used * used)
            ]) for head in freqs.unbind(1)])
            x = forward_block(
                x, weights, len(matrices), (used, used), (by, by) if i else (0, 0), matrices,
                weights.get('attn.relative_position_bias_table'))
        if stage == 0:
            merged = torch.cat([x[:, row::2, column::2] for column in (0, 1) for row in (0, 1)], -1)
            merged = norm(merged, state, 'layers.0.downsample.norm')
            x = F.linear(merged, state['layers.0.downsample.reduction.weight'])
    return F.linear(norm(x, state, 'norm').mean((1, 2)), state['head.weight'], state['head.bias'])


def load(checkpoint, tmp_path, name='swin_tiny_rope_mixed', **kwargs):
    torch.save(checkpoint, tmp_path / 'weights.bin')
    overlay = dict(file=str(tmp_path / 'weights.bin'), num_classes=5, input_size=(3, 128, 128))
    return timm.create_model(
        name, pretrained=True, pretrained_cfg_overlay=overlay, **{**SMALL, **kwargs}).eval()


def agree(model, x, expected):
    assert expected.std() > 0.1, 'the comparison must not be between silent models'
    with torch.no_grad():
        return (model(x) - expected).abs().max() < 1e-5 * expected.abs().max()


@pytest.mark.parametrize('mixed,bias', [(True, False), (False, False), (True, True)])
@pytest.mark.parametrize('size,window', [((32, 32), 4), ((16, 16), 2), ((32, 64), 4), ((48, 24), 6)])
def test_a_naver_file(mixed, bias, size, window, tmp_path):
    checkpoint = naver_swin(mixed, bias, window)
    name = f'swin_tiny_rope_{"mixed" if mixed else "axial"}{"_rpb" if bias else ""}'
    if bias and min(size) // 8 < window:  # a table is of the window in use
        for i in range(2):
            key = f'layers.1.blocks.{i}.attn.relative_position_bias_table'
            checkpoint['model'][key] = torch.randn((2 * min(size) // 8 - 1) ** 2, 2)
    model = load(checkpoint, tmp_path, name, img_size=size, window_size=window, window_rule='naver')
    torch.manual_seed(3)
    x = torch.randn(2, 3, *size)
    assert agree(model, x, forward_naver(checkpoint, x, window, not mixed))
    if not mixed:
        assert not agree(model, x, forward_naver(checkpoint, x, window))
    # which has been recorded though index coordinates do not depend on it
    assert {tuple(rope.reference_grid.tolist()) for rope in ropes(model)} == {(window, window)}


def test_a_naver_file_by_load_state_dict():
    checkpoint = naver_swin()
    model = timm.create_model('swin_tiny_rope_mixed', **SMALL).eval()
    model.load_state_dict(checkpoint['model'])
    x = torch.randn(1, 3, 32, 32)
    assert agree(model, x, forward_naver(checkpoint, x, 4))


def test_another_head_and_more_channels_of_a_naver_file(tmp_path):
    checkpoint = naver_swin()
    model = load(checkpoint, tmp_path, num_classes=3, in_chans=6)
    assert model(torch.randn(1, 6, 32, 32)).shape == (1, 3)
    assert torch.equal(model.norm.weight, checkpoint['model']['norm.weight'])
    del checkpoint['model']['norm.weight']
    with pytest.raises(RuntimeError, match=r'missing norm\.weight'):  # timm loads with strict=False here
        load(checkpoint, tmp_path, num_classes=3)
    with pytest.raises(RuntimeError, match=r'has \(2, 2\) blocks in its stages, the model \(2, 1\)'):
        load(naver_swin(bias=True), tmp_path, 'swin_tiny_rope_mixed_rpb', depths=(2, 1))


TABLE = 'layers.0.blocks.0.attn.relative_position_bias_table'


@pytest.mark.parametrize('change,kwargs,words', [
    ({}, dict(name='swin_tiny_rope_axial'), "'mixed', the model has the rotary encoding 'axial'.*rope_warm_start"),
    ({}, dict(rope_coords='cells'), 'coords is index there and cells here'),
    ({}, dict(embed_dim=64, num_heads=(2, 4)), 'the checkpoint is 32 wide, the model 64'),
    ({}, dict(depths=(2, 4)), r'has \(2, 2\) blocks in its stages, the model \(2, 4\)'),
    ({}, dict(num_heads=(2, 4)), r'rope.freqs is \(2, 1, 1, 16\), the model needs \(2, 1, 2, 8\)'),
    ({}, dict(name='swin_tiny_rope_mixed_rpb'), 'no relative position bias, the model has one'),
    ({TABLE: torch.zeros(49, 1)}, {}, 'has a trained relative position bias'),
    ({'layers.1.blocks.1.attn.rope_freqs': torch.zeros(2, 2, 15)}, {}, r'for 64 channels, got \(2, 2, 15\)'),
    ({'layers.1.blocks.1.attn.rope_freqs': torch.zeros(2, 32)}, {}, r'for 64 channels, got \(2, 32\)'),
    ({TABLE: torch.zeros(49, 2)}, dict(name='swin_tiny_rope_mixed_rpb'), r'is \(49, 2\), the model needs \(49, 1\)'),
])
def test_a_naver_file_that_does_not_fit(change, kwargs, words, tmp_path):
    checkpoint = naver_swin()
    checkpoint['model'].update(change)
    with pytest.raises(RuntimeError, match=words):
        load(checkpoint, tmp_path, **kwargs)


def test_an_axial_naver_file_means_temperature_50(tmp_path):
    with pytest.raises(RuntimeError, match='temperature is 50 there and 100 here'):
        load(naver_swin(False), tmp_path, 'swin_tiny_rope_axial', rope_temperature=100.)
    for encoding, temperature in (('axial', 50), ('axial_learned', 50), ('spherical', 100)):
        assert make(encoding).rope.options['temperature'] == temperature


@pytest.mark.parametrize('theta', [50., 10., 100.])
def test_stored_axial_frequencies_tell_another_temperature(theta, tmp_path):
    checkpoint = naver_swin(False)
    x_half = theta ** (-torch.arange(8) / 8)
    for key, freqs in checkpoint['model'].items():
        if key.endswith('rope_freqs'):  # as cos and sin of float32 leave them
            freqs[0] = torch.cat((x_half, -4.4e-8 * x_half))
            freqs[1] = torch.cat((0 * x_half, x_half))
    model = load(checkpoint, tmp_path, 'swin_tiny_rope_axial', window_rule='naver')
    assert model.rope.options['temperature'] == theta
    x = torch.randn(2, 3, 32, 32)
    assert agree(model, x, forward_naver(checkpoint, x, 4, True, theta))
    with pytest.raises(RuntimeError, match=f'temperature is {theta:.0f} there and 20 here'):
        load(checkpoint, tmp_path, 'swin_tiny_rope_axial', rope_temperature=20.)
    if theta != 50:
        with pytest.raises(RuntimeError, match=f'temperature is {theta:.0f} there and 50 here'):
            make('axial').load_state_dict(checkpoint['model'])


def test_one_axial_block_does_not_make_an_axial_model():
    checkpoint, axial = naver_swin(), naver_swin(False)
    key = 'layers.0.blocks.0.attn.rope_freqs'
    checkpoint['model'][key] = axial['model'][key]
    assert recognise(checkpoint).encoding == 'mixed'


def test_heads_of_an_axial_naver_file(tmp_path):
    checkpoint = naver_swin(False)
    with pytest.raises(RuntimeError, match=r'has \(1, 2\) heads in its stages, the model \(2, 4\)'):
        load(checkpoint, tmp_path, 'swin_tiny_rope_axial', num_heads=(2, 4))
    other = timm.create_model('swin_tiny_rope_axial', **{**SMALL, 'num_heads': (2, 4)})
    with pytest.raises(RuntimeError, match='heads in its stages'):
        other.load_state_dict(checkpoint['model'])
    kwargs = {key: value for key, value in SMALL.items() if key != 'num_heads'}
    torch.save(checkpoint, tmp_path / 'w.bin')
    model = timm.create_model(
        'swin_tiny_rope_axial', pretrained=True, **kwargs,
        pretrained_cfg_overlay=dict(file=str(tmp_path / 'w.bin'), num_classes=5))
    assert [stage.blocks[0].attn.num_heads for stage in model.layers] == [1, 2]


def test_recorded_window_is_that_of_the_tables_else_of_the_paper(tmp_path):
    checkpoint = naver_swin(window=5)
    assert load(checkpoint, tmp_path).rope.reference_grid.tolist() == [5, 5]
    checkpoint['model'] = {key: value for key, value in checkpoint['model'].items() if '.rope_t_' not in key}
    torch.save(checkpoint, tmp_path / 'w.bin')
    model = timm.create_model(
        'swin_tiny_rope_mixed', pretrained=True, **{**SMALL, 'img_size': 64, 'window_size': 8},
        pretrained_cfg_overlay=dict(file=str(tmp_path / 'w.bin'), num_classes=5))
    assert model.rope.reference_grid.tolist() == [7, 7] and model.layers[0].blocks[0].window_size == (8, 8)


# -- weights of ours, of timm

def same(model, other, size=(32, 32)):
    torch.manual_seed(4)
    x = torch.randn(1, 3, *size)
    with torch.no_grad():
        return torch.equal(model(x), other(x))


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
    readme = (Path(__file__).parents[2] / 'README.md').read_text()
    rows = dict(re.findall(r'^\| `(swin_\w+\.\w+)` \| (.*)\|$', readme, flags=re.M))
    assert rows.keys() == PUBLISHED.keys()
    for name, row in rows.items():
        model = shape_of(name.partition('.')[0])
        assert row.startswith(f'{sum(p.numel() for p in model.parameters()) / 1e6:.2f} M |'), name
        assert f'`{model.pretrained_cfg["hf_hub_id"]}`' in row and model.pretrained_cfg['license'] in row


# -- training

def test_gradients_reach_every_block():
    for encoding in ('mixed', 'liere', 'spherical_learned', 'axial_learned'):
        model = make(encoding, rel_pos_bias=True).train()
        model(torch.randn(2, 3, 32, 32)).square().sum().backward()
        assert all(rope.freqs.grad.abs().max() > 0 for rope in ropes(model)), encoding
        assert all(p.grad is not None for p in model.parameters())
        freqs = {f'layers.{i}.blocks.{j}.attn.rope.freqs' for i in (0, 1) for j in (0, 1)}
        tables = {name.replace('rope.freqs', 'relative_position_bias_table') for name in freqs}
        assert model.no_weight_decay() == freqs | tables
    assert make('axial').no_weight_decay() == set()
    assert torch.jit.script(make()).no_weight_decay() == freqs


def test_frequencies_are_initialised_apart_and_decay_with_their_block():
    model = make(depths=(2, 3))
    assert len({tuple(rope.freqs[0, 0, 0].tolist()) for rope in ropes(model)}) == 5
    layers = {name: timm.models.group_parameters(model, model.group_matcher(), reverse=True)[name]
              for name, _ in model.named_parameters()}
    for i, j in ((0, 0), (0, 1), (1, 2)):
        block = f'layers.{i}.blocks.{j}.attn'
        assert layers[f'{block}.rope.freqs'] == layers[f'{block}.qkv.weight']
    assert layers['layers.0.blocks.0.attn.rope.freqs'] < layers['layers.1.blocks.2.attn.rope.freqs']


def test_checkpointing_changes_no_gradient():
    grads = []
    for enable in (False, True):
        model = make().train()
        model.set_grad_checkpointing(enable)
        torch.manual_seed(0)
        model(torch.randn(2, 3, 32, 32)).square().sum().backward()
        grads.append([p.grad for p in model.parameters()])
    torch.testing.assert_close(*grads)


def test_a_changed_frequency_is_seen_in_eval():
    model = make()
    x = torch.randn(1, 3, 32, 32)
    with torch.no_grad():
        before = model(x)
        for rope in ropes(model):
            rope.freqs.add_(0.5)
        assert not torch.allclose(model(x), before, atol=1e-3)
        for rope in ropes(model):
            rope.freqs.sub_(0.5)
        torch.testing.assert_close(model(x), before)


# -- forms of the model

@pytest.mark.parametrize('encoding', ['mixed', 'spherical', 'none'])
def test_copies_scripts_and_graphs(encoding):
    model = make(encoding, rel_pos_bias=encoding != 'spherical', window_rule='naver')
    x = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        expected = model(x)
        buffer = io.BytesIO()
        torch.save(model, buffer)
        buffer.seek(0)
        forms = dict(
            copy=copy.deepcopy(model), pickle=torch.load(buffer, weights_only=False), script=torch.jit.script(model),
            export=torch.export.export(model, (x,)).module())
        if encoding == 'mixed':  # half of the time of this test
            forms['compile'] = torch.compile(model, backend='eager', fullgraph=True)
        for name, form in forms.items():
            torch.testing.assert_close(form(x), expected, msg=name)
    rotary = [module for module in model.modules() if isinstance(module, RotaryEncoding)]
    assert len({id(rope) for rope in rotary}) == len(rotary) == (0 if encoding == 'none' else 4)
    owners = [id(child) for module in model.modules() for child in module.children()]
    assert len(owners) == len(set(owners)), 'no module has two owners'


@pytest.mark.parametrize('bias', [False, True])
def test_from_empty_memory(bias):
    model = make('spherical', rel_pos_bias=bias)
    other = make('spherical', rel_pos_bias=bias, device='meta').to_empty(device='cpu')
    for value in (*other.parameters(), *other.buffers()):
        value.data.fill_(math.nan if value.is_floating_point() else 0)
    other.load_state_dict(model.state_dict())
    reinit_non_persistent_buffers(other)
    assert same(model, other)
    other.init_weights()
    assert all(torch.isfinite(value).all() for value in (*other.parameters(), *other.buffers()))
    assert not same(model, other) and other.rope.reference_grid.tolist() == [4, 4]


@pytest.mark.parametrize('bias', [False, True])
def test_window_attention_alone(bias):
    built = blocks(make(rel_pos_bias=bias, window_size=(2, 4), qkv_bias=False))[3].attn
    rope = timm_rope.create_rope('mixed', 32, 2, 1, (2, 4))
    alone = RopeWindowAttention(64, 2, rope, bias, window_size=(2, 4), qkv_bias=False)
    alone.load_state_dict(built.state_dict())
    x = torch.randn(3, 8, 64)
    with torch.no_grad():
        assert torch.equal(alone(x), built(x))
        alone.set_window_size((4, 4))
        assert alone(torch.randn(3, 16, 64)).shape == (3, 16, 64)


def test_a_traced_graph_computes_from_its_frequencies():
    model = make()
    graph = torch.fx.symbolic_trace(model)
    x = torch.randn(1, 3, 32, 32)
    with torch.no_grad():
        torch.testing.assert_close(graph(x), model(x))
        for form in (graph, model):
            for name, value in form.named_parameters():
                if name.endswith('rope.freqs'):
                    value.copy_(torch.linspace(-1, 1, value.numel()).view_as(value))
        torch.testing.assert_close(graph(x), model(x))
    graph(x).sum().backward()
    assert all(p.grad is not None for p in graph.parameters())


def test_low_precision_keeps_frequencies_and_payloads():
    model = make(rel_pos_bias=True).bfloat16()
    assert {rope.freqs.dtype for rope in ropes(model)} == {torch.float32}
    assert {p.dtype for n, p in model.named_parameters() if 'rope' not in n} == {torch.bfloat16}
    assert model(torch.randn(1, 3, 32, 32).bfloat16()).dtype == torch.bfloat16
    assert ropes(make('spherical', dtype=torch.bfloat16))[0].freqs.dtype == torch.float32


@pytest.mark.parametrize('getter', [False, True])
def test_feature_pyramids(getter):
    kwargs = dict(feature_cls='getter') if getter else {}
    features = timm.create_model('swin_tiny_rope_mixed', features_only=True, **SMALL, **kwargs).eval()
    assert features.feature_info.channels() == [32, 64] and features.feature_info.reduction() == [4, 8]
    x = torch.randn(2, 3, 32, 32)
    model = timm.create_model('swin_tiny_rope_mixed', **SMALL).eval()
    inner = getattr(features, 'model', None)
    if inner is None:
        model.load_state_dict({
            key.replace('layers_', 'layers.'): value for key, value in features.state_dict().items()}, strict=False)
    else:
        model.load_state_dict(inner.state_dict(), strict=False)
    with torch.no_grad():
        pyramid = features(x)
        expected = model.forward_intermediates(x, intermediates_only=True)
    if not getter:  # timm's list of a Swin is NHWC
        pyramid = [feature.permute(0, 3, 1, 2) for feature in pyramid]
    torch.testing.assert_close(pyramid, expected)
    assert [tuple(feature.shape) for feature in pyramid] == [(2, 32, 8, 8), (2, 64, 4, 4)]


# -- sizes

@pytest.mark.parametrize('bias', [False, True])
@pytest.mark.parametrize('size,given,built', [
    ((48, 64), {}, dict(window_size=(6, 8))),  # grows with the image, the paper's protocol
    ((48, 64), dict(window_size=4), dict(window_size=4)),
    ((48, 64), dict(window_ratio=4), dict(window_ratio=4)),
    (40, dict(window_size=(3, 5)), dict(window_size=(3, 5))),  # with padding
    (64, dict(window_size=(4, 2), always_partition=True), dict(window_size=(4, 2), always_partition=True)),
])
def test_resized_is_built_at_that_size(size, given, built, bias):
    model = make('spherical', rel_pos_bias=bias)
    model.set_input_size(img_size=size, **given)
    other = make('spherical', rel_pos_bias=bias, img_size=size, **{**dict(window_size=None), **built})
    assert windows(model) == windows(other)
    assert other.rope.reference_grid.tolist() == list(blocks(other)[0].window_size)
    other.load_state_dict(model.state_dict())
    assert other.rope.reference_grid.tolist() == [4, 4]
    assert same(model, other, model.patch_embed.img_size)
    model.set_input_size(img_size=32, window_size=4, always_partition=False)
    if not bias:
        assert same(model, make('spherical'))


def test_windows_by_ratio():
    model = timm.create_model('swin_tiny_rope_mixed', device='meta', img_size=384, window_ratio=8)
    assert {b.window_size for b in blocks(model)} == {(12, 12)}
    kept = timm.create_model('swin_tiny_rope_mixed', device='meta', img_size=384)
    assert {b.window_size for b in blocks(kept)} == {(7, 7)}
    both = timm.create_model('swin_tiny_rope_mixed', device='meta', img_size=384, window_ratio=8, window_size=6)
    assert {b.window_size for b in blocks(both)} == {(6, 6)}


def test_images_of_any_size():
    torch.manual_seed(5)
    x = torch.randn(1, 3, 40, 56)
    strict, free, padded = make(), make(strict_img_size=False), make(dynamic_img_pad=True)
    with pytest.raises(ValueError, match=r'40x56 does not match the model, built .* for 32x32'):
        strict(x)
    built = make(img_size=(40, 56))
    assert [b.shift_size for b in blocks(free)] != [b.shift_size for b in blocks(built)], 'those of the nominal size'
    wide = make(img_size=64, strict_img_size=False)
    with torch.no_grad():
        torch.testing.assert_close(wide(x), built(x))
        with pytest.raises(ValueError, match='40x54 must be a positive multiple of the patch 4x4'):
            free(x[..., :54])
        torch.testing.assert_close(padded(x[..., :54]), free(F.pad(x[..., :54], (0, 2))))


@pytest.mark.parametrize('head_dim', [8, (8, 24)])
def test_heads_of_any_size(head_dim):
    model = make('mixed', head_dim=head_dim)
    first, second = (8, 8) if head_dim == 8 else head_dim
    assert [rope.freqs.shape for rope in ropes(model)] == [(2, 1, 1, first // 2)] * 2 + [(2, 1, 2, second // 2)] * 2
    assert model(torch.randn(1, 3, 32, 32)).shape == (1, 5)


def test_patch_size_can_be_changed():
    model = make()
    model.set_input_size(img_size=64, patch_size=8)
    assert model.patch_embed.grid_size == (8, 8) and blocks(model)[0].window_size == (4, 4)
    assert model(torch.randn(1, 3, 64, 64)).shape == (1, 5)


@pytest.mark.parametrize('kwargs,error,words', [
    (dict(img_size=33), ValueError, 'img_size must be a multiple of the patch 4x4.*33x33'),
    (dict(img_size=0), ValueError, 'img_size must be an integer of at least 1, got 0'),
    (dict(patch_size=0), ValueError, 'patch_size must be an integer of at least 1, got 0'),
    (dict(embed_dim=0), ValueError, 'embed_dim must be an integer of at least 1, got 0'),
    (dict(embed_dim=30, num_heads=(4, 8)), ValueError, 'num_heads of stage 0 must divide its width 30, got 4'),
    (dict(num_heads=(1,)), ValueError, r'depths and num_heads must be as many, got \(2, 2\) and \(1,\)'),
    (dict(depths=2), ValueError, 'depths must be a list with one integer for each stage, got 2'),
    (dict(depths=(2, 0)), ValueError, 'depths must be an integer of at least 1, got 0'),
    (dict(window_rule='swin'), ValueError, "window_rule must be one of 'timm', 'naver', got 'swin'"),
    (dict(weight_init='naver'), ValueError, "weight_init must be one of .*got 'naver'"),
    (dict(rel_pos_bias=1), ValueError, 'rel_pos_bias must be True or False, got 1'),
    (dict(rope_encoding='polar'), ValueError, "Unknown rotary encoding 'polar'"),
    (dict(rope_encoding='none', rope_coords='cells'), ValueError, "rope_coords need a rope_encoding"),
    (dict(rope_share_layers=True), ValueError, 'rope_share_layers is not for Swin'),
    (dict(rope_reference_grid=(0, 4)), ValueError, 'reference_grid must be two positive integers'),
    (dict(rope_block=4), ValueError, "takes no option 'block'"),
    (dict(rope_encoding='liere', rope_block=33), ValueError, 'head_dim must be at least 33'),
    (dict(rope_speed=1), TypeError, "takes no option 'speed'"),
    (dict(no_such=1), TypeError, 'no_such'),
    (dict(window_size=0), ValueError, r'window_size.*must be positive'),
    (dict(window_size=(4, 4, 4)), ValueError, r'window_size.*Expected 2 stage window sizes'),
    (dict(window_size=(4, 3.5)), ValueError, 'window_size must be an integer of at least 1, got 3.5'),
    (dict(window_size=None, window_ratio=(2, 2, 2)), ValueError, 'window_ratio.*Expected 2'),
    (dict(window_size=None, window_ratio='8'), ValueError, "window_ratio: .*'str'"),
    (dict(head_dim=(16,)), ValueError, r'depths and head_dim must be as many, got \(2, 2\) and \(16,\)'),
    (dict(head_dim=0), ValueError, 'head_dim must be an integer of at least 1, got 0'),
])
def test_bad_arguments(kwargs, error, words, monkeypatch):
    if 'no_such' not in kwargs:
        monkeypatch.setattr(SwinTransformer, '__init__', lambda *_, **__: pytest.fail('built before it was refused'))
    for create in (RopeSwinTransformer, partial(timm.create_model, 'swin_tiny_rope_mixed')):
        with pytest.raises(error, match=words):
            create(**{**SMALL, 'rope_encoding': 'mixed', **kwargs})


@pytest.mark.parametrize('kwargs', [
    dict(img_size=(48, 50)), dict(img_size=48, patch_size=5), dict(img_size=-4), dict(img_size=48, window_size=2.5),
    dict(img_size=48, window_ratio=(2, '2'))])
def test_bad_sizes_change_nothing(kwargs):
    model = make()
    before = windows(model)
    with pytest.raises(ValueError, match='(img_size|window_size) must be|window_ratio: '):
        model.set_input_size(**kwargs)
    assert model.patch_embed.img_size == (32, 32)
    assert windows(model) == before
    assert same(model, make())
