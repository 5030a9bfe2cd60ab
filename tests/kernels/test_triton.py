"""The Triton kernels against the formula in float64: in Triton's interpreter everywhere, on a GPU where there is one.

Triton decides when a kernel is defined whether it is compiled or interpreted, so the interpreter has its own process:
this file, run as a script, checks every case there and prints what went wrong.
"""
import importlib.util
import json
import os
import re
import sys
from functools import partial
from pathlib import Path

import pytest
import torch
from fresh_python import HIDE, outcomes, run_interpreted, run_python

import timm_rope
from timm_rope.encodings.spiral import ClampedPairRotation
from timm_rope.rotations import BlockRotation, PairRotation, TripletRotation

HAS_TRITON = importlib.util.find_spec('triton') is not None
needs_triton = pytest.mark.skipif(not HAS_TRITON, reason='triton is not installed')


def needs_gpu(test):
    absent = not (HAS_TRITON and torch.cuda.is_available())
    return pytest.mark.gpu(pytest.mark.skipif(absent, reason='needs a CUDA device and triton')(test))


PAIRS, TRIPLETS, YAW_FIRST = PairRotation, TripletRotation, partial(TripletRotation, order='xy')
SHARED, PER_IMAGE, STRIDED, NO_PREFIX = 'payload shared by heads', 'payload per image', 'strided', 'no prefix token'

# rotation, its arguments, heads, batch, tokens, dtype, peculiarities
CASES = [
    (PAIRS, (8, 4), 3, 2, 6, 'float32', [SHARED]),
    (PAIRS, (6, 2), 3, 2, 6, 'float32', []),
    (PAIRS, (5, 2), 2, 2, 6, 'bfloat16', []),
    (PAIRS, (48, 24), 3, 5, 8, 'float32', []),  # several tiles and several shares of the batch
    (PAIRS, (24, 12), 2, 3, 6, 'bfloat16', []),
    (PAIRS, (72, 36), 1, 3, 6, 'float16', []),
    (PAIRS, (8, 4), 3, 3, 6, 'bfloat16', [SHARED, PER_IMAGE]),
    (PAIRS, (8, 4), 3, 9, 4, 'float32', [PER_IMAGE]),  # more images than programs would be wanted
    (PAIRS, (4, 2), 1, 1, 5, 'float32', [NO_PREFIX]),
    (PAIRS, (8, 3), 3, 3, 6, 'bfloat16', [STRIDED]),
    (ClampedPairRotation, (8, 4), 2, 2, 6, 'float32', []),
    (TRIPLETS, (16, 5), 2, 3, 6, 'float32', []),
    (YAW_FIRST, (16, 5), 2, 3, 6, 'float32', []),
    (TRIPLETS, (9, 3), 3, 2, 6, 'float32', [SHARED]),
    (TRIPLETS, (32, 10), 3, 5, 9, 'bfloat16', []),
    (YAW_FIRST, (20, 6), 2, 2, 6, 'float16', []),
    (TRIPLETS, (10, 3), 3, 2, 6, 'float32', [PER_IMAGE]),
    (YAW_FIRST, (8, 2), 3, 2, 6, 'float32', [STRIDED]),
    (BlockRotation, (24, 8), 2, 3, 6, 'float32', []),
    (BlockRotation, (20, 8), 3, 5, 26, 'bfloat16', []),
    (BlockRotation, (8, 8), 3, 2, 6, 'float32', [SHARED]),
    (BlockRotation, (8, 8), 2, 2, 6, 'float16', [PER_IMAGE, STRIDED]),
    (BlockRotation, (5, 2), 3, 3, 6, 'float32', []),
    (BlockRotation, (12, 4), 3, 3, 6, 'bfloat16', []),
    (BlockRotation, (16, 16), 2, 3, 6, 'float32', []),
]


def random_payload(rotation, shape, prefix, normal):
    """Random rotations, (*shape, W); those of prefix tokens are the identity."""
    def angles():
        out = normal(*shape, rotation.groups)
        out[..., :prefix, :] = 0
        return out

    if isinstance(rotation, PairRotation):
        turns = angles()
        return torch.stack((turns.cos(), turns.sin()), dim=-1).flatten(-2)
    if isinstance(rotation, TripletRotation):
        roll, yaw = angles(), angles()
        return torch.cat((roll.cos(), roll.sin(), yaw.cos(), yaw.sin()), dim=-1)
    generators = normal(*shape, rotation.groups, rotation.size, rotation.size)
    generators[..., :prefix, :, :, :] = 0
    return torch.matrix_exp(generators - generators.transpose(-1, -2)).flatten(-3)


