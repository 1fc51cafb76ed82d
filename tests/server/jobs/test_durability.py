"""Nothing accepted is lost: what a server answers after it was started anew, and to those who ask the same again."""

import errno
import sqlite3
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import replace
from functools import partial
from hashlib import sha256
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pytest
from starlette.testclient import TestClient

from model.engine.events import Finished
from server.clock import DAY_S
from server.errors import StorageFull
from server.jobs import repository
from server.jobs.request import RequestContext
from server.jobs.service import JobService
from server.settings import Settings
from server.store import retention
from server.store.blobs import Blobs
from server.store.retention import Expired
from server.store.schema import JOURNAL, LOCK
from server.web.app import create_app
from tests.server.fakes import FakeBackend
from tests.server.jobs.records import without_room
from tests.server.jobs.test_metrics import balance, read
from tests.server.web.test_watch import kept, watch
from tests.waiting import until

LATER = {"prefer": "respond-async"}
Start = Callable[..., AbstractContextManager[TestClient]]


@pytest.fixture
def start(weights: Path, tmp_path: Path) -> Start:
    """Starts a server on the same store as the one before."""

    @contextmanager
    def started(
        open_gate: bool = True, digest: str = "sha256:0", backend: FakeBackend | None = None, **settings: Any
    ) -> Iterator[TestClient]:
        backend = backend or FakeBackend()
        if not open_gate:
            backend.gate.clear()
        if digest != "sha256:0":
            backend.models = {"tiny": replace(backend.models["tiny"], digest=digest)}
        knobs = Settings(weights=weights, data_dir=tmp_path, **settings)
        with TestClient(create_app(knobs, backend), raise_server_exceptions=False) as client:
            yield client

    return started


def later(client: TestClient, **body: Any) -> dict[str, Any]:
    """A job that nobody waits for."""
    answer = client.post("/generate", json=body, headers=LATER)
    assert answer.status_code == 202, answer.text
    job: dict[str, Any] = answer.json()
    return job


def ended(client: TestClient, id: str) -> dict[str, Any]:
    """A job's document once it has ended."""

    def found() -> dict[str, Any] | None:
        job: dict[str, Any] = client.get(f"/jobs/{id}").json()
        return None if job["status"] in ("queued", "running") else job

    return until(found, 10, pause_s=0.01)


def pictures(client: TestClient, job: dict[str, Any]) -> list[tuple[bytes, str]]:
    """The bytes of a job's pictures, and their tags."""
    answers = [client.get(image["url"]) for image in job["images"]]
    assert [answer.status_code for answer in answers] == [200] * len(answers)
    return [(answer.content, answer.headers["etag"]) for answer in answers]


def backend_of(client: TestClient) -> FakeBackend:
    backend = client.app.state.jobs.backend  # type: ignore[attr-defined]
    assert isinstance(backend, FakeBackend)
    return backend


def jobs_of(client: TestClient) -> JobService:
    jobs = client.app.state.jobs  # type: ignore[attr-defined]
    assert isinstance(jobs, JobService)
    return jobs


def call(client: TestClient, work: Callable[[], Any]) -> Any:
    """Does this on the server's event loop."""
    assert client.portal is not None
    return client.portal.call(work)


def alter(directory: Path, statement: str) -> None:
    """Changes the journal of a server that is not there."""
    with sqlite3.connect(directory / JOURNAL) as db:
        db.execute(statement)
    db.close()


def test_a_job_that_had_not_ended_goes_on_in_its_old_order(start: Start) -> None:
    with start(open_gate=False) as client:
        jobs = [later(client, seed=i, steps=3) for i in range(5)]
        urgent = later(client, seed=9, steps=3, priority=5)
    with start() as client:
        documents = [ended(client, job["id"]) for job in [*jobs, urgent]]
        specs = sorted(backend_of(client).specs, key=lambda spec: spec.rank)

    assert {document["status"] for document in documents} == {"succeeded"}
    assert [d["request"] for d in documents] == [job["request"] for job in [*jobs, urgent]]
    assert [d["created_at"] for d in documents] == [job["created_at"] for job in [*jobs, urgent]]
    assert [spec.seeds for spec in specs] == [(9,), (0,), (1,), (2,), (3,), (4,)]


