"""timm's training loop, piece by piece and in one process: loader, optimizer, scheduler, EMA, AMP, checkpoints."""
import copy
from types import SimpleNamespace

import pytest
import timm
import torch
import torch.nn.functional as F
from timm.data import create_dataset, create_loader
from timm.models import load_checkpoint, model_parameters, resume_checkpoint
from timm.optim import create_optimizer_v2
from timm.scheduler import create_scheduler_v2
from timm.utils import CheckpointSaver, ModelEmaV3

MODELS = (
    'vit_tiny_rope_axial',
    'vit_tiny_rope_mixed',
    'vit_tiny_rope_spherical_learned',
    'vit_tiny_rope_spherical_learned_ape',
    'vit_tiny_rope_liere',
)
# LayerScale starts at 1: at the 1e-4 of the full models positions would not matter after a few steps
TINY = dict(
    embed_dim=48, depth=2, num_heads=2, patch_size=8, img_size=48, num_classes=10, init_values=1., drop_path_rate=0.1,
    global_pool='avg')
EPOCHS, BATCH, LR, LAYER_DECAY = 3, 24, 8e-3, 0.75


def new_model(name, **kwargs):
    return timm.create_model(name, **{**TINY, **kwargs})


def new_loader(folder, split, size=48):
    train = split == 'train'
    return create_loader(
        create_dataset('', root=str(folder), split=split, is_training=train), input_size=(3, size, size),
        batch_size=BATCH, is_training=train, no_aug=True, use_prefetcher=False, num_workers=0, persistent_workers=False)


def new_optimizer(model):
    optimizer = create_optimizer_v2(model, 'adamw', lr=LR, weight_decay=0.05, layer_decay=LAYER_DECAY)
    scheduler, _ = create_scheduler_v2(
        optimizer, 'cosine', num_epochs=EPOCHS, warmup_epochs=1, warmup_lr=LR / 3, warmup_prefix=False)
    return optimizer, scheduler


def run_epoch(epoch, model, loader, optimizer, scheduler, ema):
    """One epoch; the seed makes its shuffling and drop path the same after a resume."""
    torch.manual_seed(epoch)
    model.train()
    losses = []
    for images, targets in loader:
        with torch.autocast('cpu', torch.bfloat16):
            loss = F.cross_entropy(model(images), targets)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        ema.update(model)
        losses.append(loss.item())
    scheduler.step(epoch + 1)
    return sum(losses) / len(losses)


@torch.inference_mode()
def evaluate(model, loader):
    model.eval()
    return torch.cat([model(images) for images, _ in loader])


def assert_same_state(state, expected):
    assert list(state) == list(expected)
    for key, value in expected.items():
        assert torch.equal(state[key], value), key


@pytest.fixture(scope='module', params=MODELS)
def trained(request, digits_folder, tmp_path_factory):
    """A model trained for EPOCHS epochs, evaluated and saved after each."""
    name = request.param
    torch.manual_seed(0)
    model = new_model(name)
    initial = copy.deepcopy(model.state_dict())
    initial_freqs = model.rope.freqs.detach().clone()
    optimizer, scheduler = new_optimizer(model)
    ema = ModelEmaV3(model, decay=0.8)
    train, val = new_loader(digits_folder, 'train'), new_loader(digits_folder, 'val')
    folder = tmp_path_factory.mktemp(name)
    saver = CheckpointSaver(
        model, optimizer, model_ema=ema, checkpoint_dir=str(folder), recovery_dir=str(folder), max_history=EPOCHS)
    losses = []
    for epoch in range(EPOCHS):
        losses.append(run_epoch(epoch, model, train, optimizer, scheduler, ema))
        # what is cached in evaluation, under inference mode, must not disturb the next epoch
        evaluate(model, val)
        evaluate(ema.module, val)
        saver.save_checkpoint(epoch, metric=-losses[-1])
    return SimpleNamespace(
        name=name, model=model, ema=ema, optimizer=optimizer, folder=folder, last=str(folder / 'last.pth.tar'),
        initial=initial, initial_freqs=initial_freqs, losses=losses)


