"""The rows of the journal and how they are read and written. What a job is, is for others to know."""

import sqlite3
from collections.abc import Iterable
from dataclasses import dataclass

from server.errors import Gone, NotFound

EXPIRED = 100_000  # so many ids of jobs that are not kept any more are remembered


@dataclass(frozen=True, slots=True)
class Kept:
    """A picture of a job: a file by the hash of its bytes."""

    place: int
    seed: int
    sha256: str
    size: int
    message: int  # its number in the stream


@dataclass(frozen=True, slots=True)
class Record:
    """A job as it is on disk. request, served, steps and error are JSON."""

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
    images: tuple[Kept, ...] = ()


@dataclass(frozen=True, slots=True)
class Found:
    """The job that came with an Idempotency-Key before, and what was sent with it."""

    id: str
    fingerprint: str


FIELDS = tuple(name for name in Record.__slots__ if name not in ("number", "images"))
COLUMNS = ", ".join((*FIELDS, "number"))
INSERT = f"INSERT INTO jobs ({', '.join(FIELDS)}) VALUES ({', '.join('?' * len(FIELDS))}) RETURNING number"
RESULT = ("status", "started_at", "finished_at", "ended", "served", "steps", "error", "messages")
FINISH = (
    f"UPDATE jobs SET {', '.join(f'{name} = ?' for name in RESULT)}, running = 0"
    " WHERE id = ? AND attempt = ? AND status IS NULL RETURNING number"
)


def insert(db: sqlite3.Connection, record: Record) -> None:
    """A new job."""
    (number,) = db.execute(INSERT, [getattr(record, name) for name in FIELDS]).fetchone()
    insert_images(db, number, record.images)


def begin(db: sqlite3.Connection, id: str) -> None:
    """A job runs."""
    db.execute("UPDATE jobs SET running = 1 WHERE id = ?", (id,))


def finish(db: sqlite3.Connection, record: Record) -> int | None:
    """What has come of a job -> its number; None if it had ended before, or another attempt has it now."""
    values = [getattr(record, name) for name in (*RESULT, "id", "attempt")]
    done = db.execute(FINISH, values).fetchone()
    return None if done is None else int(done[0])


def insert_images(db: sqlite3.Connection, number: int, images: Iterable[Kept]) -> None:
    """The pictures of a job."""
    for image in images:
        db.execute("INSERT OR IGNORE INTO files VALUES (?, ?)", (image.sha256, image.size))
        db.execute(
            "INSERT INTO images VALUES (?, ?, ?, ?, ?)", (number, image.place, image.seed, image.sha256, image.message)
        )


def first_made(db: sqlite3.Connection, identity: str, made: Kept) -> Kept:
    """The picture that was the first to be made of what decides it: this one, or one with other bytes."""
    db.execute("INSERT OR IGNORE INTO known VALUES (?, ?)", (identity, made.sha256))
    query = "SELECT sha256, size FROM known LEFT JOIN files USING (sha256) WHERE identity = ?"
    sha256, size = db.execute(query, (identity,)).fetchone()
    return Kept(made.place, made.seed, sha256, made.size if size is None else size, made.message)


def known(db: sqlite3.Connection, identity: str) -> tuple[str, int] | None:
    """The picture that this identity has, if it has been made: its hash and size."""
    query = "SELECT sha256, size FROM known JOIN files USING (sha256) WHERE identity = ?"
    found: tuple[str, int] | None = db.execute(query, (identity,)).fetchone()
    return found


def by_key(db: sqlite3.Connection, owner: str | None, key: str | None) -> Found | None:
    """The job that came with this key."""
    query = "SELECT id, fingerprint FROM jobs WHERE key = ? AND ifnull(owner, '') = ?"
    row = db.execute(query, (key, owner or "")).fetchone() if key is not None else None
    return Found(*row) if row is not None else None


