"""A fresh Python process as a user's script gets one: nothing imported, switched or in sight."""
import json
import os
import subprocess
import sys
import traceback
from pathlib import Path
from typing import Any, Callable, Dict, List, Optional, Tuple

# Put in front of a script: the packages in `hidden` are not there, as if they were not installed.
HIDE = '''
import os
from importlib.machinery import PathFinder
hidden, real_find_spec = set(os.environ['HIDDEN'].split()), PathFinder.find_spec
PathFinder.find_spec = lambda name, path=None, target=None: (
    None if name.partition('.')[0] in hidden else real_find_spec(name, path, target))
'''


def clean_env(**changes: Any) -> Dict[str, str]:
    """The environment without what steers Python, torch's autoload or the plugin, with `changes`."""
    env = {k: v for k, v in os.environ.items() if not k.startswith(('PYTHON', 'TIMM_ROPE_', 'TORCH_DEVICE_'))}
    return {**env, **{k: str(v) for k, v in changes.items()}}


def run_python(cwd: Path, *args: Any, **env: Any) -> Tuple[Any, str]:
    """Run `python *args` in the folder `cwd`.

    Returns:
        What it printed last, decoded from JSON, and its standard error.
    """
    done = subprocess.run(
        [sys.executable, *map(str, args)], cwd=cwd, env=clean_env(**env), capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, f'exit status {done.returncode}\n{done.stdout}\n{done.stderr}'
    return json.loads(done.stdout.splitlines()[-1]), done.stderr


def run_interpreted(script: Path) -> Any:
    """Run a test file as a script in Triton's interpreter: the outcome of its checks, see `outcomes`."""
    switches = dict(PYTHONPATH=Path(__file__).parent, TRITON_INTERPRET=1, OMP_NUM_THREADS=1)
    return run_python(script.parent, script.name, **switches)[0]


def outcomes(checks: Dict[str, Callable[[], Any]]) -> Dict[str, Optional[str]]:
    """What went wrong in each check, None where nothing did."""
    results: Dict[str, Optional[str]] = {}
    for name, check in checks.items():
        try:
            check()
            results[name] = None
        except Exception:
            results[name] = traceback.format_exc()
    return results


def our_warnings(stderr: str) -> List[str]:
    """Lines of a standard error that begin a warning of ours."""
    return [line for line in stderr.splitlines() if 'RuntimeWarning: timm_rope: ' in line]


def write_timm(folder: Path, version: str, torch_in: str = 'layers') -> None:
    """A timm with nothing in it but the order of its imports; releases up to 0.6 import torch in models only."""
    files = {
        'version.py': f'__version__ = {version!r}\n',
        'layers/__init__.py': '',
        'models/__init__.py': '',
        '__init__.py': 'from .version import __version__\nfrom . import layers, models\n',
    }
    files[f'{torch_in}/__init__.py'] = 'import torch\n'
    for name, text in files.items():
        file = folder / 'timm' / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text)
