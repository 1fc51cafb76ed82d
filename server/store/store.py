"""The store: every job that was accepted, on disk before it is promised, and the pictures of those that have ended.

A folder with a journal (SQLite) and pictures as files. It knows rows and files; what a job is, others know.
"""

import asyncio
import logging
import os
import sqlite3
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

from server.errors import StoreRefused
from server.store import rows
from server.store.blobs import Pictures
from server.store.rows import Found, Kept, Record
from server.store.schema import make_directory, mark_parked, open_journal, take_lock, wanting_room, was_parked
from server.store.writer import RETRY_S, Writer

logger = logging.getLogger(__name__)
ROOM_BYTES = 256 << 10  # that must be free again before it is said not to be full
AT_A_TIME = 200  # jobs, or pictures, that are deleted in one transaction
SAVERS = 8  # pictures that are synced at once: the file system writes them down together


@dataclass(frozen=True, slots=True)
class Expired:
    """Jobs that are not kept any more; the pictures that no job had any more then; whether there may be more to go."""

    ids: list[str]
    pictures: list[str]
    more: bool


class Store:
    """The jobs of a server, on disk. Raises StoreInUse, StoreRefused, StorageFull or SettingsError if it cannot be
    opened."""

    def __init__(
        self,
        directory: Path,
        on_commit: Callable[[float], None] = lambda seconds: None,
        on_failed: Callable[[StoreRefused], None] = lambda failure: None,
    ) -> None:
        make_directory(directory)
        with wanting_room(directory):
            self._lock = take_lock(directory)
            try:
                self._db = open_journal(directory)
                self.pictures = Pictures(directory / "pictures")
            except BaseException:
                os.close(self._lock)
                raise
        self.size_bytes = rows.size_bytes(self._db)  # what the jobs take on disk

        def committed(seconds: float) -> None:
            with suppress(sqlite3.Error):  # it is only told, and the next commit brings another
                self.size_bytes = rows.size_bytes(self._db)
            on_commit(seconds)

        def probe() -> None:
            self.pictures.probe(ROOM_BYTES)
            rows.probe(self._db, ROOM_BYTES)

        def failed(error: Exception) -> None:
            on_failed(StoreRefused(f"the store {directory} has failed: {error}"))

        self._writer = Writer(self._db, probe, committed, failed)
        self._savers = ThreadPoolExecutor(SAVERS, "pictures")

    @property
    def trouble(self) -> str | None:
        """Why nothing can be written right now, or None."""
        return self._writer.trouble

    def start(self) -> None:
        """From now on it can be asked, on this event loop."""
        self._writer.start()

    async def close(self) -> None:
        """Ends once everything that was asked for is on disk, or cannot be."""
        await self._writer.close()
        await asyncio.to_thread(self._savers.shutdown, True)
        self._db.close()
        os.close(self._lock)

    async def insert(
        self, record: Record, over: Record | None = None, identities: Sequence[str] = ()
    ) -> Found | Record:
        """A new job; or what came with its key before. Raises StorageFull.

        over: the same job as it is if all of its pictures are here already, whose `identities` these are. Then that is
        what is kept, and what comes back, with the hashes and sizes filled in.
        """

        def work(db: sqlite3.Connection) -> Found | Record:
            before = rows.by_key(db, record.owner, record.key)
            if before is not None:
                return before
            images = self._known(db, over.images, identities) if over is not None else ()
            made = replace(over, images=images) if over is not None and images else record
            rows.insert(db, made)
            return made

        return await self._writer.ask(work)

    def begun(self, id: str) -> None:
        """A job runs: should the server die, it may have been the reason. Soon on disk, without anybody waiting."""
        self._writer.post(partial(rows.begin, id=id))

    async def begins(self, id: str) -> None:
        """The same, of a job that was running already when a server died: on disk before it runs again. Waits for room
        on the disk."""
        await self._writer.ask(partial(rows.begin, id=id), must=True)

    async def finish(self, record: Record, identities: Sequence[str] = ()) -> Record | None:
        """What has come of a job; None if it had ended before, or another attempt has it. Waits for room on the disk.

        identities: what decides each picture, if its bytes are promised to be the same whenever it is made. Then the
        first that were made count: they are in the record that comes back.
        """

        def work(db: sqlite3.Connection) -> Record | None:
            number = rows.finish(db, record)
            if number is None:
                return None
            images = record.images
            if identities:
                pairs = zip(identities, images, strict=True)
                images = tuple(rows.first_made(db, identity, image) for identity, image in pairs)
            rows.insert_images(db, number, images)
            return replace(record, images=images)

        return await self._writer.ask(work, must=True)

    async def save(self, pngs: Mapping[str, bytes]) -> None:
        """Pictures, by the hash of their bytes. They are pinned: `release` them once a row names them, or none will.

        Waits for room on the disk.
        """
        self.pictures.pin(pngs)
        loop = asyncio.get_running_loop()
        while True:
            saving = [loop.run_in_executor(self._savers, self.pictures.save, png, name) for name, png in pngs.items()]
            failures = [e for e in await asyncio.gather(*saving, return_exceptions=True) if isinstance(e, Exception)]
            if not failures:
                return
            if not isinstance(failures[0], OSError):
                raise failures[0]
            self._writer.fails(failures[0])
            await asyncio.sleep(RETRY_S)

    def release(self, names: Iterable[str]) -> None:
        """These pictures need not be held for anybody any more."""
        self.pictures.unpin(names)

    async def by_key(self, owner: str | None, key: str) -> Found | None:
        """What came with this key before."""
        return await self._writer.ask(lambda db: rows.by_key(db, owner, key))

    async def find(self, id: str, owner: str | None) -> Record:
        """A job by its id, if it is this owner's. Raises NotFound, or Gone if it was kept once."""
        return await self._writer.ask(lambda db: rows.find(db, id, owner))

    async def page(self, owner: str | None, status: str | None, after: str | None, limit: int) -> list[Record]:
        """Jobs, newest first, older than the one with the id `after`. Raises NotFound or Gone of that one."""

        def work(db: sqlite3.Connection) -> list[Record]:
            before = 1 << 62 if after is None else rows.find(db, after, owner).number
            return rows.page(db, owner, status, before, limit)

        return await self._writer.ask(work)

    async def recover(self) -> list[Record]:
        """The jobs that have not ended, in the order in which they came; they are of a new attempt from now on.

        Pictures that no job names, of a server that died before it had written the row, are deleted.
        """

        def work(db: sqlite3.Connection) -> list[Record]:
            named = {name for (name,) in db.execute("SELECT sha256 FROM files")}
            if left := self.pictures.delete_others(named):
                logger.info("pictures of no job were deleted", extra={"count": left})
            return rows.recover(db, died=not was_parked(self._lock))

        jobs = await self._writer.ask(work)
        mark_parked(self._lock, False)
        return jobs

    async def park(self) -> None:
        """No job runs any more: whatever may come now, none of them is the reason. Raises StorageFull, and then the
        next server is told nevertheless."""
        mark_parked(self._lock, True)
        await self._writer.ask(lambda db: [*db.execute("UPDATE jobs SET running = 0 WHERE running = 1")])

    async def latest(self) -> float:
        """The greatest time that is in here, by the clock that does not jump; 0 if there is none."""
        query = "SELECT max(ifnull((SELECT max(arrived) FROM jobs), 0), ifnull((SELECT max(ended) FROM jobs), 0))"
        return await self._writer.ask(lambda db: float(db.execute(query).fetchone()[0]))

    async def expire(self, before: float, most_bytes: int) -> Expired:
        """Deletes some of the jobs that ended before this time, and of the oldest while all take more than so much.

        `delete` their pictures then: not before it is certain that no row names them any more.
        """

        def work(db: sqlite3.Connection) -> Expired:
            gone, pictures = list[str](), list[str]()
            for number, id, ended in rows.oldest(db, AT_A_TIME):
                if ended >= before and rows.size_bytes(db) <= most_bytes:
                    break
                pictures += rows.delete(db, number)
                gone.append(id)
            return Expired(gone, pictures, len(gone) == AT_A_TIME)

        return await self._writer.ask(work)

    async def delete(self, names: Sequence[str]) -> None:
        """Deletes pictures, but for those that another job has been given meanwhile. Raises StorageFull.

        Where rows are written: so none that names a picture comes between the look and the deed.
        """

        def work(some: Sequence[str], db: sqlite3.Connection) -> None:
            self.pictures.delete(name for name in some if not rows.is_named(db, name))

        for first in range(0, len(names), AT_A_TIME):  # a few at a time: others wait for the journal, too
            await self._writer.ask(partial(work, names[first : first + AT_A_TIME]))

    def _known(self, db: sqlite3.Connection, images: Sequence[Kept], identities: Sequence[str]) -> tuple[Kept, ...]:
        """The pictures with these identities, if all of them are here already."""
        found = []
        for image, identity in zip(images, identities, strict=True):
            known = rows.known(db, identity)
            if known is None or not self.pictures.has(*known):
                return ()
            found.append(replace(image, sha256=known[0], size=known[1]))
        return tuple(found)
