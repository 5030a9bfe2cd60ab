"""Two processes on the CPU: DDP and FSDP2 train the same model as one process.

Run as a script under torch.distributed.run this file is the training program, `ddp FOLDER` or `fsdp FOLDER`; the tests
look at what it leaves in the folder.
"""
import copy
import os
import subprocess
import sys
from datetime import timedelta

import pytest
import timm
import torch
import torch.distributed as dist
import torch.nn.functional as F

from timm_rope import list_ropes
from timm_rope.encodings import _cache as cache

WORLD, STEPS, CHANGES, BATCH = 2, 3, 8, 4
# name -> model arguments, gradient checkpointing
CASES = {
    **{name: ({}, False) for name in list_ropes()},
    'spherical_learned_checkpointed': ({}, True),
    'spherical_learned_ape': ({}, False),
}


def new_model(case):
    kwargs, checkpointing = CASES[case]
    model = timm.create_model(
        f'vit_tiny_rope_{case.removesuffix("_checkpointed")}',
        embed_dim=48, depth=2, num_heads=2, patch_size=8, img_size=32, num_classes=4, init_values=1., **kwargs)
    with torch.no_grad():
        model.cls_token.normal_()  # at its initial 1e-6 the first norm would blow up every rounding error
        for block in model.blocks:
            block.attn.qkv.weight.mul_(5)  # untrained scores are so flat that frequencies would hardly get a gradient
    model.set_grad_checkpointing(checkpointing)
    return model


def batch_of(step, rank):
    """Images, larger ones in the second step, and targets of one process."""
    generator = torch.Generator().manual_seed(10 * step + rank)
    size = 48 if step == 1 else 32
    images = torch.randn(BATCH, 3, size, size, generator=generator)
    return images, torch.randint(4, (BATCH,), generator=generator)


def joint_batch(step):
    images, targets = zip(*(batch_of(step, rank) for rank in range(WORLD)))
    return torch.cat(images), torch.cat(targets)


def train(model, batches, steps=STEPS):
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    for step in range(steps):
        images, targets = batches(step)
        optimizer.zero_grad()
        F.cross_entropy(model(images), targets).backward()
        optimizer.step()


@torch.no_grad()
def evaluate(model):
    return model.eval()(batch_of(STEPS, 0)[0])


def tensors(model):
    """All state, non-persistent buffers too."""
    return {k: v.detach().clone() for k, v in [*model.named_parameters(), *model.named_buffers()]}


def run_ddp(case, rank):
    torch.manual_seed(rank)  # DDP has to bring the other process to the weights of the first
    model = new_model(case)
    if rank == 1 and model.rope.learned:
        model.rope.freqs.data.add_(1)
    single = copy.deepcopy(model)
    start = tensors(model)
    model = torch.nn.parallel.DistributedDataParallel(model, find_unused_parameters=False)
    train(model, lambda step: batch_of(step, rank))
    logits = evaluate(model)
    if rank == 0:
        train(single, joint_batch)
    return {'start': start, 'end': tensors(model.module), 'single': tensors(single), 'logits': logits}