def test_a_job_that_had_ended_answers_as_before(start: Start) -> None:
    with start() as client:
        job = later(client, seed=3, steps=4, n=3, frames=None)
        before = ended(client, job["id"])
        seen, heard = pictures(client, before), watch(client, f"/jobs/{job['id']}/stream")
    with start() as client:
        after = client.get(f"/jobs/{job['id']}").json()

        assert (after, pictures(client, after)) == (before, seen)
        assert client.get("/jobs").json()["jobs"] == [before]
        assert client.get("/jobs?status=succeeded").json()["jobs"] == [before]
        assert watch(client, f"/jobs/{job['id']}/stream") == heard
        assert client.delete(f"/jobs/{job['id']}").json() == before


def test_frames_that_are_no_longer_held_are_told_by_resync_and_the_rest_keeps_its_numbers(start: Start) -> None:
    with start() as client:
        job = later(client, seed=3, steps=4, n=2, frames={"every": 1})
        before = kept(watch(client, f"/jobs/{job['id']}/stream")[0])
    with start() as client:
        after, code = watch(client, f"/jobs/{job['id']}/stream")
        late, _ = watch(client, f"/jobs/{job['id']}/stream?after={before[-2]['seq']}")
        gif = client.get(f"/jobs/{job['id']}/trajectory", headers={"accept": "image/gif"})

    shown = [message for message in before if message.get("kind") not in ("x_t", "x0")]
    assert kept(after) == shown
    assert [(m["type"], m["seq"]) for m in after if m.get("type") == "resync"] == [("resync", 11)]
    assert (late, code) == ([shown[-1]], 1000)
    assert (gif.status_code, gif.json()["code"]) == (410, "gone")


def test_a_stream_that_begins_anew_uses_no_number_twice(start: Start) -> None:
    with start(open_gate=False) as client:
        job = later(client, steps=4, n=2, frames={"every": 1})
    with start() as client:
        heard, _ = watch(client, f"/jobs/{job['id']}/stream?after=7")

    of_one_attempt = 1 + 2 * 5 + 2 + 1
    assert (heard[0]["type"], heard[0]["seq"]) == ("resync", of_one_attempt)
    assert [message["seq"] for message in kept(heard)] == list(range(of_one_attempt + 1, 2 * of_one_attempt + 1))


def test_every_end_is_kept_with_its_reason(start: Start) -> None:
    with start(open_gate=False) as client:
        given_up, late = later(client, seed=1), later(client, seed=2, deadline_s=0.05)
        client.delete(f"/jobs/{given_up['id']}")
        before = [ended(client, job["id"]) for job in (given_up, late)]
    with start() as client:
        after = [client.get(f"/jobs/{job['id']}").json() for job in (given_up, late)]

    assert after == before
    assert [job["status"] for job in after] == ["cancelled", "failed"]
    assert after[1]["error"]["code"] == "deadline-passed"


def test_a_deadline_counts_from_the_acceptance_even_if_that_was_by_another_server(start: Start) -> None:
    with start(open_gate=False) as client:
        job = later(client, seed=1, deadline_s=0.5)
    time.sleep(0.5)
    with start(open_gate=False) as client:
        assert ended(client, job["id"])["error"]["code"] == "deadline-passed"


def test_a_job_of_another_model_than_is_served_now_fails_with_the_reason(start: Start) -> None:
    with start(open_gate=False) as client:
        job = later(client, seed=1)
    with start(digest="sha256:1") as client:
        assert ended(client, job["id"])["error"]["code"] == "model-changed"


def interrupted(client: TestClient, headers: dict[str, str]) -> None:
    """A synchronous caller who waits for a picture of seed 1 when the server goes away."""
    context = RequestContext(attached=True, key=headers.get("idempotency-key"))
    call(client, partial(jobs_of(client).submit, b'{"seed": 1}', context))


@pytest.mark.parametrize(("headers", "status"), [({}, "cancelled"), ({"idempotency-key": "k"}, "succeeded")])
def test_a_job_whose_only_caller_was_lost_is_cancelled_unless_the_caller_can_come_back(
    start: Start, headers: dict[str, str], status: str
) -> None:
    with start(open_gate=False) as client:
        interrupted(client, headers)
        (job,) = client.get("/jobs").json()["jobs"]
    with start() as client:
        assert ended(client, job["id"])["status"] == status
        if headers:
            again = client.post("/generate", json={"seed": 1}, headers=headers)
            assert (again.status_code, again.headers["x-job-id"]) == (200, job["id"])


