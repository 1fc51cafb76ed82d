"""Reading and writing the rows of the journal. Each function is the body of one transaction, or a part of one."""

import sqlite3
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace

from server.errors import Gone, NotFound

EXPIRED = 100_000  # remembered ids of deleted jobs, which are answered with 410 instead of 404


@dataclass(frozen=True, slots=True, kw_only=True)
class ImageRow:
    """An image of a job. Its bytes are the blob named `sha256`."""

    index: int
    seed: int
    sha256: str
    size: int  # bytes
    message: int  # its number in the job's stream


@dataclass(frozen=True, slots=True, kw_only=True)
class Record:
    """A job as it is on disk. request, served (a ModelStatus), steps and error are JSON."""

    id: str
    owner: str | None
    key: str | None
    fingerprint: str | None
    created_at: float
    arrived: float
    request: str
    served: str
    attached: bool
    attempt: int = 1
    deaths: int = 0
    status: str | None = None
    started_at: float | None = None
    finished_at: float | None = None
    ended: float | None = None
    steps: str | None = None
    error: str | None = None
    messages: int = 0
    number: int = 0
    images: tuple[ImageRow, ...] = ()


@dataclass(frozen=True, slots=True)
class IdempotentHit:
    """The job that an Idempotency-Key was used for before, and the fingerprint of that request."""

    id: str
    fingerprint: str


@dataclass(frozen=True, slots=True)
class Expired:
    """The ids of deleted jobs, the names of blobs that no job has any more, and whether more jobs may be due."""

    ids: list[str]
    blobs: list[str]
    more: bool


FIELDS = tuple(name for name in Record.__slots__ if name not in ("number", "images"))
SELECT = f"SELECT number, {', '.join(FIELDS)} FROM jobs"
INSERT = f"INSERT INTO jobs ({', '.join(FIELDS)}) VALUES ({', '.join('?' * len(FIELDS))}) RETURNING number"
RESULT = ("status", "started_at", "finished_at", "ended", "served", "steps", "error", "messages")
FINISH = (
    f"UPDATE jobs SET {', '.join(f'{name} = ?' for name in RESULT)}, running = 0"
    " WHERE id = ? AND attempt = ? AND status IS NULL RETURNING number"
)
IMAGES = """SELECT place AS "index", seed, sha256, size, message FROM images JOIN files USING (sha256)
    WHERE job = ? ORDER BY place"""
KNOWN = "SELECT sha256, size FROM known LEFT JOIN files USING (sha256) WHERE identity = ?"


def insert(
    db: sqlite3.Connection,
    record: Record,
    cached: Record | None,
    identities: Sequence[str],
    has_blob: Callable[[str, int], bool],
) -> IdempotentHit | Record:
    """Inserts a job: see `Store.insert`."""
    if (hit := by_key(db, record.owner, record.key)) is not None:
        return hit
    if cached is not None and (images := _stored_images(db, cached.images, identities, has_blob)):
        record = replace(cached, images=images)
    (number,) = db.execute(INSERT, [getattr(record, name) for name in FIELDS]).fetchone()
    _insert_images(db, number, record.images)
    return record


def revoke(db: sqlite3.Connection, id: str) -> None:
    """Deletes a job that was inserted too late: whoever asked for it has been told that it was not."""
    for row in db.execute("SELECT number FROM jobs WHERE id = ?", (id,)).fetchall():
        _delete(db, row["number"])


def mark_running(db: sqlite3.Connection, id: str) -> None:
    """Marks a job as running: if the server dies now, the job may be why."""
    db.execute("UPDATE jobs SET running = 1 WHERE id = ?", (id,))


def finish(db: sqlite3.Connection, record: Record, identities: Sequence[str]) -> Record | None:
    """Writes the result of a job: see `Store.finish`."""
    row = db.execute(FINISH, [getattr(record, name) for name in (*RESULT, "id", "attempt")]).fetchone()
    if row is None:
        return None
    if identities:
        firsts = (_first_made(db, *pair) for pair in zip(identities, record.images, strict=True))
        record = replace(record, images=tuple(firsts))
    _insert_images(db, row[0], record.images)
    return record


def _insert_images(db: sqlite3.Connection, number: int, images: Iterable[ImageRow]) -> None:
    for row in images:
        db.execute("INSERT OR IGNORE INTO files VALUES (?, ?)", (row.sha256, row.size))
        db.execute("INSERT INTO images VALUES (?, ?, ?, ?, ?)", (number, row.index, row.seed, row.sha256, row.message))


def _first_made(db: sqlite3.Connection, identity: str, made: ImageRow) -> ImageRow:
    """The first image that was stored with this identity: `made`, or one with other bytes."""
    db.execute("INSERT OR IGNORE INTO known VALUES (?, ?)", (identity, made.sha256))
    sha256, size = db.execute(KNOWN, (identity,)).fetchone()
    return replace(made, sha256=sha256, size=made.size if size is None else size)


def _stored_images(
    db: sqlite3.Connection, images: Sequence[ImageRow], identities: Sequence[str], has_blob: Callable[[str, int], bool]
) -> tuple[ImageRow, ...]:
    """The images with the hashes and sizes that are stored for their identities; nothing unless all are stored."""
    found = [db.execute(KNOWN, (identity,)).fetchone() for identity in identities]
    if not all(row is not None and has_blob(*row) for row in found):
        return ()
    return tuple(replace(image, **row) for image, row in zip(images, found, strict=True))


