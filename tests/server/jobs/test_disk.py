"""A disk that fails, hangs or is full, and a system that is short of something: who is told what, and for how long."""

import errno
import logging
import os
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
from starlette.testclient import TestClient

from server import troubles
from server.jobs import encode, service
from server.jobs.service import JobService
from server.settings import Settings
from server.store import blobs, rows, writer
from server.web.app import create_app
from tests.server.fakes import FakeBackend
from tests.server.jobs.records import without_room
from tests.server.jobs.test_metrics import read
from tests.server.web.test_watch import watch
from tests.waiting import until

LATER = {"prefer": "respond-async"}


@pytest.fixture
def client(weights: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[TestClient]:
    """A server of little patience, whose backend makes pictures at once."""
    for module in (blobs, writer, troubles):
        monkeypatch.setattr(module, "RETRY_S", 0.02)
    for each in (blobs, writer, service):
        monkeypatch.setattr(each, "PATIENCE_S", 1.0)
    settings = Settings(weights=weights, data_dir=tmp_path, result_cache=False)
    with TestClient(create_app(settings, FakeBackend()), raise_server_exceptions=False) as made:
        yield made


def jobs_of(client: TestClient) -> JobService:
    """Its jobs."""
    jobs = client.app.state.jobs  # type: ignore[attr-defined]
    assert isinstance(jobs, JobService)
    return jobs


def backend_of(client: TestClient) -> FakeBackend:
    """What makes its pictures."""
    backend = jobs_of(client).backend
    assert isinstance(backend, FakeBackend)
    return backend


def open_gate(client: TestClient) -> None:
    """Pictures that were held back are made."""
    assert client.portal is not None
    client.portal.call(backend_of(client).gate.set)


def later(client: TestClient, **body: Any) -> str:
    """The id of a job that nobody waits for."""
    answer = client.post("/generate", json=body, headers=LATER)
    assert answer.status_code == 202, answer.text
    return str(answer.json()["id"])


def status(client: TestClient, id: str) -> str:
    """What has become of a job."""
    return str(client.get(f"/jobs/{id}").json()["status"])


def ready(client: TestClient) -> str:
    """Why the server takes no job; empty if it does."""
    return str(client.get("/readyz").json().get("detail", ""))


Told = Callable[[], list[tuple[str, str]]]


@pytest.fixture
def told(caplog: pytest.LogCaptureFixture) -> Iterator[Told]:
    """Which events were logged of which resources, so far."""
    with caplog.at_level(logging.INFO, "server"):
        yield lambda: [
            (record.getMessage(), record.__dict__["resource"])
            for record in caplog.records
            if "resource" in record.__dict__
        ]


class Sync:
    """fsync, which fails for files, or for the folder, under `pictures` until it is mended."""

    def __init__(self, folder: bool) -> None:
        self.folder, self.broken, self.failures, self._usual = folder, True, 0, os.fsync

    def __call__(self, file: int) -> None:
        path = Path(os.readlink(f"/proc/self/fd/{file}"))
        if self.broken and (path.name if self.folder else path.parent.name) == "pictures":
            self.failures += 1
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        self._usual(file)


@pytest.mark.parametrize("folder", [False, True])
def test_pictures_that_cannot_be_synced_refuse_jobs_until_they_can_be(
    client: TestClient, monkeypatch: pytest.MonkeyPatch, told: Told, folder: bool
) -> None:
    sync, backend = Sync(folder), backend_of(client)
    monkeypatch.setattr(os, "fsync", sync)
    backend.gate.clear()
    ids = [later(client, seed=1), later(client, seed=2)]
    open_gate(client)
    until(lambda: ready(client), 10)
    until(lambda: sync.failures > 12, 10)  # of both jobs and of probes
    refused = [client.post("/generate") for _ in range(5)] + [client.get("/readyz")]
    waiting = [status(client, id) for id in ids]
    sync.broken = False
    until(lambda: not ready(client), 10)
    until(lambda: [status(client, id) for id in ids] == ["succeeded"] * 2, 10)

    assert {(a.status_code, a.json()["code"], a.json()["detail"]) for a in refused} == {
        (503, "storage-full", "the disk is full, or cannot be written: pictures")
    }
    assert waiting == ["running"] * 2
    assert told() == [
        ("the store cannot be written", "pictures"),
        ("the store can be written again", "pictures"),
    ]


def test_troubles_of_the_journal_and_of_the_pictures_are_two(
    client: TestClient, monkeypatch: pytest.MonkeyPatch, told: Told
) -> None:
    sync = Sync(folder=False)
    monkeypatch.setattr(os, "fsync", sync)
    later(client, seed=1)
    until(lambda: ready(client), 10)
    store = jobs_of(client).repository.store
    with monkeypatch.context() as full:
        probe = mock.Mock(side_effect=OSError(errno.ENOSPC, "full"))
        full.setattr(rows, "probe", probe)
        until(lambda: probe.called, 10)  # an earlier probe would end the trouble
        store._writer.write_failed(OSError(errno.ENOSPC, "full"))
        both = ready(client)
    until(lambda: ready(client).endswith("written: pictures"), 10)  # the journal is probed with success
    sync.broken = False
    until(lambda: not ready(client), 10)

    assert both.endswith("written: journal, pictures")
    assert sorted(told()) == sorted(
        (event, resource)
        for event in ("the store cannot be written", "the store can be written again")
        for resource in ("journal", "pictures")
    )


def test_a_full_disk_is_logged_once_however_often_a_result_is_tried(
    client: TestClient, monkeypatch: pytest.MonkeyPatch, told: Told
) -> None:
    store, attempts, usual = jobs_of(client).repository.store, list[int](), rows.finish

    def finish(*arguments: Any, **others: Any) -> Any:
        attempts.append(len(attempts))
        return usual(*arguments, **others)

    backend_of(client).gate.clear()
    ids = [later(client, seed=1), later(client, seed=2)]
    with monkeypatch.context() as full:
        full.setattr(rows, "finish", finish)
        full.setattr(rows, "probe", mock.Mock(side_effect=OSError(errno.ENOSPC, "full")))
        make_room = without_room(store)
        open_gate(client)
        until(lambda: len(attempts) > 12, 10)
        make_room()
    until(lambda: [status(client, id) for id in ids] == ["succeeded"] * 2 and not ready(client), 10)

    assert told() == [
        ("the store cannot be written", "journal"),
        ("the store can be written again", "journal"),
    ]


def test_while_a_large_picture_waits_for_room_a_smaller_probe_ends_no_trouble_and_jobs_are_deleted(
    client: TestClient, monkeypatch: pytest.MonkeyPatch, told: Told
) -> None:
    jobs = jobs_of(client)
    store, portal, probes = jobs.repository.store, client.portal, list[int]()
    assert portal is not None
    usual, old = store.blobs._write, later(client, seed=3)
    until(lambda: status(client, old) == "succeeded", 10)
    (picture,) = store.blobs.folder.iterdir()

    def write(name: str, data: bytes) -> None:
        if not name.startswith("probe"):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        usual(name, data)
        probes.append(len(probes))

    with monkeypatch.context() as full:
        full.setattr(store.blobs, "_write", write)
        id = later(client, seed=1)
        until(lambda: len(probes) > 5, 10)
        portal.call(store.expire, jobs.repository.clock.now(), 1 << 40)
        portal.call(store.delete_unused)
        deleted = not picture.exists()
    until(lambda: status(client, id) == "succeeded" and not ready(client), 10)

    assert deleted
    assert told() == [
        ("the store cannot be written", "pictures"),
        ("the store can be written again", "pictures"),
    ]


SHORT = {
    "file descriptors": OSError(errno.EMFILE, "Too many open files"),
    "memory": MemoryError(),
    "threads or processes": RuntimeError("can't start new thread"),
}


@pytest.mark.parametrize("resource", SHORT)
@pytest.mark.parametrize("where", ["encode", "write"])
def test_a_passing_lack_is_no_jobs_failure_and_no_full_disk(
    client: TestClient, monkeypatch: pytest.MonkeyPatch, told: Told, resource: str, where: str
) -> None:
    attempts = list[int]()

    def fail(*arguments: object, **others: object) -> None:
        attempts.append(len(attempts))
        raise SHORT[resource]

    with monkeypatch.context() as lacking:
        if where == "encode":
            lacking.setattr(encode, "_file", fail)
        else:
            lacking.setattr(jobs_of(client).repository.store.blobs, "_write", fail)
        ids = [later(client, seed=seed) for seed in range(3)]
        until(lambda: len(attempts) > 12, 10)
        seen = [status(client, id) for id in ids], ready(client)
    until(lambda: [status(client, id) for id in ids] == ["succeeded"] * 3, 10)

    assert seen == (["running"] * 3, "")
    assert told() == [("a resource is short", resource), ("a resource is no longer short", resource)]


@pytest.mark.parametrize("where", ["encode", "write"])
def test_a_caller_learns_what_keeps_its_pictures_from_being_written_and_gets_them_later(
    client: TestClient, monkeypatch: pytest.MonkeyPatch, where: str
) -> None:
    body, key = {"seed": 1}, {"Idempotency-Key": "a"}
    with monkeypatch.context() as lacking:
        fail = mock.Mock(side_effect=SHORT["file descriptors"])
        store = jobs_of(client).repository.store
        lacking.setattr(*((encode, "_file", fail) if where == "encode" else (store.blobs, "_write", fail)))
        answer = client.post("/generate", json=body, headers=key)
    until(lambda: client.post("/generate", json=body, headers=key).status_code == 200, 10)

    assert (answer.status_code, answer.json()["code"], answer.headers["retry-after"]) == (503, "not-ready", "2")
    assert answer.json()["detail"].endswith(": file descriptors")


def test_a_picture_that_cannot_be_opened_now_is_asked_for_again(
    client: TestClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(service, "PATIENCE_S", 0.0)
    id = later(client, seed=1)
    until(lambda: status(client, id) == "succeeded", 10)
    (image,) = jobs_of(client).repository._ended[id].images.values()
    with monkeypatch.context() as lacking:
        lacking.setattr(image, "read", lambda: (_ for _ in ()).throw(SHORT["file descriptors"]))
        answer = client.get(f"/jobs/{id}/images/0")

    assert (answer.status_code, answer.json()["code"], answer.headers["retry-after"]) == (503, "not-ready", "2")
    assert client.get(f"/jobs/{id}/images/0").status_code == 200


def test_a_cancel_on_a_full_disk_frees_the_slot_and_is_answered(client: TestClient) -> None:
    jobs, backend = jobs_of(client), backend_of(client)
    backend.gate.clear()
    id, other = later(client, seed=1, steps=10), later(client, seed=2, steps=10)
    until(lambda: len(backend.specs) == 2, 10)
    make_room = without_room(jobs.repository.store)
    refused = client.delete(f"/jobs/{id}")
    left = read(client.get("/metrics").text)["ddpm_steps_waiting"]
    again = client.delete(f"/jobs/{id}")
    heard, code = watch(client, f"/jobs/{other}/stream", {"type": "cancel"})
    make_room()
    until(lambda: [client.delete(f"/jobs/{each}").json()["status"] for each in (id, other)] == ["cancelled"] * 2, 10)

    for answer in (refused, again):
        assert (answer.status_code, answer.json()["code"]) == (503, "storage-full")
        assert "the job was stopped" in answer.json()["detail"]
    assert (left, len(backend.given_up)) == (10, 2)
    assert (heard[-1]["problem"]["code"], code) == ("storage-full", 1013)


def test_a_caller_learns_that_its_pictures_cannot_be_written(client: TestClient) -> None:
    jobs, backend = jobs_of(client), backend_of(client)
    backend.gate.clear()
    with ThreadPoolExecutor(1) as callers:
        asked = callers.submit(client.post, "/generate", json={"seed": 1}, headers={"Idempotency-Key": "a"})
        until(lambda: backend.specs, 10)
        make_room = without_room(jobs.repository.store)
        open_gate(client)
        answer = asked.result(20)
    make_room()
    until(lambda: client.post("/generate", json={"seed": 1}, headers={"Idempotency-Key": "a"}).status_code == 200, 10)

    assert (answer.status_code, answer.json()["code"]) == (503, "storage-full")


DOORS: dict[str, Callable[[TestClient], Any]] = {
    "a new job": lambda client: client.post("/generate", json={"seed": 2}).json()["code"],
    "the same again": lambda client: client.post("/generate", headers={"Idempotency-Key": "a"}).json()["code"],
    "a job of old": lambda client: client.get("/jobs/0123456789abcdef01234567").json()["code"],
    "its trajectory": lambda client: client.get("/jobs/0123456789abcdef01234567/trajectory").json()["code"],
    "its image": lambda client: client.get("/jobs/0123456789abcdef01234567/images/0").json()["code"],
    "its end": lambda client: client.delete("/jobs/0123456789abcdef01234567").json()["code"],
    "a list": lambda client: client.get("/jobs").json()["code"],
    "a watcher": lambda client: watch(client, "/jobs/0123456789abcdef01234567/stream")[0][-1]["problem"]["code"],
    "a new stream": lambda client: watch(client, "/generate/stream", {"seed": 3})[0][-1]["problem"]["code"],
    "readiness": lambda client: client.get("/readyz").json()["code"],
}


async def rows_of(jobs: JobService) -> list[str]:
    """The ids of all jobs on disk."""
    return await jobs.repository.store._writer.ask(lambda db: [row["id"] for row in db.execute("SELECT id FROM jobs")])


def test_every_door_answers_while_the_disk_does_not(client: TestClient, monkeypatch: pytest.MonkeyPatch) -> None:
    jobs, answers, began = jobs_of(client).repository.store._writer, threading.Event(), threading.Event()
    usual = jobs._work

    def hang(request: Any) -> Any:
        began.set()
        answers.wait(60)
        return usual(request)

    with ThreadPoolExecutor(1) as callers:
        monkeypatch.setattr(jobs, "_work", hang)
        first = callers.submit(client.post, "/generate", json={"seed": 1}, headers=LATER)
        began.wait(20)
        said = {door: ask(client) for door, ask in DOORS.items()}
        opened = [client.get(path).status_code for path in ("/healthz", "/metrics", "/models", "/models/tiny")]
        why = ready(client)
        lost = first.result(20)
        answers.set()
    until(lambda: not ready(client), 10)
    portal = client.portal
    assert portal is not None
    until(lambda: portal.call(rows_of, jobs_of(client)) == [], 10)

    assert said == dict.fromkeys(DOORS, "storage-full")
    assert opened == [200] * 4
    assert why == "the disk is full, or cannot be written: journal"
    assert (lost.status_code, lost.json()["code"]) == (503, "storage-full")  # and so it is on disk, too: nothing
