"""Watching a job: which messages are sent, in which order, and what happens to slow subscribers."""

import asyncio
import base64
import io
import json
import re
from contextlib import aclosing
from typing import Any

import numpy as np
import pytest
from ddpm_client.wire import pack, unpack
from PIL import Image
from starlette.testclient import TestClient
from starlette.websockets import WebSocketDisconnect

from server.errors import EngineFailed
from server.jobs import repository
from server.jobs.stream import Message, PictureMessage, Stream, Subscriber
from server.web import watch as web_watch
from tests import virtual_clock
from tests.server.conftest import Server
from tests.server.fakes import FakeBackend
from tests.waiting import until


def test_a_picture_message_has_the_format_of_comfyui() -> None:
    message = pack({"seq": 3}, b"png")

    assert message == b"\x00\x00\x00\x04\x00\x00\x00\x0a" + b'{"seq": 3}' + b"png"
    assert unpack(message) == ({"seq": 3}, b"png")


@pytest.mark.parametrize("message", [b"", b"\x00\x00\x00\x04", pack({}, b"")[:9], b"\x00\x00\x00\x05" + b"\x00" * 4])
def test_a_malformed_picture_message_is_refused(message: bytes) -> None:
    with pytest.raises(ValueError, match="picture"):
        unpack(message)


def watch(client: TestClient, url: str, say: dict[str, Any] | None = None) -> tuple[list[dict[str, Any]], int]:
    """Everything that is sent until the socket is closed, pictures as their headers with `png`; the close code."""
    heard: list[dict[str, Any]] = []
    with client.websocket_connect(url) as socket:
        if say is not None:
            socket.send_json(say)
        while True:
            message = socket.receive()
            if message["type"] == "websocket.close":
                return heard, message["code"]
            if message.get("text") is not None:
                heard.append(json.loads(message["text"]))
            else:
                header, png = unpack(message["bytes"])
                heard.append({**header, "png": png})


