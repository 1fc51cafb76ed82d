"""Which errors mean that the system had too little of something, and what is made of them."""

import asyncio
import errno
import logging
import threading
from pathlib import Path
from unittest import mock

import pytest
from starlette.testclient import TestClient

from server import troubles
from server.errors import EXIT_FAILED, NotReady, ServerError, exit_code
from server.settings import Settings
from server.troubles import Troubles, shortage, started
from server.web import app
from server.web.app import create_app
from tests.server.fakes import FakeBackend

ENFILE = OSError(errno.ENFILE, "Too many open files in system")


@pytest.mark.parametrize(
    ("error", "resource"),
    [
        (OSError(errno.EMFILE, "Too many open files"), "file descriptors"),
        (ENFILE, "file descriptors"),
        (ImportError("libwebp.so: cannot open shared object file: Too many open files"), "file descriptors"),
        (OSError(errno.ENOMEM, "Cannot allocate memory"), "memory"),
        (MemoryError(), "memory"),
        (BlockingIOError(errno.EAGAIN, "Resource temporarily unavailable"), "threads or processes"),
        (RuntimeError("can't start new thread"), "threads or processes"),
        (OSError(errno.ENOSPC, "No space left on device"), None),
        (OSError(errno.EIO, "Input/output error"), None),
        (OSError("without a number"), None),
        (ImportError("No module named 'nothing'"), None),
        (RuntimeError("a bug"), None),
        (KeyError("a bug"), None),
    ],
)
def test_a_passing_lack_is_told_from_other_errors(error: Exception, resource: str | None) -> None:
    assert shortage(error) == resource


def test_a_lack_that_many_wait_for_begins_once_and_is_over_when_nobody_waits(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(troubles, "RETRY_S", 0.0)

    async def story() -> list[int]:
        shared, left = Troubles(), [3, 6, 9]

        async def work(who: int) -> int:
            left[who] -= 1
            if left[who]:
                raise ENFILE
            return who

        return await asyncio.gather(*(shared.outlast(lambda who=who: work(who)) for who in range(3)))  # type: ignore[misc]

    with caplog.at_level(logging.INFO, "server"):
        assert asyncio.run(story()) == [0, 1, 2]
    assert [record.getMessage() for record in caplog.records] == [
        "a resource is short",
        "a resource is no longer short",
    ]


def test_whoever_stops_waiting_is_told_what_is_short_and_the_trouble_ends_with_the_next_success(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(troubles, "RETRY_S", 0.0)
    shared = Troubles()

    async def work() -> None:
        raise ENFILE

    with pytest.raises(NotReady, match="the system has too little for the server now: file descriptors"):
        asyncio.run(shared.outlast(work, within_s=0.0))
    assert shared.now.keys() == {"file descriptors"}
    asyncio.run(shared.in_thread(lambda: None))
    assert shared.now == {}


def test_all_threads_of_a_pool_run_from_the_start(monkeypatch: pytest.MonkeyPatch) -> None:
    pool = started(4, "some")

    def none(thread: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    monkeypatch.setattr(threading.Thread, "start", none)
    with pool:
        assert [task.result(10) for task in [pool.submit(int, n) for n in "12345678"]] == list(range(1, 9))
    with pytest.raises(RuntimeError, match="new thread"):
        started(4, "none")


def test_a_start_that_gets_no_thread_fails_with_a_reason_and_an_exit_code(
    weights: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    failures, lack = list[ServerError](), mock.Mock(side_effect=RuntimeError("can't start new thread"))
    made = create_app(Settings(weights=weights, data_dir=tmp_path), FakeBackend(), failures.append)
    monkeypatch.setattr(app, "started", lack)
    with pytest.raises(RuntimeError), TestClient(made):
        pass

    assert [exit_code(failure) for failure in failures] == [EXIT_FAILED]
    assert "can't start new thread" in str(failures[0])