class Inputs:
    """What a case turns: a projection, a payload, and gradients of odd layouts."""

    def __init__(self, case, device):
        make, arguments, heads, batch, tokens, dtype, peculiar = case
        generator = torch.Generator().manual_seed(0)
        self.rotation = make(*arguments)
        self.prefix = 0 if NO_PREFIX in peculiar else 1
        self.dtype = getattr(torch, dtype)
        head_dim = self.rotation.head_dim

        def normal(*shape):
            return torch.randn(*shape, generator=generator)

        def memory(*shape):
            return normal(*shape).to(device=device, dtype=self.dtype)

        shape = (1 if SHARED in peculiar else heads, tokens)
        payload = random_payload(
            self.rotation, (batch, *shape) if PER_IMAGE in peculiar else shape, self.prefix, normal)
        if STRIDED in peculiar:
            self.memory = memory(batch, 2 * tokens, 4, heads, head_dim + 3)
            self.packed = self.memory[:, ::2, 1:, :, 1:head_dim + 1]
            room = torch.zeros(*payload.shape[:-1], payload.shape[-1] + 5, device=device)
            self.payload = room[..., 2:-3].copy_(payload)
        else:
            self.packed = self.memory = memory(batch, tokens, 3, heads, head_dim)
            self.payload = payload.to(device)
        # as flash attention returns them, with the channels far apart, and the same numbers for all channels
        self.grads = (
            memory(batch, tokens, heads, head_dim).transpose(1, 2),
            memory(batch, heads, head_dim, tokens).transpose(2, 3),
            memory(batch, heads, tokens, 1).expand(batch, heads, tokens, head_dim))
        self.wide = payload.double()

    def attention_views(self):
        return self.packed.permute(2, 0, 3, 1, 4).unbind(0)

    def transposed(self, y):
        """R^T y in float64, from the derivative of the formula."""
        x = torch.zeros(y.shape, dtype=torch.float64, requires_grad=True)
        return torch.autograd.grad(self.rotation(x, self.wide), x, y.double().cpu())[0]


def bits(x):
    return x.contiguous().view(torch.int32 if x.dtype == torch.float32 else torch.int16).clone()


def assert_rounded(got, expected, scale=1.0):
    """`got` is `expected`, computed in float32 and rounded once to its own dtype."""
    error = (got.double().cpu() - expected).abs()
    # the interpreter cuts bfloat16 off where a GPU rounds it; that compiled kernels round is tested below
    roundings = 2 if got.dtype == torch.bfloat16 and got.device.type == 'cpu' else 1
    bound = roundings * 0.5 * torch.finfo(got.dtype).eps * expected.abs() * 1.01 + 4e-6 * scale
    assert bool((error <= bound).all()), f'off by {error.max():.3g}, {(error / bound).max():.3g} times the bound'


def check_turn(case, device):
    from timm_rope.kernels.triton import kernels as triton_kernels

    inputs = Inputs(case, device)
    packed, rotation, rest = inputs.packed, inputs.rotation, inputs.rotation.rotated
    packed[..., rest:] = float('inf')  # would spread if it took part
    packed[:, :, 2] = float('nan')
    before, memory = packed.clone(), bits(inputs.memory)
    payload = bits(inputs.payload)
    assert triton_kernels.supports(packed, inputs.payload, rotation)
    assert triton_kernels.turn_(packed, inputs.payload, rotation) is None

    expected = [rotation(old, inputs.wide)[..., :rest] for old in before.double().cpu().permute(2, 0, 3, 1, 4)[:2]]
    for part in range(2):
        assert_rounded(packed[:, :, part].transpose(1, 2)[..., :rest], expected[part])
    assert torch.equal(bits(packed[:, :, 2]), bits(before[:, :, 2])), 'v'
    assert torch.equal(bits(packed[..., rest:]), bits(before[..., rest:])), 'channels that belong to no group'
    assert torch.equal(packed[:, :inputs.prefix, :2], before[:, :inputs.prefix, :2]), 'prefix'
    assert torch.equal(bits(inputs.payload), payload), 'payload'
    turned = packed.clone()
    packed.copy_(before)
    assert torch.equal(bits(inputs.memory), memory), 'memory beside'

    copies = triton_kernels.turned_copy(packed, inputs.payload, rotation)
    assert torch.equal(bits(inputs.memory), memory) and torch.equal(bits(inputs.payload), payload), 'only read'
    assert len({x.untyped_storage().data_ptr() for x in copies}) == 3
    for part, (copy, place) in enumerate(zip(copies, turned.permute(2, 0, 3, 1, 4))):
        assert copy.shape == place.shape and torch.equal(bits(copy[..., rest:]), bits(place[..., rest:])), part
        if part < 2:
            assert_rounded(copy[..., :rest], expected[part])
        else:
            assert torch.equal(bits(copy), bits(place))


