"""The benchmarks run, count what they say they count, and refuse what they cannot do."""
import itertools
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

BENCHMARKS = Path(__file__).parents[2] / 'benchmarks'
sys.path.append(str(BENCHMARKS))

import counting  # noqa: E402
import machine  # noqa: E402
import memory  # noqa: E402
import peers  # noqa: E402
import report  # noqa: E402
import rotation  # noqa: E402
import speed  # noqa: E402
import train_loop  # noqa: E402
from tiny import TINY  # noqa: E402

UNIT = 'deit3_small_patch16_224'
ARGS = 'patch_size=8,embed_dim=24,depth=2,num_heads=2,num_classes=5'
SMALL = ['--device', 'cpu', '--rounds', '2', '--model-args', ARGS]
CPU = torch.device('cpu')


def speed_result(path, *args):
    speed.main([*args, *SMALL, '--batch', '2', '--size', '32', '--json', str(path)])
    return json.loads(path.read_text())


@pytest.fixture(scope='module')
def result_file(tmp_path_factory):
    path = tmp_path_factory.mktemp('speed') / 'speed.json'
    models = [UNIT, 'vit_small_rope_axial', 'naive:vit_small_rope_mixed']
    speed_result(path, *models, '--precision', 'fp32', 'bf16-autocast')
    return path


# -- speed

def test_speed_measures_every_setting(result_file):
    content = json.loads(result_file.read_text())
    assert content['finished'] and content['benchmark'] == 'speed'
    assert content['machine']['torch'] == torch.__version__ and content['machine']['device'] == 'cpu'
    assert content['settings']['rounds'] == 2 and content['settings']['models'][0] == UNIT
    seen = [(r['mode'], r['precision'], r['model']) for r in content['rows']]
    assert seen == [(mode, precision, model) for precision, mode, model in itertools.product(
        ('fp32', 'bf16-autocast'), ('eval', 'train'), content['settings']['models'])]
    for row in content['rows']:
        unit = next(r for r in content['rows'] if r['model'] == UNIT and all(
            r[k] == row[k] for k in ('mode', 'precision')))
        ratios = [a / b for a, b in zip(row['seconds'], unit['seconds'])]
        assert row['error'] is None and len(row['seconds']) == 2
        assert row['ratio'] == pytest.approx(sum(ratios) / 2)
        assert row['quartiles'][0] <= row['ratio'] <= row['quartiles'][1]
        assert row['milliseconds'] == pytest.approx(500 * sum(row['seconds']))
        assert (row['memory_bytes'] is not None) == (row['mode'] == 'train')
        assert ('bytes_per_element' in row) == (row['model'] != UNIT)


def test_the_naive_rotation_moves_more_bytes(result_file):
    moved = {(r['mode'], r['precision'], r['model']): r.get('bytes_per_element')
             for r in json.loads(result_file.read_text())['rows']}
    for mode in ('eval', 'train'):
        naive = moved[mode, 'fp32', 'naive:vit_small_rope_mixed']
        assert naive > moved[mode, 'fp32', 'vit_small_rope_axial']
    assert moved['eval', 'fp32', 'vit_small_rope_axial'] >= 8  # one float32 pass, read and written


def test_one_model_that_fails_does_not_end_the_run(tmp_path, monkeypatch):
    def broken(spec, *args, **kwargs):
        model = peers.build(spec, *args, **kwargs)
        if 'rope' in spec.name and not any(p.is_meta for p in model.parameters()):
            model.blocks[0].register_forward_pre_hook(lambda *_: 1 / 0)
        return model

    monkeypatch.setattr(speed, 'build', broken)
    content = speed_result(tmp_path / 'x.json', UNIT, 'vit_small_rope_axial', 'vit_small_ape', '--mode', 'eval')
    errors = {row['model']: row['error'] for row in content['rows']}
    assert 'ZeroDivisionError' in errors.pop('vit_small_rope_axial') and set(errors.values()) == {None}
    assert 'failed' in report.report(content)


def test_compiled_models_are_run(tmp_path, monkeypatch):
    monkeypatch.setattr(torch, 'compile', lambda model, **kwargs: compiled.append(kwargs) or model)
    compiled = []
    content = speed_result(tmp_path / 'x.json', 'vit_small_ape', '--run', 'compile', '--mode', 'train')
    assert compiled == [dict(dynamic=False)]
    assert content['rows'][0]['compile_seconds'] > 0 and 'bytes_per_element' not in content['rows'][0]


