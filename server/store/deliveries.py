"""The deliveries of webhooks: one row per ended job that has a webhook, in the transaction that ends the job."""

import json
import sqlite3
from collections.abc import Collection
from dataclasses import dataclass
from typing import Any

TABLE = """
CREATE TABLE deliveries (
    job          INTEGER PRIMARY KEY,               -- its number
    owner        TEXT,
    host         TEXT NOT NULL,
    due          REAL,                              -- of the next attempt, by the clock that does not jump; NULL: none
    state        TEXT NOT NULL,
    attempts     INTEGER NOT NULL,
    status       INTEGER,                           -- what the last attempt came to
    error        TEXT,
    delivered_at REAL
);
CREATE INDEX pending ON deliveries (due, attempts, host, owner) WHERE due IS NOT NULL;
"""
PENDING = "SELECT job FROM deliveries WHERE due IS NOT NULL"
NEXT = f"""{PENDING} AND job NOT IN (SELECT value FROM json_each(?)) AND host NOT IN (SELECT value FROM json_each(?))
    AND ifnull(owner, '') NOT IN (SELECT value FROM json_each(?))
    ORDER BY max(due, ?), iif(due > ?, 0, attempts), due, job LIMIT 1"""


@dataclass(frozen=True, slots=True, kw_only=True)
class Delivery:
    """How far the delivery of a job's webhook is."""

    host: str
    due: float | None = 0.0  # 0: at once
    state: str = "pending"  # then delivered, gone or failed
    attempts: int = 0
    status: int | None = None  # of the last answer
    error: str | None = None  # why there was no answer
    delivered_at: float | None = None

    @property
    def document(self) -> dict[str, Any]:
        """What clients see of it."""
        told = {"state": self.state, "attempts": self.attempts, "last_status": self.status, "last_error": self.error}
        return told | {"delivered_at": self.delivered_at}


FIELDS = tuple(Delivery.__slots__)
COLUMNS = f"job, owner, {', '.join(FIELDS)}"
INSERT = f"INSERT INTO deliveries ({COLUMNS}) VALUES (?, ?, {', '.join('?' * len(FIELDS))})"
UPDATE = f"UPDATE deliveries SET {', '.join(f'{name} = ?' for name in FIELDS)} WHERE job = ?"
READ = f"SELECT {', '.join(FIELDS)} FROM deliveries WHERE job = ?"


def insert(db: sqlite3.Connection, number: int, owner: str | None, delivery: Delivery | None) -> None:
    """A job has ended; its webhook, if it has one, is to be delivered. number: of the job"""
    if delivery is not None:
        db.execute(INSERT, [number, owner, *(getattr(delivery, name) for name in FIELDS)])


def update(db: sqlite3.Connection, number: int, delivery: Delivery) -> None:
    """Notes how far a delivery is, unless the job has been deleted meanwhile."""
    db.execute(UPDATE, [*(getattr(delivery, name) for name in FIELDS), number])


def read(db: sqlite3.Connection, number: int) -> Delivery | None:
    """How far the delivery of a job's webhook is; None if it has none, or has not ended."""
    row = db.execute(READ, (number,)).fetchone()
    return Delivery(**row) if row is not None else None


def next_job(
    db: sqlite3.Connection, now: float, jobs: Collection[int], hosts: Collection[str], owners: Collection[str]
) -> int | None:
    """The number of the job whose webhook is next: of those that are due the one with the fewest attempts, or the one
    that is due first. jobs, hosts, owners: have their turn already"""
    busy = [json.dumps(list(each)) for each in (jobs, hosts, owners)]
    row = db.execute(NEXT, [*busy, now, now]).fetchone()
    return row[0] if row is not None else None


def delete(db: sqlite3.Connection, number: int) -> None:
    """A job is deleted."""
    db.execute("DELETE FROM deliveries WHERE job = ?", (number,))
