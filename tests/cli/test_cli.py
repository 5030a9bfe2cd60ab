"""The commands of `python -m timm_rope`. Those that only print are run in this process, with torch and timm at hand."""
import json
import subprocess
import sys

import pytest
import torch
from fresh_python import HIDE, clean_env, write_timm

from timm_rope import __version__
from timm_rope.__main__ import COMMANDS, main
from timm_rope.cli import doctor


@pytest.fixture(autouse=True)
def environment(monkeypatch, tmp_path):
    """As a user's: the child of `doctor` inherits this environment, and must not see the repository by accident."""
    for name in set(doctor.SWITCHES) | {'PYTHONPATH', 'PYTHONWARNINGS'}:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def lines(capsys):
    """Call main with the given arguments; exit status and the lines 'name  value' that it printed."""
    def run(*args):
        status = main(list(args))
        out, err = capsys.readouterr()
        assert err == ''
        return status, {k: v.strip() for k, _, v in (line.partition('  ') for line in out.splitlines())}
    return run


def run_module(*args, stdout=subprocess.PIPE, **env):
    return subprocess.run(
        [sys.executable, '-m', 'timm_rope', *args], env=clean_env(**env), stdout=stdout, stderr=subprocess.PIPE,
        text=True, timeout=300)


# -- the frame

def test_without_a_command_help_is_printed(capsys):
    assert main([]) == 2
    out = capsys.readouterr().out
    assert out.startswith('usage: python -m timm_rope')
    assert set(COMMANDS) <= set(out.split()) and {'demo', 'doctor', 'list'} <= set(COMMANDS)


def test_only_the_command_in_use_is_imported(monkeypatch, capsys):
    monkeypatch.setitem(COMMANDS, 'broken', ('.no_such_module', 'a command that cannot be imported'))
    with pytest.raises(SystemExit, match='0'):
        main(['doctor', '--help'])
    assert 'Exit status' in capsys.readouterr().out
    with pytest.raises(ModuleNotFoundError):
        main(['broken'])


def test_a_reader_that_goes_away_is_no_error(tmp_path):
    (tmp_path / 'sitecustomize.py').write_text(HIDE)
    reader = subprocess.Popen([sys.executable, '-c', ''], stdin=subprocess.PIPE)
    reader.wait()
    done = run_module('doctor', stdout=reader.stdin, PYTHONPATH=tmp_path, HIDDEN='torch timm')
    assert done.returncode == 1
    assert done.stderr == ''


@pytest.mark.parametrize('command', ['convert', 'sweep'])
def test_a_timm_that_is_too_old_or_missing_is_one_sentence(command, tmp_path):
    for make, env, words in (
            (lambda: (tmp_path / 'sitecustomize.py').write_text(HIDE), dict(HIDDEN='timm'),
             'timm is not installed: run `pip install timm`'),
            (lambda: write_timm(tmp_path, '1.0.19'), {},
             f'timm>=1.0.20 is needed, found 1.0.19 in {tmp_path / "timm"}')):
        make()
        done = run_module(command, 'x', PYTHONPATH=tmp_path, PYTHONWARNINGS='ignore', **env)
        (tmp_path / 'sitecustomize.py').unlink(missing_ok=True)  # it hides timm in the first case alone
        said = done.stderr.strip()
        assert done.returncode == 1 and said.startswith(f'timm_rope: {words}') and '\n' not in said, said
        assert said.endswith('`python -m timm_rope doctor` says more.')


def test_a_version_that_imports_but_is_too_old_is_one_sentence(monkeypatch):
    monkeypatch.setattr('timm.version.__version__', '1.0.19')
    with pytest.raises(SystemExit, match='timm>=1.0.20 is needed, found 1.0.19'):
        main(['sweep'])


# -- doctor

def test_doctor_finds_this_environment_healthy(lines):
    status, out = lines('doctor')
    assert status == 0
    assert out['torch'][0].isdigit() and out['timm'][0].isdigit() and out['safetensors'][0].isdigit()
    assert out['timm_rope'] == f'{__version__} from {doctor.FOLDER}'
    assert out['entry point'] == 'torch.backends: timm_rope.plugin:autoload'
    assert out['TIMM_ROPE_AUTOLOAD'] == out['TORCH_DEVICE_BACKEND_AUTOLOAD'] == 'not set'
    count = out['models'].split()[0]
    assert int(count) >= 60
    assert out['autoload'] == f'active: a script that only imports timm knows {count} of the models'
    assert out['device'].startswith(('cpu', 'cuda ('))
    assert out['TIMM_ROPE_KERNEL'] == 'not set'
    assert out['rotation kernel'] == ('triton' if out['device'].startswith('cuda') else 'inplace')


