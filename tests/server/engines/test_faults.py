"""Faults in an engine: every job comes out right, and only one that kills engines fails."""

import asyncio
import os
import signal
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.server.conftest import Server
from tests.server.faults import faulty
from tests.server.jobs.test_metrics import balance, read
from tests.server.jobs.test_stream import understand, watching
from tests.waiting import until_async

POISON = 666
WATCHED = {"seed": 1000, "steps": 30, "n": 64}  # it still runs when an engine is killed
JOBS = [{"seed": seed, "steps": 12 + seed % 19} for seed in range(100, 120)]
AWAY_S = 5.0  # until work is taken again, in addition to the start of an engine


@pytest.fixture(scope="module")
def expected(server: Server) -> list[bytes]:
    """The pictures of JOBS, each made alone."""
    return [server.client.post("/generate", json=job).content for job in JOBS]


class Outcome:
    """What all jobs came to. `seen_s`, `down_s`: seconds from the signal until the server first and last said that it
    takes no work. `heard`: what a subscriber of the long job was sent."""

    def __init__(self) -> None:
        self.answers: list[httpx.Response] = []
        self.heard: list[dict[str, Any]] = []
        self.seen_s = 0.0
        self.down_s = 0.0
        self.metrics: dict[str, float] = {}


async def run(server: Server, jobs: Sequence[dict[str, Any]], kill: int | None = None) -> Outcome:
    """Runs all jobs at once, and a long one with a subscriber. kill: a signal for the engine, once it works."""
    outcome, limits = Outcome(), httpx.Limits(max_connections=None)
    async with httpx.AsyncClient(base_url=server.client.base_url, timeout=60, limits=limits) as client:

        async def make(job: dict[str, Any]) -> httpx.Response:
            return await client.post("/generate", json=job)

        async def view(job: dict[str, Any]) -> None:
            path = (await client.post("/generate", json=job, headers={"prefer": "respond-async"})).headers["location"]
            async with watching(server, f"{path}/stream") as socket:
                outcome.heard = [understand(text) async for text in socket]

        async def slots_are_full() -> bool:
            return read((await client.get("/metrics")).text)["ddpm_slots_used"] == 4

        async def probe() -> None:
            since = time.monotonic()
            while True:
                if (await client.get("/readyz")).status_code == 503:
                    outcome.down_s = time.monotonic() - since
                    outcome.seen_s = outcome.seen_s or outcome.down_s
                await asyncio.sleep(0.02)

        viewing = asyncio.create_task(view(WATCHED))
        making = [asyncio.create_task(make(job)) for job in jobs]
        if kill is not None:
            await until_async(slots_are_full)
            os.kill(server.engine_pid, kill)
        probing = asyncio.create_task(probe())
        outcome.answers = list(await asyncio.gather(*making))
        await viewing
        probing.cancel()
        await asyncio.wait({probing})
        outcome.metrics = read((await client.get("/metrics")).text)
    return outcome


def faulty_server(weights: Path, *faults: dict[str, Any], **variables: str) -> Server:
    """A server whose engine has these faults."""
    return Server(weights, **faulty(*faults), **variables).wait_until_ready()


@pytest.fixture
def once(tmp_path: Path) -> Iterator[str]:
    """A file by which a fault knows that it has happened."""
    yield str(tmp_path / "happened")


@pytest.mark.alone
@pytest.mark.parametrize(
    ("fault", "cause"),
    [
        pytest.param({"do": "cuda", "seed": 107, "step": 5}, "cuda", marks=pytest.mark.long),
        (signal.SIGKILL, "died"),
        pytest.param(signal.SIGSTOP, "hung", marks=pytest.mark.long),
    ],
    ids=lambda value: str(value["do"] if isinstance(value, dict) else value),
)
def test_an_engine_that_dies_once_costs_no_job_a_picture(
    fault: "dict[str, Any] | signal.Signals", cause: str, weights: Path, once: str, expected: list[bytes]
) -> None:
    if isinstance(fault, dict):
        server, kill = faulty_server(weights, fault | {"once": once}), None
    else:
        server, kill = Server(weights).wait_until_ready(), int(fault)
    try:
        outcome = asyncio.run(run(server, JOBS, kill))
    finally:
        code, _ = server.stop()

    assert [answer.content for answer in outcome.answers] == expected
    restarts = {name: value for name, value in outcome.metrics.items() if "restarts_total" in name}
    assert restarts == {f"ddpm_engine_restarts_total{{{cause}}}": 1}
    types = [message["type"] for message in outcome.heard if "type" in message]
    assert (types.count("restarting"), types[-1]) == (1, "succeeded")
    assert 0 < outcome.down_s < AWAY_S + server.started_s
    if kill == signal.SIGKILL:
        assert outcome.seen_s < 1
    assert balance(outcome.metrics)[0] == balance(outcome.metrics)[1]
    assert code == 0


@pytest.mark.long
def test_memory_that_runs_out_makes_the_batch_smaller_and_no_job_fails(weights: Path, expected: list[bytes]) -> None:
    server = faulty_server(weights, {"do": "memory", "bucket": 4})
    try:
        outcome = asyncio.run(run(server, JOBS))
        pid = server.engine_pid
        assert asyncio.run(run(server, JOBS)).metrics["ddpm_out_of_memory_total"] == 1  # it has been remembered
        assert server.engine_pid == pid
    finally:
        server.stop()

    assert [answer.content for answer in outcome.answers] == expected
    assert not any("restarts_total" in name for name in outcome.metrics)
    assert outcome.metrics["ddpm_out_of_memory_total"] == 1


def test_a_picture_that_is_not_finite_fails_and_its_neighbours_keep_their_bytes(
    weights: Path, expected: list[bytes]
) -> None:
    server = faulty_server(weights, {"do": "nan", "seed": 107, "step": 7})
    try:
        outcome = asyncio.run(run(server, JOBS))
    finally:
        server.stop()

    broken = outcome.answers[7]
    assert (broken.status_code, broken.json()["code"]) == (500, "sample-failed")
    assert "not finite" in broken.json()["detail"]
    others = [answer.content for answer in outcome.answers[:7] + outcome.answers[8:]]
    assert others == expected[:7] + expected[8:]


@pytest.mark.long
@pytest.mark.parametrize("step", [0, 9])
def test_of_twenty_jobs_beside_a_poison_job_none_fails(step: int, weights: Path, expected: list[bytes]) -> None:
    server = faulty_server(weights, {"do": "die", "seed": POISON, "step": step}, DDPM_ENGINE_RESTARTS="2")
    try:
        outcome = asyncio.run(run(server, [*JOBS, {"seed": POISON, "steps": 30}]))
        pid = server.wait_until_ready().engine_pid
        after = asyncio.run(run(server, JOBS))
        assert server.engine_pid == pid
    finally:
        server.stop()

    *others, poison = outcome.answers
    assert [answer.content for answer in others] == expected
    assert (poison.status_code, poison.json()["code"]) == (500, "sample-failed")
    assert outcome.metrics["ddpm_engine_restarts_total{died}"] <= 4
    assert [answer.content for answer in after.answers] == expected
