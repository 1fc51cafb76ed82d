"""`GET /jobs/{id}/events`: the stream of a job for an EventSource, which sends GET, repeats it, and stops at 204."""

import base64
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from ddpm_client.wire import unpack
from starlette.testclient import TestClient

from server.errors import NotReady
from server.settings import Settings
from server.web import generate
from server.web.app import create_app
from tests.server.fakes import FakeBackend
from tests.server.web.lines import Threaded, threaded

ASKED = {"seed": 3, "steps": 4, "n": 2, "frames": {"every": 2, "kind": "both"}}
OF_THE_MOMENT = ("queued", "progress")


@pytest.fixture
def backend() -> FakeBackend:
    """Makes flat grey pictures while its gate is open."""
    return FakeBackend()


@pytest.fixture
def grey(weights: Path, tmp_path: Path, backend: FakeBackend) -> Iterator[Threaded]:
    """A server of flat grey pictures, over real connections."""
    settings = Settings(weights=weights, data_dir=tmp_path, result_cache=False)
    with threaded(create_app(settings, backend)) as made:
        yield made


def parse(text: str) -> list[dict[str, Any]]:
    """Server-sent events: name, id and data of each. Comments and `retry` are left out."""
    events = []
    for block in text.split("\n\n"):
        fields = dict(line.split(": ", 1) for line in block.splitlines() if not line.startswith((":", "retry")))
        if fields:
            assert fields.keys() == {"event", "id", "data"}
            events.append({"event": fields["event"], "id": int(fields["id"]), "data": json.loads(fields["data"])})
    return events


