"""Rotations, wave vectors and their statistics against the oracle and closed forms."""
import math

import oracle
import pytest
import timm
import tiny
import tiny_swin
import torch

from timm_rope import analysis
from timm_rope.encodings import ENCODINGS

PAIRS = sorted(name for name, cls in ENCODINGS.items() if cls.relative == 'xy')


def turn_of(encoding, layer=1, **kwargs):
    model = tiny.make(rope_encoding=encoding, **kwargs)
    if model.rope.learned:
        with torch.no_grad():
            model.rope.freqs.mul_(1 + 0.1 * torch.randn_like(model.rope.freqs))
    return analysis.rotary_layers(model)[layer]


def dense(matrices, head_dim):
    """(N, D, D) of the matrices of one head (N, G, b, b), with 1 for channels that do not turn."""
    return torch.stack([
        torch.block_diag(*each, torch.eye(head_dim - each.shape[0] * each.shape[-1])) for each in matrices.float()])


@pytest.mark.parametrize('encoding', sorted(ENCODINGS))
def test_matrices_are_those_of_the_oracle(encoding):
    turn = turn_of(encoding)
    for head in range(2):
        matrices = analysis.rotation_matrices(turn, (3, 5))
        assert matrices.dtype == torch.float64
        expected = torch.from_numpy(oracle.rotations(turn.rope, (3, 5), 1, head))
        ours = dense(matrices[min(head, len(matrices) - 1)], turn.head_dim)
        assert (ours - expected).abs().max() < 2e-6


@pytest.mark.parametrize('encoding', sorted(ENCODINGS))
def test_generators_are_slopes(encoding):
    """exp(A_x) is a step along a row where the other coordinate is 0, and everywhere where rotations commute."""
    turn = turn_of(encoding)
    a = analysis.generators(turn)
    assert (a + a.mT).abs().max() < 1e-9
    rope = turn.rope
    commute = analysis.commutator_ratio(a)
    assert commute.max() <= math.sqrt(2)
    if rope.relative == 'xy':
        assert commute.max() < 1e-9
        matrices = analysis.rotation_matrices(turn, (3, 4)).unflatten(1, (3, 4))
        for axis, (there, here) in enumerate((((1, 2), (1, 1)), ((2, 1), (1, 1)))):
            step = matrices[:, here[0], here[1]].mT @ matrices[:, there[0], there[1]]
            torch.testing.assert_close(step, torch.matrix_exp(a[:, :, axis]), rtol=0, atol=1e-9)
    else:
        assert commute.max() > 1e-3, 'a loud non-commuting encoding'


def test_waves_of_mixed_are_its_frequencies():
    model = tiny.make('vit_tiny_rope_mixed')
    waves = analysis.wave_vectors(model)
    torch.testing.assert_close(waves, model.rope.freqs.detach().double().permute(1, 2, 3, 0), rtol=0, atol=1e-9)


@pytest.mark.parametrize('mixed', [True, False])
def test_waves_of_timm(mixed):
    """timm's port of NAVER's models: read from the angles, equal to its frequencies."""
    model = timm.create_model(f'vit_small_patch16_rope_{"mixed_" if mixed else ""}224', depth=2, img_size=64)
    waves = analysis.wave_vectors(model)
    if mixed:
        expected = model.rope.freqs.detach().double().flatten(2).permute(1, 2, 0)
        torch.testing.assert_close(
            waves.flatten(1, 2), expected.reshape(2, -1, 2), rtol=0, atol=2e-6)
    else:
        frequencies = 100. ** -(torch.arange(16).double() / 16)
        ours = waves[0, 0].abs()
        assert ((ours > 0).sum(-1) == 1).all(), 'along one axis each'
        for axis in (0, 1):
            found = ours[:, axis][ours[:, axis] > 0].sort(descending=True).values
            torch.testing.assert_close(found, frequencies, rtol=1e-5, atol=0)


