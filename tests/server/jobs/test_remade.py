"""Pictures that were damaged on disk: all of a job are made again at once, and few threads wait for them."""

import errno
from collections.abc import AsyncGenerator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from model.engine.events import Finished
from server.engines.backend import SampleEvent
from server.errors import Gone
from server.store.schema import PICTURES
from server.worker.messages import Spec
from tests.server.fakes import grey
from tests.server.store import flips
from tests.waiting import until

MANY = {"seed": 1, "steps": 2, "n": 8}


def damage(picture: Path) -> None:
    """Changes every byte of a file."""
    picture.write_bytes(picture.read_bytes()[::-1])


def test_all_damaged_pictures_of_a_job_are_made_again_in_one_run_within_one_deadline(
    weights: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with flips.start(weights, tmp_path) as client:
        whole = client.post("/generate", json=MANY).content
        sound = client.post("/generate", json={"seed": 100, "steps": 2}).headers["x-job-id"]
        keep = client.get(f"/jobs/{sound}").json()["images"][0]["sha256"]
    before = flips.snapshot(tmp_path / PICTURES)
    for name in before.keys() - {keep}:
        damage(tmp_path / PICTURES / name)
    monkeypatch.setattr("server.jobs.repository.REMAKE_S", 0.5)
    with flips.start(weights, tmp_path, open_gate=False) as client, ThreadPoolExecutor(100) as callers:
        asked = [callers.submit(client.post, "/generate", json=MANY) for _ in range(99)]
        fine = callers.submit(client.get, f"/jobs/{sound}/images/0").result()
        answers = [each.result() for each in asked]
        backend = client.app.state.jobs.backend  # type: ignore[attr-defined]
        assert client.portal is not None
        client.portal.call(backend.gate.set)
        until(lambda: client.post("/generate", json=MANY).status_code == 200, 10, pause_s=0.01)
        again = client.post("/generate", json=MANY)

    assert fine.status_code == 200
    assert {(answer.status_code, "retry-after" in answer.headers) for answer in answers} == {(503, True)}
    assert [spec.indices for spec in backend.specs] == [tuple(range(8))]
    assert (again.headers["x-cache"], again.content) == ("hit", whole)
    assert flips.snapshot(tmp_path / PICTURES) == before


def test_a_picture_that_comes_out_otherwise_takes_none_of_its_job_with_it(weights: Path, tmp_path: Path) -> None:
    with flips.start(weights, tmp_path) as client:
        job = client.post("/generate", json=MANY).headers["x-job-id"]
        images = client.get(f"/jobs/{job}").json()["images"]
    for image in images:
        damage(tmp_path / PICTURES / image["sha256"])
    with flips.start(weights, tmp_path) as client:
        jobs = client.app.state.jobs  # type: ignore[attr-defined]
        usual = jobs.backend.run

        async def run(spec: Spec) -> AsyncGenerator[SampleEvent]:
            async for event in usual(spec):
                yield Finished(3, grey(0), None) if isinstance(event, Finished) and event.id == 3 else event

        jobs.backend.run = run
        statuses = [client.get(image["url"]).status_code for image in images]

    assert statuses == [200, 200, 200, 410, 200, 200, 200, 200]
    assert jobs.repository.mismatches == 2  # when all were made again, and when it alone was


def test_a_picture_that_the_disk_cannot_read_is_damaged(
    weights: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with flips.start(weights, tmp_path) as client:
        sound, usual, failures = client.post("/generate", json=MANY).content, Path.read_bytes, [errno.EIO] * 2

        def read(path: Path) -> bytes:
            if path.parent.name == PICTURES and failures:  # once when it is asked for, once when it is checked
                raise OSError(failures.pop(), "Input/output error")
            return usual(path)

        monkeypatch.setattr(Path, "read_bytes", read)
        again = client.post("/generate", json=MANY)
        backend = client.app.state.jobs.backend  # type: ignore[attr-defined]

    assert (again.status_code, again.headers["x-cache"], again.content) == (200, "hit", sound)
    assert [spec.indices for spec in backend.specs[1:]] == [(0,)]


def test_pictures_that_were_made_again_a_moment_ago_are_not_made_once_more(weights: Path, tmp_path: Path) -> None:
    with flips.start(weights, tmp_path) as client:
        client.post("/generate", json=MANY)
        job = client.post("/generate", json=MANY).headers["x-job-id"]  # of the cache: its pictures are on disk
        jobs = client.app.state.jobs  # type: ignore[attr-defined]
        assert client.portal is not None
        found = client.portal.call(jobs.repository.find, job, None)
        same = client.portal.call(jobs.repository._remake, found, Gone("this picture was damaged on disk"))

    assert same == dict.fromkeys(range(8), True)
    assert len(jobs.backend.specs) == 1
