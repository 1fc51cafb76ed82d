"""Models that are given up, and what is left of an engine that is: scripted engine processes say what real ones do."""

import asyncio
import errno
import logging
import signal
from collections.abc import Callable, Sequence
from contextlib import aclosing
from dataclasses import replace

import pytest

from model.engine.events import Finished, Stats
from model.sampling.plan import resolve
from server.engines import supervisor
from server.engines.process import EngineProcess
from server.engines.supervisor import EngineSupervisor
from server.errors import EngineFailed, ModelBroken
from server.worker.messages import Changed, Lacking, Ready, Report, Spec, Start
from tests.model.tiny import PROCESS
from tests.server.fakes import FakeBackend, grey

STATUS = FakeBackend().models["tiny"]
OLD, NEW = replace(STATUS, digest="old"), replace(STATUS, digest="new")
WAITS = "waits"  # until it is ended, at the end of a script; else the process dies
Script = Sequence[object]


class Scripted(EngineProcess):
    """Says the next of the scripts, and ends."""

    scripts: list[Script] = []
    starts: list[Start] = []
    dies_by = 0

    async def run(self, start: Start, receive: Callable[[object], None], hangs: Callable[[], bool]) -> None:
        """As a process does that is spawned."""
        self.starts.append(start)
        for message in self.scripts.pop(0):
            if message == WAITS:
                return await self.over.wait() and None
            if isinstance(message, Lacking):
                return self.end(message)
            receive(message)
            await asyncio.sleep(0)
            if self.refused is not None:
                return
        self.signal = self.dies_by


def supervise(
    monkeypatch: pytest.MonkeyPatch, scripts: Sequence[Script], restarts: int = 5
) -> tuple[EngineSupervisor, "asyncio.Future[EngineFailed]"]:
    """A supervisor of engines with these scripts, and how it fails for good."""
    monkeypatch.setattr(supervisor, "EngineProcess", Scripted)
    monkeypatch.setattr(Scripted, "scripts", list(scripts))
    monkeypatch.setattr(Scripted, "starts", [])
    failed = asyncio.get_running_loop().create_future()
    start = Start(models=(), device="cpu", dtype="auto", slots=4, threads=1, exact=True, log_level="info")
    return EngineSupervisor(start, restarts, failed.set_result), failed


async def until(condition: Callable[[], bool]) -> None:
    """Waits for a condition."""
    async with asyncio.timeout(20):
        while not condition():
            await asyncio.sleep(0.01)


def spec(job: str, model: str = "tiny", alone: bool = False) -> Spec:
    """One picture of a job."""
    return Spec(model=model, seeds=(1,), sampling=resolve(PROCESS, steps=5), job=job, alone=alone)


def test_a_model_that_was_given_up_stays_so_when_it_is_evicted(monkeypatch: pytest.MonkeyPatch) -> None:
    async def scene() -> None:
        first = [Ready({"a": OLD, "b": OLD}, [])]
        second = [Ready({"a": NEW, "b": OLD}, []), Changed("a", replace(NEW, loaded=False)), WAITS]
        engine, _ = supervise(monkeypatch, [first, second])
        await engine.start()
        await until(lambda: engine.models.get("a", OLD).loaded is False)
        with pytest.raises(ModelBroken, match="changed"):
            async with aclosing(engine.run(spec("x", "a"))) as events:
                await anext(events)
        await engine.close()

    asyncio.run(scene())


def test_models_that_change_one_after_the_other_end_the_server_with_the_last(monkeypatch: pytest.MonkeyPatch) -> None:
    async def scene() -> EngineFailed:
        statuses = [{"a": OLD, "b": OLD}, {"a": NEW, "b": OLD}, {"a": NEW, "b": NEW}]
        scripts: list[Script] = [[Ready(each, [])] for each in statuses]
        engine, failed = supervise(monkeypatch, scripts)
        await engine.start()
        return await asyncio.wait_for(failed, 20)

    assert asyncio.run(scene()).exit_code == 3


