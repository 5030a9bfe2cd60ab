"""A route that fails on a device, or turns wrongly there, costs one warning and the formula, never the run."""
import threading
import warnings

import pytest
import torch
from tiny import make
from torch.utils._python_dispatch import TorchDispatchMode

import timm_rope
from timm_rope.kernels import guard, rotate, routes
from timm_rope.kernels.cpu import inplace

HEADS, GRID = 3, (3, 4)
MANY = 13  # more tokens than a trial has
ENCODINGS = [('mixed', {}), ('spherical_learned', {}), ('liere', dict(block=4))]


class Faulty:
    """The route of the CPU with faults: name of the function -> what it does instead, given its result."""
    NAME, MADE_WITH, ALL_OR_NOTHING = 'faulty', 'Fault 1.0', True

    def __init__(self, many_only=False, **faults):
        self.many_only, self.faults, self.calls = many_only, faults, {'turn_': 0, 'turn_back': 0}

    supports = staticmethod(inplace.supports)

    def fault(self, name, tokens):
        self.calls[name] += 1
        return self.faults.get(name) if tokens >= MANY or not self.many_only else None

    def turn_(self, packed, payload, rotation):
        fault = self.fault('turn_', packed.shape[1])
        if isinstance(fault, Exception):
            raise fault
        inplace.turn_(packed, payload, rotation)
        if fault:
            fault(packed)

    def turn_back(self, dq, dk, dv, payload, rotation, q, k, payload_grad):
        fault = self.fault('turn_back', dq.shape[2])
        if isinstance(fault, Exception):
            raise fault
        out, grad = inplace.turn_back(dq, dk, dv, payload, rotation, q, k, payload_grad)
        if fault:
            fault(out, grad)
        return out, grad


BROKEN = RuntimeError('PTX was compiled with an unsupported toolchain.')
FAULTS = {
    'compile error': (dict(turn_=BROKEN), 'raised RuntimeError: PTX was compiled'),
    'no code for the way back': (dict(turn_back=BROKEN), 'raised RuntimeError: PTX'),
    'not turned': (dict(turn_=lambda x: x[:, :, 1].mul_(1.1)), 'wrong queries, keys and values .* off by 0.'),
    'values touched': (dict(turn_=lambda x: x[:, -1, 2].zero_()), 'wrong queries, keys and values'),
    'nan': (dict(turn_=lambda x: x[0, 0].fill_(float('nan'))), 'off by nan'),
    'wrong gradient': (dict(turn_back=lambda out, grad: out[:, :, 0].neg_()), 'return wrong gradients of queries'),
    'wrong frequencies': (dict(turn_back=lambda out, grad: grad.mul_(0.5)), 'wrong gradients of the freq.* off by 0.5'),
}


@pytest.fixture
def use(monkeypatch):
    """Sets the route, in a process that has tried none."""
    monkeypatch.setattr(guard, '_passed', set())
    monkeypatch.setattr(guard, '_off', {})
    monkeypatch.delenv(routes.VARIABLE, raising=False)

    def use(route):
        monkeypatch.setattr(routes, 'load_route', lambda name: route)
        return route

    return use


def results(name, options, batch=2, dtype=torch.float32, run=rotate):
    """Queries, keys, values and the gradients of the projection and the frequencies."""
    torch.manual_seed(0)
    rope = timm_rope.create_rope(name, 12, HEADS, 1, GRID, **options)
    leaf = torch.randn(batch, MANY, 3 * HEADS * 12).to(dtype).requires_grad_()
    outputs = run(leaf * 1, rope(GRID, 1)[0], rope.rotation, HEADS)
    torch.autograd.backward(outputs, [torch.randn(out.shape).to(dtype) for out in outputs])
    return [*(out.detach() for out in outputs), leaf.grad, rope.freqs.grad]


def formula(*args, monkeypatch, **kwargs):
    with monkeypatch.context() as patch:
        patch.setenv(routes.VARIABLE, 'formula')
        return results(*args, **kwargs)


def assert_same(got, expected, tolerance=1e-5):
    for a, b in zip(got, expected):
        assert b is not None and b.abs().max() > 0.1
        assert (a - b).abs().max() <= tolerance * b.abs().max()


