"""Which webhook is next, as the journal has it."""

import asyncio
import random
import sqlite3
from pathlib import Path
from unittest import mock

import pytest

from server.errors import Gone, StoreRefused
from server.store import deliveries, retention
from server.store.checks import inspect
from server.store.records import Delivery, Record
from server.store.salvage import salvage
from server.store.schema import JOURNAL, VERSIONS
from server.store.store import Store
from tests.server.jobs.records import a_store, ended, keep, record


async def owe(store: Store, id: str, owner: str | None = None, **fields: object) -> None:
    """A job that has ended and has a webhook."""
    request = '{"webhook": "https://a"}'
    await store.insert(record(id, owner=owner, request=request))
    delivery = Delivery(**{"host": "a"} | fields)  # type: ignore[arg-type]
    await store.finish(ended(id, owner=owner, request=request, delivery=delivery))


def test_of_those_that_are_due_the_one_with_the_fewest_attempts_is_next(tmp_path: Path) -> None:
    async def story() -> list[str]:
        found = list[str]()
        async with a_store(tmp_path) as store:
            await owe(store, "done", due=None, state="delivered")
            await owe(store, "tomorrow", due=200.0)
            await owe(store, "retry", due=1.0, attempts=3)
            await owe(store, "late", due=9.0, attempts=1)
            await owe(store, "bob's", due=5.0, attempts=1, owner="bob")
            await owe(store, "first", host="b")
            for jobs, hosts, owners in [
                *(([], [], []), ([], ["b"], []), ([], ["b"], ["bob"]), ([5, 6], [], []), ([4, 5, 6], [], [])),
                *(([3, 4, 5, 6], [], []), ([], ["a", "b"], []), ([2, 3, 4, 5, 6], [], [])),
            ]:
                after = await store.next_delivery(10.0, jobs, hosts, owners)
                found.append(after.id if after is not None else "none")
        return found

    assert asyncio.run(story()) == ["first", "bob's", "late", "late", "retry", "tomorrow", "none", "none"]


def test_a_record_has_its_delivery_again_after_a_restart(tmp_path: Path) -> None:
    after = Delivery(host="a", due=None, state="gone", attempts=2, status=410, error=None)

    async def story() -> Delivery | None:
        async with a_store(tmp_path) as store:
            await owe(store, "id")
            await store.note_delivery(await store.find("id", None), after)
        async with a_store(tmp_path) as store:
            return (await store.find("id", None)).delivery

    assert asyncio.run(story()) == after


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ("UPDATE deliveries SET state = 'delivered', due = NULL", "the row of 1 in the table deliveries"),
        ("UPDATE deliveries SET host = 'b'", "the row of 1 in the table deliveries"),
        ("DELETE FROM deliveries", "1 webhooks without a delivery"),
        ("UPDATE deliveries SET job = 7", "1 deliveries without a job"),
    ],
)
def test_a_delivery_that_was_damaged_or_lost_ends_the_start(tmp_path: Path, change: str, said: str) -> None:
    async def story() -> None:
        async with a_store(tmp_path) as store:
            await owe(store, "id")

    asyncio.run(story())
    with sqlite3.connect(tmp_path / JOURNAL) as db:
        db.execute(change)
    db.close()
    damages = inspect(tmp_path, 0).damages
    with pytest.raises(StoreRefused):
        Store(tmp_path)

    assert any(said in damage for damage in damages)


def test_a_delivery_that_is_damaged_while_a_server_runs_is_passed_over(tmp_path: Path) -> None:
    async def story() -> str | None:
        async with a_store(tmp_path) as store:
            for id in ("damaged", "sound"):
                await owe(store, id)
            store._db.execute("UPDATE deliveries SET state = 'failed' WHERE job = 1")
            with pytest.raises(Gone):
                await store.find("damaged", None)
            after = await store.next_delivery(1.0, [], [], [])
            return after.id if after is not None else None

    assert asyncio.run(story()) == "sound"


