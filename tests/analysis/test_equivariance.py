"""Errors of equivariance: 0 where an encoding promises it, along one axis or both, and not 0 elsewhere."""
import math

import pytest
import tiny
import torch

from timm_rope import analysis
from timm_rope.encodings import ENCODINGS


def turn_of(encoding, **kwargs):
    return analysis.rotary_layers(tiny.make(rope_encoding=encoding, **kwargs))[0]


@pytest.mark.parametrize('encoding', sorted(ENCODINGS))
def test_errors_are_what_the_encoding_promises(encoding):
    turn = turn_of(encoding)
    matrices = analysis.rotation_matrices(turn, (4, 5))
    error = analysis.rotation_error(matrices, (4, 5))
    along_rows = analysis.score_shift_error(matrices, (4, 5), (2, 0))
    along_columns = analysis.score_shift_error(matrices, (4, 5), (0, 2))
    assert ((error >= 0) & (error <= 1)).all()
    relative = ENCODINGS[encoding].relative
    if relative == 'xy':
        assert max(error.max(), along_rows.max(), along_columns.max()) < 1e-9
    else:
        assert error.min() > 1e-4
        last, first = (along_columns, along_rows) if turn.rope.options.get('order', 'yx') == 'yx' else (
            along_rows, along_columns)
        assert first.min() > 1e-2
        assert (last.max() < 1e-9) == (relative == 'last')