def test_turns_alternate_and_the_first_round_is_not_counted():
    order = []
    seconds = machine.in_turns({name: lambda name=name: order.append(name) for name in 'abc'}, CPU, 3, 2)
    rounds = [order[i:i + 6:2] for i in range(0, len(order), 6)]
    assert len(rounds) == 4 and all(rounds[i] == rounds[i + 1][::-1] for i in range(3))
    assert {name: len(figures) for name, figures in seconds.items()} == dict(a=3, b=3, c=3)


# -- the naive peer

@pytest.mark.parametrize('name', [
    'axial', 'mixed', 'uniform', 'spherical', 'spherical_learned', 'spherical,rope_order=xy', 'liere,rope_block=4',
    'liere'])
def test_naive_models_compute_the_same(name):
    spec = peers.model_spec(f'vit_tiny_rope_{name}')
    size = dict(embed_dim=44, num_heads=2, depth=2, patch_size=8, num_classes=5, init_values=1.)  # 22 channels a head
    models = []
    for text in (spec.text, f'naive:{spec.text}'):
        torch.manual_seed(0)
        models.append(peers.build(peers.model_spec(text), 32, CPU, **size).eval())
    with torch.no_grad():
        for model in models:
            for block in model.blocks:
                block.attn.qkv.weight.mul_(20)  # attention that is not uniform, so that positions matter
        x = torch.randn(2, 3, 32, 32)
        ours, naive = (model(x) for model in models)
        for block in models[1].blocks:
            block.attn.turn = nn.Identity()
        assert (naive - models[1](x)).abs().max() > 1e-2, 'the rotation matters here'
    torch.testing.assert_close(naive, ours, rtol=1e-4, atol=1e-4)


def test_naive_frequencies_learn():
    size = {k: v for k, v in TINY.items() if k != 'img_size'}
    model = peers.build(peers.model_spec('naive:vit_tiny_rope_mixed'), 32, CPU, **size)
    model(torch.randn(2, 3, 32, 32)).square().mean().backward()
    assert all(block.attn.turn.freqs.grad.abs().max() > 0 for block in model.blocks)


# -- counts

@pytest.mark.parametrize('step, passes', [
    (lambda x, y: x + y, 3),
    (lambda x, y: x.mul_(y), 3),
    (lambda x, y: x.copy_(y), 2),
    (lambda x, y: x.zero_(), 1),
    (lambda x, y: x.view(-1)[2:].unsqueeze(0).T, 0),
    (lambda x, y: torch.empty_like(x), 0),
    (lambda x, y: torch.add(x, y, out=y), 3),
    (lambda x, y: x.t().reshape(-1), 2),
    (lambda x, y: x.expand(7, 20, 30).sum(), 1),
], ids=['add', 'mul_', 'copy_', 'zero_', 'views', 'empty', 'out', 'reshape that copies', 'expanded'])
def test_traffic_counts_what_is_read_and_written(step, passes):
    x, y = torch.randn(2, 20, 30)
    with counting.Traffic() as traffic:
        step(x, y)
    assert traffic.bytes // (4 * 600) == passes and traffic.bytes % 2400 <= 4  # a sum writes one number


def test_saved_memory_counts_each_storage_once():
    weight = torch.randn(8, 8, requires_grad=True)
    x = torch.randn(10, 8, requires_grad=True)
    with counting.saved_for_backward([weight]) as count:
        y = x @ weight  # keeps x and the weight, which is known
        z = y.exp()  # keeps its result
        (z[2:] * z[:-2]).sum()  # keeps two views of it
    assert count() == 2 * 10 * 8 * 4


def test_a_block_is_a_difference():
    class Model(nn.Module):
        def __init__(self, depth):
            super().__init__()
            self.depth = depth

    assert counting.per_block(Model, lambda model: 100 + 7 * model.depth) == 7


# -- memory, rotation, training

def test_memory_of_training(tmp_path):
    path = tmp_path / 'memory.json'
    memory.main([
        'vit_small_ape', 'naive:vit_small_rope_mixed', *SMALL[:2], '--rounds', '1', '--model-args', ARGS, '--precision',
        'fp32', '--batch', '64', '--size', '32', '--json', str(path)])
    unit, naive = json.loads(path.read_text())['rows']
    # x, two norms, q, k, v, the attention's output and its projection, two scaled branches, twice four for the MLP
    assert 10 < unit['kept_units'] < 24 and naive['kept_units'] > unit['kept_units'] + 2
    tokens = 64 * 17 * 24 * 4
    assert unit['peak_ratio'] == 1 and naive['peak_bytes'] > naive['kept_units'] * tokens > 0
    assert naive['peaks'] == [naive['peak_bytes']]


