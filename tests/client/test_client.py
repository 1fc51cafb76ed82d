"""The Python client against real connections: pictures, and whatever can go wrong on the way to them."""

import asyncio
import copy
import os
import pickle
import signal
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import pytest
from ddpm_client import (
    AsyncClient,
    Busy,
    Cancelled,
    Client,
    Denied,
    Ended,
    Event,
    Failed,
    Frame,
    Invalid,
    NotFound,
    Picture,
    Progress,
    Refused,
    Request,
    Restarting,
    Resync,
    Started,
    Unreachable,
    errors,
)
from ddpm_client.errors import Answer, LineBroken
from ddpm_client.types import NUMBERED

from server.errors import SampleLost
from server.jobs.schemas import GenerateRequest
from server.settings import Settings
from server.web.app import create_app
from server.web.auth import make_key
from tests.server.conftest import Server
from tests.server.fakes import FakeBackend, read_texts
from tests.server.web.lines import Threaded, line, threaded

PROBLEM = {"status": 429, "code": "queue-full", "detail": "later", "errors": [{"pointer": "/n"}], "request_id": "7"}
RAISED: list[Exception] = [
    *(kind(PROBLEM) for kind in (Refused, Invalid, NotFound, Denied, Failed)),
    Busy(PROBLEM, 2.5),
    *(kind("words") for kind in (errors.ClientError, Cancelled, errors.TimedOut, Unreachable)),
    LineBroken("words", Answer(503, {"retry-after": "1"}, b"{}"), code=1011, silent=True),
]


@pytest.fixture
def client(server: Server) -> Iterator[Client]:
    """A client of the server that all tests share."""
    with Client(f"http://127.0.0.1:{server.port}", timeout_s=30) as made:
        yield made


@pytest.fixture
def backend() -> FakeBackend:
    """What makes flat grey pictures, when its gate is open."""
    return FakeBackend()


@pytest.fixture
def grey(weights: Path, tmp_path: Path, backend: FakeBackend) -> Iterator[Threaded]:
    """A server of flat grey pictures, one job at a time."""
    settings = Settings(weights=weights, data_dir=tmp_path / "data", result_cache=False, max_queued_jobs=1)
    with threaded(create_app(settings, backend)) as made:
        yield made


def test_a_request_has_the_fields_that_the_server_knows() -> None:
    assert list(Request.__annotations__) == list(GenerateRequest.model_fields)


def test_every_error_is_here() -> None:
    kinds = {kind for name, kind in vars(errors).items() if isinstance(kind, type) and name[0] != "_"}
    assert {kind for kind in kinds if issubclass(kind, Exception)} == {type(error) for error in RAISED}


@pytest.mark.parametrize("error", RAISED, ids=lambda error: type(error).__name__)
def test_an_error_can_be_sent_to_another_process_and_copied(error: Exception) -> None:
    for again in (pickle.loads(pickle.dumps(error)), copy.copy(error), copy.deepcopy(error)):
        assert (type(again), str(again), vars(again)) == (type(error), str(error), vars(error))


def test_a_picture_has_the_bytes_that_anybody_else_gets(server: Server, client: Client) -> None:
    made = client.generate(seed=42, steps=7, sampler="ddim", eta=0.5)

    answer = server.client.post("/generate", json={"seed": 42, "steps": 7, "sampler": "ddim", "eta": 0.5})
    assert made.png == answer.content
    assert made.image.size == (8, 8)
    assert (made.seed, len(made), made.frames) == (42, 1, ())
    assert made[0].texts == read_texts(answer.content)
    assert made.job["status"] == "succeeded"


def test_frames_come_with_the_picture_if_they_are_asked_for(client: Client) -> None:
    made = client.generate(seed=1, steps=10, n=2, frames={"every": 5, "kind": "both"})

    assert [(f.seed, f.step, f.kind) for f in made.frames if f.index == 0] == [
        (1, 0, "x_t"),
        (1, 5, "x_t"),
        (1, 5, "x0"),
        (1, 10, "x_t"),
        (1, 10, "x0"),
    ]
    assert {frame.image.size for frame in made.frames} == {(8, 8)}
    assert [image.size for image in made.images] == [(8, 8)] * 2


def test_many_at_once_are_the_same_as_one_after_the_other(server: Server, client: Client) -> None:
    async def at_once() -> list[bytes]:
        async with AsyncClient(f"http://127.0.0.1:{server.port}") as many:
            return [made.png for made in await asyncio.gather(*(many.generate(seed=s, steps=5) for s in range(12)))]

    assert asyncio.run(at_once()) == [client.generate(seed=seed, steps=5).png for seed in range(12)]


def test_a_stream_tells_everything_in_order(client: Client) -> None:
    events = list(client.stream(seed=3, steps=4, frames={"every": 2}))

    kept = [event for event in events if isinstance(event, NUMBERED)]
    assert [type(event) for event in kept] == [Started, Frame, Frame, Frame, Picture, Ended]
    assert [event.seq for event in kept] == [1, 2, 3, 4, 5, 6]
    assert any(isinstance(event, Progress) for event in events)


