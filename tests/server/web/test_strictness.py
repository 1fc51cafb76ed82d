"""What is not understood and would change the answer is refused, wherever in a request it is; nothing is dropped."""

import json
import re
from collections.abc import Iterator
from pathlib import Path

import pytest
from starlette.testclient import TestClient, WebSocketDenialResponse

from server.settings import Settings
from server.web.app import create_app
from tests.server.fakes import FakeBackend

ROUTES = [
    *("GET /", "GET /docs", "GET /openapi.json", "GET /healthz", "GET /readyz", "GET /metrics"),
    *("GET /status", "GET /jobs/JOB/events", "GET /webhooks/secret"),
    *("GET /models", "GET /models/tiny", "GET /jobs", "GET /jobs/JOB", "DELETE /jobs/JOB", "GET /jobs/JOB/images/0"),
    *("GET /jobs/JOB/trajectory", "GET /jobs/JOB/stream", "GET /generate/stream", "POST /generate"),
    *("POST /v1/images/generations", "GET /v1/models", "GET /v1/models/tiny", "HEAD /models"),
]
HEADER = tuple[str, str]


@pytest.fixture
def job(client: TestClient) -> str:
    """The id of a job that has ended."""
    return str(client.post("/generate", json={"steps": 2, "frames": {"count": 2}}).headers["x-job-id"])


@pytest.fixture
def caching(weights: Path, tmp_path: Path) -> Iterator[TestClient]:
    """A server that answers with cached pictures."""
    with TestClient(create_app(Settings(weights=weights, data_dir=tmp_path), FakeBackend())) as made:
        yield made


def specs(client: TestClient) -> int:
    """How many jobs have been run."""
    backend = client.app.state.jobs.backend  # type: ignore[attr-defined]
    assert isinstance(backend, FakeBackend)
    return len(backend.specs)


def test_every_route_is_tried(client: TestClient) -> None:
    paths = client.get("/openapi.json").json()["paths"]
    known = {f"{method.upper()} {path}" for path, methods in paths.items() for method in methods}
    tried = {re.sub("JOB", "{id}", route).replace("tiny", "{name}").replace("/0", "/{index}") for route in ROUTES}

    assert known - tried == set()


@pytest.mark.parametrize("query", ["seed=42&steps=5&model=digits", "x", "=1", "limit%5B%5D=1", "<b>=1&<b>=1"])
def test_an_unknown_query_parameter_is_refused_on_every_route(client: TestClient, job: str, query: str) -> None:
    before = specs(client)
    names = [name for name in ("seed", "steps", "model") if name in query]
    for method, path in (route.replace("JOB", job).split() for route in ROUTES):
        answer = client.request(method, f"{path}?{query}")

        assert answer.status_code == (400 if path.startswith("/v1/") else 422), path
        if method != "HEAD":
            assert answer.json()["code"] == "invalid-request"
            assert [name for name in names if f'unknown query parameter \\"{name}\\"; ' not in answer.text] == []
            assert ("fields go into the body" in answer.json()["detail"]) == (method == "POST")
            assert "<b>" not in answer.text
    assert specs(client) == before


@pytest.mark.parametrize("query", ["limit=1&limit=2", "status=failed&status=failed", "after=x&after=y&limit=1"])
def test_a_query_parameter_that_comes_twice_is_refused(client: TestClient, query: str) -> None:
    answer = client.get(f"/jobs?{query}")

    name = query.partition("=")[0]
    assert (answer.status_code, answer.json()["errors"]) == (
        422,
        [{"pointer": f"/{name}", "message": f"{name} must be there once"}],
    )


@pytest.mark.parametrize(
    ("path", "got"),
    [
        ("/generate/stream?seed=1", 'unknown query parameter "seed"; there are none'),
        ("/jobs/JOB/stream?seq=1", 'unknown query parameter "seq"; there are after'),
        ("/jobs/JOB/stream?after=1&after=2", "after must be there once"),
    ],
)
def test_a_websocket_with_an_unknown_parameter_is_refused_before_the_handshake(
    client: TestClient, job: str, path: str, got: str
) -> None:
    with pytest.raises(WebSocketDenialResponse) as refusal, client.websocket_connect(path.replace("JOB", job)):
        pass

    answer = refusal.value
    assert (answer.status_code, answer.headers["content-type"]) == (422, "application/problem+json")
    assert got in json.loads(answer.content)["detail"]


def test_a_body_that_a_route_does_not_take_is_refused(client: TestClient, job: str) -> None:
    for method, path in (route.replace("JOB", job).split() for route in ROUTES):
        answer = client.request(method, path, content=b'{"status": "failed"}')
        assert method == "POST" or answer.status_code == 400, path
    assert client.request("GET", "/jobs", content=iter([b"{}"])).json()["detail"] == "this route takes no body"
    assert client.get("/jobs", headers={"content-length": "0"}).status_code == 200


