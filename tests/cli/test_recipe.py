"""`python -m timm_rope recipe`, and that each recipe is what its paper says and what timm's train.py takes.

What needs the script itself runs where TIMM_SCRIPTS names a folder with it, see test_scripts.py.
"""
import configparser
import csv
import importlib.util
import os
import re
import subprocess
import sys
from fnmatch import fnmatch
from pathlib import Path

import pytest
import timm
import torch
import yaml
from PIL import Image, ImageOps
from timm.layers import DropPath
from timm.optim import create_optimizer_v2
from timm.scheduler import create_scheduler_v2

import timm_rope
from timm_rope.__main__ import main
from timm_rope.cli.recipe import list_recipes, read_recipe

SCRIPTS = Path(os.environ.get('TIMM_SCRIPTS') or 'not set')
needs_scripts = [pytest.mark.scripts, pytest.mark.skipif(
    not (SCRIPTS / 'train.py').is_file(),
    reason=f'TIMM_SCRIPTS must name a folder with the scripts of timm (train.py ...), it is: {SCRIPTS}')]

# as the papers and NAVER's README state them, not read off the files
STAGE_1 = dict(epochs=400, batch=2048, opt='lamb', weight_decay=.03, warmup_epochs=5, warmup_lr=1e-6, min_lr=1e-5,
               mixup=.8, cutmix=1., smoothing=0., bce_loss=True, aug_repeats=3, aa='3a', color_jitter=.3, reprob=0.,
               crop_pct=1., seed=0)
STAGE_2 = dict(epochs=20, batch=512, opt='adamw', lr=1e-5, weight_decay=.1, warmup_epochs=5, mixup=.8, cutmix=1.,
               smoothing=.1, bce_loss=False, aug_repeats=0, aa='rand-m9-mstd0.5-inc1', reprob=0., crop_pct=1.)
CIRCULAR = dict(opt='lamb', lr=4e-3, weight_decay=.05, warmup_epochs=5, amp_dtype='bfloat16', aa='3a', color_jitter=.3,
                bce_loss=False, aug_repeats=0, reprob=0.)
PAPERS = {
    'circular_cifar100': dict(
        CIRCULAR, epochs=400, batch=1024, num_classes=100, mixup=.8, cutmix=1., drop_path=.1,
        grid=(8, 8), heads=12, head_dim=60, depth=12, rate=None, size=32),
    'circular_imagenet': dict(
        CIRCULAR, epochs=200, batch=512, mixup=0., cutmix=0., drop_path=0.,
        grid=(14, 14), heads=6, head_dim=63, depth=12, rate=None, size=224),
    'deit3_small': dict(STAGE_1, lr=4e-3, grid=(14, 14), heads=6, head_dim=64, depth=12, rate=0., size=224),
    'deit3_base': dict(STAGE_1, lr=3e-3, grid=(12, 12), heads=12, head_dim=64, depth=12, rate=.1, size=192),
    'deit3_large': dict(STAGE_1, lr=3e-3, grid=(12, 12), heads=16, head_dim=64, depth=24, rate=.4, size=192),
    'deit3_base_224': dict(STAGE_2, grid=(14, 14), heads=12, head_dim=64, depth=12, rate=.2, size=224),
    'deit3_large_224': dict(STAGE_2, grid=(14, 14), heads=16, head_dim=64, depth=24, rate=.45, size=224),
    'finetune_384': dict(STAGE_2, grid=(24, 24), heads=12, head_dim=64, depth=12, rate=.2, size=384, pretrained=True),
    'swin_tiny': dict(
        epochs=280, batch=1024, opt='adamw', lr=5e-4 * 2, weight_decay=.05, warmup_epochs=20, warmup_lr=5e-7 * 2,
        min_lr=5e-6 * 2, clip_grad=5., sched_on_updates=True, mixup=.8, cutmix=1., smoothing=.1, reprob=.25,
        bce_loss=False, aug_repeats=0, color_jitter=.4, aa='rand-m9-mstd0.5-inc1', drop_path=.2, crop_pct=.875,
        grid=(56, 56), size=224),
}
OF_THE_MODEL = ('batch', 'grid', 'heads', 'head_dim', 'depth', 'rate', 'size')
SCRIPT_DEFAULTS = dict(bce_loss=False, aug_repeats=0)
RECIPES = sorted(PAPERS)


def load(name):
    return yaml.safe_load(read_recipe(name))


