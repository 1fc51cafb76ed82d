"""The store: every accepted job, on disk before it is promised, and the images of jobs that have succeeded.

It is a folder with a journal (SQLite) and blobs. It knows rows and files; `server.jobs` knows what they mean.
"""

import asyncio
import logging
import os
import sqlite3
from collections.abc import Callable, Sequence
from contextlib import suppress
from functools import partial
from pathlib import Path

from server.errors import StorageFull, StoreRefused
from server.store import deliveries, lock, retention, rows
from server.store.blobs import Blobs
from server.store.journal import check_journal, open_journal
from server.store.records import Delivery, Record
from server.store.retention import Expired
from server.store.rows import IdempotentHit
from server.store.schema import JOURNAL, LOG, PICTURES, as_storage_full, commits, make_directory
from server.store.writer import Writer
from server.troubles import PICTURES as RESOURCE
from server.troubles import Troubles

logger = logging.getLogger(__name__)
PROBE_BYTES = 256 << 10  # that must be writable again before the store counts as writable
WATCH_S = 1.0  # between two looks whether the files are still there
BATCH = 200  # jobs, or blobs, that are deleted in one transaction


class Displaced(Exception):
    """A file of the store was removed or replaced while it is open: what is written now would be lost."""


def _place(path: str) -> tuple[int, int] | None:
    with suppress(FileNotFoundError, NotADirectoryError):
        found = os.stat(path)
        return found.st_dev, found.st_ino
    return None


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
            self._lock = lock.opened(directory, os.O_RDWR | os.O_CREAT)
            try:
                lock.hold(self._lock, directory)
                check_journal(directory, self._lock)
                lock.sign(self._lock)
                self.blobs = Blobs(directory / PICTURES, self._pictures_failed, self.troubles)
                self.blobs.probe(PROBE_BYTES)
                self._db = open_journal(directory)
                number, self._name = commits(self._db)
                lock.write_floor(self._lock, number, self._name)
            except BaseException:
                os.close(self._lock)
                raise
        self._on_commit, self._unused = on_commit, set[str]()  # blobs of deleted jobs; changed in the journal's thread

        def fail(error: BaseException) -> None:
            on_failed(StoreRefused(f"the store {directory} has failed: {error}"))

        self._writer = Writer(self._db, self._probe, self._committed, fail, self.troubles)
        paths = {name: str(directory / name) for name in (lock.LOCK, JOURNAL, LOG, PICTURES)}
        self._places = {name: (path, _place(path)) for name, path in paths.items()}
        self._watcher: asyncio.Task[None] | None = None

    def _committed(self, number: int, seconds: float) -> None:
        """A transaction is on disk. Runs in the journal's thread, before anyone is told."""
        lock.write_floor(self._lock, number, self._name)
        with suppress(OSError):  # the places cannot be looked at now: `_watch` does, until it can
            self._require_places()
        self._on_commit(seconds)

    def _pictures_failed(self, error: OSError) -> None:
        self._writer.write_failed(error, RESOURCE)

    def _probe(self, resource: str) -> None:
        """Does what saving a job does. Raises OSError or sqlite3.Error unless this resource can be written."""
        if resource == RESOURCE:
            self.blobs.probe(PROBE_BYTES)
        else:
            rows.probe(self._db, PROBE_BYTES)

    def _require_places(self) -> None:
        """Raises Displaced unless the files that are open here are those that another server would find."""
        for name, (path, place) in self._places.items():
            if _place(path) != place:
                raise Displaced(f"{name} was removed or replaced while the server ran")

    async def _watch(self) -> None:
        """Ends the store soon after a file was removed or replaced, even if there is nothing to write."""
        while not self._writer.failed:
            await asyncio.sleep(WATCH_S)
            with suppress(StorageFull):
                await self._writer.ask(lambda db: self._require_places(), durable=True)

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
        self._watcher = asyncio.create_task(self._watch(), name="store")

    async def close(self) -> None:
        """Ends after every request is on disk or has failed."""
        if self._watcher is not None:
            self._watcher.cancel()
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
        return self._writer.ask(work, undo=lambda db: self._unused.update(retention.revoke(db, record.id)))

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

    def next_delivery(
        self, now: float, jobs: Sequence[int], hosts: Sequence[str], owners: Sequence[str]
    ) -> "asyncio.Future[Record | None]":
        """The job whose webhook is next, due or not, other than of these jobs, hosts and owners."""
        return self._writer.ask(lambda db: rows.next_delivery(db, now, jobs, hosts, owners))

    def note_delivery(self, record: Record, delivery: Delivery) -> "asyncio.Future[None]":
        """Writes how far the delivery of a job's webhook is. Waits for room on the disk."""
        work = partial(deliveries.update, number=record.number, owner=record.owner, delivery=delivery)
        return self._writer.ask(work, durable=True)

    async def recover(self) -> list[Record]:
        """Starts the next attempt of every unfinished job -> these jobs, oldest first.

        Moves blobs aside that no job has: a server died after it wrote them and before it wrote the row.
        """
        named = await self._writer.ask(rows.blobs)
        if moved := await asyncio.to_thread(self.blobs.set_aside, named):
            logger.warning("pictures without a job were moved aside, for a day", extra={"count": moved})
        jobs = await self._writer.ask(partial(rows.recover, crashed=not lock.was_parked(self._lock)))
        lock.mark_parked(self._lock, False)
        return jobs

    async def park(self) -> None:
        """Records that no job is running: whatever ends the server from now on, no job is why. Raises StorageFull; the
        next server learns it nevertheless."""
        lock.mark_parked(self._lock, True)
        await self._writer.ask(rows.park)

    async def latest(self) -> float:
        """The latest time that is known here, by the clock that does not jump; 0 if there is none."""
        return max(await self._writer.ask(rows.latest), lock.read_seen(self._lock))

    def expire(self, before: float, most_bytes: int, now: float = 0.0) -> "asyncio.Future[Expired]":
        """Deletes some of the jobs that ended before this time, and of the oldest while all take more than
        `most_bytes`. `delete_unused` deletes their blobs when this is on disk. now: is noted for `latest`"""

        def work(db: sqlite3.Connection) -> Expired:
            lock.write_seen(self._lock, now)
            self._unused.update((expired := retention.expire(db, before, most_bytes, BATCH)).blobs)
            return expired

        return self._writer.ask(work)

    async def delete_unused(self) -> None:
        """Deletes the blobs of deleted jobs, except those that another job has. Raises StorageFull.

        It runs in the journal's thread, so that no row can name a blob between the check and the deletion; and after a
        look that is on disk: what has deleted the rows cannot be undone any more.
        """

        def look(db: sqlite3.Connection, some: Sequence[str]) -> list[str]:
            self._unused.difference_update(blob for blob in some if rows.has_job(db, blob))
            return list(self._unused.intersection(some))

        def delete(db: sqlite3.Connection, some: Sequence[str]) -> list[OSError]:
            failures = list[OSError]()
            for blob in some:
                try:
                    if rows.has_job(db, blob) or self.blobs.delete(blob):
                        self._unused.discard(blob)
                except OSError as error:
                    failures.append(error)
            return failures

        unused = list(self._unused)
        for first in range(0, len(unused), BATCH):  # in batches: others wait for the journal, too
            some = await self._writer.ask(partial(look, some=unused[first : first + BATCH]))
            if failures := await self._writer.ask(partial(delete, some=some)):
                self._pictures_failed(failures[0])
                raise StorageFull(self.trouble or "")
