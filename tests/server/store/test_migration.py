"""A journal of version 1, as running installations have it, becomes one of version 2 with everything in it."""

import asyncio
import sqlite3
import tracemalloc
from pathlib import Path

import pytest

from server.cli.main import main
from server.errors import Gone, StoreRefused
from server.store import journal
from server.store.journal import open_journal
from server.store.records import Record
from server.store.rows import SELECT
from server.store.schema import JOURNAL, VERSION_1
from tests.server.jobs.records import a_store, keep, name, record


def as_version_1(directory: Path) -> None:
    """Makes the journal what a server of version 1 would have left."""
    with sqlite3.connect(directory / JOURNAL) as new, sqlite3.connect(directory / "old") as old:
        old.execute("PRAGMA journal_mode = WAL")
        old.executescript(VERSION_1)
        old.execute("DELETE FROM total")
        for (table,) in old.execute(
            "SELECT name FROM sqlite_master WHERE type = 'table' AND name != 'total'"
        ).fetchall():
            columns = [row[1] for row in old.execute(f"PRAGMA table_info({table})")]
            for row in new.execute(f"SELECT {', '.join(columns)} FROM {table}"):
                places = ", ".join("?" * len(row))
                old.execute(f"REPLACE INTO {table} ({', '.join(columns)}) VALUES ({places})", row)
        old.execute("INSERT INTO total SELECT sum(size) FROM files")
    new.close()
    old.close()
    (directory / "old").replace(directory / JOURNAL)
    (directory / "lock").unlink()


async def some(directory: Path) -> list[Record]:
    """A store with an ended job of two pictures, one that was deleted, and one that has not ended -> the ended one"""
    async with a_store(directory) as store:
        await keep(store, "gone", b"x", owner="me", ended=1.0)
        await store.expire(before=1.5, most_bytes=1 << 40)
        await store.delete_unused()
        await keep(store, "a", b"png", b"other", identities=("i", "j"), created_at=5.0)
        await store.insert(record("b", owner="me", key="k", fingerprint="f"))
        return [await store.find("a", None)]


def test_a_journal_of_version_1_is_brought_to_the_present_one(tmp_path: Path) -> None:
    before = asyncio.run(some(tmp_path))
    as_version_1(tmp_path)

    async def story() -> tuple[list[Record], list[str], list[str]]:
        async with a_store(tmp_path) as store:
            with pytest.raises(Gone):
                await store.find("gone", "me")
            cached = await keep(store, "c", b"third", identities=("i",))
            assert cached is not None
            names = [image.sha256 for image in cached.images]
            return [await store.find("a", None)], names, [job.id for job in await store.recover()]

    assert asyncio.run(story()) == (before, [name(b"png")], ["b"])


def test_check_counts_the_jobs_of_version_1(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    asyncio.run(some(tmp_path / "some"))
    as_version_1(tmp_path / "some")
    (tmp_path / "none").mkdir()
    db = sqlite3.connect(tmp_path / "none" / JOURNAL)
    db.executescript(f"PRAGMA journal_mode = WAL; {VERSION_1}")
    db.close()

    assert [main(["check", str(tmp_path / name)]) for name in ("some", "none")] == [0, 0]
    assert capsys.readouterr().out.splitlines() == [
        "sound: 2 jobs (1 have not ended), 2 pictures",
        "sound: 0 jobs (0 have not ended), 0 pictures",
    ]


def test_a_migration_that_fails_leaves_version_1(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asyncio.run(some(tmp_path))
    as_version_1(tmp_path)
    with monkeypatch.context() as patched:
        patched.setattr(journal, "checksums", lambda record: (None, None))
        with pytest.raises(StoreRefused):
            open_journal(tmp_path)
    db = sqlite3.connect(tmp_path / JOURNAL)

    assert db.execute("PRAGMA user_version").fetchone() == (1,)
    with pytest.raises(sqlite3.OperationalError, match="no such column: checksum"):
        db.execute(SELECT)
    db.close()


def test_a_migration_takes_no_more_memory_for_more_jobs(tmp_path: Path) -> None:
    insert = """INSERT INTO jobs (id, created_at, arrived, request, served, attached, attempt)
        VALUES (?, 0, 0, ?, '{}', 0, 1)"""
    with sqlite3.connect(tmp_path / JOURNAL) as db:
        db.executescript(f"PRAGMA journal_mode = WAL; {VERSION_1}")
        db.executemany(insert, ((f"{number}", "x" * 10_000) for number in range(2000)))
        db.executemany("INSERT INTO expired (id) VALUES (?)", (("x" * 10_000 + f"{number}",) for number in range(2000)))
    db.close()
    tracemalloc.start()
    try:
        open_journal(tmp_path).close()
        assert tracemalloc.get_traced_memory()[1] < 1 << 20
    finally:
        tracemalloc.stop()