def test_the_same_key_and_body_is_the_same_job_in_any_form_and_after_a_restart(start: Start) -> None:
    key = {"idempotency-key": "order-66"}
    with start() as client:
        first = client.post("/generate", content=b'{"steps": 5, "n": 2}', headers=key)
        again = client.post("/generate", content=b'{"n":2,"steps":5}', headers=key)
        as_json = client.post("/generate", json={"n": 2, "steps": 5}, headers=key | {"accept": "application/json"})
        assert len(backend_of(client).specs) == 1
    with start() as client:
        after = client.post("/generate", json={"n": 2, "steps": 5}, headers=key)
        other = client.post("/generate", json={"n": 2, "steps": 6}, headers=key)

    assert first.status_code == 200
    assert {answer.headers["x-job-id"] for answer in (first, again, as_json, after)} == {as_json.json()["id"]}
    assert first.content == again.content == after.content
    assert (other.status_code, other.json()["code"]) == (422, "key-reused")


ONCE: dict[str, str] = {}
GIF, EVENTS, NPY = ({"accept": media} for media in ("image/gif", "text/event-stream", "application/x-npy"))


@pytest.mark.parametrize(
    ("first", "again", "status"),
    [
        (ONCE, LATER, 202),
        (LATER, ONCE, 200),
        (LATER, EVENTS, 200),
        (GIF, LATER, 202),
        (GIF, ONCE, 200),
        (NPY, ONCE, 200),
        (NPY, LATER, 202),
        (ONCE, GIF, 422),  # the job has no frames, of which this answer is made
        (ONCE, EVENTS, 422),
        (ONCE, NPY, 422),
    ],
)
def test_a_key_finds_its_job_in_any_form_that_the_job_can_be_answered_in(
    start: Start, first: dict[str, str], again: dict[str, str], status: int
) -> None:
    key = {"idempotency-key": "k"}
    with start() as client:
        made = client.post("/generate", json={"steps": 2}, headers=key | first)
        ended(client, made.headers["x-job-id"])
        repeated = client.post("/generate", json={"steps": 2}, headers=key | again)

    assert repeated.status_code == status, repeated.text
    assert status == 422 or repeated.headers["x-job-id"] == made.headers["x-job-id"]


@pytest.mark.parametrize("frames", [None, {"count": 2}])
def test_where_frames_are_spelled_out_the_way_a_request_comes_adds_none(start: Start, frames: object) -> None:
    key, body = {"idempotency-key": "k"}, {"steps": 2, "frames": frames}
    with start() as client:
        answers = [client.post("/generate", json=body, headers=key | way) for way in (ONCE, LATER, EVENTS)]

    assert len({answer.headers["x-job-id"] for answer in answers}) == 1


def test_the_same_key_while_its_job_runs_says_where_to_look_and_when(start: Start) -> None:
    key = {"idempotency-key": "k"}
    with start(open_gate=False) as client:
        first = client.post("/generate", json={}, headers=LATER | key)
        again = client.post("/generate", json={}, headers=LATER | key)
        backend_of(client).trouble = "the engine is loading"
        waiting = client.post("/generate", json={"frames": {"count": 30}}, headers=key)
        same = client.post("/generate", json={}, headers=LATER | key)

    assert (again.status_code, again.json()["id"]) == (202, first.json()["id"])
    assert same.json()["id"] == first.json()["id"]  # even while no work is taken
    assert waiting.status_code == 422  # a picture at once is another request than a job with frames


def test_a_synchronous_caller_with_the_key_of_a_running_job_gets_409(start: Start) -> None:
    with start(open_gate=False) as client:
        interrupted(client, {"idempotency-key": "k"})
        answer = client.post("/generate", json={"seed": 1}, headers={"idempotency-key": "k"})
        (job,) = client.get("/jobs").json()["jobs"]

    assert (answer.status_code, answer.json()["code"]) == (409, "still-running")
    assert answer.headers["location"] == f"/jobs/{job['id']}"
    assert int(answer.headers["retry-after"]) >= 1


@pytest.mark.parametrize("key", ["", " ", "a b", "é", "k" * 256])
def test_a_key_is_visible_ascii_of_some_length(start: Start, key: str) -> None:
    with start() as client:
        answer = client.post("/generate", headers=[(b"idempotency-key", key.encode("latin-1"))])

    assert (answer.status_code, answer.json()["code"]) == (400, "malformed")


