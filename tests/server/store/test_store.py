"""The store: durable, in order, for one server alone; and it reports a full or damaged disk."""

import asyncio
import contextlib
import errno
import os
import resource
import signal
import sqlite3
import subprocess
import sys
import threading
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any
from unittest import mock

import pytest

from server.errors import Gone, NotFound, NotReady, StorageFull, StoreInUse, StoreRefused
from server.store import retention, rows, writer
from server.store.records import Record
from server.store.rows import IdempotentHit
from server.store.schema import JOURNAL, PICTURES, VERSION
from server.store.store import Store
from tests.server.jobs.records import a_store, ended, keep, name, record, without_room


def files(directory: Path) -> dict[str, bytes]:
    """Everything in a folder but the lock."""
    return {p.name: p.read_bytes() for p in directory.rglob("*") if p.is_file() and p.name != "lock"}


def test_jobs_and_blobs_are_there_when_the_store_is_opened_again(tmp_path: Path) -> None:
    async def story() -> tuple[Record, list[Record], bytes]:
        async with a_store(tmp_path) as store:
            await keep(store, "a", b"png", created_at=5.0)
            await store.insert(record("b", owner="me", request='{"seed":1}'))
        async with a_store(tmp_path) as store:
            return await store.find("a", None), await store.recover(), store.blobs.read(name(b"png"))

    found, unfinished, png = asyncio.run(story())

    assert found == replace(ended("a", (b"png",), created_at=5.0), number=1)
    assert unfinished == [record("b", owner="me", request='{"seed":1}', attempt=2, number=2)]
    assert png == b"png"


def test_a_thousand_callers_at_once_share_a_few_commits(tmp_path: Path) -> None:
    commits: list[float] = []

    async def story() -> int:
        async with a_store(tmp_path, commits.append) as store:
            await asyncio.gather(*(store.insert(record(f"{i:04d}")) for i in range(1000)))
            return len(await store.recover())

    assert asyncio.run(story()) == 1000
    assert len(commits) < 20


def test_a_failing_request_does_not_affect_the_others_of_its_transaction(tmp_path: Path) -> None:
    async def story() -> tuple[list[Record | IdempotentHit | BaseException], list[str]]:
        async with a_store(tmp_path) as store:
            ids = ["a", "b", "a", "c"]
            answers = await asyncio.gather(*(store.insert(record(id)) for id in ids), return_exceptions=True)
            return answers, [row.id for row in await store.recover()]

    answers, kept = asyncio.run(story())

    assert [type(answer) for answer in answers] == [Record, Record, sqlite3.IntegrityError, Record]
    assert kept == ["a", "b", "c"]


def test_a_result_is_taken_once_and_only_from_the_latest_attempt(tmp_path: Path) -> None:
    async def story() -> list[Record | None]:
        async with a_store(tmp_path) as store:
            await store.insert(record("a"))
            (again,) = await store.recover()
            late, taken = ended("a", attempt=1), ended("a", attempt=again.attempt)
            return [await store.finish(result) for result in (late, taken, taken)]

    late, taken, twice = asyncio.run(story())

    assert (late, twice) == (None, None)
    assert taken == ended("a", attempt=2)


def test_of_two_pictures_with_one_identity_the_first_counts(tmp_path: Path) -> None:
    async def story() -> Record | None:
        async with a_store(tmp_path) as store:
            await keep(store, "a", b"first", identities=("same",))
            return await keep(store, "b", b"other", identities=("same",))

    second = asyncio.run(story())

    assert second is not None
    assert [(image.sha256, image.size) for image in second.images] == [(name(b"first"), 5)]


