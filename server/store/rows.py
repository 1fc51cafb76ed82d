"""Reading and writing the rows of the journal. Each function is the body of one transaction, or a part of one."""

import logging
import sqlite3
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace

from server.errors import Gone, NotFound
from server.store import deliveries
from server.store.records import FIELDS, ImageRow, Record, checksum, checksums, job_checksum, record_of

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class IdempotentHit:
    """The job that an Idempotency-Key was used for before, and the fingerprint of that request."""

    id: str
    fingerprint: str


CHECKSUMS = "checksum, images_checksum"
SELECT = f"SELECT number, {', '.join(FIELDS)}, {CHECKSUMS} FROM jobs"
INSERT = f"INSERT INTO jobs ({', '.join(FIELDS)}, {CHECKSUMS}) VALUES ({'?, ' * len(FIELDS)} ?, ?) RETURNING number"
RESULT = ("status", "started_at", "finished_at", "ended", "served", "steps", "error", "messages")
FINISH = f"""UPDATE jobs SET {", ".join(f"{name} = ?" for name in RESULT)}, running = 0, checksum = ?,
    images_checksum = ? WHERE number = ?"""
IMAGES = """SELECT place AS "index", seed, sha256, size, message FROM images JOIN files USING (sha256)
    WHERE job = ? ORDER BY place"""
MOST_DAMAGED = 20  # jobs that are passed over for one that is not
KNOWN = "SELECT sha256, size, checksum FROM known LEFT JOIN files USING (sha256) WHERE identity = ?"


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
    values = [getattr(record, name) for name in FIELDS]
    (number,) = db.execute(INSERT, [*values, *checksums(record)]).fetchone()
    insert_images(db, number, record.images)
    deliveries.insert(db, number, record.owner, record.delivery)
    return record


def mark_running(db: sqlite3.Connection, id: str) -> None:
    """Marks a job as running: if the server dies now, the job may be why."""
    db.execute("UPDATE jobs SET running = 1 WHERE id = ?", (id,))


def finish(db: sqlite3.Connection, record: Record, identities: Sequence[str]) -> Record | None:
    """Writes the result of a job: see `Store.finish`. Raises DatabaseError if its row is damaged."""
    query = f"{SELECT} WHERE id = ? AND attempt = ? AND status IS NULL"
    row = db.execute(query, (record.id, record.attempt)).fetchone()
    if row is None:
        return None
    try:
        before = read(db, row)
    except Gone as damage:  # what was promised cannot be kept: only a check of all can tell what else is damaged
        raise sqlite3.DatabaseError(f"the row of job {record.id} is damaged") from damage
    if identities:
        firsts = (_first_made(db, *pair) for pair in zip(identities, record.images, strict=True))
        record = replace(record, images=tuple(firsts))
    result = {name: getattr(record, name) for name in RESULT}
    kept = replace(before, **result, images=record.images)
    db.execute(FINISH, [*result.values(), *checksums(kept), kept.number])
    insert_images(db, kept.number, record.images)
    if before.delivery is None:  # else the job was salvaged, and its webhook had been delivered
        deliveries.insert(db, kept.number, record.owner, record.delivery)
    return record


def insert_images(db: sqlite3.Connection, number: int, images: Iterable[ImageRow]) -> None:
    """Inserts the images of a job."""
    for row in images:
        db.execute("INSERT OR IGNORE INTO files VALUES (?, ?)", (row.sha256, row.size))
        db.execute("INSERT INTO images VALUES (?, ?, ?, ?, ?)", (number, row.index, row.seed, row.sha256, row.message))


def _first_made(db: sqlite3.Connection, identity: str, made: ImageRow) -> ImageRow:
    """The first image that was stored with this identity: `made`, or one with other bytes."""
    if (found := _known(db, identity)) is not None:
        return replace(made, sha256=found[0], size=made.size if found[1] is None else found[1])
    db.execute("REPLACE INTO known VALUES (?, ?, ?)", (identity, made.sha256, checksum(identity, made.sha256)))
    return made


def _known(db: sqlite3.Connection, identity: str) -> tuple[str, int | None] | None:
    """The hash and, if it is stored, the size of the image with this identity; None if its row is damaged, too."""
    row = db.execute(KNOWN, (identity,)).fetchone()
    return row[:2] if row is not None and row["checksum"] == checksum(identity, row["sha256"]) else None