def test_an_identical_request_is_answered_from_the_pictures_of_before(start: Start) -> None:
    with start() as client:
        first = client.post("/generate", json={"seed": 5, "steps": 3, "n": 3})
        sheet = client.post("/generate", json={"seed": 5, "steps": 3, "n": 3})
        one = client.post("/generate", json={"seed": 6, "steps": 3})
        seen = read(client.get("/metrics").text)
        document = client.get(f"/jobs/{one.headers['x-job-id']}").json()
        stream, code = watch(client, f"/jobs/{one.headers['x-job-id']}/stream")
        assert len(backend_of(client).specs) == 1
    with start() as client:
        after = client.post("/generate", json={"seed": 5, "steps": 3, "n": 3})
        assert backend_of(client).specs == []

    assert [a.headers.get("x-cache") for a in (first, sheet, one, after)] == [None, "hit", "hit", "hit"]
    assert first.content == sheet.content == after.content
    assert document["status"] == "succeeded"
    assert document["progress"]["step"] == 3
    assert ([m.get("type", m.get("kind")) for m in stream], code) == (["started", "image", "succeeded"], 1000)
    assert stream[1]["png"] == one.content
    assert (seen["ddpm_cache_hits_total"], seen["ddpm_steps_waiting"], balance(seen)) == (2, 0, (3, 3))


def test_pictures_of_one_owner_are_kept_from_others(start: Start, tmp_path: Path) -> None:
    keys = tmp_path / "keys"
    keys.write_text("".join(f"{name}:{sha256(name.encode()).hexdigest()}:60\n" for name in ("alice", "bob")))
    alice, bob = ({"authorization": f"Bearer {name}"} for name in ("alice", "bob"))
    with start(api_keys=str(keys)) as client:
        answers = [client.post("/generate", json={"seed": 5, "steps": 20}, headers=key) for key in (alice, alice, bob)]
        id = answers[0].headers["x-job-id"]
        found = [client.get(f"/jobs/{id}", headers=key).status_code for key in (alice, bob)]
        listed = [len(client.get("/jobs", headers=key).json()["jobs"]) for key in (alice, bob)]
        both = [{**key, "idempotency-key": "same"} for key in (alice, bob)]
        keyed = [client.post("/generate", json={"steps": 20}, headers=headers).headers["x-job-id"] for headers in both]
        again = client.post("/generate", json={"seed": 5, "steps": 20}, headers=alice)
    with start(api_keys=str(keys)) as client:
        after = [client.get(f"/jobs/{id}", headers=key).status_code for key in (alice, bob)]

    assert [answer.headers.get("x-cache") for answer in (*answers, again)] == [None, "hit", None, "hit"]
    assert (found, listed, after) == ([200, 404], [2, 1], [200, 404])
    assert keyed[0] != keyed[1]


@pytest.mark.parametrize(
    ("body", "headers", "settings"),
    [
        ({}, {"cache-control": "no-cache"}, {}),
        ({}, {"accept": "application/x-npy"}, {}),
        ({"frames": {"count": 2}}, {}, {}),
        ({"seed": 6}, {}, {}),
        ({"steps": 4}, {}, {}),
        ({"noise": "torch"}, {}, {}),
        ({}, {}, {"result_cache": False}),
    ],
)
def test_a_request_that_differs_or_says_so_is_run(
    start: Start, body: dict[str, Any], headers: dict[str, str], settings: dict[str, Any]
) -> None:
    with start(**settings) as client:
        client.post("/generate", json={"seed": 5, "steps": 3})
        answer = client.post("/generate", json={"seed": 5, "steps": 3} | body, headers=headers)

        assert (answer.status_code, answer.headers.get("x-cache")) == (200, None)
        assert len(backend_of(client).specs) == 2


def test_a_cached_picture_whose_file_is_gone_is_made_again(start: Start, tmp_path: Path) -> None:
    with start() as client:
        first = client.post("/generate", json={"seed": 5, "steps": 3})
        for file in (tmp_path / "pictures").iterdir():
            file.unlink()
        gone = client.get(f"/jobs/{first.headers['x-job-id']}/images/0")
        again = client.post("/generate", json={"seed": 5, "steps": 3})

    assert gone.status_code == 200  # it is in memory, too
    assert (again.headers.get("x-cache"), again.content) == (None, first.content)


def test_a_picture_that_comes_out_otherwise_raises_the_alarm_and_the_first_one_stays(start: Start) -> None:
    class Drifting(FakeBackend):
        async def run(self, spec: Any) -> Any:
            """Another grey each time."""
            self.specs.append(spec)
            yield Finished(0, np.full((8, 8, 1), len(self.specs), np.uint8), None)

    with start(backend=Drifting()) as client:
        first = client.post("/generate", json={"seed": 5})
        second = client.post("/generate", json={"seed": 5}, headers={"cache-control": "no-cache"})
        seen = read(client.get("/metrics").text)
        image = client.get(f"/jobs/{second.headers['x-job-id']}/images/0")

    assert first.content == second.content == image.content
    assert seen["ddpm_replay_mismatch_total"] == 1