def test_rotation_alone(tmp_path):
    path = tmp_path / 'rotation.json'
    before = os.environ.get('TIMM_ROPE_KERNEL')
    rotation.main([
        'mixed', 'liere,block=4', '--device', 'cpu', '--rounds', '2', '--shapes', '2x17', '1x16', '--heads', '1',
        '--routes', 'formula', 'triton', '--json', str(path)])
    assert os.environ.get('TIMM_ROPE_KERNEL') == before
    rows = json.loads(path.read_text())['rows']
    assert [(r['tokens'], r['encoding'], r['route']) for r in rows] == list(itertools.product(
        (17, 16), ('mixed', 'liere,block=4'), ('formula', 'triton')))
    for row in rows:
        if row['route'] == 'triton':
            assert 'TIMM_ROPE_KERNEL=triton' in row['error'], 'there is no such route on a CPU'
        else:
            assert row['took'] == 'formula' and row['forward_ms'] > 0 and row['training_ms'] > 0
            passes = 2 * 2 * row['batch'] * row['tokens'] * 64 * 4
            assert row['gigabytes_per_second'] == pytest.approx(passes / row['forward_ms'] / 1e6)


def test_training_learns_where_positions_are_known(tmp_path):
    path = tmp_path / 'train.json'
    options = 'embed_dim=32,num_heads=1,depth=1'
    command = ['--device', 'cpu', '--steps', '30', '--batch', '32', '--json', str(path)]
    assert train_loop.main([f'vit_tiny_rope_mixed,{options},rope_encoding=none,pos_embed=none', *command]) == 1
    blind, = json.loads(path.read_text())['rows']
    assert blind['accuracy'] < .4 and 'not below half' in blind['error'] and 'chance is 25%' in blind['error']
    row = dict(blind, losses=[2., 1.], first_loss=2., last_loss=.5, accuracy=.9)
    freqs = nn.Parameter(torch.ones(2, 3, 1, 4))
    assert 'no gradient' in train_loop.problems(row, [freqs], [freqs.detach() + 1])[0]
    freqs.grad = torch.ones_like(freqs)
    assert train_loop.problems(row, [freqs], [freqs.detach() + 1]) == []
    assert 'not moved' in train_loop.problems(row, [freqs], [freqs.detach().clone()])[0]
    freqs.grad[:, 1] = 0
    assert 'layer by layer' in train_loop.problems(row, [freqs], [freqs.detach() + 1])[0]
    assert 'not finite' in train_loop.problems(dict(row, losses=[float('nan')]), [], [])[0]


def test_the_training_task():
    images, labels = train_loop.make_batch(200, torch.Generator().manual_seed(0), CPU)
    rows, columns = images.mean(1).mean(2), images.mean(1).mean(1)
    half = images.shape[-1] // 2
    lower, right = rows[:, half:].sum(1) > rows[:, :half].sum(1), columns[:, half:].sum(1) > columns[:, :half].sum(1)
    assert (labels == 2 * lower + right).float().mean() > .95 and labels.bincount().min() > 30


# -- results

def test_the_report_shows_every_model_and_setting(result_file, capsys):
    assert report.main([str(result_file)]) == 0
    text = capsys.readouterr().out
    row = next(r for r in json.loads(result_file.read_text())['rows'] if r['model'] == 'vit_small_rope_axial')
    lines = [line for line in text.splitlines() if line.startswith('|')]
    header = lines[0].split(' | ')
    assert len(header) == 5 and header[1] == 'eval, fp32 eager, 2 x 32 px'
    axial = next(line for line in lines if line.startswith('| `vit_small_rope_axial`')).split(' | ')
    assert axial[1] == f'{row["ratio"]:.2f}'
    assert text.startswith('speed: ') and torch.__version__ in text


@pytest.mark.parametrize('change, message', [
    (lambda c: {}, 'does not say "format"'),
    (lambda c: [], 'does not say "format"'),
    (lambda c: {**c, 'format': 'other'}, 'does not say "format"'),
    (lambda c: {k: v for k, v in c.items() if k != 'rows'}, 'lacks rows'),
    (lambda c: {**c, 'finished': False}, 'unfinished.*--partial'),
    (lambda c: {**c, 'benchmark': 'juggling'}, "benchmark 'juggling'"),
])
def test_other_files_are_refused(result_file, tmp_path, change, message, capsys):
    path = tmp_path / 'x.json'
    path.write_text(json.dumps(change(json.loads(result_file.read_text()))))
    assert report.main([str(path)]) == 1
    said = capsys.readouterr()
    assert re.search(message, said.err) and str(path) in said.err and not said.out
    if 'partial' in message:
        assert report.main([str(path), '--partial']) == 0 and ', unfinished' in capsys.readouterr().out