def _stored_images(
    db: sqlite3.Connection, images: Sequence[ImageRow], identities: Sequence[str], has_blob: Callable[[str, int], bool]
) -> tuple[ImageRow, ...]:
    """The images with the hashes and sizes that are stored for their identities; nothing unless all are stored."""
    stored = list[ImageRow]()
    for image, identity in zip(images, identities, strict=True):
        sha256, size = _known(db, identity) or ("", None)
        if size is None or not has_blob(sha256, size):
            return ()
        stored.append(replace(image, sha256=sha256, size=size))
    return tuple(stored)


def by_key(db: sqlite3.Connection, owner: str | None, key: str | None) -> IdempotentHit | None:
    """The job that this owner used an Idempotency-Key for. Raises Gone if it is damaged."""
    query = f"{SELECT} WHERE key = ? AND ifnull(owner, '') = ?"
    row = db.execute(query, (key, owner or "")).fetchone() if key is not None else None
    if row is None:
        return None
    found = read(db, row)
    return IdempotentHit(found.id, found.fingerprint or "")


def find(db: sqlite3.Connection, id: str, owner: str | None) -> Record:
    """An owner's job. Raises NotFound, or Gone if it was deleted."""
    row = db.execute(f"{SELECT} WHERE id = ? AND owner IS ?", (id, owner)).fetchone()
    if row is not None:
        return read(db, row)
    if db.execute("SELECT 1 FROM expired WHERE id = ? AND owner IS ?", (id, owner)).fetchone():
        raise Gone("this job is no longer kept")
    raise NotFound("there is no such job")


def page(db: sqlite3.Connection, owner: str | None, status: str | None, after: str | None, limit: int) -> list[Record]:
    """An owner's jobs, newest first, older than the job `after`, but for damaged ones, which are logged. Raises
    NotFound or Gone of `after`."""
    before = 1 << 62 if after is None else find(db, after, owner).number
    where = "number < :before AND owner IS :owner AND (:status IS NULL OR status = :status)"
    values = {"before": before, "owner": owner, "status": status, "limit": limit}
    jobs = list[Record]()
    for row in db.execute(f"{SELECT} WHERE {where} ORDER BY number DESC LIMIT :limit", values).fetchall():
        try:
            jobs.append(read(db, row))
        except Gone:
            logger.error("a job was damaged on disk", extra={"job": row["id"]})
    return jobs


def recover(db: sqlite3.Connection, crashed: bool) -> list[Record]:
    """Starts the next attempt of every unfinished job -> these jobs, oldest first.

    crashed: the last server did not end in order, so the jobs that were running may be why.
    """
    marked = set[int]()
    if crashed:
        marked = {number for (number,) in db.execute("SELECT number FROM jobs WHERE status IS NULL AND running")}
    jobs = list[Record]()
    for row in db.execute(f"{SELECT} WHERE status IS NULL ORDER BY number").fetchall():
        job = read(db, row)
        job = replace(job, attempt=job.attempt + 1, deaths=job.deaths + (job.number in marked))
        values = (job.attempt, job.deaths, job_checksum(job), job.number)
        db.execute("UPDATE jobs SET running = 0, attempt = ?, deaths = ?, checksum = ? WHERE number = ?", values)
        jobs.append(job)
    return jobs


def next_delivery(
    db: sqlite3.Connection, now: float, jobs: Sequence[int], hosts: Sequence[str], owners: Sequence[str]
) -> Record | None:
    """The job whose webhook is next, and that is not damaged: see `deliveries.next_job`."""
    passed = list(jobs)
    while len(passed) < len(jobs) + MOST_DAMAGED:
        number = deliveries.next_job(db, now, passed, hosts, owners)
        if number is None:
            break
        try:
            return read(db, db.execute(f"{SELECT} WHERE number = ?", (number,)).fetchone())
        except Gone:
            passed.append(number)
    return None


def park(db: sqlite3.Connection) -> None:
    """Marks all jobs as not running."""
    db.execute("UPDATE jobs SET running = 0 WHERE running = 1")


def latest(db: sqlite3.Connection) -> float:
    """The latest arrival or end of a job; 0 if there is none."""
    return float(max(db.execute("SELECT ifnull(max(arrived), 0), ifnull(max(ended), 0) FROM jobs").fetchone()))


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


def read(db: sqlite3.Connection, row: sqlite3.Row) -> Record:
    """The job of a row of SELECT. Raises Gone if it is damaged."""
    record = record_of(row, db.execute(IMAGES, (row["number"],)))
    if checksums(record) != (row["checksum"], row["images_checksum"]):
        raise Gone("this job was damaged on disk")
    return replace(record, delivery=deliveries.read(db, record.number))
