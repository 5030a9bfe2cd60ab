"""The option groups of timm's newest train.py on our models: distillation, mixed sizes, optimizers, gray images.

Several groups to a run, as each run is a process; warm starts, averages, layer decay, mixed precision and resuming are
tried in test_scripts.py, whose variable TIMM_SCRIPTS is needed here too.
"""
import pytest
import timm
import torch
from test_scripts import SCRIPTS, SPHERICAL, TINY, pytestmark, run, summary

needs_tasks = pytest.mark.skipif(
    SCRIPTS.is_dir() and '--train-img-sizes' not in (SCRIPTS / 'train.py').read_text(),
    reason='the train.py of TIMM_SCRIPTS has no mixed sizes: it is older than 1.0.31')
pytestmark = [*pytestmark, needs_tasks]

STUDENT = 'vit_tiny_rope_mixed'
# what must not decay is no matrix either: frequencies and position embeddings are left to the AdamW inside
MUON = ['--opt-kwargs', 'fallback_no_weight_decay=True']


def arguments(name, data, output, *args, **kwargs):
    given = [f'{k}={v}' for k, v in dict(TINY, **kwargs).items()]
    return ['--data-dir', data, '--model', name, '--num-classes', 10, '--img-size', 48, '--model-kwargs', *given,
            '--device', 'cpu', '--workers', 0, '--batch-size', 12, '--warmup-epochs', 0, '--sched', 'step', '--no-aug',
            '--smoothing', 0, '--epochs', 2, '--lr', 8e-3, '--output', output.parent, '--experiment', output.name,
            *args]


def train(name, data, output, *args, **kwargs):
    """What train.py printed and the checkpoint it wrote, after losses that fall."""
    said = run('train.py', *arguments(name, data, output, *args, **kwargs))
    losses = [float(row['train_loss']) for row in summary(output)]
    assert losses[-1] < losses[0], losses
    return said, torch.load(output / 'last.pth.tar', weights_only=False)


def fresh(name, **kwargs):
    return timm.create_model(name, num_classes=10, **{**TINY, 'img_size': 48, **kwargs})


def assert_trained(checkpoint, name, **kwargs):
    """A state of such a model, with frequencies that moved; loads, in the reference grid of --img-size."""
    model = fresh(name, **kwargs)
    start = model.rope.freqs.detach().clone() if model.rope.learned else None
    model.load_state_dict(checkpoint['state_dict'])
    assert model.rope.reference_grid.tolist() == [6, 6]
    if name == SPHERICAL:  # starts the same in every model
        assert not torch.equal(model.rope.freqs, start)
    assert all(bool(p.isfinite().all()) for p in model.parameters())
    return model


@pytest.fixture(scope='module')
def teacher(tmp_path_factory):
    """Name of a teacher in a folder: a spherical ViT of other width, as timm saves models."""
    folder = tmp_path_factory.mktemp('teacher')
    torch.manual_seed(0)
    timm.models.save_for_hf(fresh('vit_tiny_rope_spherical', embed_dim=72), folder)
    return f'local-dir:{folder}'


def test_logits_of_a_teacher_mixed_sizes_and_agc(teacher, digits_folder, tmp_path):
    said, checkpoint = train(
        SPHERICAL, digits_folder, tmp_path / 'out', '--kd-model-name', teacher, '--task-loss-weight', .7,
        '--train-img-sizes', 32, 48, 64, '--train-batch-sizes', 16, 12, 8, '--clip-grad', .02, '--clip-mode', 'agc',
        '--channels-last', '--opt', 'adamw', rope_reference_grid='(6,6)')
    assert 'scheduled training resolutions [32, 48, 64]' in said and 'teacher' in said
    assert_trained(checkpoint, SPHERICAL)


def test_features_of_a_teacher_muon_averages_and_resuming(teacher, digits_folder, tmp_path):
    options = ['--kd-model-name', teacher, '--kd-distill-type', 'feature', '--opt', 'muon', *MUON, '--lr', 4e-3,
               '--weight-decay', .05, '--layer-decay', .75, '--model-ema', '--model-ema-decay', .8]
    _, checkpoint = train(STUDENT, digits_folder, tmp_path / 'first', *options)
    assert_trained(checkpoint, STUDENT)
    last = tmp_path / 'first' / 'last.pth.tar'
    run('train.py', *arguments(STUDENT, digits_folder, tmp_path / 'later', *options, '--epochs', 3, '--resume', last))
    assert [int(row['epoch']) for row in summary(tmp_path / 'later')] == [2], 'resumes after the last epoch'
    later = torch.load(tmp_path / 'later' / 'last.pth.tar', weights_only=False)
    before, after = checkpoint['state_dict']['rope.freqs'], later['state_dict']['rope.freqs']
    assert 0 < (after - before).abs().max() < .5
    assert_trained(dict(state_dict=later['state_dict_ema']), STUDENT)


def test_gray_images_and_muon(digits_folder, tmp_path):
    options = ['--in-chans', 1]
    _, checkpoint = train(
        SPHERICAL, digits_folder, tmp_path / 'out', *options, '--opt', 'muon', *MUON, '--channels-last', '--lr', 4e-3)
    model = assert_trained(checkpoint, SPHERICAL, in_chans=1)
    assert model.patch_embed.proj.weight.shape[1] == 1
    states = checkpoint['optimizer']['state'].values()
    moments = {tuple(state['exp_avg'].shape) for state in states if 'exp_avg' in state}
    assert tuple(model.rope.freqs.shape) in moments and (48, 48) not in moments


def test_a_distilled_student_learns_from_a_rotary_teacher(teacher, digits_folder, tmp_path):
    student = 'deit_tiny_distilled_patch16_224'
    _, checkpoint = train(
        student, digits_folder, tmp_path / 'out', '--kd-model-name', teacher, '--kd-distill-type', 'token',
        '--task-loss-weight', .9, '--opt', 'adamw', '--lr', 1e-3, img_size=48)
    assert 'head_dist.weight' in checkpoint['state_dict']


@pytest.mark.parametrize('name', ['vit_tiny_rope_mixed', 'vit_tiny_patch16_224'])
def test_students_without_a_distillation_token_are_refused_as_by_timm(name):
    from timm.task import TokenDistillationTask

    with pytest.raises(ValueError, match='requires a model with a distillation head'):
        TokenDistillationTask(fresh(name), fresh(name))