def test_relative_rotations_by_hand():
    """Two patches in a row and two below, turned by angles: the variance within an offset over all of it."""
    angles = torch.tensor([0., 1., 0.5, 2.]).double()  # the step to the right is 1 in one row and 1.5 in the other
    rows = torch.stack((angles.cos(), -angles.sin()), -1), torch.stack((angles.sin(), angles.cos()), -1)
    matrices = torch.stack(rows, -2)[None, :, None]
    relative = {}
    everything = []
    for i in range(4):
        for j in range(4):
            m = matrices[0, i, 0].T @ matrices[0, j, 0]
            relative.setdefault((j // 2 - i // 2, j % 2 - i % 2), []).append(m)
            everything.append(m)
    within = sum(((torch.stack(ms) - torch.stack(ms).mean(0)) ** 2).sum() for ms in relative.values())
    everything = torch.stack(everything)
    expected = within / ((everything - everything.mean(0)) ** 2).sum()
    torch.testing.assert_close(analysis.rotation_error(matrices, (2, 2))[0], expected)


def test_pattern_of_pairs_is_a_mean_of_cosines():
    turn = turn_of('mixed')
    pattern = analysis.pattern_map(turn, (5, 7))
    waves = turn.rope.freqs.detach().double()[:, 0]  # (2, H, G)
    y, x = torch.meshgrid(torch.arange(5) - 2, torch.arange(7) - 3, indexing='ij')
    expected = torch.cos(waves[0, :, :, None, None] * x + waves[1, :, :, None, None] * y).mean(1)
    torch.testing.assert_close(pattern, expected, rtol=0, atol=1e-9)
    assert (pattern[:, 2, 3] - 1).abs().max() < 1e-12
    spherical = analysis.pattern_map(turn_of('spherical', embed_dim=20), (5, 5))  # one channel of ten does not turn
    assert (spherical[:, 2, 2] - 1).abs().max() < 1e-12


def test_images_are_moved_by_patches():
    images = torch.arange(2 * 3 * 8 * 12).float().reshape(2, 3, 8, 12)
    moved = analysis.shift_patches(images, (1, 2), (4, 2))
    assert torch.equal(moved[..., 4:, 4:], images[..., :4, :-4])
    shuffled = analysis.shuffle_patches(images, (4, 2), seed=3)
    assert not torch.equal(shuffled, images)

    def patches(image):
        return sorted(tuple(each.flatten().tolist()) for row in image.split(4, -2) for each in row.split(2, -1))

    assert patches(shuffled[1]) == patches(images[1]) and patches(shuffled[0]) != patches(images[1])
    assert torch.equal(shuffled, analysis.shuffle_patches(images, (4, 2), seed=3))
    with pytest.raises(ValueError, match=r'multiple of the patch \(3, 2\), got 8x12'):
        analysis.shuffle_patches(images, (3, 2))
    for shift in ((-1, 0), (3, 0), (2, 1)):
        with pytest.raises(ValueError, match=r'shift must be \(rows, columns\) from 0 that leaves two patches'):
            analysis.score_shift_error(analysis.rotation_matrices(turn_of('axial'), (3, 2)), (3, 2), shift)


def test_logits_without_positions_do_not_change():
    images = torch.randn(3, 3, 32, 32)
    still = tiny.make(rope_encoding='none', global_pool='avg', class_token=False, pos_embed='none')
    turned = tiny.make(rope_encoding='mixed', global_pool='avg', class_token=False)
    shifts = [(1, 2), (0, 3), (4, 4)]
    assert analysis.logit_shift_error(still, images, shifts, (8, 8)).max() < 1e-5
    changes = analysis.logit_shift_error(turned, images, shifts, (8, 8))
    assert changes[:2].min() > 1e-2 and changes[2] == 0, 'the last is once around'


def test_accuracy_drop():
    class Corner(torch.nn.Module):
        """Answers by the first pixel."""

        def forward(self, x):
            return torch.nn.functional.one_hot(x[:, 0, 0, 0].long(), 4).float()

    images = torch.arange(4.).repeat_interleave(4).reshape(4, 1, 2, 2).clone()
    images[2:, :, 0, 1] = 0.  # what a shift by one column brings into the corner
    labels = torch.arange(4)
    batches = [(images[:3], labels[:3]), (images[3:], labels[3:])]
    assert analysis.accuracy_drop(Corner(), batches, lambda x: analysis.shift_patches(x, (0, 1), (1, 1))) == (1., 0.5)
    with pytest.raises(ValueError, match='batches must hold images'):
        analysis.accuracy_drop(Corner(), [], lambda x: x)


def test_reconstruction():
    circle = analysis.test_pattern('circle', 32)
    drawn, mse, ssim = analysis.reconstruct(circle, torch.ones(32, 32, dtype=torch.bool))
    torch.testing.assert_close(drawn, circle, rtol=0, atol=1e-12)
    assert mse < 1e-24 and ssim == pytest.approx(1)
    # a wave that is kept is drawn exactly, one that is not leaves the mean
    n = torch.arange(32).double()
    wave = torch.cos(2 * math.pi * (3 * n[:, None] - 5 * n) / 32)
    keep = analysis.encodable_bins(torch.tensor([[-5., 3.], [math.nan, 0.]]) * 2 * math.pi / 32, 32)
    assert keep.sum() == 3
    assert analysis.reconstruct(wave, keep)[1] < 1e-24
    other = analysis.encodable_bins(torch.tensor([[5., 3.]]) * 2 * math.pi / 32, 32)
    assert analysis.reconstruct(wave, other)[1] == pytest.approx(0.5)
    assert analysis.encodable_bins(torch.tensor([[2 * math.pi + 0.2, 0.]]), 32)[0, 1], 'aliased'
    with pytest.raises(ValueError, match="'dot' or 'circle', got 'square'"):
        analysis.test_pattern('square')


def test_ssim_by_its_definition():
    torch.manual_seed(0)
    a, b = torch.rand(2, 11, 11).double()
    axis = torch.arange(11).double() - 5
    w = torch.exp(-(axis[:, None] ** 2 + axis ** 2) / (2 * 1.5 ** 2))
    w = w / w.sum()
    ma, mb = (w * a).sum(), (w * b).sum()
    va, vb, vab = (w * (a - ma) ** 2).sum(), (w * (b - mb) ** 2).sum(), (w * (a - ma) * (b - mb)).sum()
    expected = (2 * ma * mb + 1e-4) * (2 * vab + 9e-4) / ((ma ** 2 + mb ** 2 + 1e-4) * (va + vb + 9e-4))
    torch.testing.assert_close(analysis.ssim(a, b), expected)