def test_a_line_that_breaks_again_and_again_loses_nothing_and_repeats_nothing(server: Server, client: Client) -> None:
    with line(server.port, most_bytes=4000) as bad, Client(bad.url, timeout_s=30) as far:
        stream = far.stream(seed=9, steps=30, frames={"every": 1, "kind": "both"})
        seen = [event for event in stream if isinstance(event, NUMBERED)]

    assert stream.job is not None
    assert seen == [event for event in client.watch(stream.job) if isinstance(event, NUMBERED)]
    assert [event.seq for event in seen] == list(range(1, len(seen) + 1))
    assert bad.breaks >= 4


def test_a_line_that_breaks_under_asyncio_loses_nothing_and_repeats_nothing(server: Server, client: Client) -> None:
    async def numbers() -> list[int]:
        with line(server.port, most_bytes=4000) as bad:
            async with AsyncClient(bad.url) as far, far.stream(seed=9, steps=30, frames={"every": 1}) as stream:
                return [event.seq async for event in stream if isinstance(event, NUMBERED)]

    assert asyncio.run(numbers()) == list(range(1, 35))


def test_an_answer_that_is_lost_on_the_way_makes_no_second_job(grey: Threaded, backend: FakeBackend) -> None:
    with line(grey.port, most_bytes=0) as bad, Client(bad.url, timeout_s=20) as far:
        asking = ThreadPoolExecutor(1).submit(far.generate, seed=5)
        while bad.breaks < 2:
            time.sleep(0.01)
        bad.most_bytes = None

        assert asking.result(20).seed == 5
    assert len(backend.specs) == 1


def test_who_is_too_many_comes_back_when_told_to(grey: Threaded, backend: FakeBackend) -> None:
    grey.do(backend.gate.clear)
    with Client(grey.url) as client, Client(grey.url, timeout_s=0.5) as hasty, ThreadPoolExecutor() as threads:
        first = client.submit(seed=1)
        with pytest.raises(Busy, match="jobs") as refused:
            hasty.submit(seed=2)
        second = threads.submit(client.generate, seed=3)
        grey.do(backend.gate.set)

        assert (refused.value.status, refused.value.code) == (429, "queue-full")
        assert refused.value.retry_after_s is not None and refused.value.retry_after_s >= 1
        assert (first.wait().seed, second.result(20).seed) == (1, 3)


def test_leaving_a_loop_early_gives_the_job_up(grey: Threaded, backend: FakeBackend) -> None:
    grey.do(backend.gate.clear)
    with Client(grey.url) as client:
        stream = client.stream(seed=1)
        for _ in stream:
            break

        assert stream.job is not None
        assert client.job(stream.job).status == "cancelled"


def test_a_task_that_is_cancelled_gives_its_job_up(grey: Threaded, backend: FakeBackend) -> None:
    async def status() -> str:
        async with AsyncClient(grey.url) as client:
            task = asyncio.create_task(client.generate(seed=1))
            while not (jobs := await client.jobs()):
                await asyncio.sleep(0.01)
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)
            return (await jobs[0].refresh()).status

    grey.do(backend.gate.clear)
    assert asyncio.run(status()) == "cancelled"


def test_leaving_before_the_id_is_known_gives_the_job_up(grey: Threaded, backend: FakeBackend) -> None:
    async def statuses() -> list[str]:
        with line(grey.port, most_bytes=0) as bad:
            async with AsyncClient(bad.url) as far:
                task = asyncio.create_task(far.generate(seed=1))
                while bad.breaks < 2:
                    await asyncio.sleep(0.01)
                bad.most_bytes = None
                task.cancel()
                await asyncio.gather(task, return_exceptions=True)
                return [job.status for job in await far.jobs()]

    grey.do(backend.gate.clear)
    assert asyncio.run(statuses()) == ["cancelled"]


def test_watching_cancels_nothing(grey: Threaded, backend: FakeBackend) -> None:
    grey.do(backend.gate.clear)
    with Client(grey.url) as client:
        job = client.submit(seed=1)
        with job.watch() as events:
            next(iter(events))
        assert job.refresh().status == "queued"
        assert job.cancel().status == "cancelled"
        assert "<progress" not in job._repr_html_()
        with pytest.raises(Cancelled):
            job.wait()


def test_a_job_is_found_again_and_shows_itself(grey: Threaded, backend: FakeBackend) -> None:
    grey.do(backend.gate.clear)
    with Client(grey.url) as client:
        job = client.submit(seed=7, steps=4, frames={"every": 2})
        waiting = job._repr_html_()
        grey.do(backend.gate.set)
        made = job.wait()
        again = client.job(job.id)

        assert "<progress" in waiting and "<img" not in waiting
        assert again._repr_html_().count("<img") == 1
        assert [picture.png for picture in again.images()] == [made.png]
        assert [frame.step for frame in made.frames] == [0, 2, 4]
        assert again.trajectory("gif").startswith(b"GIF89a")
        assert [job.id for job in client.jobs(status="succeeded", limit=5)] == [job.id]


