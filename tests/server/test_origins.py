"""Host and Origin: other people's pages cannot make a browser use this server, whatever their names lead to."""

from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path

import pytest
from starlette.testclient import TestClient, WebSocketDenialResponse

from server.app import create_app
from server.errors import SettingsError
from server.origins import Rules
from server.settings import Settings
from tests.server.fakes import FakeBackend

Clients = Callable[..., TestClient]
NOBODYS = ["localhost", "localhost:8000", "LOCALHOST", "127.0.0.1:8000", "[::1]:8000", "10.1.2.3", "ddpm", "ddpm:80"]
NOBODYS += ["my-pc.local", "ddpm.default.svc.cluster.local:8000", "app.localhost", "host.docker.internal", "a_b:1"]
STRANGERS = ["evil.example", "127.0.0.1.nip.io", "localhost.evil.example:8000", "local", "a.b"]
ILL_FORMED = ["", " ", "a b", "a/b", "a:b", "a:99999", "a:1:2", "::1", "[::1", "a..b", ".", "user@localhost", "a,b", "é"]


@pytest.fixture
def serve(weights: Path) -> "Clients":
    """Applications with the settings a test asks for."""
    with ExitStack() as stack:

        def make(**knobs: str) -> TestClient:
            app = create_app(Settings.read({}, {"weights": weights, **knobs}), FakeBackend())
            return stack.enter_context(TestClient(app, base_url="http://localhost:8000"))

        yield make  # type: ignore[misc]