def test_an_idempotency_key_finds_its_job_for_its_owner_alone(tmp_path: Path) -> None:
    async def story() -> list[Record | IdempotentHit | None]:
        async with a_store(tmp_path) as store:
            mine, theirs = record("a", key="k", fingerprint="f"), record("b", key="k", fingerprint="g", owner="them")
            same = record("c", key="k", fingerprint="h")
            race = await asyncio.gather(*(store.insert(each) for each in (mine, theirs, same)))
            return [
                *race,
                await store.by_key(None, "k"),
                await store.by_key("them", "k"),
                await store.by_key(None, "l"),
            ]

    *race, mine, theirs, nobody = asyncio.run(story())

    assert [type(answer) for answer in race] == [Record, Record, IdempotentHit]
    assert (mine, theirs, nobody) == (IdempotentHit("a", "f"), IdempotentHit("b", "g"), None)


def test_the_oldest_jobs_expire_first_and_a_blob_stays_while_a_job_has_it(tmp_path: Path) -> None:
    async def story() -> tuple[list[str], list[bool], list[object]]:
        async with a_store(tmp_path) as store:
            for i, pngs in enumerate([(b"x", b"y"), (b"y",), (b"z",)]):
                await keep(store, f"{i}", *pngs, ended=10.0 + i)
            gone = await store.expire(before=11.0, most_bytes=1 << 40)
            await store.delete_unused()
            left = [store.blobs.has(name(png), 1) for png in (b"x", b"y", b"z")]
            errors = list[object]()
            for id in ("0", "9"):
                with pytest.raises((Gone, NotFound)) as error:
                    await store.find(id, None)
                errors.append(error.type)
            return gone.ids, left, errors

    assert asyncio.run(story()) == (["0"], [False, True, True], [Gone, NotFound])


def test_the_size_is_limited_by_deleting_the_oldest_jobs(tmp_path: Path) -> None:
    async def story() -> tuple[list[str], int, int]:
        async with a_store(tmp_path) as store:
            for i in range(5):
                await keep(store, f"{i}", os.urandom(100_000))
            before = store.size_bytes
            gone = await store.expire(before=0.0, most_bytes=before - 250_000)
            return gone.ids, before, store.size_bytes

    ids, before, after = asyncio.run(story())

    assert ids == ["0", "1", "2"]
    assert before > 500_000
    assert 200_000 <= after <= before - 250_000


def test_a_pinned_blob_is_not_deleted_with_its_job(tmp_path: Path) -> None:
    async def story() -> bytes:
        async with a_store(tmp_path) as store:
            await keep(store, "a", b"png")
            await store.insert(record("b"))
            await store.blobs.save({name(b"png"): b"png"})
            await store.expire(before=99.0, most_bytes=1 << 40)  # between the picture and its row
            await store.delete_unused()
            await store.finish(ended("b", (b"png",)))
            return store.blobs.read(name(b"png"))

    assert asyncio.run(story()) == b"png"


def test_a_blob_that_another_job_has_is_not_deleted_with_its_job(tmp_path: Path) -> None:
    async def story() -> bytes:
        async with a_store(tmp_path) as store:
            await keep(store, "a", b"png")
            await store.expire(before=99.0, most_bytes=1 << 40)
            await keep(store, "b", b"png")  # between the end of its row and the end of its file
            await store.delete_unused()
            return store.blobs.read(name(b"png"))

    assert asyncio.run(story()) == b"png"


def test_blobs_without_a_job_are_deleted_at_the_start_and_damaged_ones_are_refused(tmp_path: Path) -> None:
    async def story() -> dict[str, bytes]:
        async with a_store(tmp_path) as store:
            await keep(store, "a", b"good")
            await store.blobs.save({name(b"nobody's"): b"nobody's"})
            (tmp_path / "pictures" / f"{7:016x}.part").write_bytes(b"ha")
            (tmp_path / "pictures" / name(b"good")).write_bytes(b"evil")
            with pytest.raises(Gone, match="damaged"):
                store.blobs.read(name(b"good"))
        async with a_store(tmp_path) as store:
            await store.recover()
            return files(tmp_path / "pictures")

    assert asyncio.run(story()) == {name(b"good"): b"evil"}


