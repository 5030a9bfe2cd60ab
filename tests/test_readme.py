"""The README shows what the code does: tables come from the registry, examples run, CI finds its commands."""
import re
from pathlib import Path

import pytest
import timm

from timm_rope.cli.encodings import options_table, properties_table
from timm_rope.models.rope_vit import PUBLISHED

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


def test_the_table_of_weights_has_every_tag():
    rows = dict(re.findall(r'^\| `(vit_\w+\.\w+)` \| (.*)\|$', README, flags=re.M))
    assert rows.keys() == PUBLISHED.keys()
    for name, row in rows.items():
        cfg = timm.get_pretrained_cfg(name)
        structure = dict(norm_layer='spiral_rms', pos_embed='learn') if 'spiral' in name else {}
        model = timm.create_model(name, device='meta', **structure)
        assert row.startswith(f'{sum(p.numel() for p in model.parameters()) / 1e6:.2f} M |'), name
        assert 'spiral' in name or (f'`{cfg.hf_hub_id}`' in row and cfg.license in row), name