def kept(events: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The numbered ones."""
    return [event for event in events if event["event"] not in OF_THE_MOMENT]


def job_of(client: TestClient | httpx.Client, **asked: Any) -> str:
    """The path of a new job."""
    answer = client.post("/generate", json={**ASKED, **asked}, headers={"prefer": "respond-async"})
    return str(answer.headers["location"])


def test_events_are_the_messages_of_the_websocket(client: TestClient) -> None:
    job = job_of(client)
    answer = client.get(f"{job}/events", headers={"accept": "text/event-stream"})
    heard = []
    with client.websocket_connect(f"{job}/stream") as socket:
        while (message := socket.receive())["type"] != "websocket.close":
            if message.get("text") is not None:
                data = json.loads(message["text"])
                heard.append({"event": data["type"], "id": data["seq"], "data": data})
            else:
                header, png = unpack(message["bytes"])
                data = {**header, "b64_png": base64.b64encode(png).decode()}
                heard.append(
                    {"event": "image" if header["kind"] == "image" else "frame", "id": header["seq"], "data": data}
                )

    assert (answer.status_code, answer.headers["content-type"]) == (200, "text/event-stream; charset=utf-8")
    assert (answer.headers["cache-control"], answer.headers["x-accel-buffering"]) == ("no-store", "no")
    assert answer.text.startswith("retry: 2000\n\n")
    assert kept(parse(answer.text)) == kept(heard)
    assert [event["id"] for event in kept(heard)] == list(range(1, 1 + 2 * (5 + 1) + 2))  # n x (points x kinds + image)


@pytest.mark.parametrize(
    ("after", "last", "begins"), [("", None, 1), ("?after=5", None, 6), ("?after=5", "9", 10), ("", "0", 1)]
)
def test_a_stream_goes_on_behind_the_last_message(
    client: TestClient, after: str, last: str | None, begins: int
) -> None:
    """An EventSource repeats its URL, so the header knows better."""
    answer = client.get(f"{job_of(client)}/events{after}", headers={"last-event-id": last} if last else {})
    events = kept(parse(answer.text))

    assert (events[0]["id"], events[-1]["event"]) == (begins, "succeeded")


def test_a_stream_that_was_read_to_its_end_is_answered_with_204(client: TestClient) -> None:
    job = job_of(client)
    last = parse(client.get(f"{job}/events").text)[-1]["id"]
    again = [
        client.get(f"{job}/events", headers={"last-event-id": str(last)}),
        client.get(f"{job}/events?after={last}"),
    ]

    assert [(answer.status_code, answer.content) for answer in again] == [(204, b"")] * 2
    assert parse(client.get(f"{job}/events?after={last - 1}").text)[0]["event"] == "succeeded"


def test_a_client_that_is_ahead_of_the_stream_is_told_to_forget_what_it_has_and_gets_everything(
    client: TestClient,
) -> None:
    """As after a store was restored from an older copy."""
    job = job_of(client)
    everything = kept(parse(client.get(f"{job}/events").text))
    ahead = everything[-1]["id"] + 7

    events = kept(parse(client.get(f"{job}/events?after={ahead}").text))
    assert (events[0]["event"], events[1:]) == ("resync", everything)
    with client.websocket_connect(f"{job}/stream?after={ahead}") as socket:
        assert (socket.receive_json()["type"], socket.receive_json()["type"]) == ("resync", everything[0]["event"])


@pytest.mark.parametrize("given", ["-1", "x", "1.0", "1e3", "9999999999", "٣"])
def test_a_place_that_is_no_number_is_refused(client: TestClient, given: str) -> None:
    job = job_of(client)
    answers = {
        "Last-Event-ID": client.get(f"{job}/events", headers={b"last-event-id": given.encode()}),
        "after": client.get(f"{job}/events", params={"after": given}),
        "after ": client.get(f"{job}/events", params={"after": given}, headers={"last-event-id": "0"}),
    }

    for name, answer in answers.items():
        assert answer.status_code == 422
        assert answer.json()["detail"].startswith(f"{name.strip()} must be an integer in 0..999999999")


def test_a_stream_is_for_those_who_accept_one(client: TestClient) -> None:
    job = job_of(client)

    assert client.get(f"{job}/events", headers={"accept": "application/json"}).status_code == 406
    assert client.get("/jobs/nothing/events").status_code == 404
    assert client.head(f"{job}/events").status_code == 200


def test_a_watcher_who_leaves_cancels_nothing(grey: Threaded, backend: FakeBackend) -> None:
    backend.gate.clear()
    with httpx.Client(base_url=grey.url, timeout=30) as client:
        job = job_of(client)
        with client.stream("GET", f"{job}/events") as answer:
            assert next(answer.iter_lines()) == "retry: 2000"
        assert client.head(f"{job}/events").status_code == 200  # does not wait for the end
        grey.do(backend.gate.set)
        text = client.get(f"{job}/events").text

    assert parse(text)[-1]["event"] == "succeeded"
    assert backend.given_up == []


@pytest.mark.parametrize("path", ["/jobs/{id}/events", "/generate", "/v1/images/generations"])
def test_a_comment_is_sent_while_nothing_happens(
    grey: Threaded, backend: FakeBackend, monkeypatch: pytest.MonkeyPatch, path: str
) -> None:
    monkeypatch.setattr(generate, "BEAT_S", 0.01)
    backend.gate.clear()
    with httpx.Client(base_url=grey.url, timeout=30, headers={"accept": "text/event-stream"}) as client:
        job = job_of(client)
        method = "GET" if "{id}" in path else "POST"
        body = {"stream": True} if path.startswith("/v1") else None
        with client.stream(method, path.format(id=job.removeprefix("/jobs/")), json=body) as answer:
            lines = answer.iter_lines()
            assert [next(line for line in lines if line.startswith(":")) for _ in range(3)] == [":"] * 3
    grey.do(backend.gate.set)


def test_a_server_that_goes_away_leaves_the_stream_unfinished(grey: Threaded, backend: FakeBackend) -> None:
    """So an EventSource comes back, to the next server."""
    backend.gate.clear()

    def go() -> None:
        backend.failure = NotReady("the server is shutting down")
        backend.gate.set()

    with httpx.Client(base_url=grey.url, timeout=30) as client:
        job = job_of(client)
        with client.stream("GET", f"{job}/events") as answer:
            grey.do(go)
            answer.read()
        again = client.get(f"{job}/events", headers={"last-event-id": "1"})

    assert parse(answer.text)[-1]["event"] == "error"
    assert parse(answer.text)[-1]["data"]["problem"]["code"] == "not-ready"
    assert again.status_code == 200