def counted(monkeypatch: pytest.MonkeyPatch, module: ModuleType, name: str) -> list[str]:
    """A list that grows with every call of this function."""
    calls, usual = list[str](), getattr(module, name)

    def call(*arguments: Any, **others: Any) -> Any:
        calls.append(name)
        return usual(*arguments, **others)

    monkeypatch.setattr(module, name, call)
    return calls


def fill_up(store: Store) -> None:
    """From now on the journal finds no room for another page."""
    store._db.execute("PRAGMA max_page_count = 1")


def test_a_full_disk_refuses_jobs_makes_results_wait_and_recovers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(writer, "RETRY_S", 0.02)
    big = "x" * 100_000

    async def story() -> tuple[str | None, bool, Record | None, str | None, list[str]]:
        async with a_store(tmp_path) as store:
            await store.insert(record("a"))
            fill_up(store)
            with pytest.raises(StorageFull):
                await store.insert(record("b", request=big))
            said = store.trouble
            attempts = counted(monkeypatch, rows, "finish")
            result = store.finish(ended("a", error=big))
            while len(attempts) < 3:
                await asyncio.sleep(0.01)
            waited = not result.done()
            store._db.execute("PRAGMA max_page_count = 1000000")
            done = await asyncio.wait_for(result, 5)
            await store.insert(record("c", request=big))
            return said, waited, done, store.trouble, [row.id for row in await store.recover()]

    said, waited, done, now, unfinished = asyncio.run(story())

    assert (said, waited, now) == ("the disk is full, or cannot be written: journal", True, None)
    assert done is not None
    assert unfinished == ["c"]


