"""Engines that die of what they are given: over processes that are played, to see what is held against which job."""

import asyncio
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import ClassVar

import pytest

from model.engine.events import Finished, Stats
from model.sampling.plan import resolve
from server.engines import supervisor
from server.engines.process import EngineProcess
from server.engines.supervisor import EngineSupervisor
from server.errors import EXIT_ENGINE, EngineFailed, SampleLost
from server.worker.messages import Cancel, Died, Heartbeat, Ready, Report, Spec, Start, Step, Submit
from tests.model.tiny import PROCESS
from tests.server.fakes import FakeBackend, grey

START = Start(
    models=(("tiny", Path("tiny")),),
    device="cpu",
    dtype="auto",
    slots=4,
    threads=1,
    exact=True,
    log_level="info",
)
SAMPLING = resolve(PROCESS, steps=5)


class Played(EngineProcess):
    """An engine process without a process: a test reads what it is sent, and says what it reports."""

    def __init__(self) -> None:
        super().__init__()
        self.messages: asyncio.Queue[Submit | Cancel] = asyncio.Queue()

    def send(self, message: Submit | Cancel) -> None:
        self.messages.put_nowait(message)

    async def submitted(self) -> Submit:
        """What it is to make next."""
        while not isinstance(message := await self.messages.get(), Submit):
            pass
        return message


class Frail(Played):
    """An engine that dies as soon as a sample is seated, before the first step."""

    async def run(self, start: Start, receive: Callable[[object], None], hangs: Callable[[], bool]) -> None:
        receive(Ready(FakeBackend().models, []))
        submitted = await self.submitted()
        receive(Report(Stats(), [], [(id, 0) for id in submitted.ids]))


class Stillborn(EngineProcess):
    """An engine that dies before it is ready, of want of memory."""

    async def run(self, start: Start, receive: Callable[[object], None], hangs: Callable[[], bool]) -> None:
        self.end(Died("memory", ""))


class Breaking(Played):
    """An engine whose device breaks for good after its first picture: this one dies in a step, and those that replace
    it when their loads run the net."""

    broken = False

    async def run(self, start: Start, receive: Callable[[object], None], hangs: Callable[[], bool]) -> None:
        if not Breaking.broken:
            receive(Ready(FakeBackend().models, []))
            (id,) = (await self.submitted()).ids
            receive(Report(Stats(steps=5), [Finished(id, grey(1), None)], []))
            receive(Report(Stats(steps=5), [], [(id, 0) for id in (await self.submitted()).ids]))
        Breaking.broken = True
        self.end(Died("cuda", ""))


class Slow(Played):
    """An engine whose steps take twelve seconds. It was idle for a while, and is given a picture."""

    found: ClassVar[dict[str, bool]] = {}  # whether it is taken to hang after so long a silence

    async def run(self, start: Start, receive: Callable[[object], None], hangs: Callable[[], bool]) -> None:
        def hangs_after(seconds: float) -> bool:
            self.heard_at = time.monotonic() - seconds
            return hangs()

        receive(Ready(FakeBackend().models, [Step("tiny", 4, 12.0)]))
        for _ in range(100):
            receive(Report(Stats(), [], [], Heartbeat([], [], 0)))
        self.found["idle, 9 s"] = hangs_after(9.0)
        (id,) = (await self.submitted()).ids
        self.found.update({f"in a step, {seconds} s": hangs_after(seconds) for seconds in (400, 500)})
        receive(Report(Stats(steps=5), [Finished(id, grey(1), None)], []))
        await self.submitted()


@asynccontextmanager
async def supervised(restarts: int, failures: list[EngineFailed]) -> AsyncIterator[EngineSupervisor]:
    """A backend whose engines may be replaced so often."""
    backend = EngineSupervisor(START, restarts, failures.append)
    await backend.start()
    try:
        yield backend
    finally:
        await backend.close()


async def run(backend: EngineSupervisor, seed: int, alone: bool = False) -> None:
    """A job of one picture."""
    async for _ in backend.run(Spec(model="tiny", seeds=(seed,), sampling=SAMPLING, alone=alone)):
        pass


def test_an_engine_may_be_silent_for_as_long_as_its_steps_take_also_after_an_idle_time(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    async def scene() -> None:
        async with supervised(2, []) as backend:
            await asyncio.wait_for(run(backend, 1), 30)

    monkeypatch.setattr(supervisor, "EngineProcess", Slow)
    monkeypatch.setattr(Slow, "found", {})
    asyncio.run(scene())

    assert Slow.found == {"idle, 9 s": True, "in a step, 400 s": False, "in a step, 500 s": True}


def test_any_number_of_jobs_that_kill_at_their_first_step_fail_one_by_one_and_the_engine_is_replaced(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    async def scene() -> list[EngineFailed]:
        failures: list[EngineFailed] = []
        async with supervised(2, failures) as backend:
            for seed in range(3):
                with pytest.raises(SampleLost):
                    await asyncio.wait_for(run(backend, seed), 30)
        return failures

    monkeypatch.setattr(supervisor, "EngineProcess", Frail)

    assert asyncio.run(scene()) == []


def test_a_device_that_breaks_while_it_serves_ends_the_server_and_fails_no_job(monkeypatch: pytest.MonkeyPatch) -> None:
    async def scene() -> list[EngineFailed]:
        failures: list[EngineFailed] = []
        async with supervised(2, failures) as backend:
            await asyncio.wait_for(run(backend, 1), 30)
            jobs = [run(backend, seed) for seed in (2, 3)]
            outcomes = await asyncio.wait_for(asyncio.gather(*jobs, return_exceptions=True), 30)
            assert [type(outcome) for outcome in outcomes] == [EngineFailed] * 2  # at which a job is parked
        return failures

    monkeypatch.setattr(supervisor, "EngineProcess", Breaking)
    monkeypatch.setattr(Breaking, "broken", False)

    assert [failure.exit_code for failure in asyncio.run(scene())] == [EXIT_ENGINE]


def test_an_engine_that_dies_with_no_sample_on_it_is_given_up_and_what_helps_is_named(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    async def scene() -> list[EngineFailed]:
        failures: list[EngineFailed] = []
        async with supervised(2, failures) as backend:
            with pytest.raises(EngineFailed):
                await asyncio.wait_for(run(backend, 1), 30)
        return failures

    monkeypatch.setattr(supervisor, "EngineProcess", Stillborn)

    (failure,) = asyncio.run(scene())

    assert failure.exit_code == EXIT_ENGINE
    assert "DDPM_SLOTS" in str(failure)