@pytest.mark.parametrize('name,options', ENCODINGS)
@pytest.mark.parametrize('fault', FAULTS)
def test_a_fault_is_found_before_real_data_is_turned(fault, name, options, use, monkeypatch):
    expected = formula(name, options, monkeypatch=monkeypatch)
    faults, problem = FAULTS[fault]
    route = use(Faulty(**faults))
    with pytest.warns(UserWarning, match=f"'faulty' .Fault 1.0. do not work on cpu: they .*{problem}") as seen:
        assert_same(results(name, options), expected, 0)
    assert len(seen) == 1 and 'TIMM_ROPE_KERNEL=formula' in str(seen[0].message)
    assert 'is switched off on cpu' in guard.switched_off()[0]
    calls = dict(route.calls)
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        for other, more in ENCODINGS:  # the whole route is left, whatever it is asked for
            results(other, more)
    assert route.calls == calls


@pytest.mark.parametrize('name,options', ENCODINGS)
@pytest.mark.parametrize('where', ['turn_', 'turn_back'])
def test_a_later_failure_is_no_end_of_the_run(where, name, options, use, monkeypatch):
    """Only with many tokens: out of shared memory, say. What is turned already gets its gradient by the formula."""
    expected = formula(name, options, monkeypatch=monkeypatch)
    route = use(Faulty(many_only=True, **{where: BROKEN}))
    with pytest.warns(UserWarning, match='do not work on cpu: they raised RuntimeError: PTX') as seen:
        assert_same(results(name, options), expected)
    assert len(seen) == 1
    calls = dict(route.calls)
    assert_same(results(name, options), expected, 0)
    assert route.calls == calls


def test_graphs_made_before_a_failure_go_back_by_the_formula(use, monkeypatch):
    expected = formula('mixed', {}, monkeypatch=monkeypatch)
    route = use(Faulty(many_only=True, turn_back=BROKEN))

    def twice(qkv, *args):
        rotate(qkv.detach().requires_grad_() * 1, *args)[0].sum().backward()
        return out

    torch.manual_seed(0)
    rope = timm_rope.create_rope('mixed', 12, HEADS, 1, GRID)
    leaf = torch.randn(2, MANY, 3 * HEADS * 12).requires_grad_()
    args = rope(GRID, 1)[0], rope.rotation, HEADS
    out = rotate(leaf * 1, *args)
    upstream = [torch.randn(x.shape) for x in out]
    with pytest.warns(UserWarning, match='PTX'):
        twice(leaf, args[0].detach(), *args[1:])
    calls = route.calls['turn_back']
    torch.autograd.backward(out, upstream)
    assert_same([leaf.grad, rope.freqs.grad], expected[3:])
    assert route.calls['turn_back'] == calls


@pytest.mark.parametrize('faults,many_only', [
    (dict(turn_=BROKEN), False), (dict(turn_=BROKEN), True), (dict(turn_back=BROKEN), True),
    (dict(turn_=lambda x: x.zero_()), False)])
def test_a_route_that_is_asked_for_raises(faults, many_only, use, monkeypatch):
    use(Faulty(many_only, **faults))
    monkeypatch.setenv(routes.VARIABLE, 'triton')
    for _ in range(2):
        with pytest.raises(RuntimeError, match='PTX was compiled|do not work on cpu: they return wrong'):
            results('mixed', {})
    assert not guard.switched_off()


def test_errors_that_must_not_be_passed_over(use):
    use(Faulty(many_only=True, turn_=torch.OutOfMemoryError('CUDA out of memory.')))
    with pytest.raises(torch.OutOfMemoryError):
        results('mixed', {})
    use(Faulty(turn_back=torch.OutOfMemoryError('CUDA out of memory.')))
    guard._passed.clear()
    with pytest.raises(torch.OutOfMemoryError):
        results('mixed', {})
    half_turned = use(Faulty(many_only=True, turn_=BROKEN))
    half_turned.ALL_OR_NOTHING = False
    with pytest.raises(RuntimeError, match='PTX'):
        results('mixed', {})
    assert not guard.switched_off()