def test_a_durable_mark_of_a_running_job_waits_for_room_on_the_disk(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(writer, "RETRY_S", 0.02)

    async def story() -> tuple[bool, list[Record]]:
        async with a_store(tmp_path) as store:
            await store.insert(record("a"))
            make_room = without_room(store)
            begins = store.mark_running_durably("a")
            while store.trouble is None and not begins.done():
                await asyncio.sleep(0.01)
            waited = not begins.done()
            make_room()
            await asyncio.wait_for(begins, 5)
            return waited, await store.recover()

    waited, (job,) = asyncio.run(story())

    assert (waited, job.deaths) == (True, 1)


@pytest.mark.parametrize("why", [sqlite3.DatabaseError("database disk image is malformed"), KeyError("a bug")])
def test_a_result_that_can_never_be_written_ends_the_server(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, why: Exception
) -> None:
    failures = list[StoreRefused]()

    async def story() -> str | None:
        store = Store(tmp_path, on_failed=failures.append)
        store.start()
        await store.insert(record("a"))
        monkeypatch.setattr(rows, "finish", mock.Mock(side_effect=why))
        asked: list[asyncio.Future[Any]] = [store.finish(ended("a")), store.insert(record("b")), store.find("a", None)]
        answers = await asyncio.wait_for(asyncio.gather(*asked, return_exceptions=True), 5)
        assert isinstance(answers[0], StorageFull)
        with pytest.raises(StorageFull):  # and so it is for whoever comes later
            await asyncio.wait_for(store.insert(record("c")), 5)
        store._writer.write_failed(OSError(28, "No space left on device"))  # hides nothing
        await store.close()
        return store.trouble

    assert asyncio.run(story()) == "the store has failed"
    assert [str(failure) for failure in failures] == [f"the store {tmp_path} has failed: {why}"]


def test_a_size_that_cannot_be_read_after_a_commit_does_no_harm(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def story() -> list[str]:
        async with a_store(tmp_path) as store:
            with monkeypatch.context() as patched:
                patched.setattr(rows, "size_bytes", mock.Mock(side_effect=sqlite3.OperationalError("I/O error")))
                await asyncio.wait_for(store.insert(record("a")), 5)
            return [row.id for row in await store.recover()]

    assert asyncio.run(story()) == ["a"]


def test_free_space_is_noticed_without_a_request(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(writer, "RETRY_S", 0.02)

    async def story() -> None:
        async with a_store(tmp_path) as store:
            full, room, probes = OSError(28, "No space left on device"), asyncio.Event(), list[int]()

            def probe(size_bytes: int) -> None:
                probes.append(size_bytes)
                if not room.is_set():
                    raise full

            monkeypatch.setattr(store.blobs, "probe", probe)
            store._writer.write_failed(full)
            while len(probes) < 3:
                await asyncio.sleep(0.01)
            assert store.trouble is not None
            room.set()
            async with asyncio.timeout(5):
                while store.trouble is not None:
                    await asyncio.sleep(0.01)

    asyncio.run(story())


def test_a_job_that_was_refused_is_undone_even_if_the_disk_answers_only_at_the_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(writer, "PATIENCE_S", 0.05)
    answers = threading.Event()

    async def story() -> None:
        store = Store(tmp_path)
        usual = store._writer._work
        monkeypatch.setattr(store._writer, "_work", lambda request: (answers.wait(20), usual(request))[1])
        store.start()
        await asyncio.sleep(0)  # it waits for requests
        closing = asyncio.create_task(store.close())
        asked = store.insert(record("a"))
        with pytest.raises(StorageFull):
            await asked
        answers.set()
        await closing

    async def after() -> list[str]:
        async with a_store(tmp_path) as store:
            return [job.id for job in await store.recover()]

    asyncio.run(story())

    assert asyncio.run(after()) == []


@pytest.mark.parametrize("error", [MemoryError(), OSError(errno.EMFILE, "Too many open files")])
def test_who_asks_while_the_system_is_short_of_something_is_told_so(tmp_path: Path, error: Exception) -> None:
    async def story() -> str | None:
        async with a_store(tmp_path) as store:
            with mock.patch.object(rows, "find", side_effect=error), pytest.raises(NotReady, match="too little"):
                await store.find("a", None)
            return store.trouble

    assert asyncio.run(story()) is None


def test_files_that_cannot_be_looked_at_for_a_moment_do_not_end_the_server(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def story() -> list[str]:
        async with a_store(tmp_path) as store:
            with monkeypatch.context() as failing:
                failing.setattr("server.store.store._place", mock.Mock(side_effect=OSError(errno.EIO, "I/O error")))
                await store.insert(record("a"))
            await store.insert(record("b"))
            return [job.id for job in await store.recover()]

    assert asyncio.run(story()) == ["a", "b"]


def test_a_second_server_on_the_same_store_is_refused_by_the_first_ones_process(tmp_path: Path) -> None:
    async def story() -> None:
        async with a_store(tmp_path):
            with pytest.raises(StoreInUse, match=f"process {os.getpid()}"):
                Store(tmp_path)

    asyncio.run(story())


def some_jobs(directory: Path) -> None:
    """A store of a server that was killed: some of it is in the log that has not been merged yet."""
    code = f"""
import asyncio, os, pathlib
from tests.server.jobs.records import a_store, record
async def story():
    async with a_store(pathlib.Path({str(directory)!r})) as store:
        for i in range(300):
            await store.insert(record(f"{{i}}", request="x" * 500))
        os._exit(0)
asyncio.run(story())
"""
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.parametrize("wrong", ["garbage", "page", "newer", "other"])
def test_a_damaged_or_unknown_store_is_refused_and_unchanged(tmp_path: Path, wrong: str) -> None:
    some_jobs(tmp_path)
    journal = tmp_path / JOURNAL
    if wrong == "garbage":
        journal.write_bytes(b"not a database at all" * 1000)
    else:
        with sqlite3.connect(journal) as db:
            db.execute("PRAGMA wal_checkpoint(TRUNCATE)")
            if wrong == "newer":
                db.execute(f"PRAGMA user_version = {VERSION + 1}")
            if wrong == "other":
                db.executescript("PRAGMA application_id = 7; CREATE TABLE theirs (x)")
        db.close()
        if wrong == "page":
            data = bytearray(journal.read_bytes())
            data[4096 * 5 : 4096 * 6] = b"\xff" * 4096
            journal.write_bytes(data)
    before = files(tmp_path)

    with pytest.raises(StoreRefused) as refusal:
        Store(tmp_path)

    assert {"newer": "version 2", "other": "something else"}.get(wrong, "damaged") in str(refusal.value)
    assert files(tmp_path).items() >= before.items()


@contextlib.contextmanager
def files_of_at_most(size: int) -> Iterator[None]:
    """No file of this process can grow beyond so many bytes: writing more fails with EFBIG. The signal that comes with
    it is ignored, as Python does anyway; where Triton has compiled something, LLVM has put a handler in its place."""
    (soft, hard), handler = resource.getrlimit(resource.RLIMIT_FSIZE), signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        if handler is not None:  # None: not one of Python's, which cannot be put back
            signal.signal(signal.SIGXFSZ, handler)


@pytest.mark.parametrize("bytes_", [0, 8192])  # for not even the lock; for no index of the log
def test_a_sound_store_on_a_full_disk_is_not_called_damaged_and_unchanged(tmp_path: Path, bytes_: int) -> None:
    some_jobs(tmp_path)
    before = files(tmp_path)
    with files_of_at_most(bytes_), pytest.raises(StorageFull, match="the disk may be full") as refusal:
        Store(tmp_path)

    assert "damaged" not in str(refusal.value)
    assert files(tmp_path) == before
    asyncio.run(Store(tmp_path).close())


def test_a_store_whose_server_was_killed_opens_with_all_jobs(tmp_path: Path) -> None:
    some_jobs(tmp_path)

    async def story() -> int:
        async with a_store(tmp_path) as store:
            return len(await store.recover())

    assert asyncio.run(story()) == 300


def test_a_blob_is_on_disk_before_the_row_that_names_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    done: list[str] = []

    def noting(word: str, call: str) -> None:
        real = getattr(os, call)

        def noted(*args: object) -> object:
            done.append(word)
            return real(*args)

        monkeypatch.setattr(os, call, noted)

    async def story() -> None:
        async with a_store(tmp_path, lambda seconds: done.append("commit")) as store:
            await store.insert(record("a"))
            done.clear()
            await keep_again(store)

    async def keep_again(store: Store) -> None:
        await store.blobs.save({name(b"png"): b"png"})
        await store.finish(ended("a", (b"png",)))

    noting("sync", "fsync")
    noting("rename", "replace")
    asyncio.run(story())

    assert done == ["sync", "rename", "sync", "commit"]


def test_a_blob_that_cannot_be_deleted_is_a_trouble_of_the_pictures_and_is_deleted_later(tmp_path: Path) -> None:
    bad, usual = name(b"x"), Path.unlink

    def unlink(path: Path, missing_ok: bool = False) -> None:
        if path.name == bad:
            raise OSError(errno.EIO, "Input/output error")
        usual(path, missing_ok)

    async def story() -> list[object]:
        async with a_store(tmp_path) as store:
            await keep(store, "a", b"x", b"y", b"z")
            await store.expire(before=99.0, most_bytes=1 << 40)
            with mock.patch.object(Path, "unlink", unlink), pytest.raises(StorageFull, match="pictures"):
                await store.delete_unused()
            found: list[object] = [list(store.troubles.now), [path.name for path in (tmp_path / PICTURES).iterdir()]]
            await store.delete_unused()
            return [*found, [*(tmp_path / PICTURES).iterdir()]]

    assert asyncio.run(story()) == [["pictures"], [bad], []]


@pytest.mark.parametrize("end", [999.0, 2.0])  # the last job with the picture is undone; it expires before that
def test_the_blobs_of_jobs_are_deleted_though_the_disk_answers_late(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, end: float
) -> None:
    answers = threading.Event()

    async def story() -> list[Path]:
        async with a_store(tmp_path) as store:
            await keep(store, "a", b"png", identities=("i",))
            usual = store._writer._work
            monkeypatch.setattr(writer, "PATIENCE_S", 0.05)
            monkeypatch.setattr(store._writer, "_work", lambda request: (answers.wait(20), usual(request))[1])
            asked: list[asyncio.Future[Any]] = [
                store.insert(record("b"), ended("b", (b"png",), ended=end), ("i",)),  # from the cache
                store.expire(before=99.0, most_bytes=1 << 40),
            ]
            assert [type(answer) for answer in await asyncio.gather(*asked, return_exceptions=True)] == [
                StorageFull
            ] * 2
            answers.set()
            while store.blobs.has(name(b"png"), 3):
                with contextlib.suppress(StorageFull):  # until the disk answers again
                    await store.delete_unused()
                await asyncio.sleep(0)
            return [*(tmp_path / PICTURES).iterdir()]

    assert asyncio.run(story()) == []


def test_a_folder_of_pictures_that_was_made_anew_is_noticed_though_inode_numbers_are_used_again(tmp_path: Path) -> None:
    failures = list[StoreRefused]()

    async def story() -> None:
        store = Store(tmp_path, on_failed=failures.append)
        store.start()
        before = (tmp_path / PICTURES).stat().st_ino
        for _ in range(100):
            (tmp_path / PICTURES).rmdir()
            (tmp_path / PICTURES).mkdir()
            if (tmp_path / PICTURES).stat().st_ino == before:
                break
        with pytest.raises(StorageFull):
            await store.insert(record("b"))
        await store.close()

    asyncio.run(story())

    assert "pictures was removed or replaced" in str(failures[0])


def test_a_file_system_that_is_read_only_is_no_mistake_of_the_settings(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "statvfs", lambda path: mock.Mock(f_flag=os.ST_RDONLY))

    with pytest.raises(StorageFull, match="its file system is mounted read-only; what is in it has been left as it is"):
        Store(tmp_path)


def test_a_file_system_without_locks_is_not_taken_for_another_server(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("fcntl.flock", mock.Mock(side_effect=OSError(errno.ENOLCK, "No locks available")))

    with pytest.raises(StoreRefused, match="cannot be locked: No locks available$"):
        Store(tmp_path)


def test_a_disk_that_does_not_answer_holds_up_no_event_loop(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    writers = list[int]()
    monkeypatch.setattr("server.store.lock.write_seen", lambda *_: writers.append(threading.get_ident()))

    async def story() -> None:
        async with a_store(tmp_path) as store:
            await store.expire(before=0.0, most_bytes=1 << 40, now=5.0)

    asyncio.run(story())

    assert writers
    assert threading.get_ident() not in writers


def test_no_picture_is_deleted_with_a_job_whose_deletion_may_be_undone(tmp_path: Path) -> None:
    class Full:
        """The journal while no transaction that changes something can be committed."""

        def __init__(self, db: sqlite3.Connection) -> None:
            self.db, self.room, self.before = db, asyncio.Event(), db.total_changes

        def __getattr__(self, name: str) -> Any:
            return getattr(self.db, name)

        def execute(self, query: str, *values: Any) -> sqlite3.Cursor:
            if query == "COMMIT" and not self.room.is_set() and self.db.total_changes > self.before:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            return self.db.execute(query, *values)

    async def story() -> tuple[bool, bool]:
        async with a_store(tmp_path) as store:
            await keep(store, "a", b"png")
            full = Full(store._db)
            store._writer._db = full  # type: ignore[assignment]
            revoking = store._writer.ask(lambda db: store._unused.update(retention.revoke(db, "a")), durable=True)
            store._unused.add(name(b"png"))  # as after a first attempt
            with contextlib.suppress(StorageFull):
                await store.delete_unused()
            kept = store.blobs.has(name(b"png"), 3)
            full.room.set()
            await revoking
            await store.delete_unused()
            return kept, store.blobs.has(name(b"png"), 3)

    assert asyncio.run(story()) == (True, False)
