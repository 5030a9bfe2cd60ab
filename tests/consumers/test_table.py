"""The lines of code in the table of libraries run, where the library is installed."""
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
TABLE = (ROOT / 'timm_rope/models/README.md').read_text().split('<!-- consumers -->')[1].split('<!-- /consumers -->')[0]
ROWS = [row.strip('| ').split(' | ') for row in TABLE.strip().splitlines()[2:]]


def test_the_table_names_what_the_extra_installs():
    extra = re.search(r'^consumers =\n((?:    .*\n)*)', (ROOT / 'setup.cfg').read_text(), flags=re.M)[1].split()
    named = {name.partition('>=')[0].removesuffix('_torch') for name in extra} - {'onnx', 'onnxscript'}
    assert named <= set(re.findall(r'[\w-]+', ' '.join(row[0] for row in ROWS)))


@pytest.mark.slow
@pytest.mark.filterwarnings('ignore')
@pytest.mark.parametrize('row', ROWS, ids=[row[0].split(' ')[0] for row in ROWS])
def test_lines_run(row):
    lines = re.findall(r'`([^`]+)`', row[-1])
    for names in re.findall(r'^(?:import (.+)|from (\w+))', '\n'.join(lines), flags=re.M):
        for module in re.findall(r'(?:^|, )(\w+)', ''.join(names)):
            pytest.importorskip(module)
    exec('\n'.join(lines), {})
