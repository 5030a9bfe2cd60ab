"""`python -m timm_rope doctor`: does a script that only imports timm find our models, and if not, why.

Whether it does is not concluded but tried, in a child process. torch and timm are imported there only: this module
needs neither, since it must work where they are missing, too old or broken.
"""
import argparse
import importlib.util
import json
import os
import re
import subprocess
import sys
from importlib import metadata
from pathlib import Path
from typing import Any, Dict, List, Optional

from .. import plugin

ENTRY_POINT = 'timm_rope.plugin:autoload'
PACKAGES = ('torch', 'torchvision', 'timm', 'huggingface_hub', 'safetensors')
FOLDER = Path(__file__).parents[1]
SWITCHES = ('TIMM_ROPE_AUTOLOAD', 'TORCH_DEVICE_BACKEND_AUTOLOAD', 'TIMM_ROPE_KERNEL')
TIMEOUT = 300  # seconds; a cold `import timm` from a network drive takes most of a minute

# What the child runs. It must not import timm_rope before timm's models are counted.
CHILD = '''
import sys
sys.path[:] = filter(None, sys.path)  # not the current directory: a script lies elsewhere
names, error = [], ''
try:
    import timm
    names = timm.list_models()
except Exception as exception:
    error = f'{type(exception).__name__}: {exception}'
from timm_rope.cli.doctor import inspect_process
inspect_process(names, error)
'''


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.epilog = 'Exit status: 0 if scripts find the models without a change, 1 if not.'


def run(args: argparse.Namespace) -> int:
    facts = ask_child()
    problems = find_problems(facts)
    print(format_facts(facts))
    print()
    if problems:
        print(f'{len(problems)} problem{"s" if len(problems) > 1 else ""}:')
        for problem in problems:
            print(f'- {problem}')
    else:
        print('Healthy: a script that imports timm and nothing else can create the models.')
    for note in old_libraries():
        print(f'Note: {note}.')
    return 1 if problems else 0


def ask_child() -> Dict[str, Any]:
    """Facts about this environment, as far as they can be had.

    Returns:
        versions: Package -> version, None if it is not installed; of PACKAGES and timm_rope.
        files: Package -> a file of it, of those that were found.
        location: Folder of the timm_rope that a script imports, or of this one if it finds none.
        entry_point: Whether the installed metadata has it.
        autoloaded: How many of our models `import timm` alone brought.
        models: How many there are after `import timm_rope`.
        status: What the plugin says of itself.
        device: 'cpu' or 'cuda (...)'.
        error: Of `import timm`, if any.
        build_error: Of the creation of a model, if any.
        kernels: Which route turns queries and keys.
        kernel_error: Of trying them, if any.
        child_error: Of the child process, if it did not answer.
    """
    facts: Dict[str, Any] = dict(
        versions=_versions(), files={}, location=str(FOLDER), entry_point=False, autoloaded=0, models=0, status='',
        device='unknown', error='', build_error='', kernels='unknown', kernel_error='',
        child_error='')
    try:
        child = subprocess.run([sys.executable, '-c', CHILD], capture_output=True, text=True, timeout=TIMEOUT)
        if child.returncode == 0:
            facts.update(json.loads(child.stdout.splitlines()[-1]))
        else:
            facts['child_error'] = (child.stderr.strip().splitlines() or [f'exit status {child.returncode}'])[-1]
    except (OSError, ValueError, subprocess.TimeoutExpired) as error:
        facts['child_error'] = str(error)
    return facts


def inspect_process(names: List[str], error: str) -> None:
    """Second half of the child: print the facts as JSON.

    Args:
        names: Models that timm knew before this package was imported by name.
        error: Of `import timm`, if any.
    """
    facts: Dict[str, Any] = dict(
        error=error, location=str(FOLDER), status=plugin.status,
        entry_point=any(e.value == ENTRY_POINT for e in metadata.entry_points(group='torch.backends')))
    try:
        from ..models.entrypoints import model_names

        ours = model_names()
        facts.update(models=len(ours), autoloaded=len(set(ours) & set(names)))
        if ours:
            import timm

            timm.create_model(ours[0], device='meta', weight_init='skip')
    except Exception as exception:
        facts['build_error'] = f'{type(exception).__name__}: {exception}'
    try:
        import torch

        facts['device'] = f'cuda ({torch.cuda.get_device_name()})' if torch.cuda.is_available() else 'cpu'
    except Exception as exception:
        facts['error'] = error or f'{type(exception).__name__}: {exception}'
    try:
        from ._kernel_survey import summary, survey

        facts['kernels'] = summary(survey(facts['device'].split()[0]))
    except Exception as exception:
        facts['kernel_error'] = str(exception)
    facts['versions'] = _versions()
    facts['files'] = {name: getattr(sys.modules.get(name), '__file__', None) for name in PACKAGES}
    print('\n' + json.dumps(facts))


