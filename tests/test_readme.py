"""The README shows what the code does: tables come from the registry, examples run, CI finds its commands."""
import re
from pathlib import Path

import pytest

from timm_rope.properties import options_table, properties_table

README = (Path(__file__).parents[1] / 'README.md').read_text()
EXAMPLES = re.findall(r'```python\n(.*?)```', README, flags=re.S)


@pytest.mark.parametrize('name,table', [('encodings', properties_table), ('options', options_table)])
def test_tables_are_current(name, table):
    shown = README.split(f'<!-- {name} -->')[1].split(f'<!-- /{name} -->')[0].strip()
    assert shown == table(), f'run `python -m timm_rope encodings` and put its table into the README ({name})'


@pytest.mark.parametrize('example', EXAMPLES, ids=range(len(EXAMPLES)))
def test_examples_run(example):
    exec(example, {})


def test_there_are_examples():
    assert len(EXAMPLES) >= 2
