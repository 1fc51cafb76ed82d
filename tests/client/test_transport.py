"""Addresses, keys and proxies, and answers that do not come from the server."""

from concurrent.futures import ThreadPoolExecutor
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import pytest
from ddpm_client import Client, Denied, Refused, Unreachable

from server.settings import Settings
from server.web.app import create_app
from server.web.auth import make_key
from tests.server.conftest import Server
from tests.server.fakes import FakeBackend
from tests.server.web.lines import threaded


def test_a_server_that_is_not_there_is_unreachable() -> None:
    with Client("http://127.0.0.1:9", timeout_s=0.5) as client:
        assert not client.ready()
        with pytest.raises(Unreachable):
            client.generate(seed=1)


@pytest.mark.parametrize("url", ["127.0.0.1:8000", "ftp://x", "http://", "http://[::1", "http://x:y", "http://x:65536"])
def test_an_ill_formed_url_is_refused_and_not_repeated_in_the_message(url: str) -> None:
    with pytest.raises(ValueError, match=r"^the URL of a server is like http://127.0.0.1:8000 or https://example.com$"):
        Client(url)


def test_a_url_may_be_in_capitals(server: Server) -> None:
    with Client(f"HTTP://LOCALHOST:{server.port}", timeout_s=20) as client:
        assert client.generate(seed=1, steps=1).seed == 1


@pytest.mark.parametrize("key", ["ключ", "one\ntwo", "one\0"])
def test_an_ill_formed_key_is_refused_and_not_repeated_in_the_message(key: str) -> None:
    with pytest.raises(ValueError, match="^a key consists of visible ASCII characters$"):
        Client("http://127.0.0.1:9", key)


def test_a_key_is_sent_over_http_and_over_the_websocket(weights: Path, tmp_path: Path, backend: FakeBackend) -> None:
    key, words = make_key("alice")
    (tmp_path / "keys").write_text(words)
    settings = Settings(weights=weights, data_dir=tmp_path / "data", api_keys=str(tmp_path / "keys"))
    with threaded(create_app(settings, backend)) as locked, Client(locked.url, f"{key}\n") as alice:
        job = alice.submit(seed=1)
        assert job.wait().seed == 1
        with Client(locked.url) as nobody:
            assert nobody.ready()
            with pytest.raises(Denied):
                nobody.models()
            with pytest.raises(Denied):
                list(nobody.watch(job.id))


def test_an_answer_that_is_not_of_the_server_is_refused() -> None:
    class Elsewhere(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            """Another place, or a page."""
            self.send_response(301 if self.path.startswith("/jobs") else 200)
            self.send_header("Location", "http://127.0.0.1:1/")
            self.end_headers()
            self.wfile.write(b"<html>")

        def log_message(self, format: str, *arguments: object) -> None:
            """Nothing."""

    with HTTPServer(("127.0.0.1", 0), Elsewhere) as server, ThreadPoolExecutor(1) as pool:
        serving = pool.submit(server.serve_forever)
        with Client(f"http://127.0.0.1:{server.server_port}", timeout_s=5) as client:
            with pytest.raises(Refused, match="the answer was 200, and no JSON"):
                client.models()
            with pytest.raises(Refused, match="the answer was 301"):
                client.job("x")
        server.shutdown()
        serving.result()


def test_no_proxy_is_used_for_this_machine(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("http_proxy", "HTTP_PROXY", "ALL_PROXY", "all_proxy"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")
    monkeypatch.delenv("no_proxy", raising=False)
    with Client(f"http://127.0.0.1:{server.port}", timeout_s=10) as client:
        assert client.ready()
        assert client.generate(seed=1, steps=2).seed == 1
