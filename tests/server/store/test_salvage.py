"""What `ddpm check --salvage` makes of a damaged store: no job is lost for what can be made again."""

import asyncio
import errno
import os
import shutil
import sqlite3
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from unittest import mock

import pytest

from server.cli.main import main
from server.errors import StoreRefused
from server.store import salvage as salvaging
from server.store.lock import LOCK
from server.store.records import Delivery, Record, checksum
from server.store.salvage import salvage
from server.store.schema import JOURNAL, LOG, PICTURES, VERSIONS
from server.store.store import Store
from tests.server.jobs.records import a_store, ended, name, record
from tests.server.store.test_migration import as_version_1

WEBHOOK = '{"webhook": "https://a"}'
DELIVERED = Delivery(host="a", due=None, state="delivered", attempts=1, status=200, delivered_at=3.0)


async def fill(directory: Path) -> None:
    """Two jobs with pictures, the first of them with a webhook that was delivered; one that failed; one that waits."""
    async with a_store(directory) as store:
        for id, pngs in (("a", (b"png", b"other")), ("b", (b"third",))):
            await store.insert(record(id, request=WEBHOOK))
            await store.blobs.save({name(png): png for png in pngs})
            await store.finish(ended(id, pngs, request=WEBHOOK, delivery=Delivery(host="a")))
        await store.note_delivery(await store.find("a", None), DELIVERED)
        await store.insert(record("failed"))
        await store.finish(ended("failed", status="failed"))
        await store.insert(record("waits"))


async def states(directory: Path) -> dict[str, tuple[str | None, int]]:
    """The status of each job, and how many images it has."""
    async with a_store(directory) as store:
        return {job.id: (job.status, len(job.images)) for job in reversed(await store.page(None, None, None, 9))}


def change(directory: Path, statement: str) -> None:
    """Changes the journal behind the server's back."""
    with sqlite3.connect(directory / JOURNAL) as db:
        db.execute(statement)
    db.close()


def overwrite(directory: Path, *tables: str) -> None:
    """Overwrites the first page of these tables."""
    with sqlite3.connect(directory / JOURNAL) as db:
        query = "SELECT rootpage FROM sqlite_schema WHERE name = ?"
        pages = [db.execute(query, (table,)).fetchone()[0] for table in tables]
    db.close()
    with open(directory / JOURNAL, "r+b") as file:
        for page in pages:
            file.seek(4096 * (page - 1))
            file.write(b"\xff" * 4096)


ALL = {"a": (None, 0), "b": (None, 0), "failed": ("failed", 0), "waits": (None, 0)}


@pytest.mark.parametrize(
    ("damage", "again"),
    [
        (lambda data: change(data, "UPDATE images SET seed = seed + 1 WHERE job = 1"), ["a"]),
        (lambda data: change(data, "DELETE FROM images WHERE job = 2"), ["b"]),
        (lambda data: change(data, "UPDATE images SET job = 2 WHERE place = 1"), ["a", "b"]),
        (lambda data: change(data, "UPDATE files SET size = size + 1"), ["a", "b"]),
        (lambda data: change(data, "UPDATE jobs SET images_checksum = images_checksum + 1 WHERE number = 1"), ["a"]),
        (lambda data: overwrite(data, "images"), ["a", "b"]),
        (lambda data: overwrite(data, "files"), ["a", "b"]),
        (lambda data: (data / PICTURES).rename(data / "elsewhere"), ["a", "b"]),
    ],
)
def test_a_job_whose_images_are_damaged_runs_again(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], damage: Callable[[Path], object], again: list[str]
) -> None:
    asyncio.run(fill(tmp_path / "data"))
    damage(tmp_path / "data")

    main(["check", str(tmp_path / "data"), "--salvage", str(tmp_path / "out")])

    said = capsys.readouterr().out
    assert [line.split()[-1] for line in said.splitlines() if line.startswith("will run again")] == again
    assert "lost: job" not in said
    kept = {"a": ("succeeded", 2), "b": ("succeeded", 1)}
    after = ALL | {id: state for id, state in kept.items() if id not in again}
    assert asyncio.run(states(tmp_path / "out")) == after


def test_of_a_journal_of_version_1_no_job_is_lost_for_its_images(tmp_path: Path) -> None:
    asyncio.run(fill(tmp_path / "data"))
    as_version_1(tmp_path / "data")
    overwrite(tmp_path / "data", "images")

    report = salvage(tmp_path / "data", tmp_path / "out")

    assert (report.again, report.lost) == (["a", "b"], [])
    assert asyncio.run(states(tmp_path / "out")) == ALL


