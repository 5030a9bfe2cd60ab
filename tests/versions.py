"""Run the core of the tests with several releases of timm, torch and Python: python tests/versions.py --help.

Each release gets an environment of its own, which is deleted afterwards. For timm alone it is light: the packages of
the interpreter that runs this script, with another timm in front of them. For torch or another Python it is a whole
one, several GB with torch's packages for CUDA. Nothing is installed into the interpreter that runs this script.
"""
import argparse
import json
import os
import shutil
import subprocess
import sys
import sysconfig
import tempfile
import time
import xml.etree.ElementTree as ET
from collections import Counter
from pathlib import Path
from typing import Any, Dict, List, NamedTuple, Optional, Tuple

ROOT = Path(__file__).resolve().parents[1]
TIMM = ('1.0.20', '1.0.22', '1.0.24', '1.0.26', '1.0.28', 'newest')
CORE = ('tests/models', 'tests/weights', 'tests/test_plugin.py', *(f'tests/cli/test_{name}.py' for name in (
    'cli', 'convert_models', 'convert_weights', 'sweep_accuracy', 'sweep_refusals', 'sweep_results', 'sweep_rules')))
# what a release of timm needs that newer ones do not: 1.0.20 takes huggingface_hub 2 for missing
BESIDE = {'1.0.20': ('huggingface_hub<2',)}
WHOLE = ('torchvision', 'numpy', 'scipy', 'scikit-learn', 'matplotlib', 'onnx', 'onnxruntime', 'onnxscript', 'pytest',
         'pytest-timeout', 'pytest-xdist', 'setuptools>=77')
GB_OF_TORCH = 12  # while it is downloaded and unpacked
BEGIN, END = '<!-- versions -->', '<!-- /versions -->'
COLUMNS = ('timm', 'torch', 'Python', 'passed', 'failed', 'skipped', 'minutes')
VERSIONS = '''
import json, platform, timm, torch, timm_rope
print(json.dumps([timm.__version__, torch.__version__, platform.python_version(), timm_rope.__file__]))
'''


class Plan(NamedTuple):
    """What an environment has: releases, 'newest', or '' for that of the interpreter that runs this script."""
    timm: str = ''
    torch: str = ''
    python: str = ''

    @property
    def name(self) -> str:
        return ', '.join(f'{key} {value}' for key, value in self._asdict().items() if value)


class Failure(Exception):
    """No environment, or no tests in it; says why."""


def plans(args: argparse.Namespace) -> List[Plan]:
    """One for each release named; all of TIMM if none is."""
    named = [*(Plan(timm=each) for each in args.timm), *(Plan('newest', torch=each) for each in args.torch),
             *(Plan('newest', 'newest', each) for each in args.python)]
    return named or [Plan(timm=each) for each in TIMM]


def make(folder: Path, plan: Plan) -> str:
    """Make the environment of a plan.

    Returns:
        Its interpreter.

    Raises:
        Failure: No such release or interpreter, or too little room on the disk.
    """
    whole = bool(plan.torch or plan.python)
    free = shutil.disk_usage(folder).free / 1e9
    if whole and free < GB_OF_TORCH:
        raise Failure(f'{GB_OF_TORCH} GB are needed in {folder} while torch is installed, {free:.0f} GB are free')
    base = shutil.which(plan.python or sys.executable)
    if base is None:
        raise Failure(f'there is no interpreter {plan.python}')
    call([base, '-m', 'venv', '--without-pip', str(folder)])
    python = str(folder / 'bin' / 'python')
    install = [sys.executable, '-m', 'pip', '--python', python, 'install', '--no-input', '--quiet',
               '--disable-pip-version-check', '--no-cache-dir']
    if whole:
        call([*install, pin('torch', plan.torch), *WHOLE])
        call([*install, pin('timm', plan.timm)])
    else:
        site = call([python, '-c', 'import sysconfig; print(sysconfig.get_paths()["purelib"])']).strip()
        seen = dict.fromkeys([sysconfig.get_paths()[key] for key in ('purelib', 'platlib')])
        Path(site, 'of_the_interpreter.pth').write_text(''.join(f'{path}\n' for path in seen))
        call([*install, '--no-deps', '--ignore-installed', pin('timm', plan.timm)])
        if plan.timm in BESIDE:
            call([*install, *BESIDE[plan.timm]])
    # with its metadata, of which the plugin is a part
    call([*install, '--no-deps', '--no-build-isolation', '--ignore-installed', '-e', str(ROOT)])
    return python


def pin(package: str, release: str) -> str:
    return package if release in ('', 'newest') else f'{package}=={release}'


def call(command: List[str], **kwargs: Any) -> str:
    """What a command printed.

    Raises:
        Failure: It failed; ends with its last line.
    """
    env = {key: value for key, value in os.environ.items() if not key.startswith(('PYTHON', 'TIMM_ROPE_', 'VIRTUAL'))}
    done = subprocess.run(command, capture_output=True, text=True, env=env, cwd=ROOT, **kwargs)
    if done.returncode:
        lines = (done.stderr.strip() or done.stdout.strip() or f'exit status {done.returncode}').splitlines()
        raise Failure(next((line for line in lines if 'ERROR' in line), lines[-1]))
    return done.stdout


