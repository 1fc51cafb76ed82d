"""Whether a store holds what was promised, read without changing a byte of it."""

import sqlite3
from collections.abc import Iterator
from contextlib import closing
from dataclasses import dataclass, field
from itertools import groupby
from pathlib import Path

from server.errors import StoreRefused
from server.store import wal
from server.store.blobs import blobs_in, is_sound, why_unreadable
from server.store.deliveries import COLUMNS
from server.store.records import Record, checksum, checksums, record_of
from server.store.rows import SELECT
from server.store.schema import APPLICATION, JOURNAL, LOCK, LOG, PICTURES, VERSION, VERSIONS, commits

ALL_IMAGES = """SELECT job, place AS "index", seed, sha256, size, message FROM images LEFT JOIN files USING (sha256)
    ORDER BY job, place"""
HOLDER = "SELECT 1 FROM images WHERE images.sha256 = files.sha256"
PLAIN = {"known": ("identity", "sha256"), "expired": ("id", "owner")}  # tables whose rows have checksums of their own
HEADER = 100  # bytes, of a database
OWED = "jobs.status IS NOT NULL AND json_extract(request, '$.webhook') IS NOT NULL"


@dataclass(slots=True)
class Report:
    """What was found: numbers of what is sound, and a sentence for each damage."""

    jobs: int = 0
    unfinished: int = 0
    pictures: int = 0
    damages: list[str] = field(default_factory=list)  # of the journal
    bad_pictures: list[str] = field(default_factory=list)


def inspect(directory: Path, floor: int, store: str = "", hashes: bool = False) -> Report:
    """Checks everything. floor, store: the last transaction that was promised, as the lock file has it. hashes: also of
    the pictures.

    Raises StoreRefused if the journal is of a newer version or of something else.
    """
    report, path = Report(), directory / JOURNAL
    if unreadable := list(filter(None, map(why_unreadable, (path, path.with_name(LOG))))):
        report.damages += unreadable
        return report
    if not path.exists() or path.stat().st_size < HEADER:  # SQLite would delete the log of an empty one
        report.damages.append(f"{JOURNAL} is missing, or cut off in its header")
        return report
    frames = _check_files(path, report)
    committed, complete = 0 if frames is None else frames.committed, False
    try:
        with closing(_open(path, committed > 0)) as db:
            found = [text for (text,) in db.execute("PRAGMA integrity_check(20)")]
            report.damages += [line for text in found for line in text.splitlines()[-1:] if text != "ok"]
            version = _version(db, path, report)
            if version == VERSION:
                number, found_store = commits(db)
                if store not in ("", found_store):
                    report.damages.append(f"{JOURNAL} or {LOCK} is of another store")
                complete = 0 < floor <= number and committed > 0
                if number < floor:
                    lost = f"transaction {floor} was promised, and the last one that can be read is {number}"
                    report.damages.append(f"{JOURNAL} or its log is cut short, missing in part, or older: {lost}")
            _check_rows(db, version, report)
            _check_pictures(directory / PICTURES, db, report, hashes)
    except (sqlite3.DatabaseError, TypeError, ValueError) as error:
        report.damages.append(f"{JOURNAL} cannot be read: {error}")
    if frames is not None and not frames.is_torn and not complete:  # else they are of transactions that failed
        of = f"{committed + 1} of {len(frames.pages)}"
        report.damages.insert(0, f"{LOG}: frame {of}, or one of the same transaction, is damaged")
    return report


def _check_files(path: Path, report: Report) -> wal.Frames | None:
    """Checks the files of the journal, before SQLite reads them -> the frames of the log"""
    with open(path, "rb") as file:
        header = file.read(HEADER)
    if header[:16] != b"SQLite format 3\0" or header[18:20] != b"\2\2":  # the latter: with a log
        report.damages.append(f"the header of {JOURNAL} is damaged")
    try:
        return wal.read(path.with_name(LOG))
    except (ValueError, OSError) as error:
        report.damages.append(f"{LOG}: {error}")
        return None


def _open(path: Path, with_log: bool) -> sqlite3.Connection:
    """A connection that changes no file and creates none: it takes no lock, and keeps the log's index in memory.

    Without frames that count, the log is not opened: SQLite would delete it in the end.
    """
    how = "vfs=unix-none" if with_log else "immutable=1"
    db = sqlite3.connect(f"{path.absolute().as_uri()}?mode=ro&{how}", uri=True)
    db.row_factory = sqlite3.Row
    db.execute("PRAGMA locking_mode = EXCLUSIVE")
    return db


