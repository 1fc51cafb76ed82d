"""Host and Origin: pages of other sites cannot make a browser use the server."""

import itertools
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import TypeAlias

import pytest
from starlette.testclient import TestClient, WebSocketDenialResponse

from server.errors import BadHost, Forbidden, SettingsError
from server.settings import Settings
from server.web.app import create_app
from server.web.hosts import Rules
from tests.server.fakes import FakeBackend

Clients: TypeAlias = Callable[..., TestClient]
NOBODYS = ["localhost", "localhost:8000", "LOCALHOST", "127.0.0.1:8000", "[::1]:8000", "10.1.2.3", "ddpm", "ddpm:80"]
NOBODYS += ["my-pc.local", "ddpm.default.svc.cluster.local:8000", "app.localhost", "host.docker.internal", "a_b:1"]
STRANGERS = ["evil.example", "127.0.0.1.nip.io", "localhost.evil.example:8000", "a.b", "local.evil", "0x7f.1"]
ILL_FORMED = [
    "",
    " ",
    "a b",
    "a/b",
    "a:b",
    "a:99999",
    "a:1:2",
    "::1",
    "[::1",
    "a..b",
    ".",
    "user@localhost",
    "a,b",
    "é",
]


@pytest.fixture
def serve(weights: Path, tmp_path: Path) -> Iterator[Clients]:
    """Applications with the settings a test asks for."""
    count = itertools.count()
    with ExitStack() as stack:

        def make(**knobs: str) -> TestClient:
            app = create_app(
                Settings.read({}, {"weights": weights, "data_dir": tmp_path / str(next(count)), **knobs}), FakeBackend()
            )
            return stack.enter_context(TestClient(app, base_url="http://localhost:8000"))

        yield make


def rules(hosts: str = "", origins: str = "", keys_needed: bool = False) -> Rules:
    return Rules.read(hosts, origins, keys_needed)


def answers_for(host: str, found: Rules) -> bool:
    """Whether these rules let a Host header pass."""
    try:
        found.check_host([host.encode("latin-1")])
    except BadHost:
        return False
    return True


@pytest.mark.parametrize("host", NOBODYS)
def test_private_names_and_addresses_are_allowed_hosts(host: str) -> None:
    assert answers_for(host, rules())


@pytest.mark.parametrize("host", STRANGERS)
def test_public_names_are_allowed_hosts_only_if_a_key_is_needed(host: str) -> None:
    assert not answers_for(host, rules())
    assert answers_for(host, rules(keys_needed=True))
    assert answers_for(host, rules("*"))


@pytest.mark.parametrize("host", ILL_FORMED)
def test_ill_formed_hosts_are_never_allowed(host: str) -> None:
    assert not answers_for(host, rules("*"))


def test_there_must_be_exactly_one_host() -> None:
    for given in ([], [b"localhost", b"localhost"]):
        with pytest.raises(BadHost, match="one Host header"):
            rules("*").check_host(given)


def test_named_hosts_are_the_only_allowed_ones() -> None:
    named = rules("Pictures.example, *.lab.example")

    assert [
        host
        for host in ("pictures.example:80", "PICTURES.EXAMPLE", "a.lab.example", "a.b.lab.example")
        if not answers_for(host, named)
    ] == []
    assert [
        host
        for host in ("localhost", "127.0.0.1", "lab.example", "xpictures.example", "a.pictures.example")
        if answers_for(host, named)
    ] == []


@pytest.mark.parametrize("text", ["a b", "http://a.example", "a.example:80", "a*.example", "*.", ",a/b"])
def test_ill_formed_allowed_hosts_stop_the_start(text: str) -> None:
    with pytest.raises(SettingsError, match="DDPM_ALLOWED_HOSTS"):
        rules(hosts=text)


@pytest.mark.parametrize(
    "text", ["a.example", "https://a.example/", "//a", "https://", "null", "https://bücher.example"]
)
def test_ill_formed_allowed_origins_stop_the_start(text: str) -> None:
    with pytest.raises(SettingsError, match="DDPM_ALLOWED_ORIGINS"):
        rules(origins=text)


OURS = [None, "http://localhost:8000", "https://localhost:8000", "HTTP://LOCALHOST:8000"]
OTHERS = [
    "https://evil.example",
    "http://localhost",
    "http://localhost:8001",
    "null",
    "",
    "http://127.0.0.1:8000",
    "file://",
    "http://localhost:8000.evil.example",
    "http://evil.example/localhost:8000",
]


