"""Run timm's own tests on our models.

    python tests/timm_contract.py                           # every model of the size tiny
    python tests/timm_contract.py --models 'swin_tiny_rope_*'
    python tests/timm_contract.py --models 'vit_test_*'     # small models of the same code, minutes instead of an hour
    python tests/timm_contract.py --full                    # every model of the package
    python tests/timm_contract.py -k 'prune or roundtrip'   # as pytest's -k

The tests come from the source distribution of the installed timm, unpacked at $TIMM_TESTS (the folder `tests` or the
one that holds it) or downloaded with pip and kept in ~/.cache/timm_rope. `timm_contract_plugin.py` says which of them
run and how they get our models; a pattern that none of ours match names timm's models, to see what its own do.
"""
import argparse
import fnmatch
import os
import shutil
import subprocess
import sys
import tarfile
import tempfile
import xml.etree.ElementTree as ET
from collections import Counter
from importlib.metadata import version
from pathlib import Path
from typing import Dict, List, NamedTuple, Optional, Tuple

TEST_FILES = ('test_models.py', 'test_model_input.py', 'test_utils.py', 'test_checkpoint_loading.py')
DEFAULT = ['vit_tiny_*', 'swin_tiny_*']


class TestsUnavailable(RuntimeError):
    """TIMM_TESTS is not set and timm's tests cannot be downloaded."""


class Outcome(NamedTuple):
    model: str
    test: str  # name of the function
    name: str  # with its parameters
    result: str  # 'passed', 'failed', 'skipped'
    seconds: float
    message: str


def find_tests() -> Path:
    """Folder with timm's tests.

    Raises:
        TestsUnavailable: They cannot be downloaded; says why.
        ValueError: $TIMM_TESTS does not hold the tests of the installed version.
    """
    installed = version('timm')
    given = os.environ.get('TIMM_TESTS')
    if given:
        for folder in (Path(given), Path(given) / 'tests'):
            if (folder / TEST_FILES[0]).is_file():
                return _same_version(folder, installed)
        raise ValueError(f'TIMM_TESTS={given} holds no {TEST_FILES[0]}: unpack the source distribution there.')
    cache = Path(os.environ.get('XDG_CACHE_HOME') or Path.home() / '.cache') / 'timm_rope'
    folder = cache / f'timm-{installed}' / 'tests'
    if not (folder / TEST_FILES[0]).is_file():
        _download(installed, cache)
    return folder


def _same_version(folder: Path, installed: str) -> Path:
    info = folder.parent / 'PKG-INFO'
    if info.is_file():
        found = next(line.split()[1] for line in info.read_text().splitlines() if line.startswith('Version:'))
        if found != installed:
            raise ValueError(f'TIMM_TESTS={folder} holds the tests of timm {found}, installed is {installed}.')
    return folder


def _download(installed: str, cache: Path) -> None:
    source = f'the source distribution of timm {installed}'
    with tempfile.TemporaryDirectory() as temp:
        # only timm itself from source: `:all:` would also compile the tools that pip needs to read its metadata
        command = [sys.executable, '-m', 'pip', 'download', '--no-deps', '--no-binary', 'timm', '--dest', temp,
                   '--disable-pip-version-check', f'timm=={installed}']
        try:
            done = subprocess.run(command, capture_output=True, text=True, timeout=300)
        except subprocess.TimeoutExpired:
            raise TestsUnavailable(f'Downloading {source} took more than 300 s; set TIMM_TESTS instead.') from None
        archives = list(Path(temp).glob('timm-*.tar.gz'))
        if done.returncode or not archives:
            lines = (done.stderr or done.stdout).strip().splitlines() or ['pip said nothing']
            raise TestsUnavailable(f'Cannot download {source}, set TIMM_TESTS instead. pip: {lines[-1]}')
        with tarfile.open(archives[0]) as archive:
            members = [m for m in archive.getmembers() if m.isfile() and m.name.split('/')[1] in ('tests', 'PKG-INFO')]
            if not any(m.name.endswith(TEST_FILES[0]) for m in members):
                raise TestsUnavailable(f'There are no tests in {source}.')
            # complete or absent: another process may be waiting for the same folder
            unpacked = Path(tempfile.mkdtemp(dir=_made(cache)))
            archive.extractall(unpacked, members, **({'filter': 'data'} if hasattr(tarfile, 'data_filter') else {}))
        target = cache / f'timm-{installed}'
        try:
            os.replace(unpacked / f'timm-{installed}', target)
        except OSError:
            if not (target / 'tests' / TEST_FILES[0]).is_file():
                raise
        shutil.rmtree(unpacked, ignore_errors=True)