def test(python: str, tests: List[str], options: List[str]) -> Tuple[Dict[str, str], List[str]]:
    """Run tests in an environment.

    Returns:
        A row of the table, and what failed.

    Raises:
        Failure: The package is not importable, or pytest made no report.
    """
    timm, torch, version, file = json.loads(call([python, '-W', 'ignore', '-c', VERSIONS]).splitlines()[-1])
    if Path(file).parents[1] != ROOT:
        raise Failure(f'{file} would be tested instead of {ROOT}')
    start = time.monotonic()
    with tempfile.TemporaryDirectory() as temp:
        report = Path(temp) / 'junit.xml'
        env = {**{k: v for k, v in os.environ.items() if not k.startswith(('PYTHON', 'TIMM_ROPE_'))},
               'OMP_NUM_THREADS': '1'}
        subprocess.run(
            [python, '-m', 'pytest', '-m', 'not slow', '-p', 'no:cacheprovider', '--durations=0', '--tb=short', '-rs',
             f'--junitxml={report}', *options, *tests], cwd=ROOT, env=env)
        if not report.is_file():
            raise Failure('pytest made no report')
        cases = list(ET.parse(report).getroot().iter('testcase'))
    seconds = time.monotonic() - start
    results: Counter = Counter()
    failed = []
    for case in cases:
        tags = {child.tag for child in case}
        result = 'failed' if tags & {'failure', 'error'} else 'skipped' if 'skipped' in tags else 'passed'
        results[result] += 1
        if result == 'failed':
            failed.append(f'{case.get("classname")}.{case.get("name")}')
    counts = [str(results[name]) for name in ('passed', 'failed', 'skipped')]
    values = [timm, torch.partition('+')[0], '.'.join(version.split('.')[:2]), *counts, f'{seconds / 60:.1f}']
    return dict(zip(COLUMNS, values)), failed


# -- the table

def table(rows: List[Dict[str, str]]) -> str:
    lines = [COLUMNS, ['---'] * len(COLUMNS), *([row[name] for name in COLUMNS] for row in rows)]
    return ''.join(f'| {" | ".join(line)} |\n' for line in lines)


def split(path: Path) -> Tuple[str, List[Dict[str, str]], str]:
    """Text before the table of a file, its rows, and the text after it.

    Raises:
        ValueError: The file has no place for a table.
    """
    text = path.read_text(encoding='utf-8')
    before, begin, rest = text.partition(f'{BEGIN}\n')
    inside, end, after = rest.partition(END)
    if not begin or not end:
        raise ValueError(f'{path} needs a line {BEGIN} and, after it, a line {END}: the table is written between them.')
    cells = [[cell.strip() for cell in line.strip('| ').split('|')] for line in inside.splitlines()[2:]]
    return before + begin, [dict(zip(COLUMNS, row)) for row in cells if len(row) == len(COLUMNS)], end + after


def write(path: Path, rows: List[Dict[str, str]]) -> None:
    """Put rows into the table of a file, in place of those of the same versions."""
    before, old, after = split(path)
    merged = {tuple(row[name] for name in COLUMNS[:3]): row for row in [*old, *rows]}

    def release(row: Dict[str, str]) -> List[List[int]]:
        return [[int(part) if part.isdigit() else 0 for part in row[name].split('.')] for name in COLUMNS[:3]]

    path.write_text(before + table(sorted(merged.values(), key=release)) + after, encoding='utf-8')


def main(argv: Optional[List[str]] = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--timm', nargs='+', default=[], metavar='RELEASE',
                        help=f'releases of timm, or newest (default, if no other is named: {" ".join(TIMM)})')
    parser.add_argument('--torch', nargs='+', default=[], metavar='RELEASE', help='releases of torch, or newest')
    parser.add_argument('--python', nargs='+', default=[], metavar='PATH', help='interpreters, with the newest torch')
    parser.add_argument('--tests', nargs='+', default=list(CORE), metavar='PATH', help='files and folders of tests')
    parser.add_argument('--options', default='-n 2 --dist loadfile', help="of pytest (default: '%(default)s')")
    parser.add_argument('--folder', type=Path, help='where the environments are made (default: a temporary folder)')
    parser.add_argument('--output', type=Path, metavar='FILE',
                        help=f'write the rows into the table that FILE has between {BEGIN} and {END}')
    args = parser.parse_args(argv)
    if args.output is not None:
        try:
            split(args.output)
        except (ValueError, OSError) as error:
            parser.error(str(error))
    rows, problems = [], []
    for plan in plans(args):
        print(f'== {plan.name}', flush=True)
        with tempfile.TemporaryDirectory(dir=args.folder, prefix='versions') as folder:
            try:
                row, failed = test(make(Path(folder), plan), args.tests, args.options.split())
            except Failure as error:
                problems.append(f'{plan.name}: {error}')
                print(error, file=sys.stderr)
                continue
        rows.append(row)
        problems += [f'{plan.name}: {name}' for name in failed]
        if args.output is not None:  # at once, so that a later failure loses nothing
            write(args.output, [row])
    print(f'\n{table(rows)}')
    for problem in problems:
        print(f'- {problem}')
    return int(bool(problems))


if __name__ == '__main__':
    sys.exit(main())