@pytest.mark.slow
def test_trains(trained):
    rope, freqs = trained.model.rope, trained.model.rope.freqs
    first, second, third = trained.losses
    assert third < second < first and third < 0.93 * first, trained.losses
    assert freqs.dtype == torch.float32
    if not rope.learned:
        assert torch.equal(freqs, trained.initial_freqs)
        assert not list(rope.parameters()) and 'rope.freqs' not in trained.initial
        return
    # the last backward left its gradients: every axis of every layer takes part
    assert torch.isfinite(freqs.grad).all()
    assert (freqs.grad.flatten(2).abs().amax(2) > 0).all()
    assert (freqs.grad != 0).float().mean() > 0.9
    assert ((freqs - trained.initial_freqs).flatten(2).abs().amax(2) > 0).all()


def test_all_else_but_the_encoding_is_unchanged_by_training(trained):
    state = trained.model.state_dict()
    for key in ('rope.reference_grid', 'rope.signature'):
        assert torch.equal(state[key], trained.initial[key])
        assert torch.equal(trained.ema.module.state_dict()[key], trained.initial[key])
    unmoved = [k for k, v in state.items() if torch.equal(v, trained.initial[k])]
    expected = ['rope.reference_grid', 'rope.signature', *(['pos_embed_grid'] if 'pos_embed' in state else [])]
    assert sorted(unmoved) == sorted(expected)


@pytest.mark.parametrize('name', MODELS)
def test_optimizer_groups(name):
    model = new_model(name)
    optimizer, _ = new_optimizer(model)
    groups = {id(p): group for group in optimizer.param_groups for p in group['params']}
    assert len(groups) == len(list(model.parameters()))
    assert groups[id(model.blocks[0].mlp.fc1.weight)]['weight_decay'] == 0.05
    stem, head = groups[id(model.patch_embed.proj.weight)], groups[id(model.head.weight)]
    assert stem['lr_scale'] == pytest.approx(LAYER_DECAY ** 3) and head['lr_scale'] == 1
    assert stem['lr'] == pytest.approx(stem['lr_scale'] * head['lr'])
    if model.rope.learned:
        group = groups[id(model.rope.freqs)]
        assert group['weight_decay'] == 0
        assert group['lr_scale'] == stem['lr_scale'] and group['lr'] == stem['lr']


@pytest.mark.filterwarnings('ignore:.torch.jit')
@pytest.mark.parametrize('name', MODELS)
def test_scripted_model_has_the_same_groups(name):
    # the training script creates the optimizer after --torchscript
    model = new_model(name)
    scripted = torch.jit.script(model)
    assert scripted.no_weight_decay() == model.no_weight_decay()
    assert scripted.group_matcher() == model.group_matcher()
    mine, theirs = new_optimizer(scripted)[0].param_groups, new_optimizer(model)[0].param_groups
    assert [[g['lr'], g['weight_decay'], len(g['params'])] for g in mine] == [
        [g['lr'], g['weight_decay'], len(g['params'])] for g in theirs]


def test_head_is_last(trained):
    # timm's adaptive gradient clipping takes the last two parameters for the head
    kept = {id(p) for p in model_parameters(trained.model, exclude_head=True)}
    left_out = [n for n, p in trained.model.named_parameters() if id(p) not in kept]
    assert left_out == ['head.weight', 'head.bias']


def test_resume_continues_with_equal_weights(trained, digits_folder):
    checkpoint = str(trained.folder / f'checkpoint-{EPOCHS - 2}.pth.tar')
    torch.manual_seed(1)
    model = new_model(trained.name)
    optimizer, scheduler = new_optimizer(model)
    assert resume_checkpoint(model, checkpoint, optimizer, log_info=False) == EPOCHS - 1
    ema = ModelEmaV3(model, decay=0.8)
    load_checkpoint(ema.module, checkpoint, use_ema=True)
    scheduler.step(EPOCHS - 1)
    loss = run_epoch(EPOCHS - 1, model, new_loader(digits_folder, 'train'), optimizer, scheduler, ema)

    assert loss == trained.losses[-1]
    assert_same_state(model.state_dict(), trained.model.state_dict())
    assert_same_state(ema.module.state_dict(), trained.ema.module.state_dict())
    for mine, theirs in zip(optimizer.state.values(), trained.optimizer.state.values()):
        assert torch.equal(mine['exp_avg_sq'], theirs['exp_avg_sq'])


