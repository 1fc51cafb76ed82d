"""How a job that is run ends: cancelled, parked, or with what it was told meanwhile."""

import asyncio
import gc
import json
import random
import weakref
from collections.abc import AsyncGenerator, Callable
from contextlib import aclosing
from pathlib import Path

import pytest

from model.engine.events import Finished, Preview
from server.catalog import find_models
from server.engines.backend import Progress, Restarting, SampleEvent
from server.jobs.job import Job, State
from server.jobs.request import RequestContext
from server.jobs.service import JobService
from server.jobs.stream import PictureMessage, TextMessage
from server.metrics import Metrics
from server.settings import Settings
from server.store.store import Store
from server.worker.messages import Spec
from tests.server.fakes import FakeBackend, grey

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


class Wandering(FakeBackend):
    """Tells what an engine may tell of two pictures of nine steps, in an order that a test draws."""

    def __init__(self, draw: random.Random) -> None:
        super().__init__()
        self.draw = draw

    async def run(self, spec: Spec) -> AsyncGenerator[SampleEvent]:
        """Frames and progress, which may be old; restarts; both pictures."""
        done = {0: 0, 1: 0}
        while len(done):
            await asyncio.sleep(0)
            index = self.draw.choice([*done])
            match self.draw.randrange(12):
                case 0:
                    done = dict.fromkeys(done, 0)
                    yield Restarting(1.0)
                case 1 | 2:
                    yield Progress(dict(done))
                case 3:  # told before the last steps
                    yield Progress({index: self.draw.randint(0, done[index])})
                case _ if done[index] == 9:
                    del done[index]
                    yield Finished(index, grey(index), None)
                case _:
                    done[index] += 1
                    yield Preview(index, done[index], grey(done[index]), None)


def test_no_subscriber_is_told_of_less_progress_than_before(serve: Serve) -> None:
    """Behind a frame or a picture, too, whenever it subscribes and however slow it is, unless told of a restart."""
    body = json.dumps({"steps": 9, "n": 2, "seed": 1, "frames": {"every": 2}}).encode()
    draw = random.Random(0)

    async def follow(jobs: JobService, job: Job, wait: int) -> int:
        least, pictures, told = 0, 0, 0
        for _ in range(wait):
            await asyncio.sleep(0)
        async with aclosing(jobs.watch(job).messages()) as messages:
            async for message in messages:
                if isinstance(message, PictureMessage):
                    pictures += not message.passing
                    least = max(least, message.header["step"], 9 * pictures)
                elif message.body["type"] == "restarting":
                    least = 9 * pictures
                elif message.body["type"] == "progress":
                    assert message.body["step"] >= least
                    least, told = message.body["step"], told + 1
                for _ in range(draw.randrange(4)):
                    await asyncio.sleep(0)
        return told

    async def scene() -> int:
        jobs = serve(Wandering(draw))
        await jobs.start()
        job = await jobs.submit(body, RequestContext(shows=True))
        told = await asyncio.gather(*(follow(jobs, job, 5 * each) for each in range(8)))
        await jobs.close()
        return sum(told)

    assert sum(asyncio.run(scene()) for _ in range(8)) > 8
