"""How an untouched `import timm` comes to know our models, and that nothing breaks where it cannot.

What is imported first decides, so every case is a process of its own. Each costs the 2 s of `import torch` and mostly
the 4 s of `import timm`; cases that allow it share one.
"""
import inspect
import json
import sys
from importlib import metadata

import pytest
from fresh_python import HIDE, our_warnings, run_python, write_timm

from timm_rope import list_ropes, plugin

ENCODINGS = list_ropes()
SIZES = ('tiny', 'small', 'base', 'large')
PROMISED = {
    *(f'vit_{size}_rope_{encoding}{ape}' for size in SIZES for encoding in ENCODINGS for ape in ('', '_ape')),
    *(f'vit_{size}_ape' for size in SIZES), *(f'vit_{size}_rope_vit5' for size in SIZES[1:]),
    *(f'swin_{size}_rope_{encoding}{rpb}' for size in SIZES[:3] for encoding in ('axial', 'mixed')
      for rpb in ('', '_rpb')),
}
ANY = 'vit_small_rope_spherical'

# What the scripts below end with.
REPORT = '''
import json
import timm
print(json.dumps({**found, 'models': {n: timm.model_entrypoint(n).__module__ for n in timm.list_models()}}))
'''
UNKNOWN = f'''
import timm
try:
    timm.create_model({ANY!r})
except RuntimeError as error:
    found = {{'unknown': str(error)}}
'''


def ours(models):
    return {name for name, module in models.items() if module.startswith('timm_rope.')}


@pytest.fixture(scope='module')
def stock(tmp_path_factory):
    """What a script sees that imports timm and nothing of ours."""
    script = '''
        import timm
        import importlib.util, inspect, pickle, sys, torch

        model = timm.create_model('vit_small_rope_spherical')
        names = [name for module in ('rope_vit', 'rope_swin') for name in timm.list_models(module=module)]
        entrypoints = [timm.model_entrypoint(name) for name in names]
        modules = [sys.modules[f'timm_rope.models.{module}'] for module in ('rope_vit', 'rope_swin')]
        found = {
            'output': list(model.eval()(torch.zeros(1, 3, 224, 224)).shape),
            'of_module': names,
            'all': [name for module in modules for name in module.__all__],
            'attributes': [e.__name__ for e in entrypoints if getattr(sys.modules[e.__module__], e.__name__) is e],
            'pickled': [e.__name__ for e in entrypoints if pickle.loads(pickle.dumps(e)) is e],
            'documented': [e.__name__ for e in entrypoints if inspect.getdoc(e) and 'Args:' in e.__doc__],
            'loaders': [type(loader).__name__ for loader in (
                timm.models.__spec__.loader, timm.models.__loader__, importlib.util.find_spec('timm.models').loader)],
            'source': inspect.getsource(timm.models) == open(timm.models.__file__).read(),
            'finders': [f for f in map(repr, sys.meta_path) if 'timm_rope.plugin' in f],
        }
    '''
    found, stderr = run_python(tmp_path_factory.mktemp('stock'), '-c', inspect.cleandoc(script) + REPORT)
    return {**found, 'stderr': stderr}


@pytest.fixture(scope='module')
def opted_out(tmp_path_factory):
    """What a script sees with TIMM_ROPE_AUTOLOAD=0, before and after it imports timm_rope."""
    script = UNKNOWN + '''
import sys
found['loaded'] = [name for name in sys.modules if name.startswith('timm_rope')]
found['before'] = {n: timm.model_entrypoint(n).__module__ for n in timm.list_models()}
import timm_rope
timm.create_model('vit_tiny_rope_mixed', device='meta')
'''
    found, stderr = run_python(tmp_path_factory.mktemp('opted_out'), '-c', script + REPORT, TIMM_ROPE_AUTOLOAD=0)
    return {**found, 'stderr': stderr}


# -- with nothing but `import timm`