@pytest.mark.parametrize("deaths", [1, 2, 3, 9])
def test_deaths_of_the_server_never_fail_a_job_but_make_it_run_alone_and_last(
    start: Start, tmp_path: Path, deaths: int
) -> None:
    with start(open_gate=False) as client:
        jobs = [later(client, seed=seed)["id"] for seed in (1, 2, 3, 4)]
    for _ in range(deaths):
        running = f"('{jobs[0]}', '{jobs[2]}')"
        alter(tmp_path, f"UPDATE jobs SET running = 1 WHERE id IN {running}")  # as a dying server leaves it
        (tmp_path / LOCK).unlink()
        with start(open_gate=False) as client:
            pass
    with start() as client:
        results = [ended(client, job)["status"] for job in jobs]
        specs = backend_of(client).specs

    assert results == ["succeeded"] * 4
    if deaths == 1:  # once may be chance
        assert [(spec.seeds[0], spec.alone) for spec in specs] == [(1, False), (2, False), (3, False), (4, False)]
    else:
        assert [(spec.seeds[0], spec.alone) for spec in specs] == [(2, False), (4, False), (1, True), (3, True)]


def test_an_orderly_end_is_no_death(start: Start, tmp_path: Path) -> None:
    with start() as client:
        job = later(client, seed=1, steps=2)
        ended(client, job["id"])
        backend_of(client).gate.clear()
        waiting = later(client, seed=2, frames={"every": 1})
    for _ in range(5):
        with start(open_gate=False) as client:
            pass
    with start() as client:
        assert ended(client, waiting["id"])["status"] == "succeeded"


def test_an_orderly_end_on_a_full_disk_is_no_death_either(start: Start) -> None:
    with start(open_gate=False) as client:
        job = later(client, seed=1)
    for _ in range(4):
        with start(open_gate=False) as client:
            store = jobs_of(client).repository.store
            call(client, partial(store.mark_running, job["id"]))
            call(client, store.latest)  # so that it is on disk
            without_room(store)
    with start() as client:
        assert ended(client, job["id"])["status"] == "succeeded"


def test_recovered_jobs_are_in_the_balance(start: Start) -> None:
    with start(open_gate=False) as client:
        for i in range(3):
            later(client, seed=i)
    with start(open_gate=False) as client:
        seen = read(client.get("/metrics").text)

    assert (seen["ddpm_jobs_accepted_total"], seen["ddpm_jobs_waiting"], balance(seen)) == (3, 3, (3, 3))
    assert seen["ddpm_steps_waiting"] == 90


def test_what_is_no_longer_kept_is_gone_and_not_unknown(start: Start) -> None:
    with start(retention_days=0) as client:
        job = later(client, seed=1)
        ended(client, job["id"])
        call(client, jobs_of(client).repository.sweep)
        answers = [client.get(f"/jobs/{job['id']}{path}") for path in ("", "/images/0", "/trajectory")]
        codes = [answer.status_code for answer in answers]
        closed = watch(client, f"/jobs/{job['id']}/stream")[1]

    assert (codes, closed) == ([410] * 3, 4404)


@pytest.mark.parametrize("where", [(retention, "expire"), (Blobs, "clear_aside")])
def test_a_passing_lack_does_not_end_retention(
    start: Start, monkeypatch: pytest.MonkeyPatch, where: tuple[Any, str]
) -> None:
    monkeypatch.setattr(repository, "SWEEP_S", 0.01)
    with start(retention_days=0) as client:
        with mock.patch.object(*where, side_effect=OSError(errno.EMFILE, "Too many open files")) as lacking:
            until(lambda: lacking.called, 10)
        job = later(client, seed=1)
        until(lambda: client.get(f"/jobs/{job['id']}").status_code == 410, 10)