def test_a_job_whose_server_is_gone_shows_what_was_last_heard(grey: Threaded, backend: FakeBackend) -> None:
    grey.do(backend.gate.clear)
    with line(grey.port) as short, Client(short.url, timeout_s=30) as far:
        jobs = [far.submit(seed=1)]
        grey.do(backend.gate.set)
        jobs[0].wait()
        jobs.append(far.job(jobs[0].id))
        grey.do(backend.gate.clear)
        jobs.append(far.submit(seed=2))
        short.close()
        began = time.monotonic()
        shown = [job._repr_html_() for job in jobs]

    assert [(html.count("<img"), html.count("<progress")) for html in shown] == [(1, 0), (0, 0), (0, 1)]
    assert time.monotonic() - began < 20


def test_a_model_that_is_broken_for_good_is_not_waited_for(grey: Threaded, backend: FakeBackend) -> None:
    backend.models["tiny"] = replace(backend.models["tiny"], trouble="its weights are cut off")
    with Client(grey.url, timeout_s=5) as client, pytest.raises(Refused, match="cut off") as refused:
        client.generate(seed=1)

    assert (type(refused.value), refused.value.code) == (Refused, "model-broken")


def test_what_fails_is_told_in_the_words_of_the_server(grey: Threaded, backend: FakeBackend) -> None:
    backend.failure = SampleLost("the numbers were not finite")
    with Client(grey.url) as client:
        with pytest.raises(Failed, match="the numbers were not finite") as failed:
            client.generate(seed=1)
        with pytest.raises(Invalid) as invalid:
            client.generate(steps=31, seed=1)
        with pytest.raises(NotFound):
            client.job("nothing")
        with pytest.raises(NotFound):
            list(client.watch("nothing"))

    assert (failed.value.status, failed.value.code) == (500, "sample-failed")
    assert invalid.value.errors == [{"pointer": "/steps", "message": "steps must lie in 1..30, got 31"}]


def test_a_key_opens_both_doors(weights: Path, tmp_path: Path, backend: FakeBackend) -> None:
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


def test_nobody_there_is_said_before_long() -> None:
    with Client("http://127.0.0.1:9", timeout_s=0.5) as client:
        assert not client.ready()
        with pytest.raises(Unreachable):
            client.generate(seed=1)


@pytest.mark.parametrize("url", ["127.0.0.1:8000", "ftp://x", "http://", "http://[::1", "http://x:y", "http://x:65536"])
def test_an_ill_formed_url_is_refused_at_once_and_not_repeated(url: str) -> None:
    with pytest.raises(ValueError, match=r"^the URL of a server is like http://127.0.0.1:8000 or https://example.com$"):
        Client(url)


def test_a_url_may_be_written_in_capitals(server: Server) -> None:
    with Client(f"HTTP://LOCALHOST:{server.port}", timeout_s=20) as client:
        assert client.generate(seed=1, steps=1).seed == 1


@pytest.mark.parametrize("key", ["ключ", "one\ntwo", "one\0"])
def test_an_ill_formed_key_is_refused_at_once_and_not_repeated(key: str) -> None:
    with pytest.raises(ValueError, match="^a key consists of visible ASCII characters$"):
        Client("http://127.0.0.1:9", key)


def test_models_are_described(client: Client) -> None:
    (model,) = client.models()

    assert (model["name"], model["T"]) == ("tiny", 30)
    assert client.model("tiny")["digest"] == model["digest"]


@pytest.fixture(scope="module")
def mortal(weights: Path) -> Iterator[Server]:
    """A server that may be killed."""
    made = Server(weights)
    try:
        yield made.wait_until_ready()
    finally:
        made.stop()


def test_whatever_is_killed_is_waited_for_and_changes_nothing(mortal: Server) -> None:
    with Client(f"http://127.0.0.1:{mortal.port}") as client:
        expected = client.generate(seed=6, steps=30, n=48)
        events: list[Event] = []
        with client.stream(seed=6, steps=30, n=48, frames=None) as stream:
            for event in stream:
                restarting = any(isinstance(before, Restarting) for before in events)
                events.append(event)
                if isinstance(event, Started) and not restarting:
                    os.kill(mortal.engine_pid, signal.SIGKILL)
                if isinstance(event, Restarting) and not restarting:
                    mortal.kill()
                    threading.Timer(0.3, mortal.start).start()

    numbers = [event.seq for event in events if isinstance(event, NUMBERED)]
    assert {type(event) for event in events} >= {Started, Restarting, Resync, Picture, Ended}
    assert numbers == sorted(set(numbers))
    assert {e.seed: e.png for e in events if isinstance(e, Picture)} == {p.seed: p.png for p in expected}


def test_what_answers_otherwise_than_the_server_is_refused() -> None:
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


def test_a_proxy_is_not_asked_for_what_is_on_this_machine(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("http_proxy", "HTTP_PROXY", "ALL_PROXY", "all_proxy"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")
    monkeypatch.delenv("no_proxy", raising=False)
    with Client(f"http://127.0.0.1:{server.port}", timeout_s=10) as client:
        assert client.ready()
        assert client.generate(seed=1, steps=2).seed == 1