@pytest.mark.parametrize(("origin", "allowed"), [(o, True) for o in OURS] + [(o, False) for o in OTHERS])
def test_only_pages_of_the_server_itself_may_change_anything(serve: Clients, origin: str | None, allowed: bool) -> None:
    client, headers = serve(), {} if origin is None else {"origin": origin}

    assert client.post("/generate", headers=headers).status_code == (200 if allowed else 403)
    assert client.delete("/jobs/x", headers=headers).status_code == (404 if allowed else 403)
    assert client.options("/generate", headers=headers).status_code == (405 if allowed else 403)
    assert client.get("/models", headers=headers).status_code == 200
    assert opens(client, "/generate/stream", headers) == allowed


def opens(client: TestClient, path: str, headers: dict[str, str]) -> bool:
    """Whether a websocket is let in; if not, it must be told in a problem, with an HTTP status."""
    try:
        with client.websocket_connect(path, headers={"host": "localhost:8000", **headers}):
            return True
    except WebSocketDenialResponse as refusal:
        assert refusal.headers["content-type"] == "application/problem+json"
        assert refusal.json()["code"] in ("origin-not-allowed", "bad-host")
        assert refusal.json()["request_id"] == refusal.headers["x-request-id"]
        return False


def test_two_origin_headers_are_forbidden() -> None:
    with pytest.raises(Forbidden):
        rules().check_origin([b"http://localhost", b"http://localhost"], b"localhost")


def test_dns_rebinding_reaches_only_the_probes(serve: Clients) -> None:
    client, rebound = serve(), {"host": "evil.example:8000", "origin": "http://evil.example:8000"}

    for path in ("/", "/models", "/jobs", "/metrics", "/openapi.json", "/static/app.js", "/nothing"):
        answer = client.get(path, headers=rebound)
        assert (answer.status_code, answer.json()["code"]) == (400, "bad-host")
        assert "evil" not in answer.text
    assert client.post("/generate", headers=rebound).status_code == 400
    assert not opens(client, "/generate/stream", rebound)
    assert client.get("/healthz", headers=rebound).status_code == 200
    assert client.get("/readyz", headers=rebound).status_code == 200


def test_metrics_with_their_key_are_answered_for_every_host(serve: Clients) -> None:
    client = serve(allowed_hosts="pictures.example", metrics_key="a-key-for-metrics")
    found = client.get("/metrics", headers={"host": "10.0.0.7:8000", "authorization": "Bearer a-key-for-metrics"})

    assert found.status_code == 200
    assert client.get("/metrics", headers={"host": "10.0.0.7:8000"}).status_code == 401
    assert client.get("/models", headers={"host": "10.0.0.7:8000"}).status_code == 400


def test_an_allowed_origin_may_use_and_read_everything(serve: Clients) -> None:
    client, page = serve(allowed_origins="https://page.example"), {"origin": "https://page.example"}
    preflight = {
        "access-control-request-method": "POST",
        "access-control-request-headers": "authorization, prefer, x-request-id",
    }

    assert (
        client.options("/generate", headers=page | preflight).headers["access-control-allow-origin"] == page["origin"]
    )
    made = client.post("/generate", headers=page)
    assert (made.status_code, made.headers["access-control-allow-origin"]) == (200, page["origin"])
    assert {"X-Seed", "RateLimit", "RateLimit-Policy", "Preference-Applied"} <= set(
        made.headers["access-control-expose-headers"].split(", ")
    )
    assert "access-control-allow-credentials" not in made.headers
    assert opens(client, "/generate/stream", page)
    other = client.options("/generate", headers={"origin": "https://evil.example", **preflight})
    assert (other.status_code, other.json()["code"]) == (403, "origin-not-allowed")


def test_a_page_of_an_allowed_origin_can_read_that_its_key_is_wrong(serve: Clients, tmp_path: Path) -> None:
    (tmp_path / "keys").write_text(f"a:{'0' * 64}\n")
    client = serve(allowed_origins="https://page.example", api_keys=str(tmp_path / "keys"))
    answer = client.get("/jobs", headers={"origin": "https://page.example"})

    assert answer.status_code == 401
    assert answer.headers["access-control-allow-origin"] == "https://page.example"


def test_every_origin_may_be_allowed(serve: Clients) -> None:
    client = serve(allowed_origins="*")

    assert client.post("/generate", headers={"origin": "https://any.example"}).status_code == 200
    assert opens(client, "/generate/stream", {"origin": "null"})
