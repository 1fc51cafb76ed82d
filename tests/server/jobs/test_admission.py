"""More is asked for than can be done: what is refused is refused at once and told when to come back, and the rest is
done as if nobody else had asked."""

import asyncio
import statistics
import time
from collections.abc import Iterator, Sequence
from contextlib import aclosing
from dataclasses import replace
from pathlib import Path

import pytest
from prometheus_client.parser import text_string_to_metric_families
from starlette.testclient import TestClient

from benchmarks.overload import flood
from model.engine.events import Finished
from model.sampling.plan import resolve
from model.sampling.schedule import Process, linear
from server.engines.supervisor import EngineSupervisor
from server.settings import Settings
from server.web.app import create_app
from server.worker.messages import Spec, Start
from tests.server.conftest import Server
from tests.server.fakes import FakeBackend
from tests.server.jobs.test_metrics import balance, read
from tests.waiting import until, until_async

pytestmark = pytest.mark.alone

LATER = {"prefer": "respond-async"}
ROOM, STEPS = 64, 40  # jobs that fit, and their steps


@pytest.fixture
def full(weights: Path, tmp_path: Path) -> Iterator[TestClient]:
    """The application over a backend that finishes nothing until it is told to, with room for a few frames."""
    backend = FakeBackend()
    settings = Settings(weights=weights, data_dir=tmp_path, max_queued_jobs=3, max_live_bytes=1 << 20)
    with TestClient(create_app(settings, backend), raise_server_exceptions=False) as client:
        backend.gate.clear()
        yield client
        backend.gate.set()


def is_idle(seen: dict[str, float]) -> bool:
    """Whether a scrape shows no work. A job whose steps are done runs on until its end is on disk."""
    return not (seen["ddpm_steps_waiting"] or seen["ddpm_jobs_running"])


def test_a_thousand_at_once_are_all_answered_and_those_for_whom_there_is_room_are_served(long_weights: Path) -> None:
    server = Server(long_weights, DDPM_MAX_QUEUED_STEPS=str(ROOM * STEPS), DDPM_SLOTS="8").wait_until_ready()
    try:
        replies = asyncio.run(flood(server.port, 1000, STEPS))
        until(lambda: is_idle(read(server.client.get("/metrics").text)))
        text = server.client.get("/metrics").text
    finally:
        server.stop()

    seen = read(text)
    refused = [reply for reply in replies if reply.status == 429]
    accepted = [reply for reply in replies if reply.status in (200, 202)]
    assert len(refused) + len(accepted) == 1000
    assert len(accepted) >= ROOM
    assert all(1 <= int(reply.headers["retry-after"]) <= 60 for reply in refused)
    assert max(reply.after_s for reply in replies if reply.status != 200) < 2
    families = {family.name: family for family in text_string_to_metric_families(text)}
    within = {s.labels["le"]: s.value for s in families["ddpm_refusal_seconds"].samples if s.name.endswith("bucket")}
    assert within["0.02"] >= 0.99 * within["+Inf"] and within["+Inf"] == len(refused)
    assert balance(seen)[0] == balance(seen)[1] == len(accepted)
    assert seen["ddpm_jobs_total{succeeded}"] == len(accepted)


def test_what_live_jobs_may_come_to_hold_is_bounded(full: TestClient) -> None:
    many = {"steps": 30, "n": 4, "frames": {"every": 1, "kind": "both"}}  # 244 frames, half a MiB in all
    too_many = full.post("/generate", json={**many, "n": 64})
    assert (too_many.status_code, too_many.json()["errors"][0]["pointer"]) == (422, "/frames")

    jobs = [full.post("/generate", json=many, headers=LATER) for _ in range(2)]
    assert [job.status_code for job in jobs] == [202, 429]
    assert int(jobs[1].headers["retry-after"]) >= 1
    assert "bytes" in jobs[1].json()["detail"]

    full.delete(f"/jobs/{jobs[0].json()['id']}")
    assert full.post("/generate", json=many, headers=LATER).status_code == 202


