"""Matrix exponentials of LieRE: all positions at once, against eigenvectors and `torch.linalg.matrix_exp`."""
import math

import numpy as np
import oracle
import pytest
import torch

import timm_rope
from timm_rope.rotations import exponential, grid_exponentials
from timm_rope.rotations.exponential import block_table

SIZES = [2, 3, 4, 5, 6, 7, 8, 16]


def generators(size, layers=1, heads=1, groups=1, dtype=torch.float32, scale=2 * math.pi):
    torch.manual_seed(size)
    return scale * torch.rand(2, layers, heads, groups, size * (size - 1) // 2, dtype=dtype)


def cells(count, reference=14):
    return (torch.arange(count, dtype=torch.float64) + 0.5) / reference


def skew(triangle, size):
    """(..., b (b - 1) / 2) -> (..., b, b), by NumPy's own order of the strict upper triangle."""
    row, column = np.triu_indices(size, 1)
    out = triangle.new_zeros(*triangle.shape[:-1], size, size)
    out[..., row, column] = triangle
    return out - out.mT


def formula(freqs, y, x, size):
    """What `block_table` stands for, in float64, by torch's own exponential."""
    a = skew(freqs.double(), size)
    at = [[u * a[0] + v * a[1] for u in x.double()] for v in y.double()]
    return torch.linalg.matrix_exp(torch.stack([torch.stack(row) for row in at])).flatten(0, 1).movedim(0, 2).flatten(3)


def expected(freqs, y, x, size):
    """The same through eigenvectors, one position after the other in NumPy: (L, H, N, G b b)."""
    _, layers, heads, groups, _ = freqs.shape
    a = skew(freqs.detach().double(), size).numpy()
    out = np.empty((layers, heads, len(y) * len(x), groups, size, size))
    for index in np.ndindex(layers, heads, groups):
        for i, v in enumerate(y.tolist()):
            for j, u in enumerate(x.tolist()):
                matrix = u * a[0][index] + v * a[1][index]
                out[index[0], index[1], i * len(x) + j, index[2]] = oracle.skew_exponential(matrix)
    return torch.from_numpy(out).flatten(3)


@pytest.mark.parametrize('size', [*SIZES, 64])
@pytest.mark.parametrize('count', [14, 32])
def test_float32_is_as_close_as_float32_can_be(size, count):
    freqs = generators(size, groups=1 if size > 8 else 3)
    y, x = cells(count)[-3:], cells(count)  # the last rows, where norms are largest
    out = block_table(freqs, y, x, size)
    assert out.dtype == torch.float32
    assert (out - expected(freqs, y, x, size)).abs().max() < 3e-7


@pytest.mark.parametrize('size,count', [(5, 14), (8, 14), (16, 14), (64, 14), (8, 32)])
def test_learning_generators_are_squared_in_float32(size, count):
    freqs = generators(size, groups=1 if size > 8 else 3).requires_grad_()
    y, x = cells(count)[-3:], cells(count)
    exact = expected(freqs, y, x, size)
    learning = (block_table(freqs, y, x, size) - exact).abs().max()
    with torch.no_grad():
        fixed = (block_table(freqs, y, x, size) - exact).abs().max()
    assert fixed < 3e-7 and learning < 5e-6


@pytest.mark.parametrize('rows,columns,far', [(1, 1, 1), (2, 3, 1), (2, 2, 10)])
def test_few_positions_are_as_exact_as_many(rows, columns, far):
    freqs = generators(8, 2, groups=2).requires_grad_()
    y, x = far * (cells(rows, rows) + 0.2), far * (cells(columns, columns) + 0.1)
    assert (block_table(freqs, y, x, 8) - expected(freqs, y, x, 8)).abs().max() < 5e-6
    gradient, reference = (gradient_of(f, freqs, y, x, 8) for f in (block_table, formula))
    assert (gradient - reference).abs().max() < (1e-5 if far == 1 else 3e-5) * reference.abs().max()


@pytest.mark.parametrize('size', [*SIZES, 64])
def test_float64_has_the_accuracy_of_float64(size):
    freqs = generators(size, groups=2, dtype=torch.float64)
    y, x = cells(9)[-2:], cells(4)
    norm = 9 / 14 * 2 * math.pi * size
    # every product of matrices of this norm may lose some units of float64, as may the sines of the closed forms
    bound = 50 * torch.finfo(torch.float64).eps * norm
    assert (block_table(freqs, y, x, size) - expected(freqs, y, x, size)).abs().max() < bound


@pytest.mark.parametrize('size', [5, 8])
@pytest.mark.parametrize('layers,heads', [(1, 1), (3, 1), (1, 2), (3, 2)])
def test_every_layer_head_group_and_position_is_in_its_place(size, layers, heads, monkeypatch):
    freqs = generators(size, layers, heads, 2).requires_grad_()
    y, x = cells(2), cells(3, 7) - 0.3
    out = block_table(freqs, y, x, size)
    exact = expected(freqs, y, x, size)
    grad = torch.randn_like(out)
    derivative, = torch.autograd.grad(exponential._plain_table(freqs, y, x, size), freqs, grad)
    assert torch.allclose(out.double(), exact, atol=5e-6)
    monkeypatch.setattr(grid_exponentials, 'CHUNK', 1)  # one head at a time
    out = block_table(freqs, y, x, size)
    assert torch.allclose(out.double(), exact, atol=5e-6)
    assert torch.allclose(torch.autograd.grad(out, freqs, grad)[0], derivative, atol=5e-6 * derivative.max())


@pytest.mark.parametrize('size', [3, 4, 5, 8, 64])
@pytest.mark.parametrize('dtype', [torch.float32, torch.float64])
def test_the_identity_is_exact(size, dtype):
    eye = torch.eye(size, dtype=dtype).flatten()
    origin = torch.zeros(1, dtype=torch.float64)
    assert torch.equal(block_table(generators(size, dtype=dtype), origin, origin, size)[0, 0, 0], eye)
    grid = torch.tensor([-1.0, 0.0, 2.0], dtype=torch.float64)
    assert torch.equal(block_table(generators(size, dtype=dtype), grid, grid, size)[0, 0, 4], eye)
    many = torch.arange(-10, 21, dtype=torch.float64) / 10  # interpolated
    assert torch.equal(block_table(generators(size, dtype=dtype), many, many, size)[0, 0, 10 * 31 + 10], eye)
    zero = torch.zeros_like(generators(size, dtype=dtype))
    assert torch.equal(block_table(zero, grid, grid, size), eye.expand(1, 1, 9, -1))


@pytest.mark.parametrize('scale', [1e-30, 1e-8, 1e-3, 1.0, 1e3, 1e6])
@pytest.mark.parametrize('size', [5, 8])
def test_any_norm(scale, size):
    freqs = generators(size, dtype=torch.float64, scale=scale)
    y, x = cells(2), cells(2)
    out = block_table(freqs, y, x, size)
    assert (out - expected(freqs, y, x, size)).abs().max() < 1e-14 * max(1, 10 * scale * size)
    gradient = gradient_of(block_table, freqs, y, x, size)
    reference = gradient_of(formula, freqs, y, x, size)
    assert (gradient - reference).abs().max() < 1e-14 * max(1, 10 * scale * size) * max(1, reference.abs().max())


def test_repeated_eigenvalues():
    # three planes at the same rate, and one that does not turn
    freqs = torch.zeros(2, 1, 1, 1, 28)
    for entry in (0, 13, 22):  # (0, 1), (2, 3), (4, 5)
        freqs[:, ..., entry] = 1.5
    y, x = cells(3), cells(3)
    assert (block_table(freqs, y, x, 8) - expected(freqs, y, x, 8)).abs().max() < 3e-7
    gradient, reference = (gradient_of(f, freqs, y, x, 8) for f in (block_table, formula))
    assert (gradient - reference).abs().max() < 2e-6 * reference.abs().max()


@pytest.mark.parametrize('size', [5, 16])
@pytest.mark.parametrize('along_x,along_y', [(0.0, 0.0), (0.0, 1.0), (1e-9, 3.0), (6.0, 6.0)])
def test_gradients_where_generators_do_little(size, along_x, along_y):
    # what hardly changes the exponentials over the grid does change their derivatives
    freqs = generators(size, scale=1.0, dtype=torch.float64)
    freqs *= torch.tensor([along_x, along_y], dtype=torch.float64).reshape(2, 1, 1, 1, 1)
    y, x = torch.tensor([-1.0, 0.5, 2.0]), torch.tensor([0.0, 1.3, 2.2, 4.0])
    gradient, reference = (gradient_of(f, freqs, y.double(), x.double(), size) for f in (block_table, formula))
    assert (gradient - reference).abs().max() < 1e-12 * reference.abs().max()


@pytest.mark.parametrize('rows,columns', [(1, 60), (60, 1), (40, 50), (2, 40)])
def test_long_and_large_grids(rows, columns):
    freqs = generators(8, 2, 1, 2)
    y, x = cells(rows) - 0.7, cells(columns) - 0.2
    exact, gradient = formula(freqs, y, x, 8), gradient_of(formula, freqs, y, x, 8)
    assert (block_table(freqs, y, x, 8) - exact).abs().max() < 3e-7
    assert (gradient_of(block_table, freqs, y, x, 8) - gradient).abs().max() < 1e-5 * gradient.abs().max()


def gradient_of(table, freqs, y, x, size):
    freqs = freqs.detach().clone().requires_grad_()
    out = table(freqs, y, x, size)
    weights = torch.randn(out.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    (out.double() * weights).sum().backward()
    return freqs.grad


@pytest.mark.parametrize('seed', [0, 1])
def test_large_grids_while_generators_learn(seed):
    torch.manual_seed(seed)
    single = timm_rope.create_rope('liere', 16, 2, 1, (14, 14))
    double = timm_rope.create_rope('liere', 16, 2, 1, (14, 14), dtype=torch.float64)
    double.freqs.data.copy_(single.freqs.data)
    with torch.no_grad():
        exact = double((64, 64))[0]
    assert float((single((64, 64))[0].detach().double() - exact).abs().max()) < 7e-6


@pytest.mark.parametrize('size,bound', [(3, 1e-6), (4, 1e-6), (5, 5e-6), (8, 5e-6), (16, 1e-5), (64, 5e-5)])
@pytest.mark.parametrize('autocast', [False, True])
def test_float32_gradients(size, bound, autocast):
    freqs = generators(size, 2, 1, 1 if size > 8 else 2)
    y, x = (cells(2) + 0.8, cells(2) + 0.8) if size == 64 else (cells(14)[-4:], cells(14))
    table = block_table
    if autocast and size <= 4:  # autograd runs the backward of the closed forms, under whatever autocast it finds

        def table(*args):
            with torch.autocast('cpu', torch.bfloat16):
                return block_table(*args)

    # that of larger blocks looks after itself
    with torch.autocast('cpu', torch.bfloat16, enabled=autocast and size > 4):
        gradient = gradient_of(table, freqs, y, x, size)
    reference = gradient_of(formula, freqs, y, x, size)
    assert gradient.dtype == torch.float32
    assert (gradient - reference).abs().max() < bound * reference.abs().max()
    assert (gradient != 0).all()


@pytest.mark.parametrize('size', [2, 3, 4, 5, 6, 8])
@pytest.mark.parametrize('scale', [0.0, 0.5, 6.0])
def test_first_and_second_derivatives(size, scale):
    freqs = generators(size, dtype=torch.float64, scale=scale).requires_grad_()
    y, x = torch.tensor([-1.0, 0.5], dtype=torch.float64), torch.tensor([0.0, 1.3], dtype=torch.float64)
    table = lambda freqs: block_table(freqs, y, x, size)  # noqa: E731
    assert torch.autograd.gradcheck(table, freqs, fast_mode=True, check_batched_grad=True)
    if scale and size in (4, 5):
        assert torch.autograd.gradgradcheck(table, freqs, fast_mode=True)


@pytest.mark.parametrize('size', [4, 6])
def test_functional_transforms_and_forward_mode(size):
    freqs = generators(size, dtype=torch.float64, scale=1.0)
    y, x = cells(2, 2), cells(2, 2)
    table = lambda freqs: block_table(freqs, y, x, size)  # noqa: E731
    assert torch.allclose(torch.func.vmap(table)(torch.stack((freqs, -freqs)))[1], table(-freqs))
    gradient = torch.func.grad(lambda f: table(f).sin().sum())(freqs)
    plain = freqs.clone().requires_grad_()
    table(plain).sin().sum().backward()
    assert torch.allclose(gradient, plain.grad)
    value, tangent = torch.func.jvp(table, (freqs,), (freqs,))
    step = 1e-5
    assert torch.allclose(tangent, (table(freqs * (1 + step)) - table(freqs * (1 - step))) / (2 * step), atol=1e-8)
    with torch.autograd.forward_ad.dual_level():
        dual = table(torch.autograd.forward_ad.make_dual(freqs, freqs))
        assert torch.allclose(torch.autograd.forward_ad.unpack_dual(dual).tangent, tangent)


@pytest.mark.slow
@pytest.mark.parametrize('dynamic', [False, True])
@pytest.mark.parametrize('size', [4, 8])
def test_compiled_whole_with_gradients(size, dynamic, monkeypatch):
    def refuse(*args):
        raise AssertionError('one position at a time')

    freqs = generators(size, 2, 1, 2)
    expected_gradients = [gradient_of(block_table, freqs, cells(n), cells(3), size) for n in (2, 5)]
    if size > 4:
        monkeypatch.setattr(exponential, '_plain_table', refuse)
    torch._dynamo.reset()  # what was compiled for other parameters counts
    compiled = torch.compile(
        lambda f, y, x: block_table(f, y, x, size), backend='aot_eager', fullgraph=True, dynamic=dynamic)
    for n, expected_gradient in zip((2, 5), expected_gradients):
        y, x = cells(n), cells(3)
        assert torch.allclose(compiled(freqs, y, x).double(), expected(freqs, y, x, size), atol=7e-6)
        gradient = gradient_of(lambda *args: compiled(*args[:3]), freqs, y, x, size)
        assert torch.allclose(gradient, expected_gradient, atol=1e-4)


@pytest.mark.slow
def test_compiled_transforms():
    freqs, y, x = generators(8, 2, dtype=torch.float64), cells(2), cells(2)
    table = lambda f: block_table(f, y, x, 8)  # noqa: E731
    gradient = torch.func.grad(lambda f: table(f).sin().sum())
    several = torch.stack((freqs, -freqs), dim=2)
    for transformed in (
            gradient,
            lambda f: torch.func.vmap(table, in_dims=2)(several + f[:, :, None]),
            lambda f: torch.func.vmap(gradient, in_dims=2)(several + f[:, :, None]),
            lambda f: torch.func.vmap(lambda w: torch.func.vjp(table, f)[1](w)[0])(torch.stack((table(f), -table(f)))),
            lambda f: torch.func.jvp(table, (f,), (f,))[1]):
        compiled = torch.compile(transformed, backend='aot_eager', fullgraph=True)
        assert torch.allclose(compiled(freqs), transformed(freqs))


@pytest.mark.parametrize('size', [5, 8])
@pytest.mark.parametrize('requires_grad', [False, True])
def test_operators_are_well_registered(size, requires_grad):
    freqs, y, x = generators(size, 2, 1, 2).requires_grad_(requires_grad), cells(2), cells(3)
    torch.library.opcheck(grid_exponentials.operator, (freqs, y, x, size))
    grad = torch.randn(2, 1, 6, 2 * size * size)
    torch.library.opcheck(grid_exponentials.operator_backward, (grad, freqs.detach(), y, x, size))
    torch.library.opcheck(grid_exponentials.operator_backward, (grad.mT.contiguous().mT, freqs.detach(), y, x, size))


def test_operators_look_after_autocast():
    freqs, y, x = generators(8), cells(2), cells(3)
    grad = torch.randn(1, 1, 6, 64)
    plain = grid_exponentials.operator(freqs, y, x, 8), grid_exponentials.operator_backward(grad, freqs, y, x, 8)
    with torch.autocast('cpu', torch.bfloat16):
        cast = grid_exponentials.operator(freqs, y, x, 8), grid_exponentials.operator_backward(grad, freqs, y, x, 8)
    assert all(torch.equal(a, b) for a, b in zip(plain, cast))


@pytest.mark.parametrize('size', [4, 8])
def test_runs_are_bit_identical_and_change_nothing(size):
    freqs, y, x = generators(size, 2, 2, 2), cells(5), cells(5)
    before = freqs.clone()
    first, second = (block_table(freqs, y, x, size) for _ in range(2))
    assert torch.equal(first, second) and torch.equal(freqs, before)
    assert torch.equal(*(gradient_of(block_table, freqs, y, x, size) for _ in range(2)))
    with torch.inference_mode():
        assert torch.equal(block_table(freqs, y, x, size), first), 'training and evaluation see the same rotations'
    grad = torch.randn_like(first)
    kept = grad.clone()
    block_table(freqs.requires_grad_(), y, x, size).backward(grad)
    assert torch.equal(grad, kept), 'the gradient that came in belongs to the caller'


@pytest.mark.parametrize('bad', [math.nan, math.inf])
def test_diverged_generators_give_nan_and_no_endless_loop(bad):
    freqs = generators(8, heads=2)
    freqs[0, 0, 1, 0, 3] = bad
    out = block_table(freqs, cells(2), cells(2), 8)
    assert out.shape == (1, 2, 4, 64) and out[0, 1].isnan().any()
    assert gradient_of(block_table, freqs, cells(2), cells(2), 8)[0, 0, 1, 0].isnan().all()


def test_meta_and_fake_tensors_have_shapes():
    freqs = generators(8, 2, 3, 4)
    assert block_table(freqs.to('meta'), cells(2).to('meta'), cells(3).to('meta'), 8).shape == (2, 3, 6, 256)
    with torch._subclasses.FakeTensorMode(allow_non_fake_inputs=True) as mode:
        assert block_table(mode.from_tensor(freqs), cells(2), cells(3), 8).shape == (2, 3, 6, 256)


def test_eager_mode_takes_all_positions_at_once(monkeypatch):
    def refuse(*args):
        raise AssertionError('one position at a time')

    monkeypatch.setattr(exponential, '_plain_table', refuse)
    gradient_of(block_table, generators(8), cells(2), cells(2), 8)