def build(name, **kwargs):
    """The model as train.py builds it, without memory."""
    recipe = {**load(name), **kwargs}
    if not hasattr(timm.models, 'resolve_model_input_args'):
        pytest.skip('before 1.0.31, timm has no function by which train.py builds its model')
    return timm.create_model(**timm.models.resolve_model_input_args(
        recipe['model'], recipe, num_classes=recipe.get('num_classes'), drop_path_rate=recipe.get('drop_path'),
        **recipe.get('model_kwargs', {})), device='meta')


# -- the command

def test_all_are_listed_with_one_line_each(capsys):
    assert main(['recipe']) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines] == RECIPES == list(list_recipes())
    assert all(len(line) <= 130 and len(line.split()) > 5 for line in lines)
    assert len({line.split('  ', 1)[1] for line in lines}) == len(lines)


def test_one_is_printed_or_written_as_it_is(capsys, tmp_path):
    assert main(['recipe', 'swin_tiny']) == 0
    printed = capsys.readouterr().out
    assert printed == (Path(timm_rope.__file__).parent / 'cli' / 'recipe' / 'swin_tiny.yaml').read_text()
    file = tmp_path / 'mine.yaml'
    assert main(['recipe', 'swin_tiny', '--output', str(file)]) == 0
    assert file.read_text() == printed
    assert capsys.readouterr().out == ''


