"""Deletes jobs: those whose retention has ended, and those that were inserted too late."""

import sqlite3
from dataclasses import dataclass

from server.store import deliveries
from server.store.records import checksum
from server.store.rows import size_bytes

PENDING = "EXISTS (SELECT 1 FROM deliveries WHERE job = number AND due IS NOT NULL)"
EXPIRED = 100_000  # remembered ids of deleted jobs, which are answered with 410 instead of 404


@dataclass(frozen=True, slots=True)
class Expired:
    """The ids of deleted jobs, the names of blobs that no job has any more, and whether more jobs may be due."""

    ids: list[str]
    blobs: list[str]
    more: bool


def expire(db: sqlite3.Connection, before: float, most_bytes: int, limit: int) -> Expired:
    """Deletes up to `limit` jobs: those that ended before a time and have no pending webhook, and the oldest while all
    take more than `most_bytes`. Their blobs must be deleted after this is on disk."""
    query = f"SELECT number, id, ended, {PENDING} AS owed FROM jobs WHERE status IS NOT NULL"
    if size_bytes(db) <= most_bytes:
        query += " AND ended < :before AND NOT owed"
    query, values = f"{query} ORDER BY ended, number LIMIT :limit", {"before": before, "limit": limit}
    ids, unused = list[str](), list[str]()
    for number, id, ended, owed in db.execute(query, values).fetchall():
        if (owed or ended >= before) and size_bytes(db) <= most_bytes:
            break
        unused += _delete(db, number)
        ids.append(id)
    return Expired(ids, unused, more=len(ids) == limit)


def revoke(db: sqlite3.Connection, id: str) -> list[str]:
    """Deletes a job that was inserted too late: whoever asked for it has been told that it was not. -> the names of
    blobs that no job has any more"""
    row = db.execute("SELECT number FROM jobs WHERE id = ?", (id,)).fetchone()
    return _delete(db, row["number"]) if row is not None else []


def _delete(db: sqlite3.Connection, number: int) -> list[str]:
    names = {name for (name,) in db.execute("DELETE FROM images WHERE job = ? RETURNING sha256", (number,))}
    id, owner = db.execute("DELETE FROM jobs WHERE number = ? RETURNING id, owner", (number,)).fetchone()
    db.execute("INSERT INTO expired (id, owner, checksum) VALUES (?, ?, ?)", (id, owner, checksum(id, owner)))
    deliveries.delete(db, number)
    db.execute("DELETE FROM expired WHERE number <= (SELECT max(number) FROM expired) - ?", (EXPIRED,))
    unused = [name for name in names if not db.execute("SELECT 1 FROM images WHERE sha256 = ?", (name,)).fetchone()]
    for name in unused:
        db.execute("DELETE FROM known WHERE sha256 = ?", (name,))
        db.execute("DELETE FROM files WHERE sha256 = ?", (name,))
    return unused