def by_key(db: sqlite3.Connection, owner: str | None, key: str | None) -> IdempotentHit | None:
    """The job that this owner used an Idempotency-Key for."""
    query = "SELECT id, fingerprint FROM jobs WHERE key = ? AND ifnull(owner, '') = ?"
    row = db.execute(query, (key, owner or "")).fetchone() if key is not None else None
    return IdempotentHit(*row) if row is not None else None


def find(db: sqlite3.Connection, id: str, owner: str | None) -> Record:
    """An owner's job. Raises NotFound, or Gone if it was deleted."""
    row = db.execute(f"{SELECT} WHERE id = ? AND owner IS ?", (id, owner)).fetchone()
    if row is not None:
        return _read(db, row)
    if db.execute("SELECT 1 FROM expired WHERE id = ? AND owner IS ?", (id, owner)).fetchone():
        raise Gone("this job is no longer kept")
    raise NotFound("there is no such job")


def page(db: sqlite3.Connection, owner: str | None, status: str | None, after: str | None, limit: int) -> list[Record]:
    """An owner's jobs, newest first, older than the job `after`. Raises NotFound or Gone of `after`."""
    before = 1 << 62 if after is None else find(db, after, owner).number
    where = "number < :before AND owner IS :owner AND (:status IS NULL OR status = :status)"
    values = {"before": before, "owner": owner, "status": status, "limit": limit}
    return [_read(db, row) for row in db.execute(f"{SELECT} WHERE {where} ORDER BY number DESC LIMIT :limit", values)]


def recover(db: sqlite3.Connection, crashed: bool) -> list[Record]:
    """Starts the next attempt of every unfinished job -> these jobs, oldest first.

    crashed: the last server did not end in order, so the jobs that were running may be why.
    """
    if crashed:
        db.execute("UPDATE jobs SET deaths = deaths + running WHERE status IS NULL")
    db.execute("UPDATE jobs SET running = 0, attempt = attempt + 1 WHERE status IS NULL")
    return [_read(db, row) for row in db.execute(f"{SELECT} WHERE status IS NULL ORDER BY number")]


def park(db: sqlite3.Connection) -> None:
    """Marks all jobs as not running."""
    db.execute("UPDATE jobs SET running = 0 WHERE running = 1")


def latest(db: sqlite3.Connection) -> float:
    """The latest arrival or end of a job; 0 if there is none."""
    return float(max(db.execute("SELECT ifnull(max(arrived), 0), ifnull(max(ended), 0) FROM jobs").fetchone()))


def expire(db: sqlite3.Connection, before: float, most_bytes: int, limit: int) -> Expired:
    """Deletes up to `limit` jobs: those that ended before a time, and the oldest while all take more than `most_bytes`.
    Their blobs must be deleted after this is on disk."""
    query = "SELECT number, id, ended FROM jobs WHERE status IS NOT NULL ORDER BY ended, number LIMIT ?"
    ids, unused = list[str](), list[str]()
    for number, id, ended in db.execute(query, (limit,)).fetchall():
        if ended >= before and size_bytes(db) <= most_bytes:
            break
        unused += _delete(db, number)
        ids.append(id)
    return Expired(ids, unused, more=len(ids) == limit)


def _delete(db: sqlite3.Connection, number: int) -> list[str]:
    names = {name for (name,) in db.execute("DELETE FROM images WHERE job = ? RETURNING sha256", (number,))}
    db.execute("INSERT INTO expired (id, owner) SELECT id, owner FROM jobs WHERE number = ?", (number,))
    db.execute("DELETE FROM jobs WHERE number = ?", (number,))
    db.execute("DELETE FROM expired WHERE number <= (SELECT max(number) FROM expired) - ?", (EXPIRED,))
    unused = [name for name in names if not db.execute("SELECT 1 FROM images WHERE sha256 = ?", (name,)).fetchone()]
    for name in unused:
        db.execute("DELETE FROM known WHERE sha256 = ?", (name,))
        db.execute("DELETE FROM files WHERE sha256 = ?", (name,))
    return unused


def blobs(db: sqlite3.Connection) -> set[str]:
    """The names of all blobs that jobs have."""
    return {name for (name,) in db.execute("SELECT sha256 FROM files")}


def has_job(db: sqlite3.Connection, blob: str) -> bool:
    """Whether a job has this blob."""
    return db.execute("SELECT 1 FROM files WHERE sha256 = ?", (blob,)).fetchone() is not None


def size_bytes(db: sqlite3.Connection) -> int:
    """The size of rows and blobs on disk."""
    tables = "total, pragma_page_count, pragma_freelist_count, pragma_page_size"
    return int(db.execute(f"SELECT bytes + (page_count - freelist_count) * page_size FROM {tables}").fetchone()[0])


def probe(db: sqlite3.Connection, size: int) -> None:
    """Raises sqlite3.Error unless so many bytes can be written."""
    db.execute("INSERT INTO scratch VALUES (zeroblob(?))", (size,))
    db.execute("DELETE FROM scratch")


def _read(db: sqlite3.Connection, row: sqlite3.Row) -> Record:
    values = dict(row) | {"attached": bool(row["attached"])}
    return Record(**values, images=tuple(ImageRow(**image) for image in db.execute(IMAGES, (row["number"],))))
