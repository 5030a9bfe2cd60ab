"""Which images the waves of an encoding can draw: 2D Fourier reconstruction (arXiv 2403.13298, appendix; 2602.03227).

A head that attends by position alone can form any sum of the waves it turns by. So an image is taken apart into waves,
only those that the encoding has are kept, and what they draw is compared with the image.
"""
import math
from typing import Tuple

import torch
import torch.nn.functional as F
from torch import Tensor


def test_pattern(kind: str, size: int = 64) -> Tensor:
    """A binary image of `size` x `size`: a 'dot' in the middle, or a 'circle'.

    Raises:
        ValueError: There is no such kind.
    """
    axis = torch.arange(size, dtype=torch.float64) - size // 2
    radius = torch.hypot(axis[:, None], axis)
    if kind == 'dot':
        return (radius < 1).double()
    if kind == 'circle':
        return ((radius - size / 4).abs() < 1).double()
    raise ValueError(f"kind must be 'dot' or 'circle', got {kind!r}.")


test_pattern.__test__ = False  # type: ignore[attr-defined]  # no test, whatever pytest makes of the name


def encodable_bins(waves: Tensor, size: int = 64) -> Tensor:
    """The bins of a discrete Fourier transform that are nearest to the waves, with their opposites.

    Args:
        waves: (..., 2), radians per patch, x first; NaN is no wave, and a faster one than pi is seen as a slower one.
        size: Patches along each side of the image.

    Returns:
        (size, size), bool, rows are frequencies along y; the constant bin is always among them.
    """
    waves = waves.reshape(-1, 2)
    waves = waves[~waves.isnan().any(-1)]
    bins = (waves * size / (2 * math.pi)).round().long()
    keep = torch.zeros(size, size, dtype=torch.bool, device=waves.device)
    keep[0, 0] = True
    for sign in (1, -1):
        keep[(sign * bins[:, 1]) % size, (sign * bins[:, 0]) % size] = True
    return keep


def reconstruct(image: Tensor, keep: Tensor) -> Tuple[Tensor, float, float]:
    """The image from the kept waves alone.

    Args:
        image: (size, size).
        keep: (size, size), of `encodable_bins`.

    Returns:
        The reconstruction (size, size), its mean squared error, and its SSIM.
    """
    drawn = torch.fft.ifft2(torch.fft.fft2(image) * keep).real
    return drawn, float((drawn - image).square().mean()), float(ssim(drawn, image))


def ssim(a: Tensor, b: Tensor, span: float = 1., window: int = 11, sigma: float = 1.5) -> Tensor:
    """Mean structural similarity of two images (Wang et al., 2004), 1 where they are equal.

    Args:
        a: (rows, columns).
        b: (rows, columns).
        span: Difference of the largest and the smallest value an image can have, L of the paper.
        window: Width of the Gaussian window in pixels.
        sigma: Of the Gaussian window.
    """
    axis = torch.arange(window, dtype=a.dtype, device=a.device) - window // 2
    gauss = torch.exp(-axis.square() / (2 * sigma ** 2))
    gauss = gauss / gauss.sum()
    kernel = (gauss[:, None] * gauss)[None, None]

    def local(x: Tensor) -> Tensor:
        return F.conv2d(x[None, None], kernel)[0, 0]

    mean_a, mean_b = local(a), local(b)
    var_a, var_b = local(a * a) - mean_a ** 2, local(b * b) - mean_b ** 2
    shared = local(a * b) - mean_a * mean_b
    c1, c2 = (0.01 * span) ** 2, (0.03 * span) ** 2
    top = (2 * mean_a * mean_b + c1) * (2 * shared + c2)
    return (top / ((mean_a ** 2 + mean_b ** 2 + c1) * (var_a + var_b + c2))).mean()