@pytest.mark.slow
@pytest.mark.parametrize('choice,kernel,problem', [
    ('formula', 'formula', None),
    ('fast', 'unknown', "TIMM_ROPE_KERNEL must be one of auto, formula, inplace, triton, got 'fast'."),
    ('triton', 'unknown', 'TIMM_ROPE_KERNEL=triton cannot rotate float32 queries on cpu'),
])
def test_doctor_tries_the_kernel_that_is_asked_for(choice, kernel, problem, lines, monkeypatch):
    if torch.cuda.is_available():
        pytest.skip('about a machine without a GPU')
    monkeypatch.setenv('TIMM_ROPE_KERNEL', choice)
    status, out = lines('doctor')
    assert out['rotation kernel'] == kernel and status == (1 if problem else 0)
    problems = [line for line in out if line.startswith('- ')]
    assert len(problems) == bool(problem) and all(problem in line for line in problems)


def test_doctor_tells_autoload_that_is_switched_off(lines, monkeypatch):
    monkeypatch.setenv('TIMM_ROPE_AUTOLOAD', '0')
    status, out = lines('doctor')
    assert status == 1
    assert out['TIMM_ROPE_AUTOLOAD'] == '0'
    assert out['autoload'].startswith('not active: ')
    assert int(out['models'].split()[0]) >= 60
    assert [line for line in out if line.startswith('- ')] == [
        '- TIMM_ROPE_AUTOLOAD switches autoload off: unset it, or `import timm_rope` in the script.']


def test_doctor_works_without_torch_and_timm(tmp_path):
    (tmp_path / 'sitecustomize.py').write_text(HIDE)
    done = run_module('doctor', PYTHONPATH=tmp_path, HIDDEN='torch timm')
    assert done.returncode == 1
    assert done.stderr == ''
    assert '\n- torch is not installed: run `pip install torch`.\n' in done.stdout
    assert '\n- timm is not installed: run `pip install timm`.\n' in done.stdout
    assert '\n2 problems:\n' in done.stdout


def test_doctor_tells_a_timm_that_is_too_old(lines, monkeypatch, tmp_path):
    write_timm(tmp_path, '0.9.16')
    monkeypatch.setenv('PYTHONPATH', str(tmp_path))
    status, out = lines('doctor')
    assert status == 1
    assert out['timm'] == '0.9.16'
    [problem] = [line for line in out if line.startswith('- ')]
    assert problem.startswith(f'- timm>=1.0.20 is needed, found 0.9.16 in {tmp_path / "timm"}, a folder that')


def test_doctor_tells_a_checkout_of_timm_that_hides_the_installed_one(lines, monkeypatch, tmp_path):
    write_timm(tmp_path, '1.0.19')
    monkeypatch.chdir(tmp_path)
    status, out = lines('doctor')
    assert status == 1
    [problem] = [line for line in out if line.startswith('- ')]
    assert problem.startswith('- in scripts of this folder, timm>=1.0.20 is needed, found 1.0.19 in ')
    assert f'{tmp_path / "timm"}, a folder that' in problem


@pytest.mark.parametrize('version, note', [
    ('0.4.0', ['segmentation_models_pytorch>=0.5 is needed, found 0.4.0: run `pip install -U '
               'segmentation_models_pytorch`']),
    ('0.5.0', []), (None, [])])
def test_doctor_notes_libraries_that_are_too_old_for_the_models(version, note, monkeypatch, capsys):
    asked = ['timm>=1.0.20', 'peft; extra == "consumers"', 'segmentation_models_pytorch>=0.5; extra == "consumers"',
             'segmentation_models_pytorch>=0.5; extra == "downstream"']
    monkeypatch.setattr(doctor.metadata, 'requires', lambda name: asked)
    monkeypatch.setattr(doctor, '_version', lambda name: version)
    assert doctor.old_libraries() == note
    monkeypatch.setattr(doctor, 'ask_child', lambda: HEALTHY)
    assert main(['doctor']) == 0, 'the models are found nevertheless'
    assert ('Note: segmentation' in capsys.readouterr().out) == bool(note)


HEALTHY = dict(
    versions=dict.fromkeys((*doctor.PACKAGES, 'timm_rope'), '99.0'), files={}, location='', entry_point=True,
    autoloaded=60, models=60, status='registered', device='cpu', error='', build_error='', kernels='inplace',
    kernel_error='', child_error='')


