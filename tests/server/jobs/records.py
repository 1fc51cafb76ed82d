"""Rows for the tests of the store, and a store that is open for a while."""

from collections.abc import AsyncIterator, Callable, Coroutine
from contextlib import asynccontextmanager
from hashlib import sha256
from pathlib import Path
from typing import Any
from unittest import mock

from server.store.records import ImageRow, Record
from server.store.store import Store


def record(id: str, **fields: Any) -> Record:
    """A job as it comes."""
    usual: dict[str, Any] = {"owner": None, "key": None, "fingerprint": None, "created_at": 1.0, "arrived": 1.0}
    return Record(id=id, **usual | {"request": "{}", "served": "{}", "attached": False} | fields)


def ended(id: str, pngs: tuple[bytes, ...] = (), **fields: Any) -> Record:
    """The same once it has ended, with these pictures."""
    images = tuple(
        ImageRow(index=i, seed=i, sha256=name(png), size=len(png), message=2 + i) for i, png in enumerate(pngs)
    )
    usual: dict[str, Any] = {"status": "succeeded", "finished_at": 2.0, "ended": 2.0, "messages": 2 + len(pngs)}
    return record(id, **usual | {"images": images} | fields)


def name(png: bytes) -> str:
    """The file that a picture is in."""
    return sha256(png).hexdigest()


@asynccontextmanager
async def a_store(directory: Path, on_commit: Callable[[float], None] = lambda seconds: None) -> AsyncIterator[Store]:
    """A store, open."""
    store = Store(directory, on_commit)
    store.start()
    try:
        yield store
    finally:
        await store.close()


async def keep(store: Store, id: str, *pngs: bytes, identities: tuple[str, ...] = (), **fields: Any) -> Record | None:
    """A job that came and has ended with these pictures."""
    await store.insert(record(id, **fields))
    await store.blobs.save({name(png): png for png in pngs})
    done = await store.finish(ended(id, pngs, **fields), identities)
    store.blobs.unpin([name(png) for png in pngs])
    return done


def without_room(store: Store) -> Callable[[], None]:
    """From now on nothing that changes the journal finds room; until what this gives is called."""
    writer, usual = store._writer, store._writer._work

    def work(request: Any) -> Any:
        before, answer = store._db.total_changes, usual(request)
        if store._db.total_changes > before:
            raise OSError(28, "No space left on device")
        return answer

    full = mock.patch.object(writer, "_work", work)
    full.start()
    return full.stop


Story = Callable[[Store], Coroutine[Any, Any, None]]