def _version(db: sqlite3.Connection, path: Path, report: Report) -> int:
    """The version of the tables. The header is believed alone only where nothing is damaged: a newer version has other
    tables. Raises StoreRefused of a journal that is of a newer version or of something else."""
    (told,), (application,) = (db.execute(f"PRAGMA {name}").fetchone() for name in ("user_version", "application_id"))
    schema = schema_of(db)
    for version in range(1, VERSION + 1):
        if schema == schema_of(empty(version)):
            if (told, application) != (version, APPLICATION):
                report.damages.append(f"the header of {JOURNAL} is damaged: its tables are those of version {version}")
            return version
    sound = not report.damages
    if application != APPLICATION and (sound or not schema & schema_of(empty(1))):
        raise StoreRefused(f"{path} is a database of something else")
    if application == APPLICATION and sound and told > VERSION:
        raise StoreRefused(f"the store {path} is of version {told}, this server knows up to version {VERSION}")
    report.damages.append(f"the schema of {JOURNAL} is not that of its version")
    return VERSION


def empty(version: int) -> sqlite3.Connection:
    """A journal of this version without rows, in memory."""
    db = sqlite3.connect(":memory:")
    db.executescript("".join(VERSIONS[:version]))
    return db


def schema_of(db: sqlite3.Connection) -> set[tuple[str, ...]]:
    """The tables, indexes and triggers of a journal."""
    return {tuple(row) for row in db.execute("SELECT type, name, tbl_name, sql FROM sqlite_schema")}


def all_records(db: sqlite3.Connection) -> Iterator[tuple[Record, tuple[int, int]]]:
    """Every job with the checksums that were written with it, in one pass over the tables."""
    groups = groupby(db.execute(ALL_IMAGES), key=lambda row: int(row["job"]))
    number, images = next(groups, (1 << 62, iter(())))
    for row in db.execute(f"{SELECT} ORDER BY number"):
        while number < row["number"]:
            number, images = next(groups, (1 << 62, iter(())))
        yield record_of(row, images if number == row["number"] else ()), (row["checksum"], row["images_checksum"])


def _check_rows(db: sqlite3.Connection, version: int, report: Report) -> None:
    if version == VERSION:
        for record, written in all_records(db):
            if checksums(record) != written:
                report.damages.append(f"the row of job {record.id} (number {record.number}), or of one of its images")
            else:
                report.jobs += 1
                report.unfinished += record.status is None
        for table, columns in (PLAIN | {"deliveries": COLUMNS}).items():
            for *values, written in db.execute(f"SELECT {', '.join(columns)}, checksum FROM {table}"):
                if checksum(*values) != written:
                    report.damages.append(f"the row of {values[0]} in the table {table}")
    else:
        report.jobs, report.unfinished = db.execute("SELECT count(*), count(*) - count(status) FROM jobs").fetchone()
    queries = [
        ("SELECT count(*) FROM images LEFT JOIN files USING (sha256) WHERE size IS NULL", "images without a size"),
        ("SELECT count(*) FROM images LEFT JOIN jobs ON number = job WHERE number IS NULL", "images without a job"),
        (f"SELECT count(*) FROM files WHERE NOT EXISTS ({HOLDER})", "pictures without a job"),
        ("SELECT bytes - ifnull((SELECT sum(size) FROM files), 0) FROM total", "bytes between pictures and their sum"),
        ("SELECT count(*) - 1 FROM total", "rows too many in the table total"),
    ]
    if version == VERSION:
        owed = f"SELECT count(*) FROM jobs LEFT JOIN deliveries ON job = number WHERE job IS NULL AND {OWED}"
        unknown = "SELECT count(*) FROM deliveries LEFT JOIN jobs ON number = job WHERE number IS NULL"
        queries += [(owed, "webhooks without a delivery"), (unknown, "deliveries without a job")]
    for query, damage in queries:
        row = db.execute(query).fetchone()
        if row is None or row[0] != 0:
            report.damages.append(f"{JOURNAL} has {row and row[0]} {damage}")


def _check_pictures(folder: Path, db: sqlite3.Connection, report: Report, hashes: bool) -> None:
    """Compares the pictures with the sizes of their rows, and with their names."""
    there = blobs_in(folder)
    for name, size in db.execute("SELECT sha256, size FROM files"):
        if there.get(name) != size:
            found = f"has {there[name]} bytes instead of {size}" if name in there else "is missing"
            report.bad_pictures.append(f"the picture {name} {found}")
        elif hashes and not _is_sound(folder / name):
            report.bad_pictures.append(f"the picture {name} has other bytes than its name says, or cannot be read")
        else:
            report.pictures += 1


def _is_sound(picture: Path) -> bool:
    try:
        return is_sound(picture.name, picture.read_bytes())
    except OSError:
        return False