def test_engines_that_somebody_kills_are_replaced_five_times_as_often(monkeypatch: pytest.MonkeyPatch) -> None:
    async def scene() -> int:
        monkeypatch.setattr(Scripted, "dies_by", signal.SIGKILL)
        engine, failed = supervise(monkeypatch, [[] for _ in range(20)], restarts=1)
        await engine.start()
        await asyncio.wait_for(failed, 20)
        return len(Scripted.starts)

    assert asyncio.run(scene()) == 6


def test_an_engine_that_has_failed_for_good_uses_no_slots(monkeypatch: pytest.MonkeyPatch) -> None:
    async def scene() -> Stats:
        busy = Report(Stats(seated=3, waiting=2), [], [])
        engine, failed = supervise(monkeypatch, [[Ready({"tiny": STATUS}, []), busy]], restarts=0)
        await engine.start()
        await asyncio.wait_for(failed, 20)
        return engine.health.stats

    stats = asyncio.run(scene())
    assert (stats.seated, stats.waiting) == (0, 0)


def test_others_are_assigned_when_an_isolated_run_ends_whose_reader_is_busy(monkeypatch: pytest.MonkeyPatch) -> None:
    async def scene() -> list[str]:
        engine, _ = supervise(monkeypatch, [[Ready({"tiny": STATUS}, []), WAITS]])
        await engine.start()
        await until(lambda: engine.trouble is None)
        free = asyncio.Event()

        async def read(asked: Spec) -> None:
            async with aclosing(engine.run(asked)) as events:
                async for _ in events:
                    await free.wait()  # as for room on the disk

        readers = [asyncio.create_task(read(spec("a", alone=True)))]
        await until(lambda: bool(engine._in_flight.assigned))
        readers.append(asyncio.create_task(read(spec("b"))))
        await until(lambda: bool(engine._in_flight.waiting))
        (alone,) = engine._in_flight.assigned
        engine._receive(Report(Stats(), [Finished(next(iter(alone.samples)), grey(0), None)], []))
        assigned = [run.spec.job for run in engine._in_flight.assigned]
        for reader in readers:
            reader.cancel()
        await asyncio.gather(*readers, return_exceptions=True)
        await engine.close()
        return assigned

    assert asyncio.run(scene()) == ["b"]


@pytest.mark.parametrize(
    ("number", "script", "told"),
    [
        (signal.SIGILL, [Ready({"tiny": STATUS}, [])], "an instruction that this processor lacks"),
        (signal.SIGSEGV, [], "that was loading a model"),
        (signal.SIGSEGV, [Ready({"tiny": STATUS}, [])], ""),
        (signal.SIGKILL, [], ""),
    ],
    ids=["illegal instruction", "crash in a load", "crash in a step", "killed in a load"],
)
def test_what_native_code_ended_is_run_by_torch_in_the_next_engine(
    monkeypatch: pytest.MonkeyPatch, number: int, script: Script, told: str
) -> None:
    async def scene() -> str:
        monkeypatch.setattr(Scripted, "dies_by", number)
        engine, _ = supervise(monkeypatch, [script, [WAITS]])
        await engine.start()
        await until(lambda: len(Scripted.starts) == 2)
        await engine.close()
        return Scripted.starts[1].unusable

    unusable = asyncio.run(scene())
    assert told in unusable
    assert bool(told) == bool(unusable)


@pytest.mark.parametrize("lack", [OSError(errno.ENFILE, "Too many open files in system"), MemoryError()])
def test_an_engine_that_finds_too_little_to_begin_has_not_died(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, lack: Exception
) -> None:
    async def scene() -> tuple[int, dict[str, int]]:
        engine, failed = supervise(monkeypatch, [*4 * [[Lacking(lack)]], [Ready({"tiny": STATUS}, []), WAITS]], 1)
        await engine.start()
        await until(lambda: engine.trouble is None or failed.done())
        await engine.close()
        return len(Scripted.starts), dict(engine.health.restarts)

    monkeypatch.setattr(supervisor, "AGAIN_S", 0.0)
    with caplog.at_level(logging.INFO, "server.troubles"):
        assert asyncio.run(scene()) == (5, {})
    assert [record.getMessage() for record in caplog.records] == [
        "a resource is short",
        "a resource is no longer short",
    ]
