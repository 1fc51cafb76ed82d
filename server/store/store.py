"""The store: every accepted job, on disk before it is promised, and the images of jobs that have succeeded.

It is a folder with a journal (SQLite) and blobs. It knows rows and files; `server.jobs` knows what they mean.
"""

import asyncio
import logging
import os
import sqlite3
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

from server.errors import StoreRefused
from server.store import rows
from server.store.blobs import Blobs
from server.store.rows import Expired, IdempotentHit, Record
from server.store.schema import LOCK, as_storage_full, make_directory, mark_parked, open_journal, take_lock, was_parked
from server.store.writer import Writer
from server.troubles import PICTURES, Troubles

logger = logging.getLogger(__name__)
PROBE_BYTES = 256 << 10  # that must be writable again before the store counts as writable
BATCH = 200  # jobs, or blobs, that are deleted in one transaction


class Store:
    """The jobs of a server on disk. Methods that return a future return the answer of the journal's writer.

    Raises StoreInUse, StoreRefused, StorageFull or SettingsError if it cannot be opened.
    """

    def __init__(
        self,
        directory: Path,
        on_commit: Callable[[float], None] = lambda seconds: None,
        on_failed: Callable[[StoreRefused], None] = lambda failure: None,
        troubles: Troubles | None = None,
    ) -> None:
        self.troubles = troubles or Troubles()
        make_directory(directory)
        with as_storage_full(directory):
            self._lock = os.open(directory / LOCK, os.O_RDWR | os.O_CREAT, 0o600)
            try:
                take_lock(self._lock, directory)
                self._db = open_journal(directory)
                self.blobs = Blobs(directory / "pictures", self._pictures_failed, self.troubles)
            except BaseException:
                os.close(self._lock)
                raise
        failed = f"the store {directory} has failed"
        self._writer = Writer(
            self._db,
            self._probe,
            on_commit,
            lambda error: on_failed(StoreRefused(f"{failed}: {error}")),
            self.troubles,
        )

    def _pictures_failed(self, error: OSError) -> None:
        self._writer.write_failed(error, PICTURES)

    def _probe(self, resource: str) -> None:
        """Does what saving a job does. Raises OSError or sqlite3.Error unless this resource can be written."""
        if resource == PICTURES:
            self.blobs.probe(PROBE_BYTES)
        else:
            rows.probe(self._db, PROBE_BYTES)

    @property
    def trouble(self) -> str | None:
        """Why nothing can be written now, or None."""
        return self._writer.trouble

    @property
    def size_bytes(self) -> int:
        """The size of jobs and images on disk."""
        return self._writer.size_bytes

    def start(self) -> None:
        """Begins to serve requests on this event loop."""
        self._writer.start()

    async def close(self) -> None:
        """Ends after every request is on disk or has failed."""
        await self._writer.close()
        await asyncio.to_thread(self.blobs.close)
        self._db.close()
        os.close(self._lock)

    def insert(
        self, record: Record, cached: Record | None = None, identities: Sequence[str] = ()
    ) -> "asyncio.Future[IdempotentHit | Record]":
        """Inserts a new job -> its record, or the job that its Idempotency-Key was used for. Raises StorageFull.

        cached: the same job as succeeded; it is inserted instead, with the hashes and sizes of the stored images, if
        all images with these `identities` are stored.
        """
        work = partial(rows.insert, record=record, cached=cached, identities=identities, has_blob=self.blobs.has)
        return self._writer.ask(work, undo=partial(rows.revoke, id=record.id))

    def mark_running(self, id: str) -> None:
        """Marks a job as running: if the server dies, the job may be why. Nobody waits until this is on disk."""
        marked = self._writer.ask(partial(rows.mark_running, id=id))
        marked.add_done_callback(asyncio.Future.exception)  # or asyncio would report that nobody retrieved it

    def mark_running_durably(self, id: str) -> "asyncio.Future[None]":
        """Marks a job as running, on disk before it runs: it was running when a server died. Waits for room on disk."""
        return self._writer.ask(partial(rows.mark_running, id=id), durable=True)

    def finish(self, record: Record, identities: Sequence[str] = ()) -> "asyncio.Future[Record | None]":
        """Writes the result of a job -> the record with the images that count; None if the job has ended already, or
        belongs to another attempt (the attempt is a fencing token). Waits for room on the disk.

        identities: hashes of everything that decides each image, if equal ones must have equal bytes. Of images with
        the same identity, the first one made counts.
        """
        return self._writer.ask(partial(rows.finish, record=record, identities=identities), durable=True)

    def by_key(self, owner: str | None, key: str) -> "asyncio.Future[IdempotentHit | None]":
        """The job that this owner used an Idempotency-Key for."""
        return self._writer.ask(partial(rows.by_key, owner=owner, key=key))

    def find(self, id: str, owner: str | None) -> "asyncio.Future[Record]":
        """An owner's job. Raises NotFound, or Gone if it was deleted."""
        return self._writer.ask(partial(rows.find, id=id, owner=owner))

    def page(
        self, owner: str | None, status: str | None, after: str | None, limit: int
    ) -> "asyncio.Future[list[Record]]":
        """An owner's jobs, newest first, older than the job `after`. Raises NotFound or Gone of `after`."""
        return self._writer.ask(partial(rows.page, owner=owner, status=status, after=after, limit=limit))

    async def recover(self) -> list[Record]:
        """Starts the next attempt of every unfinished job -> these jobs, oldest first.

        Deletes blobs that no job has: a server died after it wrote them and before it wrote the row.
        """
        named = await self._writer.ask(rows.blobs)
        if deleted := await asyncio.to_thread(self.blobs.delete_others, named):
            logger.info("blobs without a job deleted", extra={"count": deleted})
        jobs = await self._writer.ask(partial(rows.recover, crashed=not was_parked(self._lock)))
        mark_parked(self._lock, False)
        return jobs

    async def park(self) -> None:
        """Records that no job is running: whatever ends the server from now on, no job is why. Raises StorageFull; the
        next server learns it nevertheless."""
        mark_parked(self._lock, True)
        await self._writer.ask(rows.park)

    async def latest(self) -> float:
        """The latest arrival or end of a job, by the clock that does not jump; 0 if there is none."""
        return await self._writer.ask(rows.latest)

    def expire(self, before: float, most_bytes: int) -> "asyncio.Future[Expired]":
        """Deletes some of the jobs that ended before this time, and of the oldest while all take more than
        `most_bytes`. Pass the blobs to `delete` when this is certainly on disk."""
        return self._writer.ask(partial(rows.expire, before=before, most_bytes=most_bytes, limit=BATCH))

    async def delete(self, blobs: Sequence[str]) -> None:
        """Deletes blobs, except those that a new job has been given meanwhile. Raises StorageFull.

        It runs in the journal's thread, so that no row can name a blob between the check and the deletion.
        """

        def delete(db: sqlite3.Connection, some: Sequence[str]) -> None:
            self.blobs.delete(blob for blob in some if not rows.has_job(db, blob))

        for first in range(0, len(blobs), BATCH):  # in batches: others wait for the journal, too
            await self._writer.ask(partial(delete, some=blobs[first : first + BATCH]))