@pytest.mark.parametrize('facts, problem', [
    (dict(versions={**HEALTHY['versions'], 'safetensors': None}), 'safetensors is not installed: run `pip install'),
    (dict(versions={**HEALTHY['versions'], 'torch': '2.4.1+cu121'}), 'torch>=2.5 is needed, found 2.4.1+cu121: run'),
    (dict(autoloaded=0, error='RuntimeError: operator torchvision::nms does not exist'), 'torchvision::nms'),
    (dict(autoloaded=0, entry_point=False), 'pip install --force-reinstall timm_rope'),
    (dict(autoloaded=0, models=0, status='failed: ImportError: no name x'), 'failed: ImportError: no name x'),
    (dict(build_error='TypeError: unexpected y'), 'TypeError: unexpected y'),
    (dict(kernel_error='triton turns pairs in float32 wrong.'), 'wrong. `export TIMM_ROPE_KERNEL=formula` avoids it.'),
    (dict(autoloaded=0), '`import timm_rope` in the script, and please report it'),
    (dict(autoloaded=0, entry_point=False, child_error="ModuleNotFoundError: No module named 'timm_rope'"),
     'scripts in other folders do not find timm_rope: run `pip install timm_rope`'),
    (dict(autoloaded=0, entry_point=False, child_error='exit status -11'), 'exit status -11'),
])
def test_doctor_says_what_to_do_in_one_line(facts, problem):
    assert doctor.find_problems(HEALTHY) == []
    found, = doctor.find_problems({**HEALTHY, **facts})
    assert problem in found and '\n' not in found


def test_doctor_tells_the_switch_of_torch(monkeypatch):
    monkeypatch.setenv('TORCH_DEVICE_BACKEND_AUTOLOAD', 'true')  # torch takes only '1' for on
    found, = doctor.find_problems({**HEALTHY, 'autoloaded': 0})
    assert found.startswith('TORCH_DEVICE_BACKEND_AUTOLOAD switches the plugins of torch off')


# -- list

def test_list_prints_a_table(capsys):
    assert main(['list', 'vit_*_rope_spherical*']) == 0
    out, err = capsys.readouterr()
    assert err == ''
    head, *rows = [line.split() for line in out.splitlines()]
    assert head == ['name', 'encoding', 'parameters', 'weights']
    assert len(rows) == 16
    # one position embedding of 196 x 192 less than DeiT-III-Ti
    assert ['vit_tiny_rope_spherical', 'spherical', '5.68', 'M', '-'] in rows
    assert ['vit_small_rope_spherical_learned_ape', 'spherical_learned', '22.06', 'M', '-'] in rows


def test_list_prints_json(capsys):
    assert main(['list', '--json', 'vit_tiny_*']) == 0
    models = {model.pop('name'): model for model in json.loads(capsys.readouterr().out)}
    assert len(models) >= 15
    assert models['vit_tiny_ape'] == dict(encoding='none', parameters=5721832, weights=[])
    assert models['vit_tiny_rope_axial'] == dict(encoding='axial', parameters=5721832 - 196 * 192, weights=[])


def test_list_names_the_tags_that_have_weights(capsys, monkeypatch):
    from timm.models import PretrainedCfg, _registry
    name = 'vit_tiny_ape.untrained'
    monkeypatch.setitem(_registry._model_pretrained_cfgs, name, PretrainedCfg(hf_hub_id='someone/weights'))
    assert main(['list', 'vit_tiny_ape']) == 0
    assert capsys.readouterr().out.splitlines()[1].split()[-1] == 'untrained'


def test_list_without_a_match_says_so(capsys):
    assert main(['list', 'spherical']) == 1
    out, err = capsys.readouterr()
    assert out == ''
    assert "No model matches 'spherical'" in err and "'*spherical*'" in err


def test_list_prints_no_warnings_and_needs_no_autoload():
    done = run_module('list', 'vit_tiny_ape', TIMM_ROPE_AUTOLOAD=0)
    assert done.returncode == 0
    assert done.stderr == ''
    assert done.stdout.splitlines()[1].startswith('vit_tiny_ape')


def test_list_without_timm_refers_to_doctor(tmp_path):
    (tmp_path / 'sitecustomize.py').write_text(HIDE)
    done = run_module('list', PYTHONPATH=tmp_path, HIDDEN='timm')
    assert done.returncode == 1
    assert done.stderr == ("No models to list (ModuleNotFoundError: No module named 'timm'): "
                           "run `python -m timm_rope doctor`.\n")
