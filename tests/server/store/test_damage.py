"""What a server promised is what the next one finds, or it does not start: damage to the store of a killed server."""

import asyncio
import itertools
import os
import random
import shutil
import sqlite3
from collections.abc import AsyncGenerator, Callable
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest import mock

import pytest

from model.engine.events import Failed
from server.cli.main import main
from server.engines.backend import SampleEvent
from server.errors import Gone, StorageFull, StoreRefused
from server.store import blobs, wal
from server.store.lock import FLOOR, FLOOR_BYTES, LOCK
from server.store.records import Record
from server.store.salvage import salvage
from server.store.schema import JOURNAL, LOG, PICTURES
from server.store.store import Store
from server.worker.messages import Spec
from tests.server.jobs.records import a_store, keep, name, record
from tests.server.store import flips
from tests.server.store.flips import flip, killed, pick, snapshot, truncate, verdict
from tests.waiting import until

Promised = tuple[Path, dict[str, Any]]


@pytest.fixture(scope="module")
def promised(weights: Path, tmp_path_factory: pytest.TempPathFactory) -> Promised:
    """The data directory of a server that was killed, and the jobs that it had promised."""
    place = tmp_path_factory.mktemp("killed")
    return place / "data", killed(weights, place)


@pytest.fixture
def data(promised: Promised, tmp_path: Path) -> Path:
    """A copy of that directory."""
    return Path(shutil.copytree(promised[0], tmp_path / "data"))


def refusal(data: Path) -> str:
    """Why a server does not start, after nothing was changed."""
    before = snapshot(data)
    with pytest.raises(StoreRefused) as refused:
        Store(data)
    assert snapshot(data) == before
    return str(refused.value)


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("kind", [JOURNAL, LOG, PICTURES])
def test_a_flipped_bit_or_a_cut_is_refused_or_harmless(
    weights: Path, promised: Promised, data: Path, kind: str, seed: int
) -> None:
    draw = random.Random(f"{kind} {seed}")
    what = draw.choice((flip, truncate))(pick(data, kind, draw), draw)

    assert verdict(weights, data, promised[1]) in ("exit 4", "all there"), what


def test_without_damage_everything_is_there(weights: Path, promised: Promised, data: Path) -> None:
    assert verdict(weights, data, promised[1]) == "all there"


def middle(path: Path, at: float = 0.25) -> None:
    """Flips a bit at this part of a file."""
    with open(path, "r+b") as file:
        file.seek(int(path.stat().st_size * at))
        byte = file.read(1)[0]
        file.seek(-1, os.SEEK_CUR)
        file.write(bytes([byte ^ 1]))