@pytest.mark.parametrize(
    "index", ["00", "+0", "-0", "0_0", "%200", "0%20", "0%0A", "0.0", "0x0", "%D9%A0", "%EF%BC%90"]
)
def test_a_number_in_a_path_has_one_form(client: TestClient, job: str, index: str) -> None:
    answer = client.get(f"/jobs/{job}/images/{index}")

    assert (answer.status_code, answer.json()["code"]) == (404, "not-found")


@pytest.mark.parametrize(
    "number", ["01", "+1", "-1", "1_0", "%201", "1%20", "1%0A", "1.0", "1e0", "%D9%A1", "%C2%B2", ""]
)
def test_a_number_in_a_query_has_one_form(client: TestClient, job: str, number: str) -> None:
    for path in ("/jobs?limit=", f"/jobs/{job}/events?after="):
        answer = client.get(f"{path}{number}")
        assert (answer.status_code, answer.json()["code"]) == (422, "invalid-request"), path
    with client.websocket_connect(f"/jobs/{job}/stream?after={number}") as socket:
        assert socket.receive_json()["problem"]["code"] == "invalid-request"


@pytest.mark.parametrize("number", ["01", "+1", "-1", "1_0", "1.0", "1e0", "1, 1", ""])
def test_a_number_in_a_header_has_one_form(client: TestClient, job: str, number: str) -> None:
    for method, path in (("GET", f"/jobs/{job}/events"), ("POST", "/generate")):
        answer = client.request(method, path, headers={"last-event-id": number, "accept": "text/event-stream"})

        assert (answer.status_code, answer.json()["code"]) == (422, "invalid-request")
        assert [each["pointer"] for each in answer.json()["errors"]] == [""]  # no pointer leads to a header


def test_a_path_has_one_form(client: TestClient, job: str) -> None:
    for method, path in (route.replace("JOB", job).split() for route in ROUTES):
        others = {f"{path}{more}" for more in ("%0A", "%0a", "%00")} | {path.upper()} - {path}
        if path.count("/") > 1:
            others |= {"%2f".join(path.rsplit("/", 1)), "%2F".join(path.rsplit("/", 1))}
        for other in others:
            assert client.request(method, other).status_code == 404, other


def test_a_page_of_another_origin_does_not_watch_by_another_form_of_the_path(client: TestClient, job: str) -> None:
    for path, status in ((f"/jobs/{job}/events", 403), (f"/jobs/{job}/events%0A", 404)):
        assert client.get(path, headers={"origin": "https://evil.example"}).status_code == status


@pytest.mark.parametrize("path", ["/", "/docs", "/static/app.js"])
def test_pages_are_sent_whole_whatever_range_is_asked_for(client: TestClient, path: str) -> None:
    whole = client.get(path).content
    for given in ("bytes=0-9", "bytes=99999999-", "bytes=5-2", "lines=1-2", "bytes=0-1,4-5"):
        answer = client.get(path, headers={"range": given})
        assert (answer.status_code, answer.content) == (200, whole), given


def test_refusals_are_counted(client: TestClient) -> None:
    before = dict(client.app.state.jobs.admission.rejected)  # type: ignore[attr-defined]
    client.get("/jobs?x=1")
    client.post("/generate", headers={"accept": "text/html"})

    after = client.app.state.jobs.admission.rejected  # type: ignore[attr-defined]
    assert {code: after[code] - before.get(code, 0) for code in ("invalid-request", "not-acceptable")} == {
        "invalid-request": 1,
        "not-acceptable": 1,
    }


def test_static_files_and_missing_paths_may_have_any_query(client: TestClient) -> None:
    assert client.get("/static/app.js?v=3").status_code == 200
    assert client.get("/nothing?v=3").status_code == 404


REFUSED: list[tuple[HEADER, int, str]] = [
    (("content-type", ""), 415, "unsupported-media-type"),
    (("cache-control", "only-if-cached"), 400, "malformed"),
    (("idempotency-key", ""), 400, "malformed"),
    (("idempotency-key", "k" * 256), 400, "malformed"),
    (("idempotency-key", "a b"), 400, "malformed"),
    (("last-event-id", "x"), 422, "invalid-request"),
    (("last-event-id", "3"), 400, "malformed"),
    (("expect", "something"), 417, "expectation-failed"),
    (("content-type", "application/json; charset=latin-1"), 415, "unsupported-media-type"),
    (("content-type", 'application/json;charset="UTF-16"'), 415, "unsupported-media-type"),
    (("content-encoding", "gzip"), 415, "unsupported-media-type"),
    (("transfer-encoding", "gzip, chunked"), 415, "unsupported-media-type"),
    (("accept", "application/json;version=2"), 406, "not-acceptable"),
    (("accept", "image/png;q=0, text/html"), 406, "not-acceptable"),
    (("accept", "application/json;q=2"), 406, "not-acceptable"),
]


