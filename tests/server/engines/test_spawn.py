"""The start of an engine process while the system has too little for it: it is waited for, and nothing is left over."""

import asyncio
import errno
import logging
import multiprocessing
import os
import sys
import threading
from multiprocessing.context import SpawnProcess
from unittest import mock

import pytest

from server import logs, troubles
from server.engines import process
from server.engines.process import EngineProcess
from server.worker.messages import Lacking, Start

TASK = Start(models=(), device="cpu", dtype="auto", slots=1, threads=1, exact=True, log_level="info")
LACK = {
    "file descriptors": OSError(errno.EMFILE, "Too many open files"),
    "memory": OSError(errno.ENOMEM, "Cannot allocate memory"),
    "threads or processes": BlockingIOError(errno.EAGAIN, "Resource temporarily unavailable"),
}


@pytest.mark.parametrize("thread", [False, True])
@pytest.mark.parametrize("resource", LACK)
def test_a_start_that_finds_too_little_is_tried_again_and_leaves_nothing(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, resource: str, thread: bool
) -> None:
    attempts = list[int]()
    error = RuntimeError("can't start new thread") if thread else LACK[resource]
    resource = "threads or processes" if thread else resource

    def start(child: SpawnProcess) -> None:
        attempts.append(len(attempts))
        if len(attempts) == 5:
            raise FileNotFoundError(errno.ENOENT, "No such file or directory")  # which does not pass
        if not thread:
            raise error

    class Rare(threading.Thread):
        def start(self) -> None:
            if self.name == "engine reader":
                raise error
            super().start()

    monkeypatch.setattr(troubles, "RETRY_S", 0.0)
    monkeypatch.setattr(process, "_start", start)
    monkeypatch.setattr(process, "Thread", Rare)
    before, running = len(os.listdir("/proc/self/fd")), threading.active_count()
    with caplog.at_level(logging.INFO, "server"):
        asyncio.run(EngineProcess().run(TASK, lambda message: None, lambda: False))

    assert len(attempts) == 5
    assert (len(os.listdir("/proc/self/fd")), threading.active_count()) == (before, running)
    assert [record.__dict__.get("resource", record.getMessage()) for record in caplog.records] == [
        *(resource, resource),
        "no process could be started",
    ]


def test_a_server_that_did_not_run_for_a_while_holds_no_silence_against_its_engine(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """As after SIGSTOP and SIGCONT: the engine may have sent its messages all the while."""
    times = [0.0, *(0.0, 0.01), *(0.01, 3600.01), *(3600.01, 3600.02)]  # of its making; before and after each wait
    passed = list[float]()

    def monotonic() -> float:
        passed.append(times[len(passed)])
        return passed[-1]

    monkeypatch.setattr(process, "POLL_S", 0.01)
    monkeypatch.setattr(process, "time", mock.Mock(monotonic=monotonic))

    async def scene() -> list[float]:
        engine, silences = EngineProcess(), list[float]()

        def hangs() -> bool:
            silences.append(passed[-1] - engine.heard_at)
            if len(passed) == len(times):
                engine.over.set()
            return False

        await engine._watch(mock.Mock(pid=0), hangs)
        return silences

    assert asyncio.run(asyncio.wait_for(scene(), 10)) == pytest.approx([0.01, 0.02, 0.03])


def test_an_engine_that_does_not_end_when_it_is_killed_is_killed_and_told_of_once(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(process, "POLL_S", 0.01)
    stuck, looks = mock.Mock(pid=0), list[int]()  # as one that waits for its device

    async def scene() -> None:
        engine = EngineProcess()

        def hangs() -> bool:
            looks.append(len(looks))
            if len(looks) == 3:
                engine.over.set()
            return True

        await engine._watch(stuck, hangs)

    with caplog.at_level(logging.ERROR, "server"):
        asyncio.run(asyncio.wait_for(scene(), 10))

    assert len(looks) == 3
    assert stuck.kill.mock_calls == [mock.call()]
    assert caplog.messages == ["engine hangs and is killed"]


@pytest.mark.parametrize(
    ("said", "passes"),
    [("libtorch_cpu.so: cannot open shared object file: Too many open files", True), ("No module named 'x'", False)],
)
def test_a_process_that_finds_too_little_to_import_torch_tells_it(
    monkeypatch: pytest.MonkeyPatch, said: str, passes: bool
) -> None:
    class Finder:
        def find_spec(self, name: str, *more: object) -> None:
            if name == "server.worker.main":
                raise ImportError(said)

    monkeypatch.setattr(logs, "configure", lambda level: None)
    monkeypatch.delitem(sys.modules, "server.worker.main", raising=False)
    monkeypatch.delattr("server.worker.main", raising=False)
    monkeypatch.setattr(sys, "meta_path", [Finder(), *sys.meta_path])
    ours, theirs = multiprocessing.Pipe()
    if not passes:
        with pytest.raises(ImportError):
            process._serve(theirs, TASK)
    else:
        process._serve(theirs, TASK)
        told = ours.recv()
        assert isinstance(told, Lacking) and troubles.shortage(told.error) == "file descriptors"
