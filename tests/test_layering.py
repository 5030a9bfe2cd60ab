"""The direction of imports, and that every file has its place."""
import ast
import re
from pathlib import Path

import pytest

import timm_rope
from timm_rope.encodings import ENCODINGS

PACKAGE = Path(timm_rope.__file__).parent

# room, or module at the top -> the rooms and modules of the package it may import; one that is missing has no place yet
ALLOWED = {
    '_version': set(),
    '_checks': set(),
    '_tracing': set(),
    '_timm': set(),
    '_precision': {'_tracing'},
    'plugin': set(),
    'positions': {'_precision'},
    'rotations': {'_precision', '_tracing'},
    'encodings': {'positions', 'rotations', '_checks', '_precision', '_tracing'},
    'kernels': {'rotations', '_precision', '_tracing'},
    'analysis': {'encodings', 'positions'},
    'weights': {'encodings', 'positions', '_checks', '_timm', '_version'},
    'models': {'weights', 'kernels', 'encodings', 'positions', 'rotations', '_checks', '_timm', '_tracing'},
    'cli': {
        'analysis', 'models', 'weights', 'kernels', 'encodings', 'positions', 'rotations', '_checks', '_timm',
        '_version', 'plugin'},
    '__main__': {'cli', 'plugin', '_version'},
    '__init__': {'models', 'encodings', 'plugin', '_version'},
}
# what must work without timm: whole rooms, and modules of the others
FREE_OF_TIMM = [
    '__init__', '__main__', '_version', '_checks', '_precision', '_tracing', 'plugin', 'positions', 'rotations',
    'encodings', 'kernels', 'weights/files', 'weights/hub', 'weights/hub_cache', 'cli/encodings', 'cli/recipe']


def unit_of(path):
    parts = path.relative_to(PACKAGE).with_suffix('').parts
    return parts[0]  # the room, or a module at the top


def imports(path):
    """Absolute names of the modules a file imports."""
    package = ['timm_rope', *path.relative_to(PACKAGE).parts[:-1]]
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = package[:len(package) - node.level + 1] if node.level else []
            module = '.'.join([*base, *([node.module] if node.module else [])])
            if module == 'timm_rope' or not node.module:
                yield from (f'{module}.{alias.name}' for alias in node.names)
            else:
                yield module


FILES = sorted(PACKAGE.rglob('*.py'))


@pytest.mark.parametrize('path', FILES, ids=[str(p.relative_to(PACKAGE)) for p in FILES])
def test_imports_point_downwards(path):
    unit = unit_of(path)
    name_of_file = path.relative_to(PACKAGE).with_suffix('').as_posix()
    assert unit in ALLOWED, f'{unit} has no place in the layout: add it to ALLOWED with what it may import'
    for name in imports(path):
        if name.startswith('timm_rope.'):
            target = name.split('.')[1]
            if target != unit:
                assert target in ALLOWED[unit], f'{unit} must not import {target}'
            elif unit == 'cli' and name.count('.') >= 2:
                assert name.split('.')[2] in command_and_shared(name_of_file), f'{name_of_file} must not import {name}'
        elif name.split('.')[0] == 'timm':
            assert not {unit, name_of_file} & set(FREE_OF_TIMM), f'{name_of_file} must work without timm'


def command_and_shared(name_of_file):
    """A command imports no other command, but itself and what all commands share (with an underscore)."""
    shared = {path.stem for path in (PACKAGE / 'cli').glob('_*.py')}
    return shared | {name_of_file.split('/')[1]}


def test_no_encoding_imports_another():
    files = list((PACKAGE / 'encodings').glob('[a-z]*.py'))
    for path in files:
        assert not any(re.match(r'timm_rope\.encodings(\.[a-z]|$)', name) for name in imports(path)), path.name
    defined_in = {cls.__module__.rsplit('.', 1)[-1] for cls in ENCODINGS.values()}
    assert {path.stem for path in files} == defined_in, 'every file in encodings/ must be in the registry'


@pytest.mark.parametrize('name', sorted(ENCODINGS))
def test_every_encoding_explains_itself(name):
    cls = ENCODINGS[name]
    assert cls.summary and cls.source
    assert cls.source in cls.__doc__ and 'head_dim' in cls.__doc__
    assert all(f'{option}:' in cls.__doc__ for option in cls.option_defaults()), 'every option is documented'
    assert cls.relative in ('xy', 'last', '')


# -- sizes: the package grows by files and rooms, not by floors

ROOM = dict(
    _timm=480, analysis=800, positions=450, rotations=1320, encodings=2010, models=2430, kernels=2010, weights=2560,
    cli=3700)
CORE = ('positions', 'rotations', 'encodings', 'models')


def lines_of(*paths):
    return sum(len(path.read_text().splitlines()) for path in paths)


def is_encoding(path):
    return path.parent.name == 'encodings' and not path.name.startswith('_')


@pytest.mark.parametrize('path', FILES, ids=[str(p.relative_to(PACKAGE)) for p in FILES])
def test_no_file_function_or_class_is_long(path):
    sizes = [(path.name, lines_of(path), 120 if is_encoding(path) else 300)]
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
            # good documentation is no length
            length = node.end_lineno - node.lineno + 1 - len((ast.get_docstring(node) or '').splitlines())
            sizes.append((node.name, length, 260 if isinstance(node, ast.ClassDef) else 60))
    for name, length, bound in sizes:
        assert length <= bound, f'{name} has {length} lines, the bound is {bound}: split it or cut'


def test_no_room_is_crowded():
    counted = [path for path in FILES if not is_encoding(path)]  # an encoding has its own bound: one more is one file
    lines = {name: lines_of(*(path for path in counted if unit_of(path) == name)) for name in ROOM}
    for name, bound in ROOM.items():
        assert lines[name] <= bound, f'{name} has {lines[name]} lines, the bound is {bound}'
    core = sum(lines[name] for name in CORE)
    assert core <= 6150, f'{", ".join(CORE)} have {core} lines together, the bound is 6150'
    assert lines_of(*counted) <= 16150, f'the package has {lines_of(*counted)} lines, the bound is 16150'
