"""What browsers are told about pages of other sites: CORS by the origin alone, on every answer, and frames."""

import itertools
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any, TypeAlias

import pytest
from httpx2 import Response
from starlette.testclient import TestClient

from server.errors import SettingsError
from server.settings import Settings
from server.web.app import create_app
from server.web.auth import hash_of_key
from server.web.hosts import Rules, frame_policy
from tests.server.fakes import FakeBackend
from tests.server.web.lines import threaded
from tests.server.web.raw import ask

Clients: TypeAlias = Callable[..., TestClient]
PAGE, KEY = "https://page.example", "open sesame"
OF_OPENAI = "authorization, content-type, x-stainless-arch, x-stainless-lang, x-stainless-retry-count, user-agent"
READABLE = {"cache-control", "content-length", "content-type", "last-modified"}  # by every page (Fetch, 3.3.2)
NOT_ABOUT_US = {"vary", "access-control-allow-origin", "access-control-expose-headers"}


@pytest.fixture
def serve(weights: Path, tmp_path: Path) -> Iterator[Clients]:
    """Applications with the settings a test asks for, which pages of PAGE may use."""
    count = itertools.count()
    with ExitStack() as stack:

        def make(**knobs: Any) -> TestClient:
            data = tmp_path / str(next(count))
            settings = {"allowed_origins": PAGE, "weights": weights, "data_dir": data, "max_queued_steps": 100, **knobs}
            app = create_app(Settings.read({}, settings), FakeBackend())
            made = TestClient(app, base_url="http://localhost:8000", raise_server_exceptions=False)
            return stack.enter_context(made)

        yield make


@pytest.fixture
def keys(tmp_path: Path) -> str:
    """A file with KEY."""
    (tmp_path / "keys").write_text(f"alice:{hash_of_key(KEY.encode()).hex()}\n")
    return str(tmp_path / "keys")


def preflight(client: TestClient, path: str, origin: str = PAGE, **more: str) -> Response:
    """What a browser is told that asks whether a page may send a request."""
    asked = {"origin": origin, "access-control-request-method": "POST"}
    return client.options(path, headers=asked | {name.replace("_", "-"): value for name, value in more.items()})


@pytest.mark.parametrize("path", ["/generate", "/v1/images/generations", "/jobs/x", "/status", "/nothing"])
@pytest.mark.parametrize("wanted", [OF_OPENAI, "x-anything-at-all", "traceparent,x-a", ""])
def test_a_page_of_an_allowed_origin_may_send_every_header(serve: Clients, keys: str, path: str, wanted: str) -> None:
    answer = preflight(serve(api_keys=keys), path, access_control_request_headers=wanted)

    assert (answer.status_code, answer.content) == (204, b"")
    assert answer.headers["access-control-allow-origin"] == PAGE
    assert answer.headers["access-control-allow-methods"] == "GET, HEAD, POST, DELETE"
    allowed = answer.headers["access-control-allow-headers"]
    assert allowed.split(", ") == (wanted.replace(" ", "").split(",") if wanted else ["*"])
    assert int(answer.headers["access-control-max-age"]) > 0
    assert "access-control-allow-private-network" not in answer.headers
    varies = {word.strip() for line in answer.headers.get_list("vary") for word in line.split(",")}
    assert {"Origin", "Access-Control-Request-Headers", "Access-Control-Request-Private-Network"} <= varies


def test_a_page_of_an_allowed_origin_may_come_from_a_public_network(serve: Clients) -> None:
    answer = preflight(serve(), "/generate", access_control_request_private_network="true")

    assert answer.headers["access-control-allow-private-network"] == "true"


@pytest.mark.parametrize("origin", ["https://evil.example", "null", f"{PAGE}:8443", f"{PAGE}.evil.example"])
def test_a_page_of_another_origin_is_told_in_a_problem_that_it_may_not(serve: Clients, origin: str) -> None:
    client = serve()
    refused = preflight(client, "/generate", origin, access_control_request_private_network="true")
    watched = client.get("/jobs/x/events", headers={"origin": origin})

    for answer in (refused, watched):
        assert (answer.status_code, answer.json()["code"]) == (403, "origin-not-allowed")
        assert answer.headers["content-type"] == "application/problem+json"
        assert [name for name in answer.headers if name.startswith("access-control")] == []
        assert "evil" not in answer.text


