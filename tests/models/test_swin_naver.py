"""NAVER's files of Swin models, read and compared with their formula in float64."""
import oracle
import pytest
import timm
import torch
import torch.nn.functional as F
from tiny_swin import SMALL, double, forward_block, load, make, norm, ropes

from timm_rope.weights.layouts import recognise


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
