"""Fixtures of the tests of weights."""
import pickle

import pytest
from hub_server import HubServer
from planted import NAME, Planted
from tiny import make


@pytest.fixture
def cache(tmp_path):
    return tmp_path / 'cache'


@pytest.fixture
def hub(monkeypatch, cache):
    with HubServer() as server:
        yield server.serve(monkeypatch, cache)


@pytest.fixture
def marker(tmp_path):
    """A path that code from a planted weight file would create; the test fails if it did."""
    path = tmp_path / 'code-was-run'
    pickle.loads(pickle.dumps(Planted(path)))
    assert path.is_dir(), 'the trap works'
    path.rmdir()
    yield path
    assert not path.exists(), 'code from the weight file was run'


@pytest.fixture(scope='session')
def weights():
    """An honest state dict."""
    return make(NAME).state_dict()