def kept(heard: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The messages that are numbered."""
    passing = ("queued", "progress", "dropped", "restarting", "resync")
    return [message for message in heard if message.get("type") not in passing]


def test_a_job_sends_its_start_its_frames_its_pictures_and_its_end(client: TestClient) -> None:
    heard, code = watch(client, "/generate/stream", {"seed": 5, "steps": 4, "n": 2, "frames": {"count": 3}})

    numbered = kept(heard)
    assert [message["seq"] for message in numbered] == list(range(1, 11))
    assert [message.get("type", message.get("kind")) for message in numbered] == [
        "started",
        *["x_t"] * 6,
        *["image"] * 2,
        "succeeded",
    ]
    assert [(m["index"], m["step"], m["t"]) for m in numbered[1:7:2]] == [(0, 0, 22), (0, 2, 8), (0, 4, 0)]
    assert numbered[-1]["document"]["status"] == "succeeded"
    assert code == 1000


def test_both_kinds_are_sent_from_the_first_update_on(client: TestClient) -> None:
    heard, _ = watch(client, "/generate/stream", {"steps": 3, "frames": {"every": 2, "kind": "both"}})

    frames = [(m["kind"], m["step"], m["t"]) for m in kept(heard) if m.get("kind") in ("x_t", "x0")]
    assert frames == [("x_t", 0, 21), ("x_t", 2, 1), ("x0", 2, 11), ("x_t", 3, 0), ("x0", 3, 1)]


def test_every_subscriber_gets_the_same_messages_from_any_number_on(client: TestClient) -> None:
    job = client.post("/generate", json={"steps": 9, "n": 3}, headers={"prefer": "respond-async"}).json()
    whole, _ = watch(client, f"/jobs/{job['id']}/stream")

    for after in range(len(kept(whole)) + 1):
        part, code = watch(client, f"/jobs/{job['id']}/stream?after={after}")
        assert kept(part) == kept(whole)[after:]
        assert code == 1000


def test_an_asynchronous_job_is_answered_at_once_and_goes_on(client: TestClient) -> None:
    backend = backend_of(client)
    backend.gate.clear()
    answer = client.post("/generate", json={"seed": 1}, headers={"prefer": "respond-async"})
    job = answer.json()

    assert (answer.status_code, answer.headers["location"]) == (202, f"/jobs/{job['id']}")
    assert (job["status"], job["request"]["frames"]) == ("queued", {"count": 30, "kind": "x_t"})
    assert client.get("/jobs?status=queued").json()["jobs"][0]["id"] == job["id"]

    client.portal.call(backend.gate.set)  # type: ignore[union-attr]
    watch(client, f"/jobs/{job['id']}/stream")
    assert client.get(f"/jobs/{job['id']}").json()["status"] == "succeeded"


def test_a_job_ends_once_however_often_it_is_cancelled(client: TestClient) -> None:
    backend_of(client).gate.clear()
    job = client.post("/generate", headers={"prefer": "respond-async"}).json()

    answers = [client.delete(f"/jobs/{job['id']}") for _ in range(3)]

    assert [answer.status_code for answer in answers] == [200] * 3
    assert {answer.json()["status"] for answer in answers} == {"cancelled"}
    heard, code = watch(client, f"/jobs/{job['id']}/stream")
    assert [message["type"] for message in kept(heard)] == ["cancelled"]
    assert (code, queue_taken(client)) == (1000, 0)


def test_a_subscriber_may_cancel_and_a_disconnect_does_not(client: TestClient) -> None:
    backend_of(client).gate.clear()
    job = client.post("/generate", headers={"prefer": "respond-async"}).json()
    with client.websocket_connect(f"/jobs/{job['id']}/stream") as socket:
        socket.receive_json()
    assert client.get(f"/jobs/{job['id']}").json()["status"] == "queued"

    heard, _ = watch(client, f"/jobs/{job['id']}/stream", {"type": "cancel"})
    assert heard[-1]["type"] == "cancelled"


def test_disconnecting_from_a_new_job_cancels_it(client: TestClient) -> None:
    backend = backend_of(client)
    backend.gate.clear()
    with client.websocket_connect("/generate/stream") as socket:
        socket.send_json({"seed": 1})
        socket.receive_json()
    until(lambda: backend.given_up)

    assert backend.given_up == backend.specs
    assert queue_taken(client) == 0


@pytest.mark.parametrize(
    ("say", "code", "said"),
    [
        ({"steps": 0}, 4400, "steps must lie in 1..30, got 0"),
        ({"frames": {"count": 1}}, 4400, "frames.count must lie in 2.."),
        ({"steps": 30, "n": 8}, 4400, "at most 200"),
    ],
)
def test_a_bad_request_is_explained_before_the_socket_closes(
    client: TestClient, say: dict[str, Any], code: int, said: str
) -> None:
    (error,), closed = watch(client, "/generate/stream", say)

    assert (error["type"], error["job"], error["seq"], closed) == ("error", None, 0, code)
    assert said in error["problem"]["errors"][0]["message"]
    assert re.fullmatch("[0-9a-f]{16}", error["problem"]["request_id"])


@pytest.mark.parametrize("after", ["x", "-1", "", "1.0", str(10**15)])
def test_an_impossible_message_number_is_explained_too(client: TestClient, after: str) -> None:
    job = client.post("/generate", headers={"prefer": "respond-async"}).json()["id"]
    (error,), closed = watch(client, f"/jobs/{job}/stream?after={after}")

    assert (error["type"], error["job"], error["seq"], closed) == ("error", None, 0, 4400)
    assert error["problem"]["detail"].startswith("after must be an integer in 0..999999999")


def test_unknown_jobs_and_unknown_messages_close_the_socket(client: TestClient) -> None:
    backend_of(client).gate.clear()
    job = client.post("/generate", headers={"prefer": "respond-async"}).json()["id"]

    assert watch(client, "/jobs/nothing/stream")[1] == 4404
    assert watch(client, f"/jobs/{job}/stream", {"type": "dance"})[1] == 1008
    with pytest.raises(WebSocketDisconnect) as closed, client.websocket_connect("/generate/stream") as socket:
        socket.send_bytes(b"{}")
        socket.receive_json()
    assert closed.value.code == 1003


def test_subscribers_learn_that_the_engine_has_failed_for_good(client: TestClient) -> None:
    backend_of(client).failure = EngineFailed("the engine died 6 times", 70)

    heard, code = watch(client, "/generate/stream", {"steps": 2})

    assert "failed" not in [message.get("type") for message in heard]  # it goes on when the server comes back
    assert code == 1011


def test_server_sent_events_end_with_the_reason_if_the_server_cannot_go_on(client: TestClient) -> None:
    backend_of(client).failure = EngineFailed("the engine died 6 times", 70)

    answer = client.post("/generate", json={"steps": 2}, headers={"accept": "text/event-stream"})

    last = dict(line.split(": ", 1) for line in answer.text.strip().split("\n\n")[-1].split("\n"))
    error = json.loads(last["data"])
    assert (last["event"], error["type"], error["job"]) == ("error", "error", answer.headers["x-job-id"])
    assert last["id"] == str(error["seq"]) == "4"  # the number of the last message that is kept
    assert (error["problem"]["code"], error["problem"]["status"]) == ("engine-down", 503)
    assert error["problem"]["request_id"] == answer.headers["x-request-id"]


def test_a_transient_message_is_not_replayed(client: TestClient) -> None:
    backend = backend_of(client)
    backend.gate.clear()
    job = client.post("/generate", json={"steps": 2}, headers={"prefer": "respond-async"}).json()
    with client.websocket_connect(f"/jobs/{job['id']}/stream") as socket:
        assert socket.receive_json()["type"] == "queued"
        client.portal.call(backend.gate.set)  # type: ignore[union-attr]
        while (message := socket.receive())["type"] != "websocket.close":
            assert json.loads(message.get("text") or "{}").get("type") != "queued"

    assert [m.get("type", m.get("kind")) for m in watch(client, f"/jobs/{job['id']}/stream")[0]] == [
        "started",
        *["x_t"] * 3,
        "image",
        "succeeded",
    ]


def test_the_number_of_frames_is_limited(client: TestClient) -> None:
    client.app.state.jobs._settings = client.app.state.settings.model_copy(update={"max_frames": 20})  # type: ignore[attr-defined]

    refused = client.post("/generate", json={"n": 3, "steps": 10, "frames": {"every": 1}})
    allowed = client.post("/generate", json={"n": 2, "steps": 9, "frames": {"every": 1}})

    assert (refused.status_code, refused.json()["errors"][0]["pointer"]) == (422, "/frames")
    assert allowed.status_code == 200


def test_server_sent_events_are_the_same_messages(client: TestClient) -> None:
    answer = client.post(
        "/generate", json={"steps": 3, "frames": {"count": 2}}, headers={"accept": "text/event-stream"}
    )

    events = [dict(line.split(": ", 1) for line in block.split("\n")) for block in answer.text.strip().split("\n\n")]
    numbered = [e for e in events if e["event"] not in ("queued", "progress")]
    assert [(e["id"], e["event"]) for e in numbered] == [
        ("1", "started"),
        ("2", "frame"),
        ("3", "frame"),
        ("4", "image"),
        ("5", "succeeded"),
    ]
    picture = Image.open(io.BytesIO(base64.b64decode(json.loads(numbered[3]["data"])["b64_png"])))
    assert picture.size == (8, 8)


@pytest.mark.parametrize("media", ["image/gif", "image/apng", "image/webp"])
def test_an_animation_ends_on_the_picture_and_holds_it(server: Server, media: str) -> None:
    request = {"seed": 3, "steps": 6, "n": 2, "frames": {"every": 2}}
    answer = server.client.post("/generate", json=request, headers={"accept": media})
    picture = server.client.post("/generate", json=request).content
    moving: Any = Image.open(io.BytesIO(answer.content))
    moving.seek(moving.n_frames - 1)
    moving.load()

    assert answer.headers["content-type"] == media
    assert moving.n_frames >= 4
    assert moving.info["duration"] == 2000
    last, still = (np.asarray(image.convert("L"), int) for image in (moving, Image.open(io.BytesIO(picture))))
    assert abs(last - still).max() <= 1
    again = server.client.get(f"/jobs/{answer.headers['x-job-id']}/trajectory", headers={"accept": media})
    assert again.content == answer.content


def test_a_page_of_jobs_continues_the_previous_page(client: TestClient) -> None:
    made = [client.post("/generate", json={"seed": i}).headers["x-job-id"] for i in range(5)]

    first = [job["id"] for job in client.get("/jobs?limit=2").json()["jobs"]]
    second = [job["id"] for job in client.get(f"/jobs?limit=9&after={first[-1]}").json()["jobs"]]

    assert first + second == made[::-1]
    for query in ("limit=0", "limit=x", "status=odd"):
        assert client.get(f"/jobs?{query}").status_code == 422


def stream_of(frames: int, small: bool = False) -> Stream:
    stream = Stream("j")
    stream.keep_text("started")
    for i in range(frames):
        stream.keep_picture({"index": i}, True, lambda: b"png", small)
    return stream


def heard_by(subscriber: Subscriber, before: Any = None) -> list[Message]:
    async def listen() -> list[Message]:
        heard = []
        async with aclosing(subscriber.messages()) as messages:
            async for message in messages:
                heard.append(message)
                if before is not None:
                    before(len(heard))
        return heard

    return asyncio.run(listen())


def test_a_slow_subscriber_is_told_what_it_missed_and_gets_the_newest_frame_and_the_end() -> None:
    stream = stream_of(3)
    subscriber = Subscriber(stream)

    def late(count: int) -> None:
        if count == 2:  # while the first frame was being sent, all of this happened
            for _ in range(5):
                stream.keep_picture({}, True, lambda: b"png")
            subscriber.fell_behind()
            stream.keep_picture({}, False, lambda: b"image")
            stream.end("succeeded")

    heard = heard_by(subscriber, late)

    assert [m.seq for m in heard if isinstance(m, PictureMessage)] == [2, 9, 10]
    dropped = [m.body for m in heard if not isinstance(m, PictureMessage) and m.body["type"] == "dropped"]
    assert dropped == [{"type": "dropped", "job": "j", "seq": 8, "from": 3, "to": 8}]
    assert stream.counts.dropped == 6


def test_a_picture_is_encoded_once_for_all_subscribers_and_never_for_none() -> None:
    asked: list[int] = []

    async def many() -> list[bytes]:
        stream = Stream("j")
        stream.keep_picture({}, True, lambda: asked.append(1) or b"png")  # type: ignore[func-returns-value]
        stream.keep_picture({}, True, lambda: asked.append(2) or b"png")  # type: ignore[func-returns-value]
        first = stream.kept[0]
        assert isinstance(first, PictureMessage)
        return await asyncio.gather(*(first.packed() for _ in range(10)))

    assert [unpack(message)[1] for message in asyncio.run(many())] == [b"png"] * 10
    assert asked == [1]


class Slow:
    """A socket that takes so long for a message."""

    def __init__(self, seconds: float) -> None:
        self.seconds, self.sent = seconds, list[str | bytes]()

    async def send_text(self, data: str) -> None:
        """A message in words."""
        await asyncio.sleep(self.seconds)
        self.sent.append(data)

    send_bytes = send_text


def test_a_stalled_subscriber_is_disconnected_and_a_slow_one_misses_frames() -> None:
    async def send(seconds: float) -> list[str | bytes]:
        stream, socket = stream_of(10, small=True), Slow(seconds)
        asyncio.get_running_loop().call_later(8, stream.end, "succeeded")
        await web_watch._send_all(socket, Subscriber(stream))  # type: ignore[arg-type]
        return socket.sent

    with pytest.raises(web_watch._Close) as closed:
        virtual_clock.run(send(11))
    assert closed.value.code == 1013
    slow = [json.loads(m) if isinstance(m, str) else unpack(m)[0] for m in virtual_clock.run(send(6))]
    assert [m.get("type", m["seq"]) for m in slow] == ["started", "dropped", 11, "succeeded"]
    assert len(virtual_clock.run(send(0.5))) == 12


def test_a_subscriber_that_sends_too_much_is_disconnected(client: TestClient) -> None:
    backend_of(client).gate.clear()
    job = client.post("/generate", headers={"prefer": "respond-async"}).json()["id"]
    with client.websocket_connect(f"/jobs/{job}/stream") as socket:
        for _ in range(100):
            socket.send_json({"type": "ping"})
        while (message := socket.receive())["type"] != "websocket.close":
            pass

    assert message["code"] == 1008


def test_position_and_eta_are_shown_to_those_who_ask(client: TestClient) -> None:
    backend_of(client).gate.clear()
    for _ in range(2):
        client.post("/generate", json={"steps": 20}, headers={"prefer": "respond-async"})
    urgent = {"steps": 10, "n": 4, "priority": 5}
    client.post("/generate", json=urgent, headers={"prefer": "respond-async"})
    id = client.post("/generate", json={"steps": 10, "n": 6}, headers={"prefer": "respond-async"}).json()["id"]

    def seen() -> dict[str, Any] | None:
        """The job with its outlook: outlooks are made for all at once, a few times a second."""
        found: dict[str, Any] = client.get(f"/jobs/{id}").json()
        return found if found["progress"]["position"] == 1 else None

    job = until(seen)

    # Four slots, ten image-steps a second. Ten steps of the urgent four, ten of its own first four, since they are
    # shorter than those of the jobs before it, ten of its last two beside those.
    assert job["progress"]["position"] == 1
    assert job["progress"]["eta_s"] == pytest.approx(4 + 4 + 4, rel=0.2)  # tests/server/jobs/test_eta.py
    with client.websocket_connect(f"/jobs/{job['id']}/stream") as socket:
        queued = socket.receive_json()
    assert (queued["type"], queued["position"]) == ("queued", 1)
    assert queued["eta_s"] == pytest.approx(job["progress"]["eta_s"], abs=0.5)


def test_frames_are_kept_in_memory_within_a_limit_and_jobs_longer(
    client: TestClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(repository, "KEPT_JOBS", 2)
    body, gif = {"steps": 2, "frames": {"every": 1}}, {"accept": "image/gif"}
    made = [client.post("/generate", json=body).headers["x-job-id"] for _ in range(4)]

    assert [client.get(f"/jobs/{job}").status_code for job in made] == [200] * 4
    assert [client.get(f"/jobs/{job}/images/0").status_code for job in made] == [200] * 4
    assert [client.get(f"/jobs/{job}/trajectory", headers=gif).status_code for job in made] == [410, 410, 200, 200]


def test_the_memory_of_ended_jobs_stays_within_its_limit(client: TestClient, monkeypatch: pytest.MonkeyPatch) -> None:
    bound, ended = 50_000, client.app.state.jobs.repository  # type: ignore[attr-defined]
    monkeypatch.setattr(repository, "KEPT_BYTES", bound)
    made = [client.post("/generate", json={"steps": 1}).headers["x-job-id"] for _ in range(40)]
    held = [job.size_bytes for id in made if (job := ended.in_memory(id)) is not None]

    assert 0.7 * bound < sum(held) <= bound


def test_an_animation_needs_frames(client: TestClient) -> None:
    answer = client.post("/generate", json={"frames": None}, headers={"accept": "image/gif"})

    assert (answer.status_code, answer.json()["errors"][0]["pointer"]) == (422, "/frames")


def test_only_the_last_transient_message_is_sent() -> None:
    stream = Stream("j")
    for step in range(10):
        stream.send_transient("progress", step=step)
    subscriber = Subscriber(stream)

    heard = heard_by(subscriber, lambda count: stream.end("succeeded") if count == 1 else None)

    assert [getattr(m, "body", {}).get("step") for m in heard] == [9, None]


def backend_of(client: TestClient) -> FakeBackend:
    backend = client.app.state.jobs.backend  # type: ignore[attr-defined]
    assert isinstance(backend, FakeBackend)
    return backend


def queue_taken(client: TestClient) -> int:
    taken: int = client.app.state.jobs.admission.capacity.steps  # type: ignore[attr-defined]
    return taken