def test_an_origin_without_a_setting_is_refused_in_a_problem(serve: Clients) -> None:
    answer = preflight(serve(allowed_origins=""), "/generate")

    assert (answer.status_code, answer.json()["code"]) == (403, "origin-not-allowed")


@pytest.mark.parametrize(
    "given", ["https://a.example:443", "HTTPS://A.example", "http://b.example:80, https://a.example"]
)
def test_an_origin_may_be_named_with_the_port_that_its_scheme_has(given: str) -> None:
    assert Rules.read("", given, False).allows([b"https://a.example"])


@pytest.mark.parametrize("given", ["https://*.example", "https://a.example;", "https://me@a.example", "'self'"])
def test_an_origin_that_no_browser_sends_stops_the_start(given: str) -> None:
    with pytest.raises(SettingsError, match="DDPM_ALLOWED_ORIGINS"):
        Rules.read("", given, False)


def broken(*_: object, **__: object) -> Any:
    """A bug."""
    raise RuntimeError("a bug")


def test_a_page_of_an_allowed_origin_can_read_every_refusal(
    serve: Clients, keys: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    client, of_page = serve(api_keys=keys), {"origin": PAGE, "authorization": f"Bearer {KEY}"}
    answers = [
        client.get("/jobs", headers={"origin": PAGE}),
        client.get("/jobs", headers={**of_page, "host": "a b"}),
        client.get("/nothing", headers=of_page),
        client.put("/generate", headers=of_page),
        client.post("/generate", headers={**of_page, "accept": "text/html"}),
        client.post("/generate", headers=of_page, json={"steps": 0}),
        client.post("/generate", headers=of_page, content=b"{"),
        client.post("/v1/images/generations", headers=of_page, json={"model": "other"}),
    ]
    monkeypatch.setattr(client.app.state.jobs.repository, "page", broken)  # type: ignore[attr-defined]
    answers.append(client.get("/jobs", headers=of_page))

    assert [answer.status_code for answer in answers] == [401, 400, 404, 405, 406, 422, 400, 404, 500]
    for answer in answers:
        assert answer.headers["content-type"] == "application/problem+json"
        assert answer.headers["access-control-allow-origin"] == PAGE
        assert answer.headers["x-request-id"] == answer.json()["request_id"]
        assert answer.headers.get_list("access-control-allow-origin") == [PAGE]


@pytest.mark.parametrize(
    ("line", "status"), [("X-Long: " + "x" * 9000, b"431"), ("Expect: 1\r\nBad header", b"400"), ("", b"414")]
)
def test_a_page_can_read_what_is_refused_before_it_is_a_request(
    weights: Path, tmp_path: Path, line: str, status: bytes
) -> None:
    settings = Settings(weights=str(weights), data_dir=tmp_path, allowed_origins=PAGE)
    path = "/" + "x" * 5000 * (status == b"414")
    with threaded(create_app(settings, FakeBackend())) as made:
        head = f"GET {path} HTTP/1.1\r\nHost: localhost\r\nOrigin: {PAGE}\r\n{line}\r\n\r\n"
        answer = ask(made.port, head.encode())

    assert answer.startswith(b"HTTP/1.1 " + status)
    assert b"vary: Origin" in answer
    assert (f"access-control-allow-origin: {PAGE}".encode() in answer) == (status != b"414")  # Origin comes behind it


def test_a_page_can_read_when_to_come_back(serve: Clients) -> None:
    client = serve(max_queued_steps=10)
    client.app.state.jobs.backend.gate.clear()  # type: ignore[attr-defined]
    first = client.post("/generate", json={"steps": 10}, headers={"prefer": "respond-async"})
    answer = client.post("/generate", json={"steps": 10}, headers={"origin": PAGE, "prefer": "respond-async"})

    assert (first.status_code, answer.status_code) == (202, 429)
    assert answer.headers["access-control-allow-origin"] == PAGE
    assert {"Retry-After", "Location"} <= set(answer.headers["access-control-expose-headers"].split(", "))


def test_every_header_of_an_answer_can_be_read_by_the_page(serve: Clients, keys: str) -> None:
    client, of_page = serve(api_keys=keys), {"origin": PAGE, "authorization": f"Bearer {KEY}"}
    later = client.post("/generate", json={"seed": 1}, headers={**of_page, "prefer": "respond-async"})
    answers = [
        later,
        client.get("/jobs", headers={"origin": PAGE}),
        client.put("/generate", headers=of_page),
        client.get(f"{later.headers['location']}/events", headers=of_page),
        client.post("/generate", json={"seed": 1}, headers=of_page),
        client.get(f"{later.headers['location']}/images/0", headers=of_page),
        client.post("/v1/images/generations", headers=of_page, json={"n": 0}),
    ]

    for answer in answers:
        exposed = {word.lower() for word in answer.headers["access-control-expose-headers"].split(", ")}
        hidden = answer.headers.keys() - exposed - READABLE - NOT_ABOUT_US
        assert hidden <= {"x-accel-buffering"}  # is for proxies


def test_no_cache_gives_a_page_the_answer_that_was_for_another(serve: Clients) -> None:
    """An answer to a request without Origin, such as that of an <img>, has no CORS headers; a cache must know why."""
    client = serve()
    job = client.post("/generate").headers["x-job-id"]
    image, page = client.get(f"/jobs/{job}/images/0"), client.get("/")
    animation = client.post("/generate", headers={"accept": "image/gif"})

    assert ["Origin" in answer.headers["vary"] for answer in (image, page, animation)] == [True, True, True]
    assert "Accept" in animation.headers["vary"]
    assert "vary" not in serve(allowed_origins="").get("/").headers


def test_every_origin_may_read_if_every_origin_is_allowed(serve: Clients) -> None:
    client = serve(allowed_origins="*")

    for headers in ({}, {"origin": "null"}, {"origin": "https://any.example"}):
        answer = client.get("/models", headers=headers)
        assert (answer.status_code, answer.headers["access-control-allow-origin"]) == (200, "*")
    answer = preflight(client, "/generate", "https://any.example", access_control_request_headers=OF_OPENAI)
    assert (answer.status_code, answer.headers["access-control-allow-origin"]) == (204, "*")
    assert answer.headers["access-control-allow-headers"] == OF_OPENAI  # * would not stand for authorization


POLICIES = [
    ("none", "'none'", "DENY"),
    ("", "'none'", "DENY"),
    ("self", "'self'", "SAMEORIGIN"),
    ("*", "*", None),
    ("https://a.example", "https://a.example", None),
    ("self, https://a.example, http://B.example:8080", "'self' https://a.example http://b.example:8080", None),
]


@pytest.mark.parametrize(("setting", "ancestors", "older"), POLICIES)
@pytest.mark.parametrize("path", ["/", "/docs"])
def test_pages_may_be_shown_in_frames_of_the_origins_of_the_setting(
    serve: Clients, path: str, setting: str, ancestors: str, older: str | None
) -> None:
    answer = serve(frame_ancestors=setting).get(path)
    current = serve(frame_ancestors=setting).get(path, headers={"if-none-match": answer.headers["etag"]})

    assert (answer.status_code, current.status_code) == (200, 304)
    for each in (answer, current):
        policy = each.headers["content-security-policy"].split("; ")
        assert [word for word in policy if word.startswith("frame-ancestors")] == [f"frame-ancestors {ancestors}"]
        assert "default-src 'self'" in policy
        assert each.headers.get("x-frame-options") == older


def test_nobody_may_show_a_page_in_a_frame_without_a_setting(serve: Clients) -> None:
    assert serve().get("/").headers["x-frame-options"] == "DENY"


@pytest.mark.parametrize(
    "text", ["a.example", "https://a.example/", "none, self", "'self'", "https://a.example; script-src *", "everybody"]
)
def test_an_ill_formed_setting_for_frames_stops_the_start(text: str) -> None:
    with pytest.raises(SettingsError, match="DDPM_FRAME_ANCESTORS"):
        frame_policy(text)
