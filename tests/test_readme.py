"""The READMEs show what the code does: tables come from the registry, examples run, links and commands exist."""
import re
from pathlib import Path

import pytest
import timm

from timm_rope.__main__ import COMMANDS
from timm_rope.cli.encodings import options_table, properties_table
from timm_rope.models.rope_vit import PUBLISHED

ROOT = Path(__file__).parents[1]
PAGES = {
    str(path.relative_to(ROOT)): path.read_text() for path in sorted(ROOT.rglob('*.md'))
    if not any(part.startswith('.') or part in ('build', 'venv') for part in path.relative_to(ROOT).parts)}
NOT_RUN = '<!-- not run:'  # in front of an example that shows a part of a file; says why
EXAMPLES = [
    (name, example) for name, text in PAGES.items()
    for before, example in re.findall(r'([^\n]*)\n```python\n(.*?)```', text, flags=re.S) if NOT_RUN not in before]


def test_there_is_a_page_for_every_room():
    rooms = [path.name for path in (ROOT / 'timm_rope').iterdir() if (path / '__init__.py').exists()]
    assert {f'timm_rope/{room}/README.md' for room in rooms} <= PAGES.keys()
    assert {'README.md', 'CONTRIBUTING.md', 'CHANGELOG.md', 'benchmarks/README.md', 'tests/README.md'} <= PAGES.keys()


def test_the_first_page_is_short():
    # without the table, which has a line for each encoding
    text, table, rest = re.split('<!-- /?encodings -->\n', PAGES['README.md'])
    assert len((text + rest).splitlines()) <= 202


@pytest.mark.parametrize('name,table', [('encodings', properties_table), ('options', options_table)])
def test_tables_are_current(name, table):
    shown = {
        page: text.split(f'<!-- {name} -->\n')[1].split(f'\n<!-- /{name} -->')[0]
        for page, text in PAGES.items() if f'<!-- {name} -->\n' in text}
    assert 'timm_rope/encodings/README.md' in shown
    for page, text in shown.items():
        assert text == table(), f'run `python -m timm_rope encodings --update {page}`'


@pytest.mark.parametrize('page,example', EXAMPLES, ids=[f'{name}-{i}' for i, (name, _) in enumerate(EXAMPLES)])
def test_examples_run(page, example):
    exec(example, {})


def test_there_are_examples():
    pages = {name for name, _ in EXAMPLES}
    assert {'README.md', 'timm_rope/encodings/README.md', 'timm_rope/models/README.md'} <= pages


def anchors(text):
    titles = re.findall(r'^#+ (.*)$', re.sub(r'```.*?```', '', text, flags=re.S), flags=re.M)
    return {re.sub(r'[^\w\- ]', '', title.lower()).replace(' ', '-') for title in titles}


@pytest.mark.parametrize('page', PAGES)
def test_links_lead_somewhere(page):
    for target in re.findall(r'\]\(([^)\s]+)\)', PAGES[page]):
        if target.startswith(('http://', 'https://')):
            continue
        path, _, anchor = target.partition('#')
        file = (ROOT / page).parent / path if path else ROOT / page
        assert file.exists(), f'{page} leads to {target}'
        if anchor:
            assert anchor in anchors(file.read_text()), f'{page} leads to {target}'


@pytest.mark.parametrize('page', PAGES)
def test_commands_exist(page):
    text = PAGES[page]
    assert set(re.findall(r'python -m timm_rope (\w+)', text)) <= {*COMMANDS, 'COMMAND'}
    for file in re.findall(r'\b((?:benchmarks|tests)/[\w/]+\.(?:py|sh))\b', text):
        assert (ROOT / file).exists(), f'{page} names {file}'


def test_the_table_of_weights_has_every_tag():
    rows = dict(re.findall(r'^\| `(vit_\w+\.\w+)` \| (.*)\|$', PAGES['timm_rope/weights/README.md'], flags=re.M))
    assert rows.keys() == PUBLISHED.keys()
    for name, row in rows.items():
        cfg = timm.get_pretrained_cfg(name)
        structure = dict(norm_layer='spiral_rms', pos_embed='learn') if 'spiral' in name else {}
        model = timm.create_model(name, device='meta', **structure)
        assert row.startswith(f'{sum(p.numel() for p in model.parameters()) / 1e6:.2f} M |'), name
        assert 'spiral' in name or (f'`{cfg.hf_hub_id}`' in row and cfg.license in row), name
