"""Fixtures of the tests of weights."""
import pytest
from hub_server import HubServer


@pytest.fixture
def cache(tmp_path):
    return tmp_path / 'cache'


@pytest.fixture
def hub(monkeypatch, cache):
    with HubServer() as server:
        yield server.serve(monkeypatch, cache)