def check_turn_back(case, device):
    from timm_rope.kernels.triton import kernels as triton_kernels

    inputs = Inputs(case, device)
    packed, rotation, payload = inputs.packed, inputs.rotation, inputs.payload
    dq, dk, dv = inputs.grads
    dq[..., rotation.rotated:] = float('inf')
    q, k, _ = inputs.attention_views()
    given = [bits(x) for x in (dq, dk, dv, q, k, payload)]
    result, payload_grad = triton_kernels.turn_back(dq, dk, dv, payload, rotation, q, k, True)

    assert result.shape == packed.shape and result.is_contiguous() and result.dtype == inputs.dtype
    assert payload_grad.shape == payload.shape and payload_grad.dtype == payload.dtype
    rest = rotation.rotated

    def assert_turned_back(packed_grad):
        for part, grad in enumerate((dq, dk)):
            turning = torch.cat((grad[..., :rest], torch.zeros_like(grad[..., rest:])), -1)
            turned = packed_grad[:, :, part].transpose(1, 2)
            assert_rounded(turned[..., :rest], inputs.transposed(turning)[..., :rest])
            assert torch.equal(bits(turned[..., rest:]), bits(grad[..., rest:]))
        assert torch.equal(bits(packed_grad[:, :, 2]), bits(dv.transpose(1, 2)))

    assert_turned_back(result)

    # the derivative of the formula by each entry of the payload, at the input that belongs to these outputs
    leaf = inputs.wide.clone().requires_grad_()
    outputs = [rotation(inputs.transposed(y), leaf)[..., :rest] for y in (q, k)]
    torch.autograd.backward(outputs, [g[..., :rest].double().cpu() for g in (dq, dk)])
    assert leaf.grad.abs().max() > 1
    assert_rounded(payload_grad, leaf.grad, scale=1 + float(leaf.grad.abs().max()))

    for x, old in zip((dq, dk, dv, q, k, payload), given):
        assert torch.equal(bits(x), old), 'what was given is only read'
    if packed.shape[0] > 3 or packed.is_cuda:  # several shares of the batch
        again, payload_again = triton_kernels.turn_back(dq, dk, dv, payload, rotation, q, k, True)
        assert torch.equal(bits(again), bits(result)) and torch.equal(bits(payload_again), bits(payload_grad))
    alone, none = triton_kernels.turn_back(dq, dk, dv, payload, rotation, None, None, False)
    assert none is None
    assert_turned_back(alone)  # but not bit for bit the same: the compiler may fuse other products and sums


def check_empty(case, device):
    from timm_rope.kernels.triton import kernels as triton_kernels

    for batch, tokens in ((0, 4), (2, 0)):
        packed = torch.empty(batch, tokens, 3, 2, 4, device=device)
        q, k, v = packed.permute(2, 0, 3, 1, 4).unbind(0)
        payload = torch.ones(2, tokens, 4, device=device)
        triton_kernels.turn_(packed, payload, PairRotation(4, 2))
        out, grad = triton_kernels.turn_back(q, k, v, payload, PairRotation(4, 2), q, k, True)
        assert out.shape == packed.shape and grad.shape == payload.shape and not grad.any()


class OtherPairs(PairRotation):
    def forward(self, x, payload):
        return super().forward(x, -payload)


