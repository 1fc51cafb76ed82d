"""The deliveries of webhooks: one row per ended job that has a webhook, in the transaction that ends the job."""

import json
import sqlite3
from collections.abc import Sequence

from server.errors import Gone
from server.store.records import Delivery, Record, checksum

PENDING = "SELECT job FROM deliveries WHERE due IS NOT NULL"
NEXT = f"""{PENDING} AND job NOT IN (SELECT value FROM json_each(?)) AND host NOT IN (SELECT value FROM json_each(?))
    AND ifnull(owner, '') NOT IN (SELECT value FROM json_each(?))
    ORDER BY max(due, ?), iif(due > ?, 0, attempts), due, job LIMIT ?"""
MOST = 20  # of which one is sound, or the journal is not worth asking
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
        values = [number, owner, *_values(delivery)]
        db.execute(INSERT, [*values, checksum(*values)])


def update(db: sqlite3.Connection, number: int, owner: str | None, delivery: Delivery) -> None:
    """Notes how far a delivery is, unless the job has been deleted meanwhile."""
    values = _values(delivery)
    db.execute(UPDATE, [*values, checksum(number, owner, *values), number])


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


def next_jobs(db: sqlite3.Connection, now: float, *busy: Sequence[int | str]) -> list[int]:
    """The numbers of jobs whose webhooks are next: of those that are due the ones with the fewest attempts, then those
    that are due first. busy: jobs, hosts and owners that have their turn already"""
    return [number for (number,) in db.execute(NEXT, [*map(json.dumps, busy), now, now, MOST])]


def delete(db: sqlite3.Connection, number: int) -> None:
    """A job is deleted."""
    db.execute("DELETE FROM deliveries WHERE job = ?", (number,))