def test_a_model_of_timm_with_one_block():
    """Its mixed frequencies still have an axis of layers."""
    model = timm.create_model('vit_small_patch16_rope_mixed_224', depth=1, img_size=64)
    turn, = analysis.rotary_layers(model)
    assert turn.head_dim == 64 and analysis.rotation_matrices(turn).shape == (6, 16, 32, 2, 2)
    assert analysis.wave_vectors(model).shape == (1, 6, 32, 2)


def test_isotropy():
    angles = torch.arange(7).double() * math.pi / 7
    spread = torch.stack((angles.cos(), angles.sin()), -1)
    assert analysis.isotropy(spread * torch.rand(7, 1)).item() == pytest.approx(1)
    assert analysis.isotropy(-spread[:1]).item() == pytest.approx(0)
    assert analysis.isotropy(torch.cat((spread, torch.zeros(3, 2)))).item() == pytest.approx(1)
    assert analysis.isotropy(torch.zeros(3, 2)).isnan()


def test_spectrum():
    pair = torch.zeros(1, 2, 2, 2).double()
    pair[0, :, 1, 0], pair[0, :, 0, 1] = torch.tensor([3., 4.]), torch.tensor([-3., -4.])
    angles = torch.linspace(0, math.pi, 5).double()
    torch.testing.assert_close(
        analysis.spectrum(pair, angles)[0, :, 0], (3 * angles.cos() + 4 * angles.sin()).abs(), rtol=0, atol=1e-12)
    turn = turn_of('spherical')
    a = analysis.generators(turn)
    w = analysis.wave_vectors(tiny.make(rope_encoding='spherical'))[0]
    # two planes that share a channel: the axes of rotation are orthogonal, so frequencies add as vectors
    torch.testing.assert_close(
        analysis.spectrum(a, angles)[..., 0],
        torch.hypot(w[..., :1] * angles.cos(), w[..., 1:] * angles.sin()), rtol=0, atol=1e-9)
    torch.testing.assert_close(analysis.commutator_ratio(a), torch.full_like(a[..., 0, 0, 0], math.sqrt(0.5)))


def test_summary_is_flat():
    model = tiny.make('vit_tiny_rope_mixed')
    summary = analysis.frequency_summary(model, prefix='log')
    assert all(isinstance(value, float) for value in summary.values())
    assert {key.rsplit('/', 1)[0] for key in summary} == {'log', 'log/blocks.0', 'log/blocks.1', 'log/blocks.2'}
    length = model.rope.freqs.detach().norm(dim=0)
    assert summary['log/blocks.1/mean'] == pytest.approx(length[1].mean().item(), rel=1e-6)
    assert summary['log/aliased'] == (length > math.pi).float().mean().item()
    assert summary['log/low'] == pytest.approx((length < 0.05).float().mean().item())
    assert summary['log/commutator'] < 1e-9
    swin = tiny_swin.make('mixed')
    waves = analysis.wave_vectors(swin)
    assert waves.shape == (4, 1, 32, 2), 'one head of 16 pairs in the first stage, two in the second'
    assert waves.isnan().any(-1).sum(-1).flatten().tolist() == [16, 16, 0, 0]
    assert not math.isnan(analysis.frequency_summary(swin)['rope/mean'])


@pytest.mark.parametrize('make', [
    lambda: timm.create_model('vit_tiny_patch16_224', depth=1), lambda: timm.create_model('test_resnet'),
    lambda: tiny.make(rope_encoding='none')])
def test_without_a_rotation(make):
    with pytest.raises(ValueError, match='has no rotary encoding'):
        analysis.wave_vectors(make())


def test_models_stay_as_they_are():
    model = tiny.make('vit_tiny_rope_spherical').train()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    analysis.frequency_summary(model)
    analysis.pattern_map(analysis.rotary_layers(model)[0])
    assert model.training and model.rope.training and model.rope.freqs.dtype == torch.float32
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
