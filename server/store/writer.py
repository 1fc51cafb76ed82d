"""One thread has the only connection to the journal and writes for all who wait: one transaction, one sync for all.

Where the disk is full, what may fail fails at once, and what may not (a result) is tried again until there is room. If
it can never be written, or the thread ends unasked, then so does the server.
"""

import asyncio
import logging
import queue
import sqlite3
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeVar

from server.errors import ServerError, StorageFull
from server.store.schema import is_full

logger = logging.getLogger(__name__)
T = TypeVar("T")
MOST_AT_ONCE = 1024  # requests that share a transaction
RETRY_S = 1.0  # while the disk is full


@dataclass(slots=True, eq=False)
class _Request:
    """Something to do, and who waits for it. must: it is tried until it can be done."""

    work: Callable[[sqlite3.Connection], Any]
    must: bool
    answer: "asyncio.Future[Any] | None"


class Writer:
    """Asked on the event loop, it answers there, after the commit."""

    def __init__(
        self,
        db: sqlite3.Connection,
        probe: Callable[[], None],
        on_commit: Callable[[float], None],
        on_failed: Callable[[Exception], None],
    ) -> None:
        self.trouble: str | None = None  # why nothing can be written right now
        self.failed = False  # nothing ever will be
        self._db, self._probe, self._on_commit, self._on_failed = db, probe, on_commit, on_failed
        self._open: set[asyncio.Future[Any]] = set()  # answers that somebody waits for
        self._inbox: queue.SimpleQueue[_Request | None] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._run, name="journal", daemon=True)
        self._loop: asyncio.AbstractEventLoop | None = None

    def start(self) -> None:
        """From now on it can be asked."""
        self._loop = asyncio.get_running_loop()
        self._thread.start()

    async def close(self) -> None:
        """Ends once everything that was asked for is on disk, or cannot be."""
        if self._thread.is_alive():
            self._inbox.put(None)
            await asyncio.to_thread(self._thread.join)

    async def ask(self, work: Callable[[sqlite3.Connection], T], must: bool = False) -> T:
        """What `work` gives, once it is on disk. Raises what `work` raises, and StorageFull unless it `must` be, or if
        nothing ever can be any more."""
        assert self._loop is not None
        if self.failed:
            raise StorageFull(self.trouble or "")
        answer: asyncio.Future[T] = self._loop.create_future()
        self._open.add(answer)
        self._inbox.put(_Request(work, must, answer))
        try:
            return await answer
        finally:
            self._open.discard(answer)

    def post(self, work: Callable[[sqlite3.Connection], object]) -> None:
        """Does this some time soon, if it can be done. Nobody waits for it."""
        self._inbox.put(_Request(work, False, None))

    def fails(self, error: Exception) -> None:
        """Something could not be written. No work is to be taken until something can."""
        if self.failed:
            return
        if self.trouble is None:
            logger.error("the store cannot be written", extra={"reason": str(error)})
        self.trouble = "the disk is full, or cannot be written"
        self.post(lambda db: None)  # wakes the thread, which then looks for room now and then

    def _works(self) -> None:
        if self.trouble is not None:
            logger.info("the store can be written again")
        self.trouble = None

    def _run(self) -> None:
        try:
            self._serve()
        except Exception as error:  # whatever it is, all who wait for this thread must hear of it
            self._call(partial(self._fail, error))

    def _fail(self, error: Exception) -> None:
        """Nothing can be written any more, and what was promised cannot be kept but by another server."""
        logger.critical("the store has failed", exc_info=error)
        self.failed, self.trouble = True, "the store has failed"
        for answer in self._open:
            if not answer.done():
                answer.set_exception(StorageFull(self.trouble))
        self._on_failed(error)

    def _serve(self) -> None:
        late: list[_Request] = []  # what must be done, and could not be yet
        open_ = True
        while open_:
            batch, open_ = self._take(patient=not late and self.trouble is None)
            late = self._commit(late + batch)
            if self.trouble is not None and not late:
                self._look_for_room()
        self._tell([(request, StorageFull(self.trouble or "")) for request in late])

    def _take(self, patient: bool) -> tuple[list[_Request], bool]:
        """Whatever waits, or comes; unless `patient`, within a second. And whether there will be more."""
        batch: list[_Request] = []
        try:
            while len(batch) < MOST_AT_ONCE:
                request = self._inbox.get(block=not batch, timeout=None if patient else RETRY_S)
                if request is None:
                    return batch, False
                batch.append(request)
        except queue.Empty:
            pass
        return batch, True

    def _commit(self, batch: list[_Request]) -> list[_Request]:
        """Does all of this at once; or, if that cannot be done, each by itself. -> what must be tried again"""
        if not batch:
            return []
        began, changes = time.perf_counter(), self._db.total_changes
        try:
            self._db.execute("BEGIN IMMEDIATE")
            answers = [(request, self._work(request)) for request in batch]
            self._db.execute("COMMIT")
        except (sqlite3.Error, OSError) as error:
            if self._db.in_transaction:
                self._db.execute("ROLLBACK")
            if len(batch) > 1:
                return [request for each in batch for request in self._commit([each])]
            return self._refuse(batch[0], error)
        if self._db.total_changes > changes:
            self._on_commit(time.perf_counter() - began)
            self._works()
        self._tell(answers)
        return []

    def _work(self, request: _Request) -> Any:
        try:
            return request.work(self._db)
        except ServerError as refusal:  # said before anything was written
            return refusal

    def _refuse(self, request: _Request, error: Exception) -> list[_Request]:
        if not is_full(error):
            if request.must:
                raise error  # it would be lost
            self._tell([(request, error)])
            return []
        self.fails(error)
        if request.must:
            return [request]
        self._tell([(request, StorageFull(self.trouble or ""))])
        return []

    def _look_for_room(self) -> None:
        """Finds out whether there is room again, when nobody asks for any."""
        try:
            self._probe()
        except (sqlite3.Error, OSError):
            return
        self._works()

    def _tell(self, answers: list[tuple[_Request, Any]]) -> None:
        def deliver() -> None:
            for request, answer in answers:
                if request.answer is None or request.answer.done():
                    continue  # nobody waits for it any more
                if isinstance(answer, Exception):
                    request.answer.set_exception(answer)
                else:
                    request.answer.set_result(answer)

        self._call(deliver)

    def _call(self, work: Callable[[], None]) -> None:
        """Has this done on the event loop."""
        assert self._loop is not None
        try:
            self._loop.call_soon_threadsafe(work)
        except RuntimeError:
            return  # the loop is closed, and whoever waited is gone with it