def test_a_job_holds_no_more_than_was_reserved_for_it(client: TestClient) -> None:
    body = {"steps": 30, "n": 4, "frames": {"every": 1, "kind": "both"}}
    id = client.post("/generate", json=body, headers=LATER).json()["id"]
    jobs = client.app.state.jobs  # type: ignore[attr-defined]
    until(lambda: client.get(f"/jobs/{id}").json()["status"] == "succeeded")
    job = jobs.repository.in_memory(id)

    assert 0.8 * job.request.size_bytes < job.size_bytes <= job.request.size_bytes
    capacity = jobs.admission.capacity
    assert capacity.size_bytes == capacity.jobs == capacity.steps == 0


def test_jobs_are_counted_and_who_is_refused_hears_when_one_of_them_will_have_ended(full: TestClient) -> None:
    for _ in range(3):
        assert full.post("/generate", json={"steps": 30, "n": 2}, headers=LATER).status_code == 202
    refused = full.post("/generate", json={"steps": 1})

    assert (refused.status_code, refused.json()["code"]) == (429, "queue-full")
    assert refused.headers["retry-after"] == "6"  # 60 image-steps of a tenth of a second


def test_a_deadline_that_cannot_be_met_is_given_up_at_once(full: TestClient) -> None:
    began = time.monotonic()
    answer = full.post("/generate", json={"steps": 30, "deadline_s": 1})  # a step takes a tenth of a second

    assert (answer.status_code, answer.json()["code"]) == (504, "deadline-passed")
    assert "cannot be met" in answer.json()["detail"]
    assert time.monotonic() - began < 0.5
    assert full.get("/jobs").json()["jobs"][0]["status"] == "failed"


def test_a_deadline_passes_for_one_who_waits_too(full: TestClient) -> None:
    began = time.monotonic()
    answer = full.post("/generate", json={"steps": 1, "deadline_s": 0.2})

    assert (answer.status_code, answer.json()["detail"]) == (504, "the deadline of 0.2 s was not met")
    assert time.monotonic() - began < 1


async def make(backend: EngineSupervisor, spec: Spec) -> float:
    """Seconds until these pictures are made."""
    began = time.monotonic()
    async with aclosing(backend.run(spec)) as events:
        assert len([event async for event in events if isinstance(event, Finished)]) == len(spec.seeds)
    return time.monotonic() - began


async def make_beside(backend: EngineSupervisor, company: Sequence[Spec], spec: Spec, times: int) -> float:
    """The same beside that company, which is given up afterwards: the median of so many times."""
    beside = [asyncio.create_task(make(backend, each)) for each in company]
    await asyncio.sleep(0.3)  # the engine is full
    took = [await make(backend, replace(spec, seeds=(i,))) for i in range(times)]
    for task in beside:
        task.cancel()
    await asyncio.gather(*beside, return_exceptions=True)
    return statistics.median(took)


@pytest.mark.long
def test_beside_five_thousand_pictures_of_another_owner_one_picture_hardly_waits(long_weights: Path) -> None:
    """Held against what it takes where each owner has half of the image-steps, in rounds, as the machine's speed varies
    from one second to the next."""
    process = Process(linear(1000, 1e-4, 0.02))
    start = Start(
        models=(("long", long_weights / "long"),),
        device="cpu",
        dtype="auto",
        slots=4,
        threads=1,
        exact=True,
        log_level="warning",
    )
    short = Spec(model="long", seeds=(0,), sampling=resolve(process, steps=50), owner="other")
    slow, many = resolve(process, steps=1000), resolve(process, steps=200)
    three = Spec(model="long", seeds=(1, 2, 3), sampling=slow, owner="flood")  # they leave it one seat of four
    flood = [Spec(model="long", seeds=tuple(range(64)), sampling=many, owner="flood") for _ in range(79)]

    async def compare(rounds: int) -> list[float]:
        backend = EngineSupervisor(start, 3, print)

        async def ready() -> bool:
            return backend.trouble is None

        await backend.start()
        await until_async(ready)
        ratios = []
        for _ in range(rounds):
            fair_s = await make_beside(backend, [three], short, 3)
            ratios.append(await make_beside(backend, flood, short, 3) / fair_s)
        await backend.close()
        return ratios

    assert statistics.median(asyncio.run(compare(7))) <= 1.5