def find_problems(facts: Dict[str, Any]) -> List[str]:
    """One line for each problem: what is wrong and what to do."""
    versions = facts['versions']
    problems = [f'{name} is not installed: run `pip install {name}`.' for name in PACKAGES if versions[name] is None]
    old = {name: plugin.too_old(name, versions[name] or '', least, facts['files'].get(name))
           for name, least in (('torch', plugin.MIN_TORCH), ('timm', plugin.MIN_TIMM))}
    problems += [f'{problem}.' for problem in old.values() if problem]
    if not old['timm']:
        problems += _shadow()
    if not problems and facts['error']:
        problems.append(f'`import timm` fails, repair the installation of torch and timm: {facts["error"]}')

    if "No module named 'timm_rope" in facts['child_error']:
        problems.append('scripts in other folders do not find timm_rope: run `pip install timm_rope`.')
    elif facts['child_error']:
        problems.append(f'a process that only imports timm died, find out why: {facts["child_error"]}')
    elif not facts['entry_point']:
        problems.append('the installed metadata lacks the entry point: run `pip install --force-reinstall timm_rope`.')
    if plugin.opted_out():
        problems.append('TIMM_ROPE_AUTOLOAD switches autoload off: unset it, or `import timm_rope` in the script.')
    if os.environ.get('TORCH_DEVICE_BACKEND_AUTOLOAD', '1') != '1':  # the test that torch makes
        problems.append(
            'TORCH_DEVICE_BACKEND_AUTOLOAD switches the plugins of torch off: unset it, or `import timm_rope` in the '
            'script.')

    if not problems and facts['status'].startswith('failed'):
        problems.append(
            f'the models were not registered, {facts["status"]}: `python -c "import timm, {plugin.MODEL_MODULES[0]}"` '
            f'shows where; please report it.')
    if facts['kernel_error'] and not facts['error']:
        problems.append(
            f'queries are not rotated: {facts["kernel_error"]} `export TIMM_ROPE_KERNEL=formula` avoids it.')
    if not problems and facts['build_error']:
        problems.append(f'a model could not be created, please report it: {facts["build_error"]}')
    if not problems and not facts['autoloaded']:
        problems.append(
            f'`import timm` alone does not bring the models (the plugin says: {facts["status"]}): '
            f'`import timm_rope` in the script, and please report it.')
    return problems


def old_libraries() -> List[str]:
    """What to do about installed libraries that use the models, and are older than our extras ask for."""
    notes = []
    try:
        asked = metadata.requires('timm_rope') or []
    except metadata.PackageNotFoundError:
        return []
    for line in dict.fromkeys(line.partition(';')[0].strip() for line in asked if 'extra ==' in line):
        name, _, least = line.partition('>=')
        version = _version(name) if least else None
        notes.append(plugin.too_old(name, version or '', plugin.release(least), None))
    return [note for note in notes if note]


def _shadow() -> List[str]:
    """A problem if scripts in this folder import a timm beside them, as in a checkout of timm, that is too old."""
    file = Path('timm', 'version.py')
    try:
        found = re.search(r"__version__ = '([^']+)'", file.read_text(encoding='utf-8'))
    except (OSError, ValueError):
        return []
    old = plugin.too_old('timm', found[1] if found else '', plugin.MIN_TIMM, str(file))
    return [f'in scripts of this folder, {old}.'] if old else []


def format_facts(facts: Dict[str, Any]) -> str:
    """The facts as aligned lines."""
    if facts['autoloaded']:
        autoload = f'active: a script that only imports timm knows {facts["autoloaded"]} of the models'
    else:
        autoload = 'not active: a script that only imports timm knows none of the models'
    versions = {name: version or 'not installed' for name, version in facts['versions'].items()}
    lines = {
        'python': f'{sys.version.split()[0]} ({sys.executable})',
        **versions,
        'timm_rope': f'{versions["timm_rope"]} from {facts["location"]}',
        'entry point': f'torch.backends: {ENTRY_POINT}' if facts['entry_point'] else 'missing',
        **{name: os.environ.get(name, 'not set') for name in SWITCHES},
        'autoload': autoload,
        'models': f'{facts["models"]} registered once timm_rope is imported',
        'device': facts['device'],
        'rotation kernel': facts['kernels'],
    }
    width = max(map(len, lines))
    return '\n'.join(f'{name:<{width}}  {value}' for name, value in lines.items())


def _versions() -> Dict[str, Optional[str]]:
    return {name: _version(name) for name in (*PACKAGES, 'timm_rope')}


def _version(name: str) -> Optional[str]:
    """Version of what `import name` gives, None if that is nothing."""
    module = sys.modules.get(name)
    try:
        if module is None and importlib.util.find_spec(name) is None:
            return None
        return getattr(module, '__version__', None) or metadata.version(name)
    except (ImportError, ValueError):  # no metadata, or something odd in the way of the search
        return 'unknown'
