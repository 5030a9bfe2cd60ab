"""How an untouched `import timm` comes to know our models.

timm has no plugin discovery, torch has: at the end of `import torch` every entry point of the group
`torch.backends` is called. Ours is `autoload` below. Importing timm there would double the time of `import torch`,
so it only puts a finder on `sys.meta_path` that waits for `timm.models`; once timm has executed that module, our
model modules are imported and register themselves.

Nothing here may raise: an exception inside an entry point breaks `import torch` for the whole environment. This
module imports only what torch has loaded anyway, for the same reason of cost.
"""
import importlib.util
import os
import re
import sys
import warnings
from importlib import import_module
from typing import Optional

MIN_TIMM = (1, 0, 20)
MIN_TORCH = (2, 5)  # the first one that runs the entry points of torch.backends
TARGET = 'timm.models'
MODEL_MODULES = ('timm_rope.models.rope_vit', 'timm_rope.models.rope_swin')

imported_by_torch = False  # set by the package when torch's autoload, not a user, imported it
status = 'not installed'  # what `python -m timm_rope doctor` reports


def autoload() -> None:
    """Entry point of the group `torch.backends`. Never raises; TIMM_ROPE_AUTOLOAD=0 makes it do nothing."""
    try:
        if opted_out():
            if imported_by_torch:
                # Forget this import, so that an explicit `import timm_rope` later runs anew and registers.
                for name in [n for n in sys.modules if n == 'timm_rope' or n.startswith('timm_rope.')]:
                    del sys.modules[name]
            return
        install()
        if importlib.util.find_spec('timm') is None:
            _warn('timm is not installed in this environment: run `pip install timm` to use the models of timm_rope.')
    except Exception as error:
        _warn(f'autoload failed, the rotary models are not available: {type(error).__name__}: {error}')


def install() -> None:
    """Register our models with timm: now if timm.models is loaded, else as soon as it is. Idempotent, never raises."""
    global status
    if status == 'not installed':
        if TARGET in sys.modules:  # half imported too: another thread is at it, or a timm too old to import torch first
            register()
        else:
            sys.meta_path.insert(0, _WaitForTimm())
            status = 'waiting for timm'


def register() -> None:
    """Import the modules whose entry points register our models. Any failure becomes one warning."""
    global status
    try:
        problem = outdated()
        if problem:
            raise RuntimeError(problem)
        for name in MODEL_MODULES:
            import_module(name)
        status = 'registered'
    except Exception as error:
        status = f'failed: {type(error).__name__}: {error}'
        _warn(f'the rotary models were not registered with timm: {type(error).__name__}: {error}')


def outdated() -> str:
    """What to do about a torch or timm that is too old, '' if neither is."""
    for name, module, least in (('torch', 'torch.version', MIN_TORCH), ('timm', 'timm.version', MIN_TIMM)):
        found = import_module(module)
        problem = too_old(name, found.__version__, least, found.__file__)
        if problem:
            return problem
    return ''


def too_old(name: str, version: str, least: tuple, file: Optional[str]) -> str:
    """What to do about a version that is too old, '' if it is not.

    Args:
        name: Of the package.
        version: Found.
        least: Release that is needed.
        file: Of a module of the package, which tells an installed one from a folder that hides it; None if unknown.
    """
    if not release(version) or release(version) >= least:
        return ''
    problem = f'{name}>={".".join(map(str, least))} is needed, found {version}'
    folder = os.path.dirname(os.path.abspath(file)) if file else ''
    if not folder or re.search(r'(site|dist)-packages', folder):
        return f'{problem}{f" in {folder}" if folder else ""}: run `pip install -U {name}`'
    return (
        f'{problem} in {folder}, a folder that Python finds before any installed {name}: `pip install` does not help, '
        f'update it (`git pull`), or run the script from where no folder {name}/ lies beside it')


def opted_out() -> bool:
    """Whether the environment forbids autoload."""
    return os.environ.get('TIMM_ROPE_AUTOLOAD', '1').strip().lower() in ('0', 'false', 'no', 'off')


def is_importing(name: str) -> bool:
    """Whether module `name` is being executed right now by the import system."""
    spec = getattr(sys.modules.get(name), '__spec__', None)
    return bool(getattr(spec, '_initializing', False))


def release(version: str) -> tuple:
    """'1.0.31.dev0', '1.0.31+local' -> (1, 0, 31): the leading numbers of a version."""
    leading = re.match(r'\d+(\.\d+)*', version)
    return tuple(int(part) for part in leading.group().split('.')) if leading else ()


def _warn(message: str) -> None:
    try:
        warnings.warn(f'timm_rope: {message}', RuntimeWarning, stacklevel=2)
    except Warning as warning:  # `python -W error` turns warnings into exceptions, which must not leave this module
        print(warning, file=sys.stderr)


class _WaitForTimm:
    """Finder that steps in for one module, once, and otherwise finds nothing."""

    def find_spec(self, fullname, path=None, target=None):
        if fullname != TARGET:
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(fullname)
        if spec is not None and spec.loader is not None:
            spec.loader = _RegisterAfterExec(spec.loader)  # type: ignore[assignment]
        return spec


class _RegisterAfterExec:
    """Loader that runs the real loader, steps out of sight, then registers our models."""

    def __init__(self, loader):
        self.loader = loader

    def __getattr__(self, name):
        return getattr(self.loader, name)

    def create_module(self, spec):
        return self.loader.create_module(spec)

    def exec_module(self, module):
        # inspect, importlib.resources and pickling of modules look at these and must find the real loader
        module.__loader__ = module.__spec__.loader = self.loader
        try:
            self.loader.exec_module(module)
            register()
        except BaseException:
            sys.meta_path.insert(0, _WaitForTimm())  # the import may be tried again
            raise