def test_import_timm_brings_the_models(stock):
    assert {'axial', 'mixed', 'spherical', 'liere', 'spiral', 'golden', 'string'} < set(ENCODINGS)
    assert PROMISED <= ours(stock['models'])
    assert stock['output'] == [1, 1000]
    assert 'timm_rope' not in stock['stderr']


def test_no_model_of_timm_is_changed(stock, opted_out):
    own = {name: module for name, module in stock['models'].items() if not module.startswith('timm_rope.')}
    assert own == opted_out['before']
    assert len(own) > 1000
    assert 'Overwriting' not in stock['stderr'] + opted_out['stderr']


def test_entry_points_are_ordinary_functions_of_their_module(stock):
    names = set(stock['of_module'])
    assert names == ours(stock['models'])
    for what in ('all', 'attributes', 'pickled', 'documented'):
        assert set(stock[what]) == names, what


def test_nothing_of_the_hook_is_left_in_the_import_system(stock):
    assert stock['loaders'] == ['SourceFileLoader'] * 3
    assert stock['source']
    assert stock['finders'] == []


# -- what it costs where timm is not wanted

@pytest.fixture(scope='module')
def without_plugin(tmp_path_factory):
    """Modules of a bare `import torch`, and the seconds that our entry point then takes.

    Between two calls it is made as new as can be without a new process, which would measure torch's noise. The first
    call of all may have to compile the modules (pip does that at installation), the median is the cost of the others.
    The garbage collector is off: a collection of torch's objects takes 4 ms, and whose import it falls into is chance.
    """
    script = '''
        import torch
        import gc, json, statistics, sys, time
        from importlib.metadata import entry_points

        modules = list(sys.modules)
        entry_point, = entry_points(group='torch.backends', name='timm_rope')
        gc.disable()
        seconds = []
        for _ in range(15):
            finders = list(sys.meta_path)
            start = time.perf_counter()
            entry_point.load()()
            seconds.append(time.perf_counter() - start)
            assert len(sys.meta_path) == len(finders) + 1
            sys.meta_path[:] = finders
            for name in [name for name in sys.modules if name.partition('.')[0] == 'timm_rope']:
                del sys.modules[name]
        print(json.dumps({'modules': modules, 'seconds': statistics.median(seconds)}))
    '''
    return run_python(
        tmp_path_factory.mktemp('bare'), '-c', inspect.cleandoc(script), TORCH_DEVICE_BACKEND_AUTOLOAD=0)[0]


def test_import_torch_alone_loads_nothing_but_the_hook(tmp_path, without_plugin):
    modules, stderr = run_python(
        tmp_path, '-c', 'import torch, sys; names = list(sys.modules); import json; print(json.dumps(names))')
    added = set(modules) - set(without_plugin['modules'])
    # the standard library is torch's doing: it imports importlib.metadata to look for plugins
    assert {name for name in added if name.partition('.')[0] not in sys.stdlib_module_names} == {
        'timm_rope', 'timm_rope._version', 'timm_rope.plugin'}
    assert stderr == ''


def test_import_torch_takes_at_most_5_ms_longer(without_plugin):
    assert without_plugin['seconds'] < 5e-3


# -- switched off, and asked for by name

def test_opt_out_hides_the_models_until_timm_rope_is_imported(opted_out):
    assert opted_out['unknown'] == f'Unknown model ({ANY})'
    assert opted_out['loaded'] == []
    assert PROMISED <= ours(opted_out['models'])
    assert 'timm_rope' not in opted_out['stderr']


@pytest.mark.slow
@pytest.mark.parametrize('switch, imports', [
    ('TIMM_ROPE_AUTOLOAD', 'import torch, timm_rope, timm'),  # torch's autoload has imported the package and dropped it
    ('TORCH_DEVICE_BACKEND_AUTOLOAD', 'import timm_rope, timm'),
    ('TORCH_DEVICE_BACKEND_AUTOLOAD', UNKNOWN + 'assert found["unknown"]; import timm_rope'),
], ids=['opt_out-before', 'torch_switch-before', 'torch_switch-after'])
def test_import_timm_rope_registers_in_any_order(tmp_path, switch, imports):
    found, stderr = run_python(tmp_path, '-c', f'found = {{}}\n{imports}\n{REPORT}', **{switch: 0})
    assert PROMISED <= ours(found['models'])
    assert stderr == ''