def run_fsdp(case, rank):
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard
    from torch.distributed.tensor import DTensor

    # as on an accelerator, where the payload cache cannot compare values
    cache._can_compare = lambda tensors: False
    torch.manual_seed(0)
    model = new_model(case)
    single = copy.deepcopy(model)
    mesh = init_device_mesh('cpu', (WORLD,))
    for block in model.blocks:
        fully_shard(block, mesh=mesh)
    fully_shard(model, mesh=mesh)
    assert all(isinstance(p, DTensor) for p in model.parameters())

    out = {}
    models = (model, single)
    optimizers = []
    for m in models:
        # the frequencies move far in every step, so that stale ones would show in the logits
        fast = [p for n, p in m.named_parameters() if n == 'rope.freqs']
        others = [p for n, p in m.named_parameters() if n != 'rope.freqs']
        optimizers.append(torch.optim.SGD([dict(params=others), *(dict(params=[p], lr=300.) for p in fast)], lr=0.1))
    for step in range(STEPS):
        for m, optimizer, (images, targets) in zip(models, optimizers, (batch_of(step, rank), joint_batch(step))):
            m.train()
            optimizer.zero_grad()
            F.cross_entropy(m(images), targets).backward()
        out[f'grads {step}'] = {
            name: (p.grad.full_tensor(), q.grad)
            for (name, p), q in zip(model.named_parameters(), single.parameters())}
        for optimizer in optimizers:
            optimizer.step()
        out[f'logits {step}'] = tuple(evaluate(m) for m in models)
    for i in range(CHANGES):
        # new frequencies without a training step, gathered into the memory of the old ones
        model.reshard()
        with torch.no_grad():
            for m in models:
                dict(m.named_parameters()).get('rope.freqs', torch.zeros(1)).mul_(1.2)
        out[f'logits {STEPS + i}'] = tuple(evaluate(m) for m in models)
    return out


def run_fsdp_bf16(case):
    """Payloads under FSDP2's bfloat16 policy, which rounds all parameters but those of an encoding sharded before.

    What blocks are given would be rounded too, and by torch 2.8 not again where a checkpointed block is recomputed.
    """
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

    torch.manual_seed(0)
    model = new_model(case)
    expected = [p.detach() for p in model.rope((4, 4), 1)]
    payloads, arrived = [], []
    model.rope.register_forward_hook(lambda module, args, output: payloads.extend(p.detach() for p in output))
    for block in model.blocks:
        block.attn.register_forward_pre_hook(lambda module, args: arrived.append(args[3].detach()))
    mesh, policy = init_device_mesh('cpu', (WORLD,)), MixedPrecisionPolicy(param_dtype=torch.bfloat16)
    inner = MixedPrecisionPolicy(param_dtype=torch.bfloat16, cast_forward_inputs=False)
    if model.rope.learned:
        fully_shard(model.rope, mesh=mesh)
    for block in model.blocks:
        fully_shard(block, mesh=mesh, mp_policy=inner)
    fully_shard(model, mesh=mesh, mp_policy=policy)
    images, targets = batch_of(0, 0)
    logits = model(images)
    F.cross_entropy(logits, targets).backward()
    grads = [p.grad.full_tensor() for p in model.rope.parameters()]
    return {
        'payloads': payloads, 'arrived': arrived[:len(model.blocks)], 'expected': expected, 'grads': grads,
        'dtype': logits.dtype}


