"""The table of tests/versions.py, and what it runs; the environments themselves are made by running it."""
import pytest
import versions

PAGE = f'before\n{versions.BEGIN}\n{versions.END}\nafter\n'


def row(timm, torch='2.14.1', passed='9'):
    return dict(zip(versions.COLUMNS, (timm, torch, '3.11', passed, '0', '1', '3.5')))


def test_rows_are_added_sorted_and_replaced(tmp_path):
    page = tmp_path / 'page.md'
    page.write_text(PAGE)
    versions.write(page, [row('1.0.31'), row('1.0.9'), row('1.0.31', '2.5.1')])
    versions.write(page, [row('1.0.9', passed='10')])
    before, rows, after = versions.split(page)
    assert rows == [row('1.0.9', passed='10'), row('1.0.31', '2.5.1'), row('1.0.31')]
    assert before.startswith('before\n') and after.endswith('after\n')
    assert sum(line.startswith('| ---') for line in page.read_text().splitlines()) == 1


@pytest.mark.parametrize('text', ['no place', PAGE.replace(versions.END, ''), f'{versions.END}\n{versions.BEGIN}\n'])
def test_a_page_without_a_place_is_refused_before_anything_runs(text, tmp_path, capsys):
    page = tmp_path / 'page.md'
    page.write_text(text)
    with pytest.raises(SystemExit):
        versions.main(['--output', str(page)])
    assert 'the table is written between them' in capsys.readouterr().err
    assert page.read_text() == text


def test_an_interpreter_that_is_not_there_is_a_line(capsys):
    assert versions.main(['--python', 'python0.1']) == 1
    assert '- timm newest, torch newest, python python0.1: there is no interpreter python0.1' in capsys.readouterr().out


def test_the_core_is_there():
    assert all((versions.ROOT / name).exists() for name in versions.CORE)
