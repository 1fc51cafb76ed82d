"""Group commit: one thread writes to the journal, and all requests that wait share one transaction and one sync.

While the disk is full, most requests fail at once; a durable one (a result) is retried until there is room. If it can
never be written, the store has failed, and the server ends. A disk that does not answer is in trouble like a full one.
"""

import asyncio
import logging
import sqlite3
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, TypeVar

from server.errors import ServerError, StorageFull
from server.logs import report
from server.store import rows
from server.store.blobs import RETRY_S
from server.store.schema import count_commit, is_full
from server.troubles import JOURNAL, PATIENCE_S, PICTURES, STORE, Troubles, shortage, started, too_little

logger = logging.getLogger(__name__)
T = TypeVar("T")
ERRORS = (sqlite3.Error, OSError, MemoryError)  # of the disk and of the system
MAX_BATCH = 1024  # requests in one transaction


@dataclass(slots=True, eq=False)
class _Request:
    work: Callable[[sqlite3.Connection], Any]
    durable: bool  # retried until it can be written
    answer: "asyncio.Future[Any]"
    undo: Callable[[sqlite3.Connection], Any] | None = None  # if it is done after its caller has given up


class Writer:
    """The queue of requests and the thread that serves them. All methods are for the event loop."""

    def __init__(
        self,
        db: sqlite3.Connection,
        probe: Callable[[str], None],
        on_commit: Callable[[int, float], None],
        on_failed: Callable[[BaseException], None],
        troubles: Troubles,
    ) -> None:
        """probe: raises OSError or sqlite3.Error unless this resource of the store can be written."""
        self.failed = False  # nothing can be written ever again
        self.size_bytes = rows.size_bytes(db)  # of all jobs on disk, as of the last commit
        self._db, self._probe, self._on_commit, self._on_failed = db, probe, on_commit, on_failed
        self._troubles = troubles
        self._queue: list[_Request] = []
        self._batch: list[_Request] = []  # the requests that the thread is serving, and those to be retried
        self._news = asyncio.Event()  # the queue or `_closing` has changed
        self._closing = False
        self._commits = 0  # that have changed something
        self._hangs = False  # the thread has got no answer from the disk for PATIENCE_S
        self._thread = started(1, "journal")
        self._task: asyncio.Task[None] | None = None
        self._troubled = asyncio.Event()  # something cannot be written
        self._prober: asyncio.Task[None] | None = None

    @property
    def trouble(self) -> str | None:
        """Why nothing can be written now, or None."""
        if self.failed:
            return "the store has failed"
        found = [resource for resource in STORE if resource in self._troubles.now]
        return f"the disk is full, or cannot be written: {', '.join(found)}" if found else None

    def start(self) -> None:
        """Begins to serve requests."""
        self._task = asyncio.create_task(self._run(), name="journal")
        self._task.add_done_callback(self._on_ended)
        self._prober = asyncio.create_task(self._probe_all(), name="probe of the disk")
        self._prober.add_done_callback(report)

    async def close(self) -> None:
        """Ends after every request was written or has failed."""
        if self._task is not None:
            self._closing = True
            self._news.set()
            await asyncio.wait([self._task])
        if self._prober is not None:
            self._prober.cancel()
        self._thread.shutdown()

    def ask(
        self,
        work: Callable[[sqlite3.Connection], T],
        durable: bool = False,
        undo: Callable[[sqlite3.Connection], Any] | None = None,
    ) -> "asyncio.Future[T]":
        """The result of `work`, once it is on disk; or what `work` raises. Unless durable, StorageFull if the disk is
        full or does not answer, NotReady if the system has too little of something; in any case StorageFull if the
        store has failed. undo: what is done if `work` succeeds after that."""
        answer: asyncio.Future[T] = asyncio.get_running_loop().create_future()
        if self.failed or (self._hangs and not durable):
            answer.set_exception(StorageFull(self.trouble or ""))
        else:
            self._queue.append(_Request(work, durable, answer, undo))
            self._news.set()
        return answer

    def write_failed(self, error: Exception, resource: str = JOURNAL) -> None:
        """Notes that a resource of the store cannot be written, until it is written, or probed with success."""
        if self.failed:
            return
        self._troubles.begin(resource, error)
        self._troubled.set()

    async def _probe_all(self) -> None:
        """Writes to all resources every RETRY_S seconds, while one cannot be written."""
        loop, threads = asyncio.get_running_loop(), {JOURNAL: self._thread, PICTURES: None}
        while True:
            if self.trouble is None:
                self._troubled.clear()
            await self._troubled.wait()
            await asyncio.sleep(RETRY_S)
            if self.failed:
                return
            for resource in STORE if not self._batch else (PICTURES,):  # else what waits shows more than a probe
                try:
                    await loop.run_in_executor(threads[resource], self._probe, resource)
                except ERRORS as error:
                    if shortage(error) is None:
                        self._troubles.begin(resource, error)
                else:
                    self._troubles.end(resource)

    async def _run(self) -> None:
        loop = asyncio.get_running_loop()
        closing = False
        while not closing or self._queue:  # the last commit may have to be undone
            if not self._queue and not self._closing:
                self._news.clear()
                with suppress(TimeoutError):
                    async with asyncio.timeout(RETRY_S if self._batch else None):
                        await self._news.wait()
            closing = self._closing and len(self._queue) <= MAX_BATCH
            asked = [request for request in self._queue[:MAX_BATCH] if request.durable or not request.answer.done()]
            self._batch, self._queue = self._batch + asked, self._queue[MAX_BATCH:]
            commits = self._commits
            committing = loop.run_in_executor(self._thread, self._commit, self._batch)
            if not (await asyncio.wait([committing], timeout=PATIENCE_S))[0]:
                self._give_up()
            answers = await committing
            self._hangs = False
            if self._commits > commits and not any(isinstance(answer, ERRORS) for _, answer in answers):
                self._troubles.end(JOURNAL)
            self._batch = [request for request, answer in answers if not self._settle(request, answer)]
        for request in self._batch:
            self._settle(request, StorageFull(self.trouble or ""))

    def _give_up(self) -> None:
        """Fails all requests that need not be durable: the disk does not answer, and their callers wait."""
        self._hangs = True
        self.write_failed(TimeoutError(f"the disk has not answered for {PATIENCE_S:g} s"))
        for request in self._batch + self._queue:
            if not request.durable and not request.answer.done():
                request.answer.set_exception(StorageFull(self.trouble or ""))

    def _commit(self, batch: list[_Request]) -> list[tuple[_Request, Any]]:
        """Does all requests in one transaction; if that fails, each in its own -> each with its result or exception.
        Runs in the thread."""
        if not batch:
            return []
        began, changes = time.perf_counter(), self._db.total_changes
        try:
            self._db.execute("BEGIN IMMEDIATE")
            answers = [(request, self._work(request)) for request in batch]
            number = count_commit(self._db) if self._db.total_changes > changes else None
            self._db.execute("COMMIT")
        except ERRORS as error:
            if self._db.in_transaction:
                self._db.execute("ROLLBACK")
            if len(batch) == 1:
                return [(batch[0], error)]
            return [answer for request in batch for answer in self._commit([request])]
        if number is not None:
            self._commits += 1
            self._on_commit(number, time.perf_counter() - began)
            with suppress(sqlite3.Error):  # the size is only shown, and the next commit brings another
                self.size_bytes = rows.size_bytes(self._db)
        return answers

    def _work(self, request: _Request) -> Any:
        try:
            return request.work(self._db)
        except ServerError as refusal:  # raised before anything was written
            return refusal

    def _settle(self, request: _Request, answer: Any) -> bool:
        """Delivers the answer to the caller -> False if the request must be retried instead. Raises an error that a
        durable request cannot survive."""
        if isinstance(answer, ERRORS):
            if (resource := shortage(answer)) is not None:
                if request.durable:
                    return False
                answer = too_little(resource)
            elif is_full(answer):
                self.write_failed(answer)
                if request.durable:
                    return False
                answer = StorageFull(self.trouble or "")
            elif request.durable:
                raise answer
        if request.answer.done():
            if request.undo is not None and not isinstance(answer, Exception):
                self.ask(request.undo, durable=True)
        elif isinstance(answer, Exception):
            request.answer.set_exception(answer)
        else:
            request.answer.set_result(answer)
        return True

    def _on_ended(self, task: "asyncio.Task[None]") -> None:
        """Fails everything if the task has ended for an error: only another server can keep what was promised."""
        error = None if task.cancelled() else task.exception()
        if error is None:
            return
        logger.critical("the store has failed", exc_info=error)
        self.failed = True
        for request in self._batch + self._queue:
            if not request.answer.done():
                request.answer.set_exception(StorageFull(self.trouble or ""))
        self._on_failed(error)