def run_fsdp_meta(case, rank):
    """Frequencies of a model that is made without memory, sharded, and then filled, each process with its own seed."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard
    from torch.distributed.tensor import DTensor

    with torch.device('meta'):
        model = new_model(case)
    for part in (*model.blocks, model):
        fully_shard(part, mesh=init_device_mesh('cpu', (WORLD,)))
    model.to_empty(device='cpu')
    torch.manual_seed(rank)
    model.init_weights()
    freqs = model.rope.freqs.detach()
    assert bool(model(batch_of(0, rank)[0]).isfinite().all())
    return freqs.full_tensor() if isinstance(freqs, DTensor) else freqs


def main(mode, folder):
    torch.set_num_threads(1)
    dist.init_process_group('gloo', timeout=timedelta(seconds=60))
    rank = dist.get_rank()
    run = {'ddp': run_ddp, 'fsdp': run_fsdp}[mode]
    results = {case: run(case, rank) for case in CASES}
    if mode == 'fsdp':
        for case in CASES:
            results[case]['bf16'] = run_fsdp_bf16(case)
            results[case]['meta'] = run_fsdp_meta(case, rank)
    torch.save(results, f'{folder}/{mode}{rank}.pt')
    dist.barrier()
    dist.destroy_process_group()


def launch(mode, folder):
    """What each process saved."""
    done = subprocess.run(
        [sys.executable, '-m', 'torch.distributed.run', '--standalone', f'--nproc_per_node={WORLD}', __file__,
         mode, str(folder)],
        env={**os.environ, 'OMP_NUM_THREADS': '1'}, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-6000:]
    return [torch.load(folder / f'{mode}{rank}.pt') for rank in range(WORLD)]


needs_gloo = pytest.mark.skipif(
    not dist.is_available() or not dist.is_gloo_available() or sys.platform == 'win32',
    reason='torch.distributed with gloo is not available')


@pytest.fixture(scope='module')
def ddp(tmp_path_factory):
    return launch('ddp', tmp_path_factory.mktemp('ddp'))


@pytest.fixture(scope='module')
def fsdp(tmp_path_factory):
    if not hasattr(pytest.importorskip('torch.distributed.fsdp'), 'fully_shard'):
        pytest.skip('fully_shard is public from torch 2.6')
    return launch('fsdp', tmp_path_factory.mktemp('fsdp'))


@pytest.mark.slow
@needs_gloo
@pytest.mark.parametrize('case', CASES)
def test_ddp_processes_end_with_equal_weights(ddp, case):
    first, second = ddp[0][case], ddp[1][case]
    learned = 'rope.freqs' in dict(new_model(case).named_parameters())
    assert torch.equal(first['start']['rope.freqs'], second['start']['rope.freqs']) == (not learned)
    for key, value in first['end'].items():
        assert torch.equal(value, second['end'][key]), key
    assert torch.equal(first['logits'], second['logits'])
    assert torch.equal(first['end']['rope.freqs'], first['start']['rope.freqs']) == (not learned)


@needs_gloo
@pytest.mark.parametrize('case', CASES)
def test_ddp_trains_as_one_process(ddp, case):
    torch.testing.assert_close(ddp[0][case]['end'], ddp[0][case]['single'], rtol=1e-4, atol=1e-5)


@pytest.mark.slow
@needs_gloo
@pytest.mark.parametrize('case', CASES)
def test_fsdp_gradients_are_those_of_one_process(fsdp, case):
    for process in fsdp:
        for step in range(STEPS):
            for name, (sharded, single) in process[case][f'grads {step}'].items():
                error, scale = (sharded - single).abs().max(), single.abs().max()
                assert error <= 1e-6 and error <= 1e-5 * scale, (step, name, error, scale)


@pytest.mark.slow
@needs_gloo
@pytest.mark.parametrize('case', CASES)
def test_fsdp_evaluates_as_one_process_after_every_change(fsdp, case):
    for process in fsdp:
        for step in range(STEPS + CHANGES):
            torch.testing.assert_close(*process[case][f'logits {step}'], rtol=0, atol=1e-5)


@needs_gloo
@pytest.mark.parametrize('case', CASES)
def test_fsdp_bf16_policy_leaves_the_positions_exact(fsdp, case):
    for process in fsdp:
        result = process[case]['bf16']
        assert result['dtype'] == torch.bfloat16
        assert len(result['payloads']) == len(result['expected']) == 2
        for seen in ('payloads', 'arrived'):
            assert len(result[seen]) == 2
            for payload, expected in zip(result[seen], result['expected']):
                assert payload.dtype == torch.float32 and torch.equal(payload, expected)
        for grad in result['grads']:
            assert grad.dtype == torch.float32 and torch.isfinite(grad).all() and grad.abs().max() > 0


@needs_gloo
@pytest.mark.parametrize('case', CASES)
def test_fsdp_fills_a_model_that_was_made_without_memory(fsdp, case):
    first, second = (process[case]['meta'] for process in fsdp)
    assert torch.equal(first, second), 'each process has a part of the same'
    expected, another = (new_model(case).rope.freqs for _ in range(2))
    if not torch.equal(expected, another):  # drawn at random
        assert first.shape == expected.shape and 0 < first.std() and first.abs().max() <= 2 * torch.pi
    else:
        assert torch.equal(first, expected)


if __name__ == '__main__':
    main(*sys.argv[1:])