@pytest.mark.parametrize('args, message', [
    (['deit3_smal'], "no recipe 'deit3_smal', the nearest name is 'deit3_small'"),
    (['nope'], "no recipe 'nope'. Recipes: circular_cifar100,"),
    (['../setup'], 'Recipes: circular_cifar100, circular_imagenet,'),
    (['deit3_smal', '--output', 'new'], "'deit3_small'"),
    (['deit3_small', '--output', 'there'], 'must be a new file, there exists'),
    (['deit3_small', '--output', '.'], 'must be a new file'),
    (['deit3_small', '--output', 'dangling'], 'must be a new file'),
    (['deit3_small', '--output', 'no/folder'], 'in a folder that exists, no is none'),
    (['--output', 'new'], 'needs the NAME'),
])
def test_refused(args, message, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path('there').write_text('mine')
    Path('dangling').symlink_to('elsewhere')
    assert main(['recipe', *args]) == 2
    out, err = capsys.readouterr()
    assert out == '' and message in err and err.count('\n') == 1
    assert Path('there').read_text() == 'mine'
    assert sorted(os.listdir()) == ['dangling', 'there']


def test_the_files_are_package_data():
    config = configparser.ConfigParser()
    config.read(Path(timm_rope.__file__).parents[1] / 'setup.cfg')
    patterns = config['options.package_data']['timm_rope.cli.recipe'].split()
    files = [path.name for path in (Path(timm_rope.__file__).parent / 'cli' / 'recipe').iterdir() if path.is_file()]
    assert len(files) == len(RECIPES) + 1
    assert all(any(fnmatch(file, pattern) for pattern in [*patterns, '__init__.py']) for file in files)


# -- the contents

@pytest.mark.parametrize('name', RECIPES)
def test_settings_are_those_of_the_paper(name):
    recipe = load(name)
    paper = {key: value for key, value in PAPERS[name].items() if key not in OF_THE_MODEL}
    assert {key: recipe.get(key, SCRIPT_DEFAULTS.get(key)) for key in paper} == paper
    assert recipe['img_size'] == PAPERS[name]['size'] and recipe['amp'] is True
    assert recipe.get('pretrained', False) == PAPERS[name].get('pretrained', False)
    if name.startswith('deit3'):
        if recipe['epochs'] == 400:
            assert recipe['bce_target_thresh'] == 0
        assert recipe.get('amp_dtype', 'float16') == 'float16'


@pytest.mark.parametrize('name', RECIPES)
def test_the_global_batch_is_said_and_true(name):
    recipe, text = load(name), ' '.join(read_recipe(name).replace('#', ' ').split())
    batch, size, gpus, steps = map(int, re.search(
        r'Global batch (\d+) = batch_size (\d+) x (\d+) GPUs? x grad_accum_steps (\d+)', text).groups())
    assert batch == size * gpus * steps == PAPERS[name]['batch']
    assert (size, steps) == (recipe['batch_size'], recipe['grad_accum_steps'])
    launch = re.search(r'(?:torchrun (?:--nnodes=(\d+) )?--nproc_per_node=(\d+)|python) train.py --config', text)
    assert int(launch[1] or 1) * int(launch[2] or 1) == gpus


@pytest.mark.parametrize('name', RECIPES)
def test_values_are_no_text_that_should_be_numbers(name):
    def leaves(value):
        for item in value.values() if isinstance(value, dict) else value if isinstance(value, list) else []:
            yield from leaves(item) if isinstance(item, (dict, list)) else [item]

    for value in leaves(load(name)):
        if isinstance(value, str):  # YAML 1.1 reads 4e-3 and "true" as text
            assert not re.fullmatch(r'[-+.\d]+(e[-+]?\d+)?|true|false|yes|no|none|null', value, re.IGNORECASE), value


@pytest.mark.parametrize('name', RECIPES)
def test_the_model_is_that_of_the_paper(name):
    model, paper = build(name), PAPERS[name]
    assert model.patch_embed.grid_size == paper['grid']
    assert model.num_classes == paper.get('num_classes', 1000)
    if name == 'swin_tiny':
        rates = [module.drop_prob for module in model.modules() if isinstance(module, DropPath)]
        assert rates == sorted(rates) and rates[-1] == pytest.approx(.2)
        return
    attention = model.blocks[0].attn
    assert (attention.num_heads, attention.head_dim, len(model.blocks)) == (
        paper['heads'], paper['head_dim'], paper['depth'])
    rates = [[m.drop_prob for m in block.modules() if isinstance(m, DropPath)] for block in model.blocks]
    if paper['rate']:
        assert rates == [[paper['rate']] * 2] * paper['depth'], 'uniform'
    elif paper['rate'] is None and paper['drop_path']:
        assert rates[-1] == [pytest.approx(paper['drop_path'])] * 2 and rates[1][0] < paper['drop_path']
    else:
        assert not any(rates)
    if name == 'circular_cifar100':
        assert model.pos_drop.p == model.blocks[0].mlp.drop1.p == model.blocks[0].attn.proj_drop.p == .1
    # NAVER's initialisation where training starts from scratch
    assert (model.weight_init_mode == 'naver') == (paper.get('batch') == 2048)
    assert all(block.ls1.gamma.shape == (model.embed_dim,) for block in model.blocks)


@pytest.mark.parametrize('name, alternative', [
    ('circular_imagenet', dict(model='vit_small_rope_mixed', model_kwargs=dict(embed_dim=384))),
    ('circular_cifar100', dict(model='vit_base_rope_mixed')), ('circular_cifar100', dict(model='vit_base_ape')),
])
def test_alternatives_of_the_comments_can_be_built(name, alternative):
    text = ' '.join(read_recipe(name).replace('#', ' ').split())
    assert alternative['model'] in text
    for key, value in alternative.get('model_kwargs', {}).items():
        assert f'--model {alternative["model"]} --model-kwargs {key}={value}' in text
    head_dim = {'circular_imagenet': 64, 'circular_cifar100': 60}[name]
    assert build(name, **alternative).blocks[0].attn.head_dim == head_dim


@pytest.mark.parametrize('name, epochs', [('swin_tiny', 300), ('deit3_small', 400), ('finetune_384', 20)])
def test_the_schedule_lasts_as_long_as_the_paper_says(name, epochs):
    recipe = load(name)
    optimizer = create_optimizer_v2(torch.nn.Linear(2, 2), opt=recipe['opt'], lr=recipe['lr'])
    scheduler, total = create_scheduler_v2(
        optimizer, updates_per_epoch=10, num_epochs=recipe['epochs'], min_lr=recipe['min_lr'],
        step_on_epochs=not recipe.get('sched_on_updates', False),
        **{key: recipe[key] for key in ('sched', 'warmup_lr', 'warmup_epochs', 'cooldown_epochs')},
        warmup_prefix=recipe.get('warmup_prefix', False))
    assert total == epochs
    lrs = []
    for epoch in range(total):
        scheduler.step(epoch)
        scheduler.step_update(epoch * 10)
        lrs.append(optimizer.param_groups[0]['lr'])
    assert lrs[0] == pytest.approx(recipe['warmup_lr'])
    assert max(lrs) == pytest.approx(recipe['lr'], rel=.01) and lrs[-1] == pytest.approx(recipe['min_lr'], rel=.1)


# -- timm's script

@pytest.fixture(scope='module')
def script():
    """train.py as a module; only its definitions run."""
    spec = importlib.util.spec_from_file_location('timm_train_script', SCRIPTS / 'train.py')
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def scripts_only(test):
    for mark in needs_scripts:
        test = mark(test)
    return test


@scripts_only
@pytest.mark.parametrize('name', RECIPES)
def test_the_script_takes_every_setting(name, script, monkeypatch, tmp_path):
    (tmp_path / 'recipe.yaml').write_text(read_recipe(name))
    defaults = {action.dest: action.default for action in script.parser._actions}
    monkeypatch.setattr(sys, 'argv', ['train.py', '--config', str(tmp_path / 'recipe.yaml'), '--data-dir', 'x'])
    try:
        args, _ = script._parse_args()
    finally:  # the settings became defaults of the parser
        script.parser.set_defaults(**defaults)
    actions = {action.dest: action for action in script.parser._actions}
    for key, value in load(name).items():
        assert key in actions, f'{key} is no argument of train.py'
        action = actions[key]
        assert getattr(args, key) == value
        if action.const is True:
            assert value is True
        elif key == 'model_kwargs':
            assert isinstance(value, dict)
        else:
            for item in value if action.nargs else [value]:
                assert isinstance(item, (float, int) if action.type is float else action.type or str), key
                assert not isinstance(item, bool), key
                assert action.choices is None or item in action.choices


def augmentation(name):
    """The recipe's; with milder magnitudes where timm and Pillow do not agree on what 0 bits of a channel are."""
    try:
        ImageOps.posterize(Image.new('L', (1, 1)), 0)
    except ValueError:
        return load(name)['aa'].replace('-inc1', '')
    return load(name)['aa']


SMALL = dict(depth=2, num_heads=2, embed_dim=36)
OVERRIDES = {
    'circular_cifar100': ['--dataset', ''],
    'swin_tiny': ['--img-size', 64, '--warmup-epochs', 1],  # which come before the two
}
SMALL_KWARGS = {
    'circular_cifar100': dict(SMALL, patch_size=8, pos_drop_rate=.1, proj_drop_rate=.1),
    'swin_tiny': dict(embed_dim=16, depths=(1, 1), num_heads=(1, 2), window_size=4),
}


@scripts_only
@pytest.mark.parametrize('name', RECIPES)
def test_the_script_trains_two_short_epochs(name, digits_folder, tmp_path):
    """Smaller in all that costs time: model, images, batch. Everything else is the recipe's."""
    (tmp_path / 'recipe.yaml').write_text(read_recipe(name).replace('pretrained: true', 'pretrained: false'))
    kwargs = {**load(name).get('model_kwargs', {}), **SMALL_KWARGS.get(name, dict(SMALL, patch_size=8))}
    done = subprocess.run(
        [sys.executable, '-W', 'error::UserWarning:timm_rope', str(SCRIPTS / 'train.py'), *map(str, [
            '--config', tmp_path / 'recipe.yaml', '--data-dir', digits_folder, '--num-classes', 10,
            '--img-size', 32, *OVERRIDES.get(name, []), '--batch-size', 24, '--epochs', 2, '--aug-repeats', 0,
            '--aa', augmentation(name),
            '--train-split', 'train', '--val-split', 'val', '--device', 'cpu', '--workers', 0,
            '--output', tmp_path, '--experiment', 'run', '--model-kwargs',
            *(f'{key}={value}' for key, value in kwargs.items())])],
        capture_output=True, text=True, timeout=300, env={**os.environ, 'TIMM_ROPE_AUTOLOAD': '1'})
    assert done.returncode == 0, (done.stdout + done.stderr)[-6000:]
    with open(tmp_path / 'run' / 'summary.csv') as file:
        rows = list(csv.DictReader(file))
    assert len(rows) >= 2
    assert all(torch.isfinite(torch.tensor(float(row[key]))) for row in rows for key in ('train_loss', 'eval_loss'))
    written = yaml.safe_load((tmp_path / 'run' / 'args.yaml').read_text())
    changed = {'batch_size', 'epochs', 'aug_repeats', 'img_size', 'num_classes', 'dataset', 'model_kwargs',
               'pretrained', 'aa', 'warmup_epochs'}
    assert {key: written[key] for key in load(name) if key not in changed} == {
        key: value for key, value in load(name).items() if key not in changed}