def find(db: sqlite3.Connection, id: str, owner: str | None) -> Record:
    """A job by its id, if it is this owner's. Raises NotFound, or Gone if it was kept once."""
    row = db.execute(f"SELECT {COLUMNS} FROM jobs WHERE id = ? AND owner IS ?", (id, owner)).fetchone()
    if row is not None:
        return _read(db, row)
    if db.execute("SELECT 1 FROM expired WHERE id = ? AND owner IS ?", (id, owner)).fetchone():
        raise Gone("this job is no longer kept")
    raise NotFound("there is no such job")


def page(db: sqlite3.Connection, owner: str | None, status: str | None, before: int, limit: int) -> list[Record]:
    """An owner's jobs that came before this one, newest first."""
    where = "number < ? AND owner IS ?" + " AND status = ?" * (status is not None)
    values = [before, owner, *([status] if status is not None else []), limit]
    rows = db.execute(f"SELECT {COLUMNS} FROM jobs WHERE {where} ORDER BY number DESC LIMIT ?", values).fetchall()
    return [_read(db, row) for row in rows]


def recover(db: sqlite3.Connection, died: bool) -> list[Record]:
    """The jobs that have not ended, as they came. They are of a new attempt now. died: the server that ran them did."""
    counted = "deaths = deaths + running, " * died
    db.execute(f"UPDATE jobs SET {counted}running = 0, attempt = attempt + 1 WHERE status IS NULL")
    rows = db.execute(f"SELECT {COLUMNS} FROM jobs WHERE status IS NULL ORDER BY number").fetchall()
    return [_read(db, row) for row in rows]


def oldest(db: sqlite3.Connection, limit: int) -> list[tuple[int, str, float]]:
    """The jobs that ended first: number, id, when."""
    query = "SELECT number, id, ended FROM jobs WHERE status IS NOT NULL ORDER BY ended, number LIMIT ?"
    return db.execute(query, (limit,)).fetchall()


def delete(db: sqlite3.Connection, number: int) -> list[str]:
    """A job is not kept any more. -> the pictures that no job names now"""
    names = {name for (name,) in db.execute("SELECT sha256 FROM images WHERE job = ?", (number,))}
    db.execute("DELETE FROM images WHERE job = ?", (number,))
    db.execute("INSERT INTO expired (id, owner) SELECT id, owner FROM jobs WHERE number = ?", (number,))
    db.execute("DELETE FROM jobs WHERE number = ?", (number,))
    db.execute("DELETE FROM expired WHERE number <= (SELECT max(number) FROM expired) - ?", (EXPIRED,))
    left = [name for name in names if not db.execute("SELECT 1 FROM images WHERE sha256 = ?", (name,)).fetchone()]
    for name in left:
        db.execute("DELETE FROM known WHERE sha256 = ?", (name,))
        db.execute("DELETE FROM files WHERE sha256 = ?", (name,))
    return left


def is_named(db: sqlite3.Connection, sha256: str) -> bool:
    """Whether a job has this picture."""
    return db.execute("SELECT 1 FROM files WHERE sha256 = ?", (sha256,)).fetchone() is not None


def size_bytes(db: sqlite3.Connection) -> int:
    """What rows and pictures take."""
    query = "SELECT bytes + (page_count - freelist_count) * page_size"
    query += " FROM total, pragma_page_count, pragma_freelist_count, pragma_page_size"
    return int(db.execute(query).fetchone()[0])


def probe(db: sqlite3.Connection, size: int) -> None:
    """Raises sqlite3.Error unless there is room for so many bytes."""
    db.execute("INSERT INTO scratch VALUES (zeroblob(?))", (size,))
    db.execute("DELETE FROM scratch")


def _read(db: sqlite3.Connection, row: tuple[object, ...]) -> Record:
    *fields, number = row
    values = dict(zip(FIELDS, fields, strict=True))
    query = (
        "SELECT place, seed, sha256, size, message FROM images JOIN files USING (sha256) WHERE job = ? ORDER BY place"
    )
    images = tuple(Kept(*image) for image in db.execute(query, (number,)))
    values["attached"] = bool(values["attached"])
    return Record(**values, number=number, images=images)  # type: ignore[arg-type]  # as the schema has them
