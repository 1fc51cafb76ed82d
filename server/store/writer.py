"""Group commit: one thread writes to the journal, and all requests that wait share one transaction and one sync.

While the disk is full, most requests fail at once; a durable one (a result) is retried until there is room. If it can
never be written, the store has failed, and the server ends.
"""

import asyncio
import logging
import sqlite3
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, TypeVar

from server.errors import ServerError, StorageFull
from server.store import rows
from server.store.blobs import RETRY_S
from server.store.schema import is_full

logger = logging.getLogger(__name__)
T = TypeVar("T")
MAX_BATCH = 1024  # requests in one transaction


@dataclass(slots=True, eq=False)
class _Request:
    work: Callable[[sqlite3.Connection], Any]
    durable: bool  # retried until it can be written
    answer: "asyncio.Future[Any]"


class Writer:
    """The queue of requests and the thread that serves them. All methods are for the event loop."""

    def __init__(
        self,
        db: sqlite3.Connection,
        probe: Callable[[], None],
        on_commit: Callable[[int, float], None],
        on_failed: Callable[[BaseException], None],
    ) -> None:
        self.trouble: str | None = None  # why nothing can be written now
        self.failed = False  # nothing can be written ever again
        self.size_bytes = rows.size_bytes(db)  # of all jobs on disk, as of the last commit
        self._db, self._probe, self._on_commit, self._on_failed = db, probe, on_commit, on_failed
        self._queue: list[_Request] = []
        self._batch: list[_Request] = []  # the requests that the thread is serving, and those to be retried
        self._news = asyncio.Event()  # the queue or `_closing` has changed
        self._closing = False
        self._thread = ThreadPoolExecutor(1, "journal")
        self._task: asyncio.Task[None] | None = None

    def start(self) -> None:
        """Begins to serve requests."""
        self._task = asyncio.create_task(self._run(), name="journal")
        self._task.add_done_callback(self._on_ended)

    async def close(self) -> None:
        """Ends after every request was written or has failed."""
        if self._task is not None:
            self._closing = True
            self._news.set()
            await asyncio.wait([self._task])
        self._thread.shutdown()

    def ask(self, work: Callable[[sqlite3.Connection], T], durable: bool = False) -> "asyncio.Future[T]":
        """The result of `work`, once it is on disk; or what `work` raises. StorageFull if the disk is full, unless
        durable; and if the store has failed."""
        answer: asyncio.Future[T] = asyncio.get_running_loop().create_future()
        if self.failed:
            answer.set_exception(StorageFull(self.trouble or ""))
        else:
            self._queue.append(_Request(work, durable, answer))
            self._news.set()
        return answer

    def write_failed(self, error: Exception) -> None:
        """Notes that the disk is full or cannot be written, until a write succeeds."""
        if self.failed:
            return
        if self.trouble is None:
            logger.error("the store cannot be written", extra={"reason": str(error)})
        self.trouble = "the disk is full, or cannot be written"
        self._news.set()  # from now on there is a probe every RETRY_S seconds

    def _write_succeeded(self) -> None:
        if self.trouble is not None:
            logger.info("the store can be written again")
        self.trouble = None

    async def _run(self) -> None:
        loop = asyncio.get_running_loop()
        closing = False
        while not closing:
            if not self._queue and not self._closing:
                self._news.clear()
                with suppress(TimeoutError):
                    async with asyncio.timeout(RETRY_S if self._batch or self.trouble is not None else None):
                        await self._news.wait()
            closing = self._closing and len(self._queue) <= MAX_BATCH
            self._batch, self._queue = self._batch + self._queue[:MAX_BATCH], self._queue[MAX_BATCH:]
            changes = self._db.total_changes
            answers = await loop.run_in_executor(self._thread, self._commit, self._batch)
            if self._db.total_changes > changes:
                self._write_succeeded()
            self._batch = [request for request, answer in answers if not self._settle(request, answer)]
            if self.trouble is not None and not self._batch:
                with suppress(sqlite3.Error, OSError):
                    await loop.run_in_executor(self._thread, self._probe)
                    self._write_succeeded()
        for request in self._batch:
            self._settle(request, StorageFull(self.trouble or ""))

    def _commit(self, batch: list[_Request]) -> list[tuple[_Request, Any]]:
        """Does all requests in one transaction; if that fails, each in its own -> each with its result or exception.
        Runs in the thread."""
        if not batch:
            return []
        began, changes = time.perf_counter(), self._db.total_changes
        try:
            self._db.execute("BEGIN IMMEDIATE")
            answers = [(request, self._work(request)) for request in batch]
            number = rows.count_commit(self._db) if self._db.total_changes > changes else None
            self._db.execute("COMMIT")
        except (sqlite3.Error, OSError) as error:
            if self._db.in_transaction:
                self._db.execute("ROLLBACK")
            if len(batch) == 1:
                return [(batch[0], error)]
            return [answer for request in batch for answer in self._commit([request])]
        if number is not None:
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
        if isinstance(answer, sqlite3.Error | OSError):
            if is_full(answer):
                self.write_failed(answer)
                if request.durable:
                    return False
                answer = StorageFull(self.trouble or "")
            elif request.durable:
                raise answer
        if not request.answer.done():
            if isinstance(answer, Exception):
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
        self.failed, self.trouble = True, "the store has failed"
        for request in self._batch + self._queue:
            if not request.answer.done():
                request.answer.set_exception(StorageFull(self.trouble))
        self._on_failed(error)
