"""Client against a real server: pictures, streams and jobs, and everything that can go wrong meanwhile."""

import os
import signal
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import pytest
from ddpm_client import (
    Busy,
    Cancelled,
    Client,
    Ended,
    Event,
    Failed,
    Frame,
    Invalid,
    NotFound,
    Picture,
    Progress,
    Refused,
    Restarting,
    Resync,
    Started,
)
from ddpm_client.types import NUMBERED

from server.errors import SampleLost
from tests.server.conftest import Server
from tests.server.fakes import FakeBackend, read_texts
from tests.server.web.lines import Threaded, line


def test_a_picture_has_the_bytes_of_the_http_response(server: Server, client: Client) -> None:
    made = client.generate(seed=42, steps=7, sampler="ddim", eta=0.5)

    answer = server.client.post("/generate", json={"seed": 42, "steps": 7, "sampler": "ddim", "eta": 0.5})
    assert made.png == answer.content
    assert made.image.size == (8, 8)
    assert (made.seed, len(made), made.frames) == (42, 1, ())
    assert made[0].texts == read_texts(answer.content)
    assert made.job["status"] == "succeeded"


def test_frames_come_with_the_picture_if_requested(client: Client) -> None:
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


def test_a_stream_gives_every_event_in_order(client: Client) -> None:
    kept = [e for e in client.stream(seed=3, steps=4, frames={"every": 2}) if isinstance(e, NUMBERED)]

    assert [type(event) for event in kept] == [Started, Frame, Frame, Frame, Picture, Ended]
    assert [event.seq for event in kept] == [1, 2, 3, 4, 5, 6]


def test_a_stream_tells_how_far_a_job_is(client: Client) -> None:
    told = [event for event in client.stream(seed=3, steps=30, n=64) if isinstance(event, Progress)]

    assert told and {event.steps for event in told} == {30 * 64}
    assert [event.step for event in told] == sorted(event.step for event in told)


def test_the_result_of_a_stream_is_that_of_generate_and_each_event_is_passed_on(client: Client) -> None:
    events: list[Event] = []
    made = client.stream(seed=3, steps=4, frames={"every": 2}).pictures(events.append)

    expected = client.generate(seed=3, steps=4, frames={"every": 2})
    assert made.png == expected.png
    assert [frame.png for frame in made.frames] == [frame.png for frame in expected.frames]
    assert [event for event in events if isinstance(event, Frame | Picture)] == [*made.frames, *made.pictures]
    assert isinstance(events[-1], Ended)


def test_a_connection_that_keeps_breaking_loses_and_repeats_no_event(server: Server, client: Client) -> None:
    with line(server.port, most_bytes=4000) as bad, Client(bad.url, timeout_s=30) as far:
        stream = far.stream(seed=9, steps=30, frames={"every": 1, "kind": "both"})
        seen = [event for event in stream if isinstance(event, NUMBERED)]

    assert stream.job is not None
    assert seen == [event for event in client.watch(stream.job) if isinstance(event, NUMBERED)]
    assert [event.seq for event in seen] == list(range(1, len(seen) + 1))
    assert bad.breaks >= 4


def test_a_lost_response_starts_no_second_job(grey: Threaded, backend: FakeBackend) -> None:
    with line(grey.port, most_bytes=0) as bad, Client(bad.url, timeout_s=20) as far:
        asking = ThreadPoolExecutor(1).submit(far.generate, seed=5)
        while bad.breaks < 2:
            time.sleep(0.01)
        bad.most_bytes = None

        assert asking.result(20).seed == 5
    assert len(backend.specs) == 1


def test_a_request_beyond_the_queue_is_retried_after_the_advised_time(grey: Threaded, backend: FakeBackend) -> None:
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


def test_leaving_a_loop_early_cancels_the_job(grey: Threaded, backend: FakeBackend) -> None:
    grey.do(backend.gate.clear)
    with Client(grey.url) as client:
        stream = client.stream(seed=1)
        for _ in stream:
            break

        assert stream.job is not None
        assert client.job(stream.job).status == "cancelled"


def test_leaving_a_watched_job_does_not_cancel_it(grey: Threaded, backend: FakeBackend) -> None:
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


def test_a_job_is_found_by_its_id_and_displays_itself(grey: Threaded, backend: FakeBackend) -> None:
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


def test_a_job_whose_server_is_gone_displays_its_last_known_state(grey: Threaded, backend: FakeBackend) -> None:
    grey.do(backend.gate.clear)
    with line(grey.port) as short, Client(short.url, timeout_s=30) as far:
        jobs = [far.submit(seed=1)]
        grey.do(backend.gate.set)
        jobs[0].wait()
        jobs.append(far.job(jobs[0].id))
        grey.do(backend.gate.clear)
        jobs.append(far.submit(seed=2))
        short.close()
        shown = [job._repr_html_() for job in jobs]

    assert [(html.count("<img"), html.count("<progress")) for html in shown] == [(1, 0), (0, 0), (0, 1)]


def test_a_broken_model_is_refused_at_once(grey: Threaded, backend: FakeBackend) -> None:
    backend.models["tiny"] = replace(backend.models["tiny"], trouble="its weights are cut off")
    with Client(grey.url, timeout_s=5) as client, pytest.raises(Refused, match="cut off") as refused:
        client.generate(seed=1)

    assert (type(refused.value), refused.value.code) == (Refused, "model-broken")


def test_errors_carry_the_message_of_the_server(grey: Threaded, backend: FakeBackend) -> None:
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


def test_models_are_described(client: Client) -> None:
    (model,) = client.models()

    assert (model["name"], model["T"]) == ("tiny", 30)
    assert client.model("tiny")["digest"] == model["digest"]
    assert client.refused_models() == []


@pytest.fixture(scope="module")
def mortal(long_weights: Path) -> Iterator[Server]:
    """A server that may be killed."""
    made = Server(long_weights)
    try:
        yield made.wait_until_ready()
    finally:
        made.stop()


@pytest.mark.long
def test_killing_engine_and_server_changes_no_picture(mortal: Server) -> None:
    with Client(f"http://127.0.0.1:{mortal.port}") as client:
        expected = client.generate(seed=6, steps=1000, n=8)
        events: list[Event] = []
        with client.stream(seed=6, steps=1000, n=8, frames=None) as stream:
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