def test_what_is_no_json_is_refused(tmp_path, capsys):
    (tmp_path / 'x.json').write_text('{')
    assert report.main([str(tmp_path / 'x.json')]) == 1 and 'not JSON' in capsys.readouterr().err
    assert report.main([str(tmp_path / 'none.json')]) == 1 and 'No such file' in capsys.readouterr().err


def test_a_failed_write_leaves_the_result_that_was_there(tmp_path):
    path = tmp_path / 'x.json'
    machine.write_result(path, 'speed', {}, {}, [], True)
    before = path.read_text()
    with pytest.raises(TypeError):
        machine.write_result(path, 'speed', {}, {}, [dict(x=object())], True)
    assert path.read_text() == before and os.listdir(tmp_path) == ['x.json']


def test_plot(result_file, tmp_path, monkeypatch, capsys):
    path = tmp_path / 'x.png'
    with monkeypatch.context() as without:
        without.setitem(sys.modules, 'matplotlib', None)
        assert report.main([str(result_file), '--plot', str(path)]) == 1
        assert 'needs matplotlib' in capsys.readouterr().err and not path.exists()
    pytest.importorskip('matplotlib')
    assert report.main([str(result_file), '--plot', str(path)]) == 0
    assert path.read_bytes().startswith(b'\x89PNG')


# -- bad input

@pytest.mark.parametrize('parse, args, message', [
    (speed.parse, ['vit_small_rope_axail'], "knows no model 'vit_small_rope_axail'"),
    (speed.parse, ['naive:vit_small_ape'], 'needs one of our rotary ViTs'),
    (speed.parse, ['naive:resnet18'], 'needs one of our rotary ViTs'),
    (speed.parse, ['vit_small_ape,depth'], 'NAME,ARGUMENT=VALUE'),
    (speed.parse, ['vit_small_ape', 'vit_small_ape'], 'given twice'),
    (speed.parse, ['vit_small_ape', '--size', '100'], 'vit_small_ape cannot be built for 100 pixels'),
    (speed.parse, ['vit_small_ape,colour=1'], 'cannot be built.*colour'),
    (speed.parse, ['naive:vit_small_rope_spiral,rope_clamp=True'], 'no naive form of ClampedPairRotation'),
    (speed.parse, ['--batch', '0'], "at least 1, got '0'"),
    (speed.parse, ['--precision', 'fp8'], "invalid choice: 'fp8'"),
    (speed.parse, ['--device', 'tpu'], "must be cpu or cuda, got 'tpu'"),
    (speed.parse, ['--json', '/no/such/folder/x.json'], 'folder that exists'),
    (memory.parse, ['--rounds', 'two'], "got 'two'"),
    (memory.parse, ['vit_small_ape', '--size', '100'], 'cannot be built for 100 pixels'),
    (rotation.parse, ['axail'], "Unknown rotary encoding 'axail'"),
    (rotation.parse, ['liere,block=65'], 'head_dim must be at least 65'),
    (rotation.parse, ['--shapes', '8x198'], '198 tokens are neither a square grid'),
    (rotation.parse, ['--shapes', '8'], 'BATCHxTOKENS'),
    (rotation.parse, ['--routes', 'magic'], "invalid choice: 'magic'"),
    (train_loop.parse, ['resnet18'], 'must be ViTs'),
])
def test_bad_input_is_refused(parse, args, message, capsys):
    with pytest.raises(SystemExit) as error:
        parse(args)
    assert error.value.code == 2 and re.search(message, capsys.readouterr().err)


# -- gpu.sh

def run_gpu_sh(folder, script, **env):
    """Run gpu.sh with a stand-in for Python that notes how it is called and then runs `script`."""
    fake = folder / 'python'
    note = f'line=$(printf "%s\\t" "$@" | tr "\\n" " "); echo "$line" >> {folder}/calls\n'  # parts run side by side
    fake.write_text(f'#!/bin/bash\n{note}{script}\n')
    fake.chmod(0o755)
    env = {**{k: v for k, v in os.environ.items() if k not in ('OUT', 'QUICK')}, 'PYTHON': str(fake), **env}
    done = subprocess.run([str(BENCHMARKS / 'gpu.sh')], env=env, capture_output=True, text=True, timeout=60)
    calls = folder / 'calls'
    return done, [line.split('\t')[:-1] for line in calls.read_text().splitlines()] if calls.exists() else []