def test_a_disk_that_was_full_for_a_while_does_not_end_retention(start: Start, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(repository, "SWEEP_S", 0.01)
    swept: list[float] = []
    with start(retention_days=0) as client:
        store = jobs_of(client).repository.store
        usual = store.expire

        async def expire(before: float, most_bytes: int, now: float) -> Expired:
            swept.append(before)
            if len(swept) == 1:
                raise StorageFull("the disk is full")
            return await usual(before, most_bytes, now)

        monkeypatch.setattr(store, "expire", expire)
        job = later(client, seed=1)
        until(lambda: client.get(f"/jobs/{job['id']}").status_code == 410, 10)


def test_a_full_disk_is_told_by_every_door_and_passes(start: Start) -> None:
    with start() as client:
        writer, full = jobs_of(client).repository.store._writer, OSError(28, "No space left on device")
        probe, writer._probe = writer._probe, mock.Mock(side_effect=full)
        writer.write_failed(full)
        refused = [client.post("/generate"), client.get("/readyz")]
        scraped = [read(client.get("/metrics").text)]
        assert client.get("/healthz").status_code == 200
        writer._probe = probe
        until(lambda: client.get("/readyz").status_code == 200, 10)
        assert client.post("/generate").status_code == 200
        scraped.append(read(client.get("/metrics").text))

    assert {(a.status_code, a.json()["code"]) for a in refused} == {(503, "storage-full")}
    assert [(seen["ddpm_storage_full"], seen["ddpm_ready"]) for seen in scraped] == [(1, 0), (0, 1)]
    assert all(int(answer.headers["retry-after"]) > 0 for answer in refused)


@pytest.mark.parametrize("years", [(-50, 0, -50, 0), (0, 95, 0, 95)])
def test_a_wall_clock_that_is_wrong_at_a_start_deletes_nothing(
    start: Start, monkeypatch: pytest.MonkeyPatch, years: tuple[int, ...]
) -> None:
    usual, kept, all_kept = time.time, list[str](), list[int]()
    for shift in years:
        monkeypatch.setattr(time, "time", lambda: usual() + shift * 365 * DAY_S)  # noqa: B023
        with start() as client:
            kept.append(later(client, seed=len(kept))["id"])
            ended(client, kept[-1])
            call(client, jobs_of(client).repository.sweep)
            all_kept.append(sum(client.get(f"/jobs/{id}").status_code == 200 for id in kept))

    assert all_kept == [1, 2, 3, 4]


def test_time_without_a_job_counts_beyond_a_restart(start: Start) -> None:
    with start() as client:
        job = later(client, seed=1)
        ended(client, job["id"])
        repository = jobs_of(client).repository
        repository.clock._offset_s += 6.9 * DAY_S  # a server that nobody asks for anything, for days
        call(client, repository.sweep)
    with start() as client:
        repository = jobs_of(client).repository
        assert client.get(f"/jobs/{job['id']}").status_code == 200
        repository.clock._offset_s += 0.2 * DAY_S
        call(client, repository.sweep)
        assert client.get(f"/jobs/{job['id']}").status_code == 410


def test_while_it_drains_a_server_says_so_and_ends_what_it_has(start: Start) -> None:
    with start(open_gate=False) as client:
        job = later(client, seed=1)
        assert client.portal is not None
        drained = client.portal.start_task_soon(jobs_of(client).drain, 10)
        refused = [client.post("/generate"), client.get("/readyz")]
        call(client, backend_of(client).gate.set)
        drained.result(10)
        assert client.get(f"/jobs/{job['id']}").json()["status"] == "succeeded"

    assert {(a.status_code, a.json()["detail"]) for a in refused} == {(503, "the server is shutting down")}


def test_a_job_that_waits_for_its_engine_has_the_grace_of_a_drain_too(start: Start) -> None:
    with start(open_gate=False) as client:
        job = later(client, seed=1)
    loading = FakeBackend()
    models, loading.models, loading.trouble = loading.models, {}, "the engine is being restarted"
    with start(open_gate=False, backend=loading) as client:
        assert client.portal is not None
        drained = client.portal.start_task_soon(jobs_of(client).drain, 10)
        until(lambda: jobs_of(client).admission.closing)
        loading.models, loading.trouble = models, None
        call(client, loading.gate.set)
        drained.result(10)
        assert client.get(f"/jobs/{job['id']}").json()["status"] == "succeeded"


def test_subscribers_of_a_job_that_is_parked_are_told_to_come_back(start: Start) -> None:
    with start(open_gate=False) as client:
        job = later(client, seed=1)
        with client.websocket_connect(f"/jobs/{job['id']}/stream") as socket:
            socket.receive_json()
            call(client, partial(jobs_of(client).drain, 0))
            while (message := socket.receive())["type"] != "websocket.close":
                assert "succeeded" not in str(message)
    with start() as client:
        assert ended(client, job["id"])["status"] == "succeeded"

    assert message["code"] == 1012
