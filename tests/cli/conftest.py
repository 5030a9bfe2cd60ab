"""Fixtures of the tests of commands."""
import pytest

from timm_rope.__main__ import main


@pytest.fixture
def convert(capsys):
    """Run the command; exit status, its lines, its standard error."""
    def run(*args):
        status = main(['convert', *map(str, args)])
        out, err = capsys.readouterr()
        assert err.count('\n') == (1 if status else 0), 'an error is one line, success none'
        return status, out, err
    return run
