"""The direction of imports, and that every file has its place."""
import ast
from pathlib import Path

import pytest

import timm_rope
from timm_rope.encodings import ENCODINGS

PACKAGE = Path(timm_rope.__file__).parent

# file -> files of the package it may import; a file that is missing here has no place yet
ALLOWED = {
    '_version': set(),
    'checks': set(),
    'precision': set(),
    'signature': set(),
    'cache': set(),
    'norms': {'checks'},
    'plugin': set(),
    'weight_files': set(),
    'hub': {'_version'},
    'hub_cache': {'hub'},
    'frequencies': set(),
    'coordinates': {'precision'},
    'scaling': {'precision'},
    'augmentation': set(),
    'chebyshev': set(),
    'doubles': set(),
    'dual_matrices': {'doubles'},
    'power_series': {'dual_matrices'},
    'grid_levels': {'chebyshev', 'power_series'},
    'grid_exponentials': {'dual_matrices', 'grid_levels', 'power_series', 'precision'},
    'exponential': {'grid_exponentials', 'precision'},
    'sines': {'precision'},
    'rotation': {'exponential', 'precision', 'sines'},
    'encoding': {'augmentation', 'cache', 'checks', 'coordinates', 'rotation', 'scaling', 'signature'},
    'encodings': {'encoding', 'frequencies', 'rotation', 'scaling', 'checks'},
    'kernels': {'doubles', 'precision', 'rotation'},
    'attention': {'kernels', 'rotation'},
    'patch_embed': {'checks'},
    'checkpointed': {'mismatches'},
    'layouts': {'encodings', 'signature'},
    'mismatches': {'encoding', 'layouts', 'norms', 'signature'},
    'warm_start': {'layouts', 'mismatches'},
    'checkpoints': {'coordinates', 'layouts', 'mismatches', 'warm_start'},
    'pretrained': {'checks', 'hub', 'hub_cache', 'layouts', 'weight_files'},
    'vit': {
        'attention', 'checkpointed', 'checkpoints', 'checks', 'encoding', 'encodings', 'norms', 'patch_embed'},
    'window_attention': {'encoding', 'kernels'},
    'swin_checkpoints': {'encoding', 'layouts', 'mismatches'},
    'swin': {
        'checkpointed', 'checks', 'encoding', 'encodings', 'patch_embed', 'swin_checkpoints',
        'window_attention'},
    'saved_encoding': {'encoding', 'encodings', 'signature'},
    'reparametrize': {'encoding', 'encodings', 'models', 'rotation', 'saved_encoding', 'swin'},
    'convert': {
        '_version', 'checkpoints', 'coordinates', 'encoding', 'hub', 'hub_cache', 'layouts', 'norms', 'plugin',
        'pretrained', 'saved_encoding', 'signature', 'swin_checkpoints', 'vit', 'weight_files'},
    'models': {'checkpoints', 'encoding', 'encodings', 'pretrained', 'swin', 'swin_checkpoints', 'vit'},
    'small_data': set(),
    'properties': {'encodings'},
    'recipes': set(),
    'sweep': {'_version', 'convert', 'layouts', 'pretrained', 'scaling', 'weight_files'},
    'demo': {'encodings', 'small_data'},
    'doctor': {'_version', 'catalog', 'kernels', 'plugin'},
    'catalog': {'models', 'encoding', 'plugin'},
    '__main__': {'catalog', 'demo', 'doctor', '_version'},
    '__init__': {'reparametrize', 'plugin', '_version', 'encoding', 'encodings', 'swin', 'vit'},
}
FREE_OF_TIMM = [
    '__init__', '_version', 'augmentation', 'cache', 'chebyshev', 'checks', 'coordinates', 'doubles', 'dual_matrices',
    'encoding', 'encodings', 'exponential', 'frequencies', 'grid_exponentials', 'grid_levels', 'kernels', 'plugin',
    'hub', 'hub_cache', 'power_series', 'precision', 'properties', 'recipes', 'rotation', 'scaling', 'signature',
    'sines', 'weight_files']


def unit_of(path):
    parts = path.relative_to(PACKAGE).with_suffix('').parts
    return parts[0]


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
    assert unit in ALLOWED, f'{unit} has no place in the layout: add it to ALLOWED with what it may import'
    for name in imports(path):
        if name.startswith('timm_rope.'):
            target = name.split('.')[1]
            if target != unit:
                assert target in ALLOWED[unit], f'{unit} must not import {target}'
        elif name.split('.')[0] == 'timm':
            assert unit not in FREE_OF_TIMM, f'{unit} must work without timm'


def test_no_encoding_imports_another():
    files = list((PACKAGE / 'encodings').glob('[a-z]*.py'))
    for path in files:
        assert not any(name.startswith('timm_rope.encodings') for name in imports(path)), path.name
    defined_in = {cls.__module__.rsplit('.', 1)[-1] for cls in ENCODINGS.values()}
    assert {path.stem for path in files} == defined_in, 'every file in encodings/ must be in the registry'


@pytest.mark.parametrize('name', sorted(ENCODINGS))
def test_every_encoding_explains_itself(name):
    cls = ENCODINGS[name]
    assert cls.summary and cls.source.startswith('arXiv ')
    assert cls.source in cls.__doc__ and 'head_dim' in cls.__doc__
    assert all(f'{option}:' in cls.__doc__ for option in cls.option_defaults()), 'every option is documented'
    assert cls.relative in ('xy', 'last', '')