def check_refusals(case, device):
    from timm_rope.kernels.triton import kernels as triton_kernels

    packed, payload = torch.ones(2, 5, 3, 2, 8, device=device), torch.ones(2, 5, 8, device=device)
    triplets, blocks = torch.ones(1, 5, 8, device=device), torch.ones(2, 5, 64, device=device)
    taken = [
        (packed, payload, PairRotation(8, 4)),
        (packed, payload[:1], PairRotation(8, 4)),
        (packed, payload.expand(2, 2, 5, 8), PairRotation(8, 4)),
        (packed, triplets, TripletRotation(8, 2)),
        (packed, blocks, BlockRotation(8, 8)),
    ]
    refused = [
        (packed.double(), payload.double(), PairRotation(8, 4)),
        (packed, payload.double(), PairRotation(8, 4)),
        (packed.bfloat16(), payload.bfloat16(), PairRotation(8, 4)),
        (packed, payload, OtherPairs(8, 4)),
        (packed, payload[..., :4].contiguous(), PairRotation(8, 4)),
        (packed, payload[:, :4], PairRotation(8, 4)),
        (packed, payload.expand(3, 2, 5, 8), PairRotation(8, 4)),
        (packed, payload[:1].expand(3, 5, 8), PairRotation(8, 4)),
        (packed, payload.transpose(-1, -2).contiguous().transpose(-1, -2), PairRotation(8, 4)),
        (packed.transpose(-1, -2).contiguous().transpose(-1, -2), payload, PairRotation(8, 4)),
        (packed[:1].expand(2, 5, 3, 2, 8), payload, PairRotation(8, 4)),
        (packed[:, :, :2], payload, PairRotation(8, 4)),
        (packed.flatten(2), payload, PairRotation(8, 4)),
        (packed[..., :6], payload, PairRotation(8, 4)),
        (torch.ones(2, 5, 3, 2, 9, device=device), payload[..., :2].contiguous(), PairRotation(9, 1)),
        (torch.ones(2, 5, 3, 2, 6, device=device), torch.ones(2, 5, 18, device=device), BlockRotation(6, 3)),
        (torch.ones(2, 5, 3, 2, 32, device=device), torch.ones(2, 5, 1024, device=device), BlockRotation(32, 32)),
    ]
    for arguments in taken:
        assert triton_kernels.supports(*arguments), arguments[2]
    for i, (x, y, rotation) in enumerate(refused):
        assert not triton_kernels.supports(x, y, rotation), f'number {i}'
        with pytest.raises(ValueError, match=re.escape(f'{tuple(x.shape)}')):
            triton_kernels.turn_(x, y, rotation)
        assert bool((x == 1).all())
    q, k, v = packed.permute(2, 0, 3, 1, 4).unbind(0)
    for argument, changed in (
            ('dk', dict(dk=k[:1])), ('dv', dict(dv=v.bfloat16())), ('q', dict(q=q[..., :4])), ('k', dict(k=k.double())),
            ('q and k', dict(q=None))):
        with pytest.raises(ValueError, match=f'^{argument} '):
            triton_kernels.turn_back(**{
                **dict(dq=q, dk=k, dv=v, payload=payload, rotation=PairRotation(8, 4), q=q, k=k, payload_grad=True),
                **changed})
    with pytest.raises(ValueError, match='ask `supports` first'):
        triton_kernels.turn_back(q, k, v, payload.double(), PairRotation(8, 4), q, k, True)


def check_trial(case, device):
    """What `guard.may_turn` asks of a route; every kind and dtype of the cases, also with a kernel that is broken."""
    from timm_rope.kernels import guard
    from timm_rope.kernels.triton import kernels as triton_kernels

    inputs = Inputs(case, device)
    tried = guard._tried(triton_kernels, inputs.packed, inputs.payload, inputs.rotation)
    assert tried == '', tried
    kernel, triton_kernels.turn_back_kernel = triton_kernels.turn_back_kernel, None
    try:
        tried = guard._tried(triton_kernels, inputs.packed, inputs.payload, inputs.rotation)
        assert tried.startswith('raised TypeError'), tried
    finally:
        triton_kernels.turn_back_kernel = kernel


def title(case):
    make, arguments, heads, batch, tokens, dtype, peculiar = case
    rotation = make(*arguments)
    order = f' {rotation.order}' if isinstance(rotation, TripletRotation) else ''
    return ', '.join([f'{type(rotation).__name__}{arguments}{order}', f'{heads}x{batch}x{tokens} {dtype}', *peculiar])


CHECKS = {
    **{f'turn {title(case)}': (check_turn, case) for case in CASES},
    **{f'turn back {title(case)}': (check_turn_back, case) for case in CASES},
    **{f'trial {title(case)}': (check_trial, case) for case in CASES},
    'empty': (check_empty, None),
    'refusals': (check_refusals, None),
}


# -- in the interpreter


@pytest.fixture(scope='module')
def interpreted():
    if not HAS_TRITON:
        pytest.skip('triton is not installed')
    return run_interpreted(Path(__file__))


@pytest.mark.parametrize('check', CHECKS)
def test_in_the_interpreter(check, interpreted):
    assert interpreted[check] is None, interpreted[check]