@pytest.mark.parametrize('dtype', [torch.float32, torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize('name,options', ENCODINGS)
def test_the_route_of_the_cpu_passes(dtype, name, options, use):
    """Once for every kind of input, by nothing but a few calls."""
    route = use(Faulty())
    rope = timm_rope.create_rope(
        name, 12, HEADS, 1, GRID, dtype=torch.float64 if dtype == torch.float64 else None, **options)
    payload = rope(GRID, 1)[0].detach()
    qkv = torch.randn(2, MANY, 3 * HEADS * 12).to(dtype)
    for _ in range(3):
        rotate(qkv.clone(), payload, rope.rotation, HEADS)
    assert len(guard._passed) == 1 and not guard.switched_off()
    assert route.calls == {'turn_': 4, 'turn_back': 1}


class Counting(TorchDispatchMode):
    seen = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.seen += 1
        return func(*args, **kwargs or {})


@pytest.mark.parametrize('fault', [None, 'not turned'])
def test_nobody_sees_the_trial(fault, use):
    """Nor is it touched by what the caller switched on: it has a thread of its own."""
    rope = timm_rope.create_rope('mixed', 12, HEADS, 1, GRID)
    payload = rope(GRID, 1)[0].detach()
    packed = torch.randn(2, MANY, 3, HEADS, 12)
    route = use(Faulty(**(FAULTS[fault][0] if fault else {})))
    state, tensors = torch.get_rng_state(), []
    with Counting() as counting, torch.inference_mode(), torch.autocast('cpu', torch.bfloat16), torch.device('meta'):
        with torch.autograd.graph.saved_tensors_hooks(lambda x: tensors.append(x) or x, lambda x: x):
            with warnings.catch_warnings():
                warnings.simplefilter('ignore')
                passed = guard.may_turn(route, packed, payload, rope.rotation, False)
    assert passed == (fault is None) and route.calls['turn_'] == 1
    assert not counting.seen and not tensors and torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize('mode', ['plain', 'autocast', 'inference', 'checkpointing', 'reentrant'])
@pytest.mark.parametrize('fault', [None, 'wrong gradient'])
def test_whole_models_at_first_use(mode, fault, use, monkeypatch):
    model = make('vit_tiny_rope_mixed').train(mode != 'inference')
    model.set_grad_checkpointing(mode in ('checkpointing', 'reentrant'))
    monkeypatch.setattr('timm.models._manipulate._USE_REENTRANT_CKPT', mode == 'reentrant', raising=False)
    route = use(Faulty(**(FAULTS[fault][0] if fault else {})))
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter('always')
        with torch.inference_mode(mode == 'inference'), torch.autocast('cpu', torch.bfloat16, mode == 'autocast'):
            out = model(torch.randn(2, 3, 32, 32)).float()
        if mode != 'inference':
            out.sum().backward()
            assert model.rope.freqs.grad.abs().max() > 0
    assert torch.isfinite(out).all()
    assert len([w for w in seen if 'do not work' in str(w.message)]) == (1 if fault else 0)
    assert route.calls['turn_'] == (1 if fault else 1 + len(model.blocks) * (1 + model.grad_checkpointing))


@pytest.mark.parametrize('choice', ['auto', 'triton'])
def test_a_cuda_graph_is_not_disturbed(choice, use, monkeypatch):
    """While one is captured there is no trial: the formula, or an earlier verdict, or what the user asked for."""
    route = use(Faulty())
    monkeypatch.setenv(routes.VARIABLE, choice)
    monkeypatch.setattr(guard, 'capturing', lambda device: True)
    results('mixed', {})
    assert route.calls == {'turn_': int(choice == 'triton'), 'turn_back': int(choice == 'triton')}
    monkeypatch.setattr(guard, 'capturing', lambda device: False)
    results('mixed', {})
    monkeypatch.setattr(guard, 'capturing', lambda device: True)
    before = route.calls['turn_']
    results('mixed', {})
    assert route.calls['turn_'] == before + 1


@pytest.mark.parametrize('fault', [None, 'compile error'])
def test_threads_wait_for_one_trial(fault, use, monkeypatch):
    route = use(Faulty(**(FAULTS[fault][0] if fault else {})))
    rope = timm_rope.create_rope('mixed', 12, HEADS, 1, GRID)
    payload = rope(GRID, 1)[0].detach()
    qkv = torch.randn(8, 2, MANY, 3 * HEADS * 12)
    with monkeypatch.context() as patch:
        patch.setenv(routes.VARIABLE, 'formula')
        expected = rotate(qkv.flatten(0, 1), payload, rope.rotation, HEADS)[0]
    outputs = [None] * 8

    def run(i):
        outputs[i] = rotate(qkv[i].clone(), payload, rope.rotation, HEADS)[0]

    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter('always')
        threads = [threading.Thread(target=run, args=(i,)) for i in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert len(seen) == (1 if fault else 0)
    assert route.calls == ({'turn_': 1, 'turn_back': 0} if fault else {'turn_': 9, 'turn_back': 1})
    torch.testing.assert_close(torch.cat(outputs), expected)


def test_doctor_prints_what_was_found(use):
    from timm_rope.cli._kernel_survey import summary, survey

    use(Faulty())
    assert summary(survey('cpu')) == 'faulty'
    guard._passed.clear()
    use(Faulty(turn_back=BROKEN))
    with pytest.warns(UserWarning, match='PTX'):
        line = summary(survey('cpu'))
    assert line == 'formula; faulty is switched off on cpu: kernels raised RuntimeError: ' + str(BROKEN)
