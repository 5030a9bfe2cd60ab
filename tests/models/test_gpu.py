"""Whole models on a GPU against the same models on the CPU, in what people do there; skipped where there is none."""
import copy

import pytest
import timm
import torch
import torch.distributed as dist
import torch.nn.functional as F
from tiny import TINY, make
from tiny_swin import make as make_swin

from timm_rope import list_ropes
from timm_rope.kernels import guard, routes

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason='needs a CUDA device')]
SOME = ['axial', 'mixed', 'spherical_learned', 'liere']


@pytest.fixture(autouse=True)
def exact_products():
    """Convolutions in float32 as on the CPU. If kernels were switched off, every test would be one of the formula."""
    with torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
        yield
    assert guard.switched_off() == []


def vit(encoding):
    return make(rope_encoding=encoding)


def images(size=32, batch=3):
    return torch.randn(batch, 3, size, size, generator=torch.Generator().manual_seed(1))


def step(model, x):
    """Logits, loss and the gradient of every parameter that has one."""
    model.zero_grad()
    logits = model(x)
    F.cross_entropy(logits.float(), torch.arange(len(x), device=x.device)).backward()
    return logits.detach(), {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def assert_near(got, expected, share=2e-4):
    assert got.isfinite().all()
    error = (got.double().cpu() - expected.double().cpu()).abs().max()
    assert error <= share * expected.double().abs().max(), f'off by {error:.3g} of {expected.abs().max():.3g}'


@pytest.mark.parametrize('build', [make, make_swin], ids=['vit', 'swin'])
@pytest.mark.parametrize('encoding', list_ropes())
def test_logits_and_gradients_are_those_of_the_cpu(build, encoding):
    model = build(rope_encoding=encoding) if build is make else build(encoding)
    wide, x = copy.deepcopy(model).double(), images()
    expected, expected_grads = step(wide, x.double())
    logits, grads = step(model.cuda(), x.cuda())
    assert_near(logits, expected)
    assert grads.keys() == expected_grads.keys()
    largest = max(g.abs().max() for g in expected_grads.values())
    for name, grad in grads.items():
        scale = expected_grads[name].abs().max() + 1e-3 * largest
        assert float((grad.double().cpu() - expected_grads[name]).abs().max() / scale) < 2e-3, name
    with torch.no_grad():
        assert_near(model.eval()(x.cuda()), wide.eval()(x.double()))


@pytest.mark.parametrize('encoding', SOME)
def test_the_kernels_of_the_gpu_are_taken(encoding, monkeypatch):
    route, seen = routes.load_route('triton'), []
    turn, back = route.turn_, route.turn_back
    monkeypatch.setattr(route, 'turn_', lambda *args: (seen.append('forward'), turn(*args))[1])
    monkeypatch.setattr(route, 'turn_back', lambda *args: (seen.append('backward'), back(*args))[1])
    model = vit(encoding).cuda()
    step(model, images().cuda())
    assert seen[-6:] == ['forward'] * 3 + ['backward'] * 3


@pytest.mark.parametrize('size', [64, (40, 72)], ids=str)
@pytest.mark.parametrize('encoding', SOME)
def test_other_sizes(encoding, size):
    model = vit(encoding)
    x = torch.randn(2, 3, *((size, size) if isinstance(size, int) else size))
    model.set_input_size(img_size=x.shape[-2:])
    with torch.no_grad():
        expected = model(x)
        assert_near(model.cuda()(x.cuda()), expected)


@pytest.mark.parametrize('encoding', list_ropes())
def test_no_step_waits_for_the_gpu(encoding):
    """Neither evaluation nor training reads a number back, which would keep Python from running ahead."""
    model, x = vit(encoding).cuda(), images().cuda()
    target = torch.arange(3, device='cuda')
    optimizer = torch.optim.SGD(model.parameters(), 1e-3)

    def train():
        optimizer.zero_grad()
        F.cross_entropy(model(x), target).backward()
        optimizer.step()

    def evaluate():
        with torch.no_grad():
            model(x)

    for run in (train, evaluate):
        run()  # kernels are tried, payloads cached
        torch.cuda.set_sync_debug_mode('error')
        try:
            run()
        finally:
            torch.cuda.set_sync_debug_mode('default')


@pytest.mark.parametrize('dtype', [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize('encoding', list_ropes())
def test_autocast(encoding, dtype):
    model = make(rope_encoding=encoding, embed_dim=48).train().cuda().to(memory_format=torch.channels_last)
    with torch.no_grad():  # attention as loud as that of the other tests would multiply the rounding of half precision
        for block in model.blocks:
            block.attn.qkv.weight.mul_(0.2)
    x = images().cuda().contiguous(memory_format=torch.channels_last)
    expected, expected_grads = step(model, x)
    with torch.autocast('cuda', dtype):
        logits, grads = step(model, x)
    assert logits.dtype == dtype
    assert_near(logits, expected, share=0.05)
    assert grads.keys() == expected_grads.keys() and all(g.isfinite().all() for g in grads.values())


def test_training_in_half_precision_with_a_scaler():
    model = vit('spherical_learned').train().cuda()
    optimizer, scaler = torch.optim.AdamW(model.parameters(), 3e-3), torch.amp.GradScaler('cuda')
    x, target, losses = images(batch=8).cuda(), torch.arange(8).cuda() % 5, []
    for _ in range(60):
        optimizer.zero_grad()
        with torch.autocast('cuda', torch.float16):
            loss = F.cross_entropy(model(x), target)
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
        losses.append(float(loss.detach()))
    assert losses[-1] < 0.5 * losses[0]


@pytest.mark.parametrize('encoding', SOME)
def test_compiled(encoding):
    model = vit(encoding).cuda()
    x = images().cuda()
    expected, expected_grads = step(model, x)
    torch._dynamo.reset()
    compiled = torch.compile(model)
    model.zero_grad()
    logits = compiled(x)
    F.cross_entropy(logits, torch.arange(3).cuda()).backward()
    assert_near(logits.detach(), expected)
    largest = max(g.abs().max() for g in expected_grads.values())
    for name, p in model.named_parameters():
        if name in expected_grads:
            assert float((p.grad - expected_grads[name]).abs().max()) < 1e-3 * largest, name


@pytest.mark.parametrize('encoding', ['axial', 'liere'])
def test_cuda_graphs(encoding):
    model = vit(encoding).cuda()
    first, second = images(batch=2).cuda(), images(batch=3)[1:].cuda()
    with torch.no_grad():
        expected = model(first), model(second)
        place = first.clone()
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            model(place)
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            out = model(place)
        for x, y in zip((first, second), expected):
            place.copy_(x)
            graph.replay()
            assert_near(out, y, share=1e-5)
    torch._dynamo.reset()
    compiled = torch.compile(model, mode='reduce-overhead')
    with torch.no_grad():
        for _ in range(3):
            for x, y in zip((first, second), expected):
                assert_near(compiled(x), y)


@pytest.mark.parametrize('encoding', SOME)
def test_moved_to_and_fro(encoding):
    model, x = vit(encoding), images()
    with torch.no_grad():
        expected = model(x)
        assert_near(model.cuda()(x.cuda()), expected)
        assert torch.equal(model.cpu()(x), expected)
        assert_near(copy.deepcopy(model).cuda()(x.cuda()), expected)
    with torch.device('meta'):
        empty = timm.create_model('vit_tiny_rope_mixed', **TINY, rope_encoding=encoding).eval()
    empty.to_empty(device='cuda')
    empty.load_state_dict(model.state_dict())
    with torch.device('cuda'):
        born = timm.create_model('vit_tiny_rope_mixed', **TINY, rope_encoding=encoding).eval()
    born.load_state_dict(model.state_dict())
    with torch.no_grad():
        assert_near(empty(x.cuda()), expected)
        assert_near(born(x.cuda()), expected)


@pytest.mark.parametrize('encoding', SOME)
def test_gradient_checkpointing(encoding):
    model, x = vit(encoding).cuda(), images().cuda()
    logits, grads = step(model, x)
    model.set_grad_checkpointing()
    again, other = step(model.train(), x)
    assert_near(again, logits, share=1e-6)
    for name, grad in grads.items():
        assert_near(other[name], grad, share=1e-5)


@pytest.mark.parametrize('kind', ['ddp', 'fsdp'])
@pytest.mark.parametrize('encoding', ['axial', 'spherical_learned'])
def test_wrapped_for_many_gpus(kind, encoding, tmp_path):
    model, x = vit(encoding).cuda(), images().cuda()
    logits, grads = step(model, x)
    dist.init_process_group('nccl', init_method=f'file://{tmp_path}/store', rank=0, world_size=1)
    try:
        if kind == 'ddp':
            wrapped = torch.nn.parallel.DistributedDataParallel(model, device_ids=[0])
        else:
            from torch.distributed.fsdp import fully_shard

            for block in model.blocks:
                fully_shard(block)
            wrapped = fully_shard(model)
        again, other = step(wrapped, x)
    finally:
        dist.destroy_process_group()
    assert_near(again, logits, share=1e-5)
    for name, grad in other.items():
        grad = grad.to_local() if kind == 'fsdp' else grad
        assert_near(grad, grads[name.removeprefix('module.')], share=1e-4)
