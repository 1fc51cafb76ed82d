"""The deliveries of webhooks: one row per ended job that has a webhook, in the transaction that ends the job."""

import json
import sqlite3
from collections.abc import Collection, Iterator
from itertools import islice

from server.errors import Gone
from server.store.records import Delivery, Record, checksum

IDLE = "due IS NOT NULL AND job NOT IN (SELECT value FROM json_each(?))"
NEXT = f"""SELECT job FROM deliveries WHERE {IDLE} AND host NOT IN (SELECT value FROM json_each(?))
    AND owner NOT IN (SELECT value FROM json_each(?))
    ORDER BY max(due, ?), iif(due > ?, 0, attempts), due, job LIMIT 1"""
HEAD = f"""SELECT owner, host, attempts, due, job FROM deliveries WHERE {IDLE} AND (owner, host, attempts) >= (?, ?, ?)
    ORDER BY owner, host, attempts, due, job LIMIT 1"""
MOST_GROUPS = 300  # that are looked up one by one: beyond that, one pass over all deliveries takes no longer
LAST_HOST, LAST_ATTEMPT = "\U0010ffff", 1 << 62  # which sort behind all others
FIELDS = tuple(Delivery.__slots__)
COLUMNS = ("job", "owner", *FIELDS)
INSERT = f"INSERT INTO deliveries ({', '.join(COLUMNS)}, checksum) VALUES ({'?, ' * len(COLUMNS)} ?)"
UPDATE = f"UPDATE deliveries SET {', '.join(f'{name} = ?' for name in FIELDS)}, checksum = ? WHERE job = ?"
READ = f"SELECT {', '.join(COLUMNS)}, checksum FROM deliveries WHERE job = ?"


def _values(delivery: Delivery) -> list[object]:
    return [getattr(delivery, name) for name in FIELDS]


def insert(db: sqlite3.Connection, number: int, owner: str | None, delivery: Delivery | None) -> None:
    """A job has ended; its webhook, if it has one, is to be delivered. number: of the job"""
    if delivery is not None:
        values = [number, owner or "", *_values(delivery)]
        db.execute(INSERT, [*values, checksum(*values)])


def update(db: sqlite3.Connection, number: int, owner: str | None, delivery: Delivery) -> None:
    """Notes how far a delivery is, unless the job has been deleted meanwhile."""
    values = _values(delivery)
    db.execute(UPDATE, [*values, checksum(number, owner or "", *values), number])


def read(db: sqlite3.Connection, number: int) -> Delivery | None:
    """How far the delivery of a job's webhook is; None if it has none, or has not ended. Raises Gone if it is
    damaged."""
    row = db.execute(READ, (number,)).fetchone()
    if row is None:
        return None
    *values, written = row
    if checksum(*values) != written:
        raise Gone("this job was damaged on disk")
    return Delivery(**{name: row[name] for name in FIELDS})


def first(record: Record) -> Delivery | None:
    """The delivery that a job which has ended began with; None if it has no webhook, or has not ended."""
    url = json.loads(record.request).get("webhook") if record.status is not None else None
    return Delivery.to(url) if url is not None else None


def next_job(
    db: sqlite3.Connection, now: float, jobs: Collection[int], hosts: Collection[str], owners: Collection[str]
) -> int | None:
    """The number of the job whose webhook is next: of those that are due the one with the fewest attempts, then the one
    that is due first. jobs, hosts, owners: those that have their turn already"""
    heads = list(islice(_heads(db, json.dumps(jobs), hosts, owners), MOST_GROUPS))
    if len(heads) < MOST_GROUPS:
        order = [(max(due, now), attempts if due <= now else 0, due, job) for *_, attempts, due, job in heads]
        return min(order)[-1] if order else None
    row = db.execute(NEXT, [*map(json.dumps, (jobs, hosts, owners)), now, now]).fetchone()
    return row[0] if row is not None else None


def _heads(db: sqlite3.Connection, jobs: str, hosts: Collection[str], owners: Collection[str]) -> Iterator[sqlite3.Row]:
    """The first delivery of each group of equal owner, host and attempts: a search of the index for each, however many
    others are pending."""
    start: tuple[str, str, int] = "", "", 0
    while (head := db.execute(HEAD, (jobs, *start)).fetchone()) is not None:
        owner, host, attempts, *_ = head
        if owner in owners:
            start = owner, LAST_HOST, 0
        elif host in hosts:
            start = owner, host, LAST_ATTEMPT
        else:
            yield head
            start = owner, host, attempts + 1


def delete(db: sqlite3.Connection, number: int) -> None:
    """A job is deleted."""
    db.execute("DELETE FROM deliveries WHERE job = ?", (number,))