@pytest.mark.parametrize('quick', ['0', '1'])
def test_gpu_sh_runs_parts_that_the_scripts_understand(tmp_path, quick, monkeypatch):
    def check_shallow(specs, sizes, **kwargs):
        peers.check_models(specs, sizes, **{**kwargs, 'depth': 1})

    for script in (speed, memory):
        monkeypatch.setattr(script, 'check_models', check_shallow)
    done, calls = run_gpu_sh(tmp_path, '', OUT=str(tmp_path / 'out'), QUICK=quick)
    assert done.returncode == 0, done.stdout + done.stderr
    scripts = dict(speed=speed, rotation=rotation, memory=memory, train_loop=train_loop)
    seen = []
    for call in calls:
        if call[0].startswith('benchmarks/') and '--json' in call:
            name = Path(call[0]).stem
            seen.append((name, scripts[name].parse(call[1:]).json.name))
    warm = [call for call in calls if call[0] == 'benchmarks/speed.py' and '--json' not in call]
    files = [file for _, file in seen]
    assert {name for name, _ in seen} == set(scripts) and len(set(files)) == len(files) == 6
    assert any(call[:4] == ['-m', 'pytest', '-m', 'gpu'] for call in calls)
    for call in warm:
        assert speed.parse(call[1:]).run == ['compile']
    limits = {name: int(seconds) for name, seconds in re.findall(r'== (\S+) \(at most (\d+) s', done.stdout)}
    assert len(limits) == 9 + len(warm) and len(warm) == (0 if quick == '1' else 5)
    alone = [limits[name] for name in ('speed', 'compile', 'rotation', 'memory', 'large')]
    assert quick == '1' or sum(alone) + max(set(limits.values()) - set(alone)) <= 480
    assert done.stdout == (tmp_path / 'out' / 'log.txt').read_text()


@pytest.mark.parametrize('code, said', [
    (3, 'failed with status 3'), (124, 'stopped at its time limit'), (137, 'stopped at its time limit')])
def test_gpu_sh_goes_on_after_a_part_that_fails(tmp_path, code, said):
    script = f'case "$1" in *rotation.py) echo broken; exit {code};; esac'
    done, _ = run_gpu_sh(tmp_path, script, OUT=str(tmp_path / 'out'))
    assert done.returncode == 1 and f'rotation: {said}' in done.stdout
    assert 'memory: done' in done.stdout and 'large: done' in done.stdout


def test_gpu_sh_gives_no_part_more_than_what_is_left(tmp_path):
    done, calls = run_gpu_sh(tmp_path, '', OUT=str(tmp_path / 'out'), MINUTES='0')
    assert done.returncode == 1 and done.stdout.count('no time left') == 14
    assert not any(call[0].startswith('benchmarks/') for call in calls)
    done, _ = run_gpu_sh(tmp_path, '', OUT=str(tmp_path / 'out'), MINUTES='1')
    limits = [int(seconds) for seconds in re.findall(r'at most (\d+) s', done.stdout)]
    assert max(limits) <= 60 and 'train: done' in done.stdout


@pytest.mark.slow
def test_gpu_sh_is_rehearsed_on_the_cpu(tmp_path):
    """All parts, with tiny models: what would stop on a GPU for another reason than the GPU stops here."""
    out = tmp_path / 'out'
    env = {**os.environ, 'PYTHON': sys.executable, 'QUICK': '1', 'OUT': str(out), 'COMMIT': 'rehearsed'}
    done = subprocess.run([str(BENCHMARKS / 'gpu.sh')], env=env, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr
    assert done.stdout.count(': done after') == 9
    files = sorted(path.name for path in out.iterdir())
    results = ['memory.json', 'rotation.json', 'speed.json', 'speed_compile.json', 'speed_large.json', 'train.json']
    assert files == sorted(['log.txt', 'machine.txt', *results])
    line = (out / 'machine.txt').read_text()
    assert all(word in line for word in ('torch ', 'triton', 'timm ', 'commit rehearsed')) and line in done.stdout
    for name in results:
        content = machine.read_result(out / name)
        assert not any(row.get('error') for row in content['rows']), name


def test_gpu_sh_says_what_is_missing(tmp_path):
    done, calls = run_gpu_sh(tmp_path, '')
    assert done.returncode == 2 and 'set OUT' in done.stderr and not calls
    done, _ = run_gpu_sh(tmp_path, 'echo timm_rope', OUT=str(tmp_path / 'out'))
    assert done.returncode == 2 and 'lacks timm_rope' in done.stderr
    done, _ = run_gpu_sh(tmp_path, 'case "$2" in *cuda*) exit 1;; esac', OUT=str(tmp_path / 'out'))
    assert done.returncode == 2 and 'no CUDA device' in done.stderr
