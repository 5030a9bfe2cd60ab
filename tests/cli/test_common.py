"""What commands share: files are written whole or not at all, arguments are refused before the work begins."""
import argparse
import os

import pytest

from timm_rope.cli._common import integer_from, output_file, write_whole


def test_a_file_is_replaced_at_once_or_not_at_all(tmp_path, monkeypatch):
    path = tmp_path / 'result.json'
    write_whole(path, 'one')
    write_whole(path, b'two')
    assert path.read_text() == 'two'

    def fail(*_):
        raise OSError('disk full')

    monkeypatch.setattr(os, 'replace', fail)
    with pytest.raises(OSError, match='disk full'):
        write_whole(path, 'three')
    assert path.read_text() == 'two' and list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize('text', ['-1', '1.5', 'x', '', '2', str(2 ** 63)])
def test_other_integers_are_refused(text):
    assert integer_from(3)('3') == 3
    with pytest.raises(argparse.ArgumentTypeError, match='integer of at least 3'):
        integer_from(3)(text)


def test_a_file_that_cannot_be_written_is_refused(tmp_path):
    assert output_file(str(tmp_path / 'new')) == tmp_path / 'new'
    for path in (tmp_path, tmp_path / 'no' / 'folder'):
        with pytest.raises(argparse.ArgumentTypeError, match='must be a file in a folder that exists'):
            output_file(str(path))