@pytest.mark.parametrize(("header", "status", "code"), REFUSED)
def test_a_header_that_is_not_understood_and_would_change_the_answer_is_refused(
    client: TestClient, header: HEADER, status: int, code: str
) -> None:
    answer = client.post("/generate", content=b'{"seed": 1}', headers=[header])

    assert (answer.status_code, answer.json()["code"]) == (status, code)
    assert specs(client) == 0


def test_two_content_types_or_encodings_are_refused(client: TestClient) -> None:
    for lines in ([("content-type", "application/json")] * 2, [("content-encoding", "identity")] * 2):
        assert client.post("/generate", content=b"{}", headers=lines).status_code == 415


@pytest.mark.parametrize(
    ("header", "status", "media"),
    [
        (("prefer", "handling=strict, wait=10"), 200, "image/png"),
        (("prefer", "respond-async=no"), 200, "image/png"),
        (("prefer", 'respond-async=""'), 202, "application/json"),
        (("prefer", "respond-async, respond-async=no"), 202, "application/json"),
        (("prefer", "respond-async=no, respond-async"), 200, "image/png"),
        (("prefer", 'x="a, respond-async, b"'), 200, "image/png"),
        (("prefer", 'x="a\\", respond-async, b"'), 200, "image/png"),
        (("prefer", 'x="a, b", respond-async'), 202, "application/json"),
        (("accept", 'image/*;x="a, application/json, b", image/gif;q=0.1'), 200, "image/gif"),
        (("accept-encoding", "gzip, br;q=0.5"), 200, "image/png"),
        (("accept-language", "tlh"), 200, "image/png"),
        (("accept", "application/json; charset=UTF-8"), 200, "application/json"),
        (("accept", "application/json;version=2, image/gif;q=0.1"), 200, "image/gif"),
        (("content-type", "application/json; charset=UTF-8"), 200, "image/png"),
        (("content-type", "application/vnd.api+json"), 200, "image/png"),
        (("range", "bytes=0-9"), 200, "image/png"),
        (("expect", "100-Continue"), 200, "image/png"),
        (("x-unknown", "1"), 200, "image/png"),
    ],
)
def test_what_http_lets_a_server_ignore_is_ignored(client: TestClient, header: HEADER, status: int, media: str) -> None:
    answer = client.post("/generate", content=b'{"seed": 1, "steps": 2}', headers=[header])

    assert (answer.status_code, answer.headers["content-type"]) == (status, media)


def test_a_form_that_no_answer_has_is_refused_but_for_pages_server_state_and_openai(
    client: TestClient, job: str
) -> None:
    answered = {"/", "/docs", "/openapi.json", "/healthz", "/readyz", "/metrics", "/status"}
    for method, path in (route.replace("JOB", job).split() for route in ROUTES):
        if path not in answered and not path.startswith("/v1/") and not path.endswith("/stream"):
            assert client.request(method, path, headers={"accept": "text/x-none"}).status_code == 406, path


def test_a_picture_is_not_sent_as_another_type_than_accept_allows(client: TestClient, job: str) -> None:
    path = f"/jobs/{job}/images/0"

    assert client.get(path, headers={"accept": "image/webp"}).status_code == 406
    assert client.get(path, headers={"accept": "image/avif,image/webp,*/*;q=0.8"}).status_code == 200


def test_events_go_on_behind_the_last_one_that_was_heard(client: TestClient) -> None:
    def numbers(*headers: HEADER) -> list[int]:
        sent = [("accept", "text/event-stream"), ("idempotency-key", "k"), *headers]
        answer = client.post("/generate", json={"seed": 1, "steps": 4, "frames": {"count": 3}}, headers=sent)
        return sorted({int(seq) for seq in re.findall("^id: (.*)$", answer.text, re.MULTILINE)} - {0})

    assert numbers() == [1, 2, 3, 4, 5, 6]
    assert numbers(("last-event-id", "4")) == [5, 6]


STREAM = ("accept", "text/event-stream")


@pytest.mark.parametrize(
    ("given", "status"),
    [
        ([("accept", "image/png")], 400),
        ([STREAM, ("prefer", "respond-async")], 400),
        ([STREAM, ("last-event-id", "4")], 422),
    ],
)
def test_a_last_event_id_that_no_stream_can_continue_from_is_refused(
    client: TestClient, given: list[HEADER], status: int
) -> None:
    sent = [("idempotency-key", "k"), ("last-event-id", "3"), *given]
    answer = client.post("/generate", json={"seed": 1, "steps": 4}, headers=sent)

    assert (answer.status_code, specs(client)) == (status, 0)


@pytest.mark.parametrize("line", ["no-cache", "no-store", "max-age=0", "max-age=60, no-transform"])
def test_cached_pictures_are_made_again_for_who_accepts_no_cached_ones(caching: TestClient, line: str) -> None:
    body = {"seed": 1, "steps": 2}
    caching.post("/generate", json=body)

    assert caching.post("/generate", json=body, headers={"cache-control": "max-stale=5, x=1"}).headers["x-cache"]
    assert "x-cache" not in caching.post("/generate", json=body, headers={"cache-control": line}).headers