def _made(folder: Path) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def match(patterns: List[str]) -> List[str]:
    """Names that match each pattern: of our models, else of the small ones made for the tests, else of timm's.

    Raises:
        ValueError: A pattern matches nothing.
    """
    import timm
    from timm_contract_plugin import STAND_INS

    from timm_rope.models import rope_swin, rope_vit

    ours = [name for name in (*rope_vit.MODEL_ARGS, *rope_swin.MODEL_ARGS) if name not in STAND_INS]
    found: List[str] = []
    for pattern in patterns:
        names: List[str] = []
        for known in (ours, STAND_INS, timm.list_models()):
            names = names or fnmatch.filter(known, pattern)
        if not names:
            raise ValueError(f'No model matches {pattern}.')
        found += [name for name in names if name not in found]
    return found


def run(models: List[str], keyword: str = '', quiet: bool = False) -> Tuple[List[Outcome], int, str]:
    """Run timm's tests on models in a pytest of their own.

    Args:
        models: Names of registered models or stand-ins.
        keyword: pytest's -k.
        quiet: Keep what pytest prints instead of showing it.

    Returns:
        What became of every test, pytest's exit status and, if quiet, its output.
    """
    tests = find_tests()
    here = Path(__file__).resolve().parent
    with tempfile.TemporaryDirectory() as temp:
        # a copy away from timm's sources, which must not be imported instead of the installed package
        for name in (*TEST_FILES, 'conftest.py'):
            shutil.copy(tests / name, temp)
        path = os.pathsep.join([str(here), str(here.parent), os.environ.get('PYTHONPATH', '')])
        env = dict(os.environ, PYTHONPATH=path.rstrip(os.pathsep), TIMM_ROPE_CONTRACT_MODELS=' '.join(models))
        env.pop('GITHUB_ACTIONS', None)  # timm runs fewer tests there
        if all(model.startswith(('vit_test_', 'swin_test_')) for model in models):
            env.setdefault('OMP_NUM_THREADS', '1')  # too small to gain from more
        command = [
            sys.executable, '-m', 'pytest', '-p', 'timm_contract_plugin', '-p', 'no:cacheprovider', '--rootdir', temp,
            '-q', '--tb=short', '--durations=10', '-W', 'ignore::pytest.PytestUnknownMarkWarning',
            '-W', 'ignore:`torch.jit:FutureWarning', '--junitxml', 'junit.xml', '-o', 'junit_family=xunit1']
        if keyword:
            command += ['-k', keyword]
        done = subprocess.run(
            command, cwd=temp, env=env, text=True, stdout=subprocess.PIPE if quiet else None,
            stderr=subprocess.STDOUT if quiet else None)
        report = Path(temp) / 'junit.xml'
        return _read(report) if report.is_file() else [], done.returncode, done.stdout or ''


def _read(report: Path) -> List[Outcome]:
    outcomes = []
    for case in ET.parse(report).getroot().iter('testcase'):
        result, message = 'passed', ''
        for tag in ('failure', 'error', 'skipped'):
            for element in case.iter(tag):
                result, message = 'skipped' if tag == 'skipped' else 'failed', element.get('message', '')
        properties = {p.get('name'): p.get('value') for p in case.iter('property')}
        name = case.get('name', '')
        outcomes.append(Outcome(
            str(properties.get('model', '')), name.split('[')[0], name, result, float(case.get('time', 0)), message))
    return outcomes


def table(outcomes: List[Outcome]) -> str:
    """One line per model."""
    rows: Dict[str, Counter] = {}
    for outcome in outcomes:
        row = rows.setdefault(outcome.model, Counter())
        row[outcome.result] += 1
        row['seconds'] += outcome.seconds  # type: ignore[assignment]
    lines = [f'{"model":36}{"passed":>8}{"failed":>8}{"skipped":>8}{"seconds":>9}']
    for model, row in rows.items():
        lines.append(f'{model:36}{row["passed"]:8}{row["failed"]:8}{row["skipped"]:8}{row["seconds"]:9.1f}')
    total = sum(rows.values(), Counter())
    lines.append(f'{"total":36}{total["passed"]:8}{total["failed"]:8}{total["skipped"]:8}{total["seconds"]:9.1f}')
    return '\n'.join(lines)


def main(argv: Optional[List[str]] = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--models', nargs='+', metavar='PATTERN', default=DEFAULT, help='names of models, * and ?')
    parser.add_argument('--full', action='store_true', help='all models of the package')
    parser.add_argument('-k', default='', metavar='EXPRESSION', help="pytest's -k")
    args = parser.parse_args(argv)
    try:
        outcomes, status, _ = run(match(['*'] if args.full else args.models), args.k)
    except (TestsUnavailable, ValueError) as error:
        print(error, file=sys.stderr)
        return 2
    print(f'\n{table(outcomes)}')
    return status or int(not any(outcome.result == 'passed' for outcome in outcomes))


if __name__ == '__main__':
    sys.exit(main())