def test_our_modules_may_be_the_first_import(tmp_path):
    # vit's own import of timm then runs the registration, while vit is half loaded
    script = f'''
from timm_rope import RopeVisionTransformer
import timm
found = dict(same=type(timm.create_model({ANY!r}, device='meta')) is RopeVisionTransformer)
'''
    found, stderr = run_python(tmp_path, '-c', script + REPORT)
    assert PROMISED <= ours(found['models'])
    assert found['same']
    assert 'timm_rope' not in stderr  # timm before 1.0.26 warns of torch.jit


# -- where it cannot work: one warning, and torch and timm are as usable as without us

@pytest.mark.slow
def test_missing_timm_is_one_warning_and_may_be_installed_later(tmp_path):
    script = HIDE + '''
import torch
found = {'sum': torch.ones(3).sum().item()}
hidden.clear()  # pip install timm in a running notebook
'''
    found, stderr = run_python(tmp_path, '-c', script + REPORT, HIDDEN='timm')
    assert found['sum'] == 3
    warning, = our_warnings(stderr)
    assert 'timm is not installed' in warning and 'pip install timm' in warning
    assert PROMISED <= ours(found['models'])


@pytest.mark.parametrize('version, torch_in', [('0.9.16', 'layers'), ('0.6.13', 'models')])
def test_too_old_timm_is_one_warning_with_both_versions(tmp_path, version, torch_in):
    write_timm(tmp_path, version, torch_in)
    found, stderr = run_python(
        tmp_path, '-c', 'import timm, json; print(json.dumps(timm.models.__name__))', PYTHONPATH=tmp_path)
    assert found == 'timm.models'
    warning, = our_warnings(stderr)
    assert f'timm>=1.0.20 is needed, found {version} in {tmp_path / "timm"}' in warning
    assert 'git pull' in warning and 'pip install -U' not in warning


BROKEN = '''
import sys
class Broken:
    def find_spec(self, name, path=None, target=None):
        if name == 'timm_rope.models.rope_vit':
            raise RuntimeError('broken on purpose')
sys.meta_path.insert(0, Broken())
import torch
import timm
found = {}
'''
CAUSE = 'timm_rope: the rotary models were not registered with timm: RuntimeError: broken on purpose'


def test_failure_of_ours_is_one_warning_with_the_cause(tmp_path):
    found, stderr = run_python(tmp_path, '-c', BROKEN + REPORT)
    assert len(found['models']) > 1000 and not ours(found['models'])
    assert len(our_warnings(stderr)) == 1
    assert CAUSE in our_warnings(stderr)[0]


def test_warnings_as_errors_do_not_leave_the_plugin(tmp_path):
    write_timm(tmp_path, '1.0.31')
    found, stderr = run_python(
        tmp_path, '-W', 'error', '-c', BROKEN + 'print("true")', PYTHONPATH=tmp_path)
    assert found is True
    assert stderr == CAUSE + '\n'


@pytest.mark.slow
def test_failed_import_of_timm_may_be_tried_again(tmp_path):
    script = '''
import sys
found = {'failures': []}
class Flaky:
    def find_spec(self, name, path=None, target=None):
        if name == 'timm.models._registry' and not found['failures']:
            raise ImportError('the network drive is away')
sys.meta_path.insert(0, Flaky())
try:
    import timm
except ImportError as error:
    found['failures'].append(str(error))
'''
    found, stderr = run_python(tmp_path, '-c', script + REPORT)
    assert found['failures'] == ['the network drive is away']
    assert PROMISED <= ours(found['models'])
    assert stderr == ''