@pytest.mark.parametrize("request_", ["'{'", "'[]'", "x'ff'"])
@pytest.mark.parametrize("number", [1, 4])  # one that has ended, and one that waits
def test_of_a_journal_of_version_1_a_damaged_request_costs_no_other_job(
    tmp_path: Path, request_: str, number: int
) -> None:
    asyncio.run(fill(tmp_path / "data"))
    as_version_1(tmp_path / "data")
    change(tmp_path / "data", f"UPDATE jobs SET request = {request_} WHERE number = {number}")

    report = salvage(tmp_path / "data", tmp_path / "out")

    assert (report.jobs, [line.split(":")[0] for line in report.lost]) == (3, [f"job number {number}"])


def test_a_webhook_that_was_delivered_is_not_delivered_again_by_a_job_that_runs_again(tmp_path: Path) -> None:
    asyncio.run(fill(tmp_path / "data"))
    change(tmp_path / "data", "DELETE FROM images")
    salvage(tmp_path / "data", tmp_path / "out")

    async def story() -> tuple[list[Delivery | None], list[Record | None]]:
        async with a_store(tmp_path / "out") as store:
            next_ = [await store.next_delivery(9.0, [], [], [])]
            for job in await store.recover():
                if job.id != "waits":
                    first = job.delivery or Delivery(host="a")
                    await store.finish(replace(job, status="succeeded", ended=9.0, delivery=first))
            found = [(await store.find(id, None)).delivery for id in ("a", "b")]
            return found, [*next_, await store.next_delivery(9.0, [], [], [])]

    found, (before, after) = asyncio.run(story())

    assert found == [DELIVERED, Delivery(host="a")]
    assert before is None
    assert after is not None
    assert after.id == "b"


@pytest.mark.parametrize("version", [1, 2])
@pytest.mark.parametrize("field", [60, 68])  # user_version, application_id
def test_a_flipped_bit_of_the_version_is_damage_and_no_newer_version(tmp_path: Path, version: int, field: int) -> None:
    data = tmp_path / "data"
    asyncio.run(fill(data))
    if version == 1:
        as_version_1(data)
    whole = (data / JOURNAL).read_bytes()
    for bit in (0, 1, 2, 17, 31):
        word = int.from_bytes(whole[field : field + 4]) ^ 1 << bit
        (data / JOURNAL).write_bytes(whole[:field] + word.to_bytes(4) + whole[field + 4 :])
        with pytest.raises(StoreRefused, match="is damaged"):
            Store(data)
        assert main(["check", str(data), "--salvage", str(tmp_path / "out")]) == 4
        assert len(asyncio.run(states(tmp_path / "out"))) == 4
        shutil.rmtree(tmp_path / "out")


@pytest.mark.parametrize("version", [1, 2])
@pytest.mark.parametrize("damage", [slice(100, 101), slice(2040, 2060), slice(3990, 4096), slice(100, 4096)])
def test_a_damaged_schema_costs_no_job(tmp_path: Path, version: int, damage: slice) -> None:
    data = tmp_path / "data"
    asyncio.run(fill(data))
    if version == 1:
        as_version_1(data)
    whole = bytearray((data / JOURNAL).read_bytes())
    whole[damage] = b"\xff" * (damage.stop - damage.start)
    (data / JOURNAL).write_bytes(whole)

    with pytest.raises(StoreRefused, match="is damaged"):
        Store(data)
    assert main(["check", str(data), "--salvage", str(tmp_path / "out")]) == 4
    kept = {"a": ("succeeded", 2), "b": ("succeeded", 1)}
    assert asyncio.run(states(tmp_path / "out")) == ALL | kept


def as_folder(path: Path) -> None:
    """A folder of this name."""
    path.unlink(missing_ok=True)
    path.mkdir()


def as_loop(path: Path) -> None:
    """A link to itself."""
    path.unlink(missing_ok=True)
    path.symlink_to(path)


def as_pipe(path: Path) -> None:
    """A pipe into which nobody writes."""
    path.unlink(missing_ok=True)
    os.mkfifo(path)


