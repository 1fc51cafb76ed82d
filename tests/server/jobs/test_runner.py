"""How a job that is run ends: cancelled, parked, or with what it was told meanwhile."""

import asyncio
import gc
import json
import weakref
from collections.abc import AsyncGenerator, Callable
from contextlib import aclosing
from pathlib import Path

import pytest

from server.catalog import find_models
from server.engines.backend import Progress, Restarting, SampleEvent
from server.jobs.job import State
from server.jobs.request import RequestContext
from server.jobs.service import JobService
from server.jobs.stream import TextMessage
from server.metrics import Metrics
from server.settings import Settings
from server.store.store import Store
from server.worker.messages import Spec
from tests.server.fakes import FakeBackend

BODY = json.dumps({"steps": 3, "n": 2, "seed": 1}).encode()
Serve = Callable[[FakeBackend], JobService]


@pytest.fixture
def serve(weights: Path, tmp_path: Path) -> Serve:
    """Makes the jobs of a server over a backend."""
    settings = Settings(weights=weights, data_dir=tmp_path)
    cards = find_models(weights)
    return lambda backend: JobService(settings, cards, backend, Store(tmp_path), Metrics())


class Slow(FakeBackend):
    """Takes several turns of the event loop to close a run."""

    async def run(self, spec: Spec) -> AsyncGenerator[SampleEvent]:
        """All pictures of `spec`."""
        try:
            async with aclosing(super().run(spec)) as events:
                async for event in events:
                    yield event
        finally:
            for _ in range(3):
                await asyncio.sleep(0)


class Stuck(FakeBackend):
    """Begins, restarts, and makes nothing more."""

    def __init__(self) -> None:
        super().__init__()
        self.begun = asyncio.Event()
        self.held: list[weakref.ref[set[int]]] = []

    async def run(self, spec: Spec) -> AsyncGenerator[SampleEvent]:
        """A step of each picture."""
        frames = set(spec.frames)
        self.held.append(weakref.ref(frames))
        yield Progress({0: 1, 1: 1})
        yield Restarting(5.0)
        self.begun.set()
        await asyncio.Event().wait()
        assert frames is not None  # it is held as long as this frame is


def test_a_drain_does_not_revoke_a_cancel(serve: Serve) -> None:
    async def scene() -> State:
        backend = Slow()
        backend.gate.clear()
        jobs = serve(backend)
        await jobs.start()
        job = await jobs.submit(BODY, RequestContext())
        while not backend.specs:
            await asyncio.sleep(0)
        cancel = asyncio.create_task(jobs.cancel(job))
        await asyncio.sleep(0)
        await jobs.drain(0)
        await cancel
        await jobs.close()
        return job.state

    assert asyncio.run(scene()) is State.CANCELLED


def test_the_first_subscriber_of_a_job_that_restarts_is_told_so(serve: Serve) -> None:
    async def scene() -> list[str]:
        backend = Stuck()
        jobs = serve(backend)
        await jobs.start()
        job = await jobs.submit(BODY, RequestContext())
        await backend.begun.wait()
        heard = list[str]()
        async with aclosing(jobs.watch(job).messages()) as messages:
            async for message in messages:
                assert isinstance(message, TextMessage)
                heard.append(message.body["type"])
                if len(heard) == 2:
                    break
        await jobs.close()
        return heard

    assert asyncio.run(scene()) == ["started", "restarting"]


def test_a_cancelled_job_holds_nothing_of_its_run(serve: Serve) -> None:
    async def scene() -> list[bool]:
        backend = Stuck()
        jobs = serve(backend)
        await jobs.start()
        job = await jobs.submit(BODY, RequestContext())
        await backend.begun.wait()
        await jobs.cancel(job)
        gc.collect()
        alive = [held() is not None for held in backend.held]
        await jobs.close()
        return alive

    assert asyncio.run(scene()) == [False]