def halve(path: Path) -> None:
    """Leaves the first half."""
    os.truncate(path, path.stat().st_size // 2)


def zero(path: Path) -> None:
    """Nothing but zeros."""
    path.write_bytes(bytes(path.stat().st_size))


@pytest.mark.parametrize(
    ("file", "damage"), [(LOG, middle), *itertools.product((JOURNAL, LOG), (halve, zero, Path.unlink))]
)
def test_a_journal_or_log_that_is_not_whole_is_refused(data: Path, file: str, damage: Callable[[Path], None]) -> None:
    damage(data / file)

    said = refusal(data)

    assert f"the store {data} is damaged" in said
    assert f"`ddpm check {data}`" in said


def test_a_log_that_is_cut_off_in_its_header_is_refused(data: Path) -> None:
    os.truncate(data / LOG, 31)

    assert f"{LOG}: its header is cut off" in refusal(data)


@pytest.mark.parametrize("at", [0.0, 0.5, 0.95, 0.9999])
def test_a_bad_frame_anywhere_in_the_log_is_refused(data: Path, at: float) -> None:
    middle(data / LOG, at)
    refusal(data)


@pytest.mark.parametrize("at", [0.0, 0.25, 0.5, 0.9])
def test_without_a_lock_file_a_bad_frame_with_transactions_behind_it_is_refused(data: Path, at: float) -> None:
    (data / LOCK).unlink()
    middle(data / LOG, at)
    with pytest.raises(StoreRefused, match=LOG):
        Store(data)


def test_an_older_journal_is_refused(tmp_path: Path) -> None:
    async def story(id: str) -> None:
        async with a_store(tmp_path / "data") as store:
            await store.insert(record(id))

    asyncio.run(story("a"))
    older = (tmp_path / "data" / JOURNAL).read_bytes()
    asyncio.run(story("b"))
    (tmp_path / "data" / JOURNAL).write_bytes(older)

    assert "was promised, and the last one that can be read" in refusal(tmp_path / "data")


@pytest.mark.parametrize("file", [JOURNAL, LOCK])
def test_a_file_of_another_store_is_refused_though_that_has_had_more_transactions(tmp_path: Path, file: str) -> None:
    async def story(directory: Path, jobs: int) -> None:
        async with a_store(directory) as store:
            for number in range(jobs):
                await store.insert(record(f"{number}"))

    ours, theirs = (tmp_path / "b", tmp_path / "a") if file == JOURNAL else (tmp_path / "a", tmp_path / "b")
    asyncio.run(story(tmp_path / "a", 5))
    asyncio.run(story(tmp_path / "b", 1))
    shutil.copy(theirs / file, ours / file)

    assert "is of another store" in refusal(ours)


def test_a_damaged_lock_file_is_refused_and_a_lost_one_is_not(data: Path) -> None:
    whole = (data / LOCK).read_bytes()
    for at in range(FLOOR, FLOOR + FLOOR_BYTES):
        (data / LOCK).write_bytes(whole[:at] + bytes([whole[at] ^ 1]) + whole[at + 1 :])
        assert "lock is damaged" in refusal(data)
    (data / LOCK).unlink()
    asyncio.run(Store(data).close())
    middle(data / JOURNAL, 0.5)
    zero(data / JOURNAL)
    refusal(data)


def test_what_a_power_cut_leaves_behind_the_last_transaction_is_no_damage(
    weights: Path, promised: Promised, data: Path
) -> None:
    frames = wal.read(data / LOG)
    assert frames is not None
    size = wal.FRAME_HEADER + frames.page_size
    head = bytearray((data / LOG).read_bytes()[wal.HEADER : wal.HEADER + wal.FRAME_HEADER])
    head[4:8] = bytes(4)  # in the midst of a transaction, whose first frame was not written
    with open(data / LOG, "ab") as log:
        log.write(bytes(size) + head + bytes(frames.page_size) + b"half of a frame")

    assert verdict(weights, data, promised[1]) == "all there"


def test_what_failed_commits_leave_behind_the_last_transaction_is_no_damage(
    weights: Path, promised: Promised, data: Path
) -> None:
    size = wal.FRAME_HEADER + 4096
    log = (data / LOG).read_bytes()
    (data / LOG).write_bytes(log + log[-6 * size :])  # ends of transactions, with the salts of this log

    assert verdict(weights, data, promised[1]) == "all there"


@pytest.mark.parametrize(
    "change",
    [
        "UPDATE jobs SET request = '[]' WHERE number = 2",
        "UPDATE jobs SET id = 'a' WHERE number = 2",
        "UPDATE jobs SET status = NULL WHERE number = 2",
        "UPDATE jobs SET messages = messages + 1 WHERE number = 2",
        "UPDATE jobs SET created_at = created_at + 1 WHERE number = 2",
        "UPDATE jobs SET checksum = checksum + 1 WHERE number = 2",
        "UPDATE images SET seed = seed + 1 WHERE job = 2",
        "DELETE FROM images WHERE job = 2",
        "UPDATE files SET size = size + 1",
        "DELETE FROM files",
        "UPDATE known SET sha256 = 'other'",
        "UPDATE known SET identity = 'other'",
        "UPDATE expired SET id = 'other'",
        "UPDATE expired SET owner = 'me'",
        "UPDATE total SET bytes = bytes + 1",
        "DELETE FROM total",
        "DROP INDEX unfinished",
        "DROP TRIGGER more",
        "UPDATE jobs SET arrived = 'never' WHERE number = 2",
        "UPDATE jobs SET request = x'00ff' WHERE number = 2",
        "UPDATE jobs SET request = CAST(x'00ff' AS TEXT) WHERE number = 2",
    ],
)
def test_a_row_that_is_not_as_it_was_written_is_refused(tmp_path: Path, change: str) -> None:
    async def story() -> None:
        async with a_store(tmp_path) as store:
            await keep(store, "gone", b"x", ended=1.0)
            await store.expire(before=1.5, most_bytes=1 << 40)
            await store.delete_unused()
            await keep(store, "kept", b"png", identities=("i",))
            await store.insert(record("waits"))

    asyncio.run(story())
    with sqlite3.connect(tmp_path / JOURNAL) as db:
        db.execute("PRAGMA wal_checkpoint(TRUNCATE)")
        assert db.execute(change).rowcount
    db.close()

    assert "damaged" in refusal(tmp_path)


def test_a_row_that_is_damaged_while_the_server_runs_is_refused_when_it_is_read(tmp_path: Path) -> None:
    async def story() -> Record | None:
        async with a_store(tmp_path) as store:
            await keep(store, "a", b"png", identities=("i",))
            store._db.execute("UPDATE known SET sha256 = 'other'")
            made = await keep(store, "b", b"png", identities=("i",))
            store._db.execute("UPDATE jobs SET request = '[]' WHERE id = 'a'")
            with pytest.raises(Gone, match="this job was damaged on disk"):
                await store.find("a", None)
            assert [job.id for job in await store.page(None, None, None, 9)] == ["b"]
            return made

    made = asyncio.run(story())

    assert made is not None
    assert made.images[0].sha256 == name(b"png")


def test_a_result_that_its_damaged_row_cannot_take_ends_the_store(tmp_path: Path) -> None:
    async def story() -> None:
        failed, waiting = asyncio.get_running_loop().create_future(), record("waits")
        store = Store(tmp_path, on_failed=failed.set_result)
        store.start()
        await store.insert(waiting)
        store._db.execute("UPDATE jobs SET request = '[]'")
        with pytest.raises(StorageFull):
            await store.finish(replace(waiting, status="cancelled", ended=2.0))
        assert "the row of job waits is damaged" in str(await failed)
        await store.close()

    asyncio.run(story())


@pytest.mark.parametrize("damage", [Path.unlink, halve])
def test_a_picture_that_is_gone_or_cut_off_is_refused_at_the_start(data: Path, damage: Callable[[Path], None]) -> None:
    picture = min((data / PICTURES).iterdir())
    damage(picture)

    assert f"the picture {picture.name}" in refusal(data)


def test_a_missing_journal_beside_pictures_alone_is_no_fresh_start(data: Path) -> None:
    for file in (JOURNAL, LOG, LOCK):
        (data / file).unlink()

    with pytest.raises(StoreRefused, match=f"{JOURNAL} is missing"):
        Store(data)


def test_a_file_that_a_probe_of_the_disk_takes_away_does_not_end_a_start(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usual = os.utime

    def late(path: Path) -> None:
        if path.name == "probe.part":
            path.unlink()
        usual(path)

    async def story() -> list[str]:
        async with a_store(tmp_path) as store:
            await store.blobs.save({name(b"lost"): b"lost"})
            (tmp_path / PICTURES / "probe.part").write_bytes(b"")
            monkeypatch.setattr(os, "utime", late)
            await store.recover()
            return [path.name for path in (tmp_path / "aside").iterdir()]

    assert asyncio.run(story()) == [name(b"lost")]


def test_what_is_not_ours_is_left_alone_and_what_no_job_names_is_kept_for_a_day(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pictures, aside = tmp_path / PICTURES, tmp_path / "aside"
    foreign = [".DS_Store", "README", "0" * 63, "F" * 64, "film.part", "jobs.newer", "jobs.new.txt"]

    async def story() -> None:
        (tmp_path / "jobs.newer").write_bytes(b"mine")
        async with a_store(tmp_path) as store:
            assert (tmp_path / "jobs.newer").exists()
            await keep(store, "a", b"png")
            await store.blobs.save({name(b"lost"): b"lost"})
        for folder in (tmp_path, pictures):
            for file in foreign:
                (folder / file).write_bytes(b"mine")
            (folder / "lost+found").mkdir()
            (folder / ("1" * 64)).mkdir()
            (folder / ("2" * 64)).symlink_to(tmp_path / "README")
        before = snapshot(pictures)
        async with a_store(tmp_path) as store:
            await store.recover()
            assert {path.name for path in aside.iterdir()} == {name(b"lost")}
            (aside / "README").write_bytes(b"mine")
            store.blobs.clear_aside()
            assert (aside / name(b"lost")).read_bytes() == b"lost"
            monkeypatch.setattr(blobs, "ASIDE_S", -1.0)  # a day later
            store.blobs.clear_aside()
        assert {path.name for path in aside.iterdir()} == {"README"}
        assert snapshot(pictures) == {file: data for file, data in before.items() if file != name(b"lost")}

    asyncio.run(story())


def swapped(directory: Path) -> None:
    """Another directory under the same name, as a mount or a restored backup puts it there."""
    directory.rename(directory.with_name("moved"))
    shutil.copytree(directory.with_name("moved"), directory)


@pytest.mark.parametrize("lost", [".", LOCK, JOURNAL, LOG, PICTURES, "swapped"])
def test_nothing_is_promised_after_a_file_of_the_store_was_removed(tmp_path: Path, lost: str) -> None:
    failures, data = list[StoreRefused](), tmp_path / "data"

    async def story() -> None:
        store = Store(data, on_failed=failures.append)
        store.start()
        await store.insert(record("a"))
        if lost == "swapped":
            swapped(data)
        elif lost in (".", PICTURES):
            shutil.rmtree(data / lost)
        else:
            (data / lost).unlink()
        with pytest.raises(StorageFull):
            await store.insert(record("b"))
        assert store.trouble is not None
        await store.close()

    asyncio.run(story())

    assert "was removed or replaced" in str(failures[0])


def test_a_server_without_work_notices_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("server.store.store.WATCH_S", 0.01)

    async def story() -> str:
        failed = asyncio.get_running_loop().create_future()
        store = Store(tmp_path / "data", on_failed=failed.set_result)
        store.start()
        shutil.rmtree(tmp_path / "data")
        async with asyncio.timeout(10):
            failure = await failed
        await store.close()
        return str(failure)

    assert "was removed or replaced" in asyncio.run(story())


def test_check_says_what_is_sound_and_changes_nothing(
    promised: Promised, data: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = snapshot(data)

    assert main(["check", str(data)]) == 0
    assert capsys.readouterr().out.startswith("sound: 45 jobs (5 have not ended), ")
    assert snapshot(data) == before


def test_check_names_each_damage(data: Path, capsys: pytest.CaptureFixture[str]) -> None:
    first, second = sorted((data / PICTURES).iterdir())[:2]
    middle(first, 0.5)
    second.unlink()
    middle(data / LOG)
    before = snapshot(data)

    assert main(["check", str(data)]) == 4
    said = capsys.readouterr().out
    assert f"damaged: {LOG}: frame " in said
    assert f"damaged: {JOURNAL} or its log is cut short" in said
    assert snapshot(data) == before


def test_check_of_a_store_in_use_or_of_something_else_is_refused(tmp_path: Path) -> None:
    async def story() -> int:
        async with a_store(tmp_path / "data"):
            return main(["check", str(tmp_path / "data")])

    assert asyncio.run(story()) == 5
    assert main(["check", str(tmp_path)]) == 2
    assert main(["check", str(tmp_path / "nowhere")]) == 2


@pytest.mark.parametrize("file", [LOG, JOURNAL, "known", "header"])
def test_salvage_writes_a_store_with_all_sound_jobs(
    weights: Path, promised: Promised, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], file: str
) -> None:
    jobs, out = dict(promised[1]), tmp_path / "out"
    if file == "known":
        with sqlite3.connect(data / JOURNAL) as db:
            db.execute("UPDATE known SET identity = 'x' WHERE sha256 = (SELECT sha256 FROM images LIMIT 1)")
        db.close()
    elif file == "header":
        middle(data / LOG, 0.0)
    else:
        middle(data / file, 0.5)
    damaged = min((data / PICTURES).iterdir())
    middle(damaged, 0.5)
    before = snapshot(data)

    code = main(["check", str(data), "--salvage", str(out)])
    said = capsys.readouterr().out

    lost = [int(line.split()[3].rstrip(":")) for line in said.splitlines() if line.startswith("lost: job number")]
    ids = list(jobs)
    for number in lost:
        del jobs[ids[number - 1]]
    assert len(jobs) >= 35
    assert f"saved in {out}: {len(jobs)} jobs" in said
    assert code == (4 if "lost: " in said else 0)
    for line in said.splitlines():
        if line.startswith("will run again"):  # it will: `verdict` compares its pictures, not when they were made
            jobs[line.split()[-1]]["status"] = "queued"
    assert verdict(weights, out, jobs) == "all there"
    assert snapshot(data) == before


def test_salvage_of_sound_rows_with_a_damaged_picture_loses_nothing(
    weights: Path, promised: Promised, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    picture = data / PICTURES / next(iter(promised[1].values()))["images"][0]["sha256"]
    picture.unlink()

    assert main(["check", str(data), "--salvage", str(tmp_path / "out")]) == 0
    said = capsys.readouterr().out
    assert f"damaged: the picture {picture.name} is missing" in said
    jobs = {id: {"status": "queued"} if id in said else document for id, document in promised[1].items()}
    assert verdict(weights, tmp_path / "out", jobs) == "all there"


def test_salvage_without_a_journal_takes_what_the_log_has(
    data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (data / JOURNAL).unlink()

    assert main(["check", str(data), "--salvage", str(tmp_path / "out")]) == 4
    assert f"damaged: {JOURNAL} is missing" in capsys.readouterr().out
    asyncio.run(Store(tmp_path / "out").close())


@pytest.mark.parametrize("at", [0, 16, 21, 30, 47, 68])  # magic, page size, fractions, pages, format, application
def test_a_damaged_header_is_damage_and_can_be_salvaged(tmp_path: Path, at: int) -> None:
    async def story() -> None:
        async with a_store(tmp_path / "data") as store:
            await keep(store, "a", b"png")

    asyncio.run(story())
    path = tmp_path / "data" / JOURNAL
    whole = path.read_bytes()
    path.write_bytes(whole[:at] + bytes([whole[at] ^ 1]) + whole[at + 1 :])

    assert "something else" not in refusal(tmp_path / "data")
    assert main(["check", str(tmp_path / "data"), "--salvage", str(tmp_path / "out")]) == 4
    assert asyncio.run(found(tmp_path / "out")) == "succeeded"


async def found(data: Path) -> str | None:
    """The state of the job a."""
    async with a_store(data) as store:
        return (await store.find("a", None)).status


@pytest.mark.parametrize("size", [0, 1, 50, 100, 4096])
def test_a_journal_that_is_cut_to_nothing_is_salvaged_from_its_log(data: Path, tmp_path: Path, size: int) -> None:
    os.truncate(data / JOURNAL, size)

    refusal(data)
    assert main(["check", str(data), "--salvage", str(tmp_path / "out")]) == 4
    asyncio.run(Store(tmp_path / "out").close())


def test_salvage_of_a_store_that_has_had_many_jobs_takes_as_long_as_those_it_has(data: Path, tmp_path: Path) -> None:
    with sqlite3.connect(data / JOURNAL) as db:
        db.execute("UPDATE sqlite_sequence SET seq = 1000000000000 WHERE name = 'jobs'")
    db.close()

    assert main(["check", str(data), "--salvage", str(tmp_path / "out")]) == 0


def test_salvage_ends_whichever_frame_is_bad_though_a_key_was_used_again(tmp_path: Path) -> None:
    data, copy = tmp_path / "data", tmp_path / "copy"

    async def story() -> None:
        async with a_store(data) as store:
            await keep(store, "old", b"png", owner="me", key="k", ended=1.0)
            await store.expire(before=1.5, most_bytes=1 << 40)
            await store.insert(record("new", owner="me", key="k"))
            shutil.copytree(data, copy)

    asyncio.run(story())
    frames = wal.read(copy / LOG)
    assert frames is not None
    saved = set[int]()
    for index in range(len(frames.pages)):
        shutil.copytree(copy, tmp_path / f"{index}")
        middle(tmp_path / f"{index}" / LOG, (index + 0.5) / len(frames.pages))
        saved.add(salvage(tmp_path / f"{index}", tmp_path / f"out{index}").jobs)
        asyncio.run(Store(tmp_path / f"out{index}").close())

    assert saved <= {0, 1}


def test_salvage_does_not_write_into_a_directory_with_something_in_it(data: Path) -> None:
    assert main(["check", str(data), "--salvage", str(data)]) == 2
    assert main(["check", str(data), "--salvage", str(data / "new")]) == 2
    assert not (data / "new").exists()


def test_a_damaged_picture_is_made_again_and_never_served(weights: Path, promised: Promised, data: Path) -> None:
    document = next(iter(promised[1].values()))
    picture = data / PICTURES / document["images"][0]["sha256"]
    sound = picture.read_bytes()
    middle(picture, 0.5)
    with flips.start(weights, data) as client:
        request = {name: document["request"][name] for name in ("seed", "steps", "n")}
        cached = client.post("/generate", json=request)
        assert (cached.headers.get("x-cache"), cached.content) == ("hit", sound)

    assert picture.read_bytes() == sound


@pytest.fixture
def damaged(promised: Promised, data: Path) -> str:
    """The URL of a picture that is damaged."""
    image: dict[str, str] = next(iter(promised[1].values()))["images"][0]
    middle(data / PICTURES / image["sha256"], 0.5)
    return image["url"]


def test_a_damaged_picture_that_cannot_be_made_again_is_refused_with_the_reason(
    weights: Path, data: Path, damaged: str
) -> None:
    with flips.start(weights, data) as client:
        backend = client.app.state.jobs.backend  # type: ignore[attr-defined]
        status = backend.models.pop("tiny")
        gone = client.get(damaged)
        backend.models["tiny"] = replace(status, digest="sha256:1")
        changed = client.get(damaged)
        backend.models["tiny"] = status
        with mock.patch("server.jobs.encode.png", return_value=b"another picture"):
            other = client.get(damaged)

    reasons = (
        "",
        ", and the model that made it is no longer served",
        ", and it comes out with other bytes on this machine",
    )
    assert [answer.status_code for answer in (gone, changed, other)] == [410] * 3
    assert [answer.json()["detail"] for answer in (gone, changed, other)] == [
        f"this picture was damaged on disk{reason}" for reason in reasons
    ]


def test_a_picture_that_could_not_be_made_again_this_time_is_no_other_picture(
    weights: Path, data: Path, damaged: str
) -> None:
    async def fails(spec: Spec) -> AsyncGenerator[SampleEvent]:
        yield Failed(0, "memory ran out")

    with flips.start(weights, data) as client:
        jobs = client.app.state.jobs  # type: ignore[attr-defined]
        with mock.patch.object(jobs.backend, "run", fails):
            first = client.get(damaged)
        second = client.get(damaged)

    assert (first.status_code, first.json()["code"]) == (503, "not-ready")
    assert (second.status_code, jobs.repository.mismatches) == (200, 0)


def test_while_a_damaged_picture_is_made_again_callers_are_told_when_to_come_back(
    weights: Path, data: Path, damaged: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("server.jobs.repository.REMAKE_S", 0.1)
    with flips.start(weights, data, open_gate=False) as client:
        first, second = client.get(damaged), client.get(damaged)
        backend = client.app.state.jobs.backend  # type: ignore[attr-defined]
        assert client.portal is not None
        client.portal.call(backend.gate.set)
        until(lambda: client.get(damaged).status_code == 200, 10, pause_s=0.01)

    assert [(a.status_code, a.json()["code"]) for a in (first, second)] == [(503, "not-ready")] * 2
    assert "being made again" in first.json()["detail"]
    assert int(first.headers["retry-after"]) > 0