@pytest.mark.parametrize("make", [as_folder, as_loop, as_pipe])
@pytest.mark.parametrize("file", [JOURNAL, LOG, LOCK])
def test_a_file_of_the_store_that_is_none_is_told_of_in_a_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], file: str, make: Callable[[Path], None]
) -> None:
    data = tmp_path / "data"
    asyncio.run(fill(data))
    make(data / file)

    assert main(["check", str(data)]) == 4
    said = capsys.readouterr()
    assert f"{file} " in said.out + said.err
    with pytest.raises(StoreRefused, match=file):
        Store(data)
    if file != LOCK:
        main(["check", str(data), "--salvage", str(tmp_path / "out")])
        assert len(asyncio.run(states(tmp_path / "out"))) == (4 if file == LOG else 0)


@pytest.mark.parametrize(("file", "code"), [(JOURNAL, 4), (LOG, 4), (LOCK, 4), (".", 2)])
def test_a_file_that_may_not_be_read_is_told_of_in_a_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], file: str, code: int
) -> None:
    asyncio.run(fill(tmp_path))
    (tmp_path / LOG).touch()
    usual: Callable[..., object] = os.listdir if file == "." else open

    def refuse(path: object, *rest: object, **named: object) -> object:
        if str(path) == str(tmp_path / file):
            raise PermissionError(errno.EACCES, "Permission denied")
        return usual(path, *rest, **named)

    with mock.patch("os.listdir" if file == "." else "builtins.open", refuse):
        assert main(["check", str(tmp_path)]) == code
    said = capsys.readouterr()
    assert "cannot be read: permission denied" in said.out + said.err


def test_check_of_a_store_without_a_folder_of_pictures_counts_what_is_missing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    asyncio.run(fill(tmp_path))
    shutil.rmtree(tmp_path / PICTURES)
    (tmp_path / PICTURES).touch()

    assert main(["check", str(tmp_path)]) == 4
    assert capsys.readouterr().out.count("is missing") == 3


def test_pages_that_the_disk_cannot_read_cost_what_is_in_them(tmp_path: Path) -> None:
    asyncio.run(fill(tmp_path / "data"))
    usual = os.pread
    with sqlite3.connect(tmp_path / "data" / JOURNAL) as db:
        page = db.execute("SELECT rootpage FROM sqlite_schema WHERE name = 'images'").fetchone()[0]
    db.close()

    def pread(file: int, size: int, at: int) -> bytes:
        if at == (page - 1) * 4096 and os.readlink(f"/proc/self/fd/{file}").endswith(f"data/{JOURNAL}"):
            raise OSError(errno.EIO, "Input/output error")
        return usual(file, size, at)

    with mock.patch("os.pread", pread):
        report = salvage(tmp_path / "data", tmp_path / "out")

    assert (report.again, report.lost) == (["a", "b"], [])


def test_a_salvage_that_is_cut_short_leaves_nothing_that_a_server_starts_on(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    asyncio.run(fill(tmp_path / "data"))
    for failure in (OSError(errno.ENOSPC, "No space left on device"), KeyboardInterrupt()):
        with mock.patch.object(salvaging, "count_commit", side_effect=failure):
            code = main(["check", str(tmp_path / "data"), "--salvage", str(tmp_path / "out")])
        assert code == (7 if isinstance(failure, OSError) else 130)
        with pytest.raises(StoreRefused):
            Store(tmp_path / "out")
        shutil.rmtree(tmp_path / "out")
    with mock.patch("os.pwrite", side_effect=OSError(errno.ENOSPC, "No space left on device")):
        assert main(["check", str(tmp_path / "data"), "--salvage", str(tmp_path / "out")]) == 7
    assert not (tmp_path / "out" / JOURNAL).exists()
    assert capsys.readouterr().err.count("No space left on device") == 2


def test_a_row_is_told_of_as_lost_once_and_only_if_no_state_of_the_journal_has_it(tmp_path: Path) -> None:
    def states_of(checksums: list[tuple[str, int]]) -> salvaging.State:
        db = sqlite3.connect(":memory:")
        db.executescript("".join(VERSIONS))
        db.executemany("INSERT INTO expired (id, owner, checksum) VALUES (?, 'me', ?)", checksums)
        return salvaging.State(db, checked=True)

    sound, report = [("a", checksum("a", "me")), ("b", checksum("b", "me"))], salvaging.Salvaged()
    states = [states_of([("a", 0), ("b", 0), ("c", 0)]), states_of([*sound, ("c", 0)])]
    out = states_of([]).db

    salvaging._copy_table(states, out, "expired", report)

    assert out.execute("SELECT id, checksum FROM expired ORDER BY id").fetchall() == sound
    assert report.lost == ["the row of c in the table expired"]