# -- imports


def test_triton_is_not_imported_before_it_is_needed(interpreted):
    assert interpreted['imported early'] == []


def test_without_triton_only_the_kernels_are_missing(tmp_path):
    script = tmp_path / 'script.py'
    script.write_text(HIDE + '''
import json, torch, timm_rope
try:
    from timm_rope.kernels.triton import kernels
except ImportError as error:
    missing = error.name
rope = timm_rope.create_rope('axial', 8, 2, 1, (2, 2))
print(json.dumps([missing, list(rope.rotate(torch.randn(1, 2, 4, 8), rope((2, 2))[0]).shape)]))
''')
    missing, shape = run_python(tmp_path, script, HIDDEN='triton')[0]
    assert missing.split('.')[0] == 'triton' and shape == [1, 2, 4, 8]


@needs_triton
def test_memory_of_the_cpu_is_refused():
    from timm_rope.kernels.triton import kernels as triton_kernels

    if not triton_kernels.INTERPRETED:
        assert not triton_kernels.supports(torch.ones(2, 5, 3, 2, 8), torch.ones(2, 5, 8), PairRotation(8, 4))


# -- compiled for GPUs that need not be there


def compiled(case, kernel, dtype, capability):
    """PTX of a kernel for aligned, contiguous tensors; the assembler of the triton package has accepted it."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from timm_rope.kernels.triton import kernels as triton_kernels

    kind, order, groups, size, head_dim, width = case
    constants = triton_kernels.all_constants(head_dim, kind, order, 6, groups, size, 4 if dtype == 'fp32' else 2)
    if kernel == 'back':
        function, constants = triton_kernels.turn_back_kernel, dict(constants, WIDTH=width, PAYLOAD_GRAD=True)
    else:
        function, constants = triton_kernels.turn_kernel, dict(constants, IN_PLACE=kernel == 'turn')
    names = function.arg_names
    options = {name: value for name, value in constants.items() if name not in names}
    constants = {name: value for name, value in constants.items() if name in names}
    constants.update((name, 1) for name in names if name.endswith('_d'))
    tensors = dict.fromkeys(('packed', 'dq', 'dk', 'dv', 'q', 'k', 'q_out', 'k_out', 'v_out'), f'*{dtype}')
    tensors.update(payload='*fp32', partial='*fp32')
    signature = {name: 'constexpr' if name in constants else tensors.get(name, 'i32') for name in names}
    multiples = [name for name in names if name not in constants and name not in triton_kernels.RUNTIME]
    source = ASTSource(
        fn=function, signature=signature, constexprs={(names.index(name),): value for name, value in constants.items()},
        attrs={(names.index(name),): [['tt.divisibility', 16]] for name in multiples})
    built = triton.compile(source, target=GPUTarget('cuda', capability, 32), options=options)
    assert built.asm['cubin']
    return built.asm['ptx']


# kind, order, groups, size, head_dim, width
PAIRS_64, TRIPLETS_64, BLOCKS_64 = (
    ('pairs', '', 32, 2, 64, 64), ('triplets', 'yx', 21, 3, 64, 84), ('blocks', '', 8, 8, 64, 512))


@needs_triton
@pytest.mark.parametrize('case,kernel,dtype,capability,wide', [
    (PAIRS_64, 'turn', 'bf16', 90, True), (PAIRS_64, 'turn', 'fp32', 80, True),
    (PAIRS_64, 'back', 'bf16', 80, True), (PAIRS_64, 'back', 'fp16', 90, True),
    (TRIPLETS_64, 'turn', 'fp16', 80, False), (TRIPLETS_64, 'back', 'bf16', 90, False),
    (BLOCKS_64, 'turn', 'bf16', 90, True), (BLOCKS_64, 'turn', 'fp32', 80, True),
    (PAIRS_64, 'copy', 'bf16', 90, True), (TRIPLETS_64, 'copy', 'bf16', 90, False)])
def test_kernels_compile_to_wide_loads_without_exchange(case, kernel, dtype, capability, wide, tmp_path, monkeypatch):
    import triton

    if tuple(int(part) for part in triton.__version__.split('.')[:2]) < (3, 3):
        pytest.skip('this triton takes other arguments to compile for a GPU that is not there')
    monkeypatch.setenv('TRITON_CACHE_DIR', str(tmp_path))
    ptx = compiled(case, kernel, dtype, capability)
    assert 'shfl.sync' not in ptx, 'threads exchange nothing'
    conversions = re.findall(r'cvt\.(\w+)\.b?f16(?:x2)?\.f32', ptx)
    assert set(conversions) == (set() if dtype == 'fp32' else {'rn'}), 'rounded to nearest'
    sizes = re.findall(r'(?:ld|st)\.global(?:\.v(\d))?\.b(\d+)', ptx)
    widths = [int(count or 1) * int(width) for count, width in sizes]
    assert widths
    if wide:
        assert set(widths) == {128}, f'16 bytes at once, got {sorted(set(widths))} bits'


# -- on a GPU


@needs_gpu
@pytest.mark.parametrize('check', CHECKS)
def test_on_a_gpu(check):
    function, case = CHECKS[check]
    function(case, 'cuda')


def gpu_inputs(batch=8, tokens=197, heads=6, head_dim=64, dtype=torch.bfloat16):
    rope = timm_rope.create_rope('mixed', head_dim, heads, 1, (14, 14), device='cuda')
    payload = rope((14, 14), num_prefix_tokens=1)[0].detach()[:, :tokens].contiguous()
    packed = torch.randn(batch, tokens, 3, heads, head_dim, device='cuda', dtype=dtype)
    return packed, payload, rope.rotation


@needs_gpu
def test_one_kernel_each_way():
    from torch.autograd import DeviceType
    from torch.profiler import ProfilerActivity, profile

    from timm_rope.kernels.triton import kernels as triton_kernels

    packed, payload, rotation = gpu_inputs()
    q, k, v = packed.permute(2, 0, 3, 1, 4).unbind(0)
    for run, names in (
            (lambda: triton_kernels.turn_(packed, payload, rotation), ['turn_kernel']),
            (lambda: triton_kernels.turn_back(q, k, v, payload, rotation, None, None, False), ['turn_back_kernel'])):
        run()
        torch.cuda.synchronize()
        with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as seen:
            run()
            torch.cuda.synchronize()
        kernels = [event.name for event in seen.events() if event.device_type == DeviceType.CUDA]
        assert kernels == names


@needs_gpu
def test_cuda_graphs_record_the_kernels():
    from timm_rope.kernels.triton import kernels as triton_kernels

    packed, payload, rotation = gpu_inputs()
    first = packed.clone()
    q, k, v = packed.permute(2, 0, 3, 1, 4).unbind(0)

    def both():
        triton_kernels.turn_(packed, payload, rotation)
        return triton_kernels.turn_back(q, k, v, payload, rotation, q, k, True)

    expected = [x.clone() for x in both()]
    turned = packed.clone()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        result = both()
    packed.copy_(first)
    graph.replay()
    torch.cuda.synchronize()
    assert torch.equal(packed, turned)
    assert all(torch.equal(x, y) for x, y in zip(result, expected))


@needs_gpu
def test_more_elements_than_32_bits_can_count():
    from timm_rope.kernels.triton import kernels as triton_kernels

    batch = 2 ** 31 // (197 * 3 * 6 * 64) + 3
    if torch.cuda.mem_get_info()[0] < 14 * 2 ** 30:
        pytest.skip('needs 14 GiB of free GPU memory')
    packed, payload, rotation = gpu_inputs(batch)
    ends = torch.cat((packed[:1], packed[-1:]))
    triton_kernels.turn_(packed, payload, rotation)
    triton_kernels.turn_(ends, payload, rotation)
    assert torch.equal(torch.cat((packed[:1], packed[-1:])), ends)
    q, k, v = packed.permute(2, 0, 3, 1, 4).unbind(0)
    out, _ = triton_kernels.turn_back(q, k, v, payload, rotation, None, None, False)
    q, k, v = ends.permute(2, 0, 3, 1, 4).unbind(0)
    expected, _ = triton_kernels.turn_back(q, k, v, payload, rotation, None, None, False)
    assert torch.equal(torch.cat((out[:1], out[-1:])), expected)


def interpret_all():
    """Every check in this process; what went wrong, None where nothing did."""
    results = {'imported early': sorted(sys.modules.keys() & {'triton', 'timm_rope.kernels.triton.kernels'})}
    from timm_rope.kernels.triton import kernels as triton_kernels

    assert triton_kernels.INTERPRETED
    checks = {check: partial(function, case, 'cpu') for check, (function, case) in CHECKS.items()}
    return {**results, **outcomes(checks)}


if __name__ == '__main__':
    assert os.environ['TRITON_INTERPRET'] == '1'
    sys.stdout.write(json.dumps(interpret_all()) + '\n')
