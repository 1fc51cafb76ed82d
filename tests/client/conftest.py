"""Real servers for the client's tests, and one whose engine waits for a gate to open."""

from collections.abc import Iterator
from pathlib import Path

import pytest
from ddpm_client import Client

from server.settings import Settings
from server.web.app import create_app
from tests.server.conftest import Server
from tests.server.conftest import long_weights as long_weights
from tests.server.conftest import no_server_is_left as no_server_is_left
from tests.server.conftest import server as server
from tests.server.conftest import weights as weights
from tests.server.fakes import FakeBackend
from tests.server.web.lines import Threaded, threaded


@pytest.fixture
def client(server: Server) -> Iterator[Client]:
    """A client of the server that all tests share."""
    with Client(f"http://127.0.0.1:{server.port}", timeout_s=30) as made:
        yield made


@pytest.fixture
def backend() -> FakeBackend:
    """An engine of flat grey pictures, which makes them while its gate is open."""
    return FakeBackend()


@pytest.fixture
def grey(weights: Path, tmp_path: Path, backend: FakeBackend) -> Iterator[Threaded]:
    """A server of flat grey pictures, whose queue takes one job."""
    settings = Settings(weights=weights, data_dir=tmp_path / "data", result_cache=False, max_queued_jobs=1)
    with threaded(create_app(settings, backend)) as made:
        yield made
