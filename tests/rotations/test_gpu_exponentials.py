"""The Triton kernels of matrix exponentials against float64: in Triton's interpreter everywhere, on a GPU if any.

Triton decides when a kernel is defined whether it is interpreted, so the interpreter has its own process: this file,
run as a script, prints what went wrong.
"""
import importlib.util
import json
from functools import partial
from pathlib import Path

import pytest
import torch
from fresh_python import outcomes, run_interpreted

HAS_TRITON = importlib.util.find_spec('triton') is not None
needs_gpu = [
    pytest.mark.gpu, pytest.mark.skipif(not (HAS_TRITON and torch.cuda.is_available()), reason='needs a CUDA device')]


def values(device, rows, columns, heads, groups, spread, first=-1.0):
    """Generators, coordinates that begin at `first`, a gradient; expected matrices and gradients in float64."""
    from timm_rope.rotations.exponential import _plain_table

    generator = torch.Generator().manual_seed(0)
    freqs = spread * torch.randn(2, 2, heads, groups, 28, generator=generator)
    y, x = (first + torch.arange(n, dtype=torch.float32) for n in (rows, columns))
    grad = torch.randn(2, heads, rows * columns, groups * 64, generator=generator)
    leaf = freqs.double().requires_grad_()
    expected = _plain_table(leaf, y.double(), x.double(), 8)
    expected_grad = torch.autograd.grad(expected, leaf, grad.double())[0]
    return [t.to(device) for t in (freqs, y, x, grad)], expected.detach(), expected_grad


def check_values(device, *args):
    from timm_rope.rotations import gpu_exponentials

    (freqs, y, x, grad), expected, expected_grad = values(device, *args)
    got, slopes = gpu_exponentials.forward(freqs, y, x), gpu_exponentials.backward(grad, freqs, y, x)
    assert got.shape == expected.shape and got.dtype == torch.float32
    error = float((got.double().cpu() - expected).abs().max())
    assert error < 5e-6, f'matrices are off by {error:.2g}'
    assert slopes.shape == freqs.shape
    error = float((slopes.double().cpu() - expected_grad).abs().max() / expected_grad.abs().max())
    assert error < 5e-6, f'gradients are off by {error:.2g} of the largest'
    again = gpu_exponentials.backward(grad, freqs, y, x)
    assert torch.equal(again, slopes), 'the same sums in the same order'


def check_not_finite(device):
    from timm_rope.rotations import gpu_exponentials

    for bad in (float('nan'), float('inf')):
        (freqs, y, x, grad), *_ = values(device, 2, 3, 1, 2, 1.0)
        freqs[0, 0, 0, 0, 3] = bad
        got = gpu_exponentials.forward(freqs, y, x).unflatten(-1, [2, 64])
        assert not got[0, 0, 0, 0].isfinite().all() and got[:, :, :, 1].isfinite().all() and got[1].isfinite().all()


def check_trial(device):
    """The trial before first use passes, and notices kernels that are wrong."""
    from timm_rope.rotations import gpu_exponentials

    assert gpu_exponentials._difference(torch.device(device)) == ''
    for name in ('forward', 'backward'):
        right = getattr(gpu_exponentials, name)
        setattr(gpu_exponentials, name, lambda *args, right=right: right(*args) * 1.001)
        try:
            assert 'off by' in gpu_exponentials._difference(torch.device(device)), name
        finally:
            setattr(gpu_exponentials, name, right)


def check_strides(device):
    """Frequencies and gradients in any layout."""
    from timm_rope.rotations import gpu_exponentials

    (freqs, y, x, grad), *_ = values(device, 3, 3, 2, 2, 1.0)
    odd = freqs.transpose(1, 2).contiguous().transpose(1, 2)
    assert torch.equal(gpu_exponentials.forward(odd, y, x), gpu_exponentials.forward(freqs, y, x))
    odd_grad = grad.mT.contiguous().mT
    assert torch.equal(gpu_exponentials.backward(odd_grad, odd, y, x), gpu_exponentials.backward(grad, freqs, y, x))


def check_points(device):
    """Positions anywhere: a grid of one column whose rows have an x of their own."""
    from timm_rope.rotations import gpu_exponentials

    (freqs, y, x, grad), *_ = values(device, 3, 7, 2, 2, 1.0)
    points = y.repeat_interleave(7), x.repeat(3).unsqueeze(1)
    assert torch.equal(gpu_exponentials.forward(freqs, *points), gpu_exponentials.forward(freqs, y, x))
    assert torch.equal(gpu_exponentials.backward(grad, freqs, *points), gpu_exponentials.backward(grad, freqs, y, x))


CHECKS = {
    'a small grid': lambda device: check_values(device, 2, 3, 2, 2, 1.0),
    'one row': lambda device: check_values(device, 1, 5, 1, 3, 1.0),
    'turns that are far': lambda device: check_values(device, 4, 5, 1, 2, 2.5, 8.0),
    'more than a tile': lambda device: check_values(device, 9, 9, 1, 1, 0.3),
    'not finite': check_not_finite,
    'strides': check_strides,
    'points': check_points,
    'trial': check_trial,
}


@pytest.fixture(scope='module')
def interpreted():
    if not HAS_TRITON:
        pytest.skip('triton is not installed')
    return run_interpreted(Path(__file__))


@pytest.mark.parametrize('check', CHECKS)
def test_in_the_interpreter(check, interpreted):
    assert interpreted[check] is None, interpreted[check]


@pytest.mark.parametrize('check', [pytest.param(name, marks=needs_gpu) for name in CHECKS])
def test_on_a_gpu(check):
    CHECKS[check]('cuda')


@needs_gpu[0]
@needs_gpu[1]
def test_the_encoding_takes_the_kernels(monkeypatch):
    import timm_rope
    from timm_rope.rotations import gpu_exponentials

    seen = []
    forward = gpu_exponentials.forward
    monkeypatch.setattr(gpu_exponentials, 'forward', lambda *args: (seen.append(1), forward(*args))[1])
    rope = timm_rope.create_rope('liere', 64, 2, 1, (14, 14), device='cuda')
    rope((14, 14))
    assert gpu_exponentials.works(rope.freqs.device) and seen


if __name__ == '__main__':
    print(json.dumps(outcomes({name: partial(check, 'cpu') for name, check in CHECKS.items()})))
