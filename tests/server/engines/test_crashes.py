"""Whatever is killed, and whenever: every job that was accepted ends once, with the same bytes."""

import asyncio
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from starlette.testclient import TestClient

from tests.server.jobs import points
from tests.server.jobs.records import a_store
from tests.server.jobs.storm import storm
from tests.server.jobs.test_durability import ended, pictures

MANY = [pytest.mark.long, pytest.mark.timeout(900)]  # each kill costs a start, and other tests start servers too


@pytest.mark.parametrize(("kills", "jobs"), [(6, 40), pytest.param(30, 200, marks=MANY)])
def test_kills_under_sixteen_clients_lose_double_and_change_nothing(weights: Path, kills: int, jobs: int) -> None:
    log, wrong = storm(weights, kills, jobs)

    assert wrong == []
    assert log.kills >= kills
    assert len(log.accepted) >= jobs


@pytest.fixture
def counting(tmp_path: Path) -> Path:
    """A library that kills its process before the N-th call that changes a disk."""
    compiler = shutil.which("cc")
    if compiler is None:
        pytest.skip("needs a C compiler")
    source, library = tmp_path / "counting.c", tmp_path / "counting.so"
    source.write_text(points.SOURCE)
    subprocess.run([compiler, "-shared", "-fPIC", "-O1", "-o", library, source, "-ldl"], check=True)
    return library


def check(client: TestClient, place: Path) -> None:
    """What a client was told before the server died is so after it was started anew."""
    lines = (place / "told").read_text().splitlines() if (place / "told").exists() else []
    for line in lines:
        words: dict[str, Any] = json.loads(line)
        job = ended(client, words["id"])
        assert job["status"] == "succeeded"
        assert (job["webhook"] or {}).get("state") == ("pending" if words["seed"] == 1 else None)
        assert [image["seed"] for image in job["images"]] == list(range(words["seed"], words["seed"] + words["n"]))
        assert words.get("document", job) == job
        assert [tag for _, tag in pictures(client, job)] == [f'"{image["sha256"]}"' for image in job["images"]]
    while True:  # what comes with this key may be on its way again
        again = client.post("/generate", json={"seed": 3}, headers={"idempotency-key": "k"})
        if again.status_code != 409:
            break
    assert again.status_code == 200
    if lines and json.loads(lines[-1])["seed"] == 3:
        assert again.headers["x-job-id"] == json.loads(lines[-1])["id"]
    known = client.get("/jobs").json()["jobs"]
    assert len({job["id"] for job in known}) == len(known) <= 3
    assert {ended(client, job["id"])["status"] for job in known} == {"succeeded"}
    assert not list((place / "data" / "pictures").glob("*.part"))


def deaths(story: str, weights: Path, directory: Path, counting: Path) -> int:
    """Plays a story again and again, with a death at every point of it; how many there are."""
    play = [sys.executable, "-m", "tests.server.jobs.points", story, str(weights), str(directory)]
    ran = subprocess.run(play, env=os.environ | {"LD_PRELOAD": str(counting)}, capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr
    return int(ran.stdout)


@pytest.mark.parametrize("every", [4, pytest.param(1, marks=pytest.mark.long)])
def test_a_death_at_any_write_or_sync_keeps_what_was_promised(
    every: int, weights: Path, tmp_path: Path, counting: Path
) -> None:
    points_ = deaths("accepting", weights, tmp_path, counting)

    for n in range(1, points_ + 2, every):
        with points.start(weights, tmp_path / str(n)) as client:
            check(client, tmp_path / str(n))
    assert points_ >= 40


def test_a_death_while_the_store_is_made_leaves_nothing_that_is_in_the_way(
    weights: Path, tmp_path: Path, counting: Path
) -> None:
    async def opens(directory: Path) -> int:
        async with a_store(directory) as store:
            return len(await store.recover())

    points_ = deaths("creating", weights, tmp_path, counting)

    assert [asyncio.run(opens(tmp_path / str(n) / "data")) for n in range(1, points_ + 2)] == [0] * (points_ + 1)
    assert points_ >= 20
