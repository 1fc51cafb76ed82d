"""Opens the journal, only if it holds what was promised, and brings an older one to the present version."""

import os
import sqlite3
from contextlib import closing
from pathlib import Path

from server.errors import StoreRefused
from server.store import rows
from server.store.blobs import blobs_in, sync_folder
from server.store.checks import PLAIN, empty, inspect, schema_of
from server.store.lock import read_floor
from server.store.records import checksum, checksums, record_of
from server.store.schema import JOURNAL, LOG, PICTURES, VERSION, VERSION_2, VERSIONS, is_full

PAGE_BYTES = 4096  # as SQLite chooses it
NO_TABLES = b"\x0d" + bytes(4) + PAGE_BYTES.to_bytes(2) + b"\0"  # an empty page of a table, without free blocks


def check_journal(directory: Path, lock: int) -> None:
    """Creates the journal, or checks that it holds what was promised. lock: the open lock file.

    Raises StoreRefused, without changing a byte, or the error of a full disk.
    """
    try:
        floor, store = read_floor(lock)
        if not (directory / JOURNAL).exists():
            _require_new(directory, floor)
            create(directory / JOURNAL)
        found = inspect(directory, floor, store)
        damages = found.damages + found.bad_pictures
    except ValueError as error:
        damages = [str(error)]
    if damages:
        raise damaged(directory, damages[0] + (f" (and {len(damages) - 1} more)" if len(damages) > 1 else ""))


def open_journal(directory: Path) -> sqlite3.Connection:
    """The journal, ready to be written. Raises StoreRefused, or the error of a full disk."""
    db = sqlite3.connect(directory / JOURNAL, isolation_level=None, check_same_thread=False)
    db.row_factory = sqlite3.Row
    try:
        for pragma in ("locking_mode = EXCLUSIVE", "journal_mode = WAL", "synchronous = FULL"):
            db.execute(f"PRAGMA {pragma}")
        migrate(db)
        return db
    except sqlite3.DatabaseError as error:
        db.close()
        if is_full(error):
            raise
        raise damaged(directory, str(error)) from None


def damaged(directory: Path, what: str) -> StoreRefused:
    """The refusal of a store that does not hold what was promised."""
    words = f"the store {directory} is damaged: {what}; it has been left as it is"
    return StoreRefused(f"{words}; `ddpm check {directory}` says what is sound")


def _require_new(directory: Path, floor: int) -> None:
    """Raises ValueError if there was a journal, as other files show."""
    if floor or (directory / LOG).exists() or blobs_in(directory / PICTURES):
        raise ValueError(f"{JOURNAL} is missing")


def create(path: Path) -> None:
    """Creates an empty journal, atomically."""
    new = path.with_suffix(".new")
    for suffix in ("", "-wal", "-shm", "-journal"):  # that a server which died here has left
        new.with_name(new.name + suffix).unlink(missing_ok=True)
    db = sqlite3.connect(new, isolation_level=None)
    db.execute("PRAGMA journal_mode = WAL")
    db.executescript(f"BEGIN; {''.join(VERSIONS)} COMMIT;")
    db.close()
    os.replace(new, path)
    sync_folder(path.parent)


def migrate(db: sqlite3.Connection) -> None:
    """Brings a journal of version 1 to version 2, in one transaction. Raises sqlite3.Error."""
    if db.execute("PRAGMA user_version").fetchone()[0] == VERSION:
        return
    try:
        db.executescript(f"BEGIN IMMEDIATE; {VERSION_2}")
        for row in db.execute(rows.SELECT):  # no update moves a row to another place in the order of this scan
            record = record_of(row, db.execute(rows.IMAGES, (row["number"],)))
            values = (*checksums(record), record.number)
            db.execute("UPDATE jobs SET checksum = ?, images_checksum = ? WHERE number = ?", values)
        for table, columns in PLAIN.items():
            for row in db.execute(f"SELECT {', '.join(columns)} FROM {table}"):
                db.execute(f"UPDATE {table} SET checksum = ? WHERE {columns[0]} = ?", (checksum(*row), row[0]))
        db.execute("COMMIT")
    except BaseException:
        if db.in_transaction:
            db.execute("ROLLBACK")
        raise


def mend(path: Path, sound: bytes) -> int:
    """Writes into a copy of the journal what all journals have: parts of the header, and the schema, unless it is one
    of ours -> the version. sound: a new journal"""
    pages = path.stat().st_size // PAGE_BYTES
    with open(path, "rb") as file:
        told = int.from_bytes(file.read(64)[60:])
    _write(path, {0: sound[:18] + b"\1\1" + sound[20:24], 28: pages.to_bytes(4), 44: sound[44:48], 56: sound[56:60]})
    with closing(sqlite3.connect(path)) as db:  # the ones at 18: there is no log
        for version in range(1, VERSION + 1):
            try:
                if schema_of(db) == schema_of(empty(version)):
                    return version
            except (sqlite3.DatabaseError, ValueError):  # the latter: of the text of the former
                break
    version = 1 if told == 1 else VERSION
    _write(path, {32: bytes(8), 100: NO_TABLES})  # and no page is free
    with closing(sqlite3.connect(path)) as db, db:
        db.execute(
            "PRAGMA writable_schema = ON"
        )  # tables are where a journal of this version has had them from the first
        db.executemany(
            "INSERT INTO sqlite_schema VALUES (?, ?, ?, ?, ?)", empty(version).execute("SELECT * FROM sqlite_schema")
        )
    return version


def _write(path: Path, parts: dict[int, bytes]) -> None:
    with open(path, "r+b") as file:
        for at, part in parts.items():
            file.seek(at)
            file.write(part)