def test_salvage_keeps_deliveries_and_begins_those_anew_that_are_damaged(tmp_path: Path) -> None:
    directory, out = tmp_path / "damaged", tmp_path / "out"

    async def before() -> None:
        async with a_store(directory) as store:
            for id in ("sound", "damaged", "lost"):
                await owe(store, id, attempts=2)
            await keep(store, "plain", b"png")

    async def after() -> tuple[list[Record], list[Delivery | None]]:
        async with a_store(out) as store:
            found = [await store.find(id, None) for id in ("sound", "damaged", "lost", "plain")]
            return await store.recover(), [job.delivery for job in found]

    asyncio.run(before())
    with sqlite3.connect(directory / JOURNAL) as db:
        db.execute("UPDATE deliveries SET attempts = 3 WHERE job = 2")
        db.execute("DELETE FROM deliveries WHERE job = 3")
    db.close()
    report = salvage(directory, out)

    assert (report.again, report.jobs) == ([], 4)
    assert asyncio.run(after()) == ([], [Delivery(host="a", attempts=2), Delivery(host="a"), Delivery(host="a"), None])


def test_retention_passes_over_jobs_with_pending_webhooks_and_bytes_do_not(tmp_path: Path) -> None:
    async def story() -> list[list[str]]:
        async with a_store(tmp_path) as store:
            await owe(store, "owed")
            for id in ("a", "b", "c"):
                await keep(store, id, b"png")
            deleted, fits = [retention.expire(store._db, 9.0, 1 << 60, limit=1).ids], mock.Mock(side_effect=[2, 2, 1])
            with mock.patch.object(retention, "size_bytes", fits):  # until one is deleted
                deleted.append(retention.expire(store._db, 0.0, 1, limit=9).ids)
            await owe(store, "owed, too")
            with mock.patch.object(retention, "size_bytes", mock.Mock(side_effect=[2, 1])):
                deleted.append(retention.expire(store._db, 9.0, 1, limit=9).ids)
            return deleted

    assert asyncio.run(story()) == [["a"], ["owed"], ["b", "c"]]


def pending(rows: list[tuple[int, str, str, float | None, int]]) -> sqlite3.Connection:
    """A journal with deliveries of (job, owner, host, due, attempts)."""
    db = sqlite3.connect(":memory:")
    db.executescript("".join(VERSIONS))
    columns = "job, owner, host, due, attempts, state, checksum"
    db.executemany(f"INSERT INTO deliveries ({columns}) VALUES (?, ?, ?, ?, ?, 'pending', 0)", rows)
    return db


@pytest.mark.parametrize("most_groups", [1, 1000])  # one pass over all; a look at each group
def test_the_next_job_is_the_first_of_all_in_the_order(monkeypatch: pytest.MonkeyPatch, most_groups: int) -> None:
    monkeypatch.setattr(deliveries, "MOST_GROUPS", most_groups)
    draw, now = random.Random(5), 10.0
    for _ in range(200):
        rows = [
            (job, draw.choice(("", "me", "you")), draw.choice("ab"), draw.choice((None, 1.0, 5.0, 20.0)), job % 3)
            for job in range(draw.randrange(12))
        ]
        jobs, hosts, owners = draw.sample(range(12), 3), draw.choice(([], ["a"])), draw.choice(([], ["me"]))
        free = [
            (max(due, now), attempts if due <= now else 0, due, job)
            for job, owner, host, due, attempts in rows
            if due is not None and job not in jobs and host not in hosts and owner not in owners
        ]

        found = deliveries.next_job(pending(rows), now, jobs, hosts, owners)

        assert found == (min(free)[-1] if free else None)


def test_looking_for_the_next_job_takes_no_longer_for_more_that_wait_for_one_host() -> None:
    def steps(count: int, hosts: list[str]) -> int:
        db, taken = pending([(job, "", "a", float(job), job % 3) for job in range(count)]), list[int]()
        db.set_progress_handler(lambda: taken.append(1), 1)
        deliveries.next_job(db, 1e9, [0, 1], hosts, [])
        return len(taken)

    assert steps(20_000, []) == steps(100, [])
    assert steps(20_000, ["a"]) == steps(100, ["a"])