@pytest.mark.parametrize('use_ema', [True, False])
def test_trained_at_48_evaluated_at_96(trained, digits_folder, use_ema):
    loader = new_loader(digits_folder, 'val', 96)
    if use_ema:  # create_model prefers the averaged weights
        model = new_model(trained.name, img_size=96, checkpoint_path=trained.last)
    else:
        model = new_model(trained.name, img_size=96)
        load_checkpoint(model, trained.last, use_ema=False)
    assert model.patch_embed.grid_size == (12, 12)
    assert model.rope.reference_grid.tolist() == [6, 6]
    if model.pos_embed is not None:
        assert model.pos_embed.shape[1] == 144 and model.pos_embed_grid.tolist() == [12, 12]

    native = new_model(trained.name)
    load_checkpoint(native, trained.last, use_ema=use_ema)
    expected, logits = evaluate(native, loader), evaluate(model, loader)
    torch.testing.assert_close(logits, expected, rtol=0, atol=1e-6)

    # the comparison above can tell: with the grid of the larger images the logits are others
    model.rope.reference_grid.copy_(torch.tensor([12, 12]))
    change = (evaluate(model, loader) - expected).abs().max()
    assert (change > 1e-3) == (model.rope.coords != 'index'), change


def test_checkpoint_evaluates_as_the_model_that_wrote_it(trained, digits_folder):
    loader = new_loader(digits_folder, 'val')
    for model, use_ema in ((trained.model, False), (trained.ema.module, True)):
        loaded = new_model(trained.name)
        load_checkpoint(loaded, trained.last, use_ema=use_ema)
        assert torch.equal(evaluate(loaded, loader), evaluate(model, loader))


def test_ema_uses_its_own_frequencies(trained, digits_folder):
    model, average = trained.model, trained.ema.module
    images = next(iter(new_loader(digits_folder, 'val')))[0]
    model.eval(), average.eval()
    with torch.inference_mode():
        own = average(images)
        model(images)
        assert torch.equal(average(images), own)
        # all of the average but its frequencies
        state = {k: v for k, v in average.state_dict().items() if k != 'rope.freqs'}
        swapped = copy.deepcopy(model)
        swapped.load_state_dict(state, strict=False)
        same = torch.equal(swapped(images), own)
    assert same == (not model.rope.learned)


@pytest.mark.parametrize('name', MODELS)
def test_copy_after_training_step_shares_nothing(name):
    torch.manual_seed(0)
    model, images = new_model(name), torch.randn(2, 3, 48, 48)
    model(images).sum().backward()
    model.eval()
    with torch.no_grad():
        for block in model.blocks:
            block.attn.qkv.weight.mul_(10)  # untrained scores are so flat that positions would hardly matter
        before = model(images)
        twin = copy.deepcopy(model)
        model.rope.freqs.mul_(1.5)
        assert torch.equal(twin(images), before)
        assert (model(images) - before).abs().max() > 1e-4


@pytest.mark.parametrize('name', MODELS)
@pytest.mark.parametrize('frozen', [False, True])
def test_training_after_inference_mode(name, frozen):
    torch.manual_seed(0)
    model, images = new_model(name, drop_path_rate=0.), torch.randn(2, 3, 48, 48)
    model.rope.requires_grad_(not frozen)
    untouched = copy.deepcopy(model)
    with torch.inference_mode():
        model.eval()(images)
    for m in (model, untouched):
        m.train()(images).square().sum().backward()
    for (key, p), q in zip(model.named_parameters(), untouched.parameters()):
        assert (p.grad is None) == (key == 'rope.freqs' and frozen), key
        assert p.grad is None or torch.equal(p.grad, q.grad), key