# -- other processes

@pytest.mark.slow
def test_spawned_dataloader_workers_find_the_models(tmp_path):
    (tmp_path / 'script.py').write_text(inspect.cleandoc('''
        import torch

        class Parameters(torch.utils.data.Dataset):
            def __len__(self):
                return 1

            def __getitem__(self, index):
                import timm
                return sum(p.numel() for p in timm.create_model('vit_tiny_rope_axial', device='meta').parameters())

        if __name__ == '__main__':
            loader = torch.utils.data.DataLoader(Parameters(), num_workers=1, multiprocessing_context='spawn')
            print([int(batch) for batch in loader])
    '''))
    found, _ = run_python(tmp_path, 'script.py')
    assert found == [5721832 - 196 * 192]  # DeiT-III-Ti without its position embedding


@pytest.mark.slow
def test_torchrun_ranks_find_the_models(tmp_path):
    (tmp_path / 'script.py').write_text(inspect.cleandoc('''
        import timm
        import json, torch

        torch.distributed.init_process_group('gloo')
        count = torch.tensor(len(timm.list_models('vit_*_rope_*', module='rope_vit')))
        counts = [torch.zeros_like(count) for _ in range(2)]
        torch.distributed.all_gather(counts, count)
        with open(f'rank{torch.distributed.get_rank()}.json', 'w') as file:
            json.dump([int(c) for c in counts], file)
        torch.distributed.destroy_process_group()
    '''))
    run_python(tmp_path, '-c', inspect.cleandoc('''
        import subprocess, sys
        subprocess.run([sys.executable, '-m', 'torch.distributed.run', '--standalone', '--nproc_per_node=2',
                        'script.py'], check=True)
        print('true')
    '''), OMP_NUM_THREADS=1, GLOO_SOCKET_IFNAME='lo0' if sys.platform == 'darwin' else 'lo')
    for rank in range(2):
        counts = json.loads((tmp_path / f'rank{rank}.json').read_text())
        assert counts[0] == counts[1] >= 56


# -- versions

def test_least_versions_are_those_of_the_metadata():
    needs = metadata.requires('timm_rope')
    assert f'timm>={".".join(map(str, plugin.MIN_TIMM))}' in needs
    assert f'torch>={".".join(map(str, plugin.MIN_TORCH))}' in needs


@pytest.mark.parametrize('version, file, words', [
    ('1.0.19', '/env/lib/python3.11/site-packages/timm/version.py',
     'found 1.0.19 in /env/lib/python3.11/site-packages/timm: run `pip install -U timm`'),
    ('1.0.19', None, 'found 1.0.19: run `pip install -U timm`'),
    ('1.0.19', '/src/timm/version.py', 'found 1.0.19 in /src/timm, a folder that Python finds before any installed'),
    ('1.0.20', '/src/timm/version.py', ''), ('1.0.32.dev0', None, ''), ('unknown', None, ''),
])
def test_what_to_do_about_an_old_version(version, file, words):
    problem = plugin.too_old('timm', version, (1, 0, 20), file)
    assert words in problem and bool(problem) == bool(words)


def test_old_torch_is_one_warning(monkeypatch):
    monkeypatch.setattr('torch.version.__version__', '2.4.1+cu121')
    monkeypatch.setattr(plugin, 'status', plugin.status)
    with pytest.warns(RuntimeWarning, match='not registered.*torch>=2.5 is needed, found 2.4.1'):
        plugin.register()


@pytest.mark.parametrize('version, release', [
    ('1.0.31', (1, 0, 31)), ('1.0.31.dev0', (1, 0, 31)), ('1.0.32rc1', (1, 0, 32)), ('1.0.31+local', (1, 0, 31)),
    ('2.15.0a0+git1f2e', (2, 15, 0)), ('1.1', (1, 1)), ('unknown', ()),
])
def test_release_of_a_version(version, release):
    assert plugin.release(version) == release
