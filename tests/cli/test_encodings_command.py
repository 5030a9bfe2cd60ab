"""`python -m timm_rope encodings --update`: tables in files."""
import pytest

from timm_rope.__main__ import main
from timm_rope.cli.encodings import options_table, properties_table

OLD = 'a\n<!-- encodings -->\nold\n<!-- /encodings -->\nb\n<!-- options -->\nold\n<!-- /options -->\nc\n'


def test_tables_are_written_between_their_marks(tmp_path):
    both, one = tmp_path / 'both.md', tmp_path / 'one.md'
    both.write_text(OLD)
    one.write_text(OLD.partition('b\n')[0])
    assert main(['encodings', '--update', str(both), str(one)]) == 0
    assert both.read_text() == (
        f'a\n<!-- encodings -->\n{properties_table()}\n<!-- /encodings -->\nb\n<!-- options -->\n{options_table()}\n'
        f'<!-- /options -->\nc\n')
    assert one.read_text().endswith('<!-- /encodings -->\n') and 'options' not in one.read_text()
    before = both.stat().st_mtime_ns
    assert main(['encodings', '--update', str(both)]) == 0
    assert both.stat().st_mtime_ns == before, 'a file that is current is not touched'


OPTIONS = '<!-- options -->\nold\n<!-- /options -->\n'


@pytest.mark.parametrize('content,words', [
    ('no marks', 'has neither <!-- encodings -->'),
    ('<!-- encodings -->\nno end', 'has only one of <!-- encodings -->'),
    (f'<!-- encodings -->\nno end\n{OPTIONS}', 'has only one of <!-- encodings -->'),
    (f'no beginning\n<!-- /encodings -->\n{OPTIONS}', 'has only one of <!-- encodings -->'),
    ('<!-- /options -->\nturned round\n<!-- options -->\n', 'or the second one first')])
def test_a_file_without_marks_is_refused_and_none_is_written(content, words, tmp_path, capsys):
    good, bad = tmp_path / 'good.md', tmp_path / 'bad.md'
    good.write_text(OLD)
    bad.write_text(content)
    assert main(['encodings', '--update', str(good), str(bad)]) == 2
    error = capsys.readouterr().err
    assert 'bad.md' in error and words in error
    assert good.read_text() == OLD and bad.read_text() == content
    assert main(['encodings', '--update', str(tmp_path / 'none.md')]) == 2
