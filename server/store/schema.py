"""The tables of the journal, the names of files in a data directory, and which errors mean a full disk."""

import os
import sqlite3
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from server.errors import SettingsError, StorageFull
from server.store.lock import LOCK as LOCK
from server.troubles import shortage

JOURNAL, LOG, PICTURES = "jobs.sqlite3", "jobs.sqlite3-wal", "pictures"
FULL = {sqlite3.SQLITE_FULL, sqlite3.SQLITE_IOERR, sqlite3.SQLITE_CANTOPEN, sqlite3.SQLITE_READONLY}
APPLICATION, VERSION = 0x6464706D, 2  # "ddpm"
VERSION_1 = f"""
PRAGMA application_id = {APPLICATION};
PRAGMA user_version = 1;
CREATE TABLE jobs (
    number      INTEGER PRIMARY KEY AUTOINCREMENT,  -- in order of arrival, whatever the clock says
    id          TEXT NOT NULL UNIQUE,
    owner       TEXT,
    key         TEXT,                               -- Idempotency-Key, and what was sent with it
    fingerprint TEXT,
    created_at  REAL NOT NULL,                      -- as the wall clock had it, to be shown
    arrived     REAL NOT NULL,                      -- by a clock that does not jump, to wait in order
    request     TEXT NOT NULL,                      -- the order, and what was served when it was taken: JSON
    served      TEXT NOT NULL,
    attached    INTEGER NOT NULL,                   -- nobody knows its id but a caller who waits
    attempt     INTEGER NOT NULL,                   -- servers that have had it: a fence for results
    running     INTEGER NOT NULL DEFAULT 0,
    deaths      INTEGER NOT NULL DEFAULT 0,         -- of servers while it ran
    status      TEXT,                               -- NULL until it has ended
    started_at  REAL,
    finished_at REAL,
    ended       REAL,
    steps       TEXT,
    error       TEXT,
    messages    INTEGER NOT NULL DEFAULT 0          -- that were numbered
);
CREATE UNIQUE INDEX keys ON jobs (ifnull(owner, ''), key) WHERE key IS NOT NULL;
CREATE INDEX unfinished ON jobs (number) WHERE status IS NULL;
CREATE INDEX ends ON jobs (ended) WHERE status IS NOT NULL;
CREATE TABLE images (
    job      INTEGER NOT NULL,
    place    INTEGER NOT NULL,
    seed     INTEGER NOT NULL,
    sha256   TEXT NOT NULL,
    message  INTEGER NOT NULL,
    PRIMARY KEY (job, place)
) WITHOUT ROWID;
CREATE INDEX holders ON images (sha256);
CREATE TABLE files (sha256 TEXT PRIMARY KEY, size INTEGER NOT NULL) WITHOUT ROWID;
CREATE TABLE total (bytes INTEGER NOT NULL);  -- of files
INSERT INTO total VALUES (0);
CREATE TRIGGER more AFTER INSERT ON files BEGIN UPDATE total SET bytes = bytes + new.size; END;
CREATE TRIGGER less AFTER DELETE ON files BEGIN UPDATE total SET bytes = bytes - old.size; END;
CREATE TABLE known (identity TEXT PRIMARY KEY, sha256 TEXT NOT NULL) WITHOUT ROWID;
CREATE INDEX identities ON known (sha256);
CREATE TABLE scratch (room BLOB);
CREATE TABLE expired (number INTEGER PRIMARY KEY AUTOINCREMENT, id TEXT NOT NULL UNIQUE, owner TEXT);
"""
VERSION_2 = """
PRAGMA user_version = 2;
ALTER TABLE jobs ADD COLUMN checksum INTEGER NOT NULL DEFAULT 0;      -- of the row
ALTER TABLE jobs ADD COLUMN images_checksum INTEGER NOT NULL DEFAULT 0; -- of the rows of its images
ALTER TABLE known ADD COLUMN checksum INTEGER NOT NULL DEFAULT 0;     -- of the row
ALTER TABLE expired ADD COLUMN checksum INTEGER NOT NULL DEFAULT 0;
CREATE TABLE deliveries (                       -- of webhooks of jobs that have ended
    job          INTEGER PRIMARY KEY,
    owner        TEXT NOT NULL,                 -- '': nobody
    host         TEXT NOT NULL,
    due          REAL,                          -- by the clock that does not jump; NULL: no more
    state        TEXT NOT NULL,
    attempts     INTEGER NOT NULL,
    status       INTEGER,                       -- what the last attempt came to
    error        TEXT,
    delivered_at REAL,
    checksum     INTEGER NOT NULL
);
CREATE INDEX pending ON deliveries (owner, host, attempts, due) WHERE due IS NOT NULL;
ALTER TABLE total ADD COLUMN commits INTEGER NOT NULL DEFAULT 0;      -- transactions, which the lock file counts, too
ALTER TABLE total ADD COLUMN store TEXT NOT NULL DEFAULT '';          -- the store's name, which is there, too
UPDATE total SET store = lower(hex(randomblob(8)));
"""
VERSIONS = (VERSION_1, VERSION_2)  # each is what the one before lacks


def is_full(error: Exception) -> bool:
    """Whether an error means that the disk is full or cannot be written."""
    of_disk = isinstance(error, OSError) and shortage(error) is None
    return of_disk or (getattr(error, "sqlite_errorcode", 0) & 0xFF) in FULL


@contextmanager
def as_storage_full(directory: Path) -> Iterator[None]:
    """Raises StorageFull for an error that means a full disk: the store itself is sound."""
    try:
        yield
    except (sqlite3.Error, OSError) as error:
        if not is_full(error):
            raise
        words = f"the store {directory} cannot be written ({error}): the disk may be full"
        raise StorageFull(f"{words}; what is in it has been left as it is") from None


def make_directory(directory: Path) -> None:
    """Creates the directory, readable for this user alone. Raises SettingsError, or StorageFull if its file system is
    read-only, as after an error of the disk."""
    try:
        directory.mkdir(mode=0o700, parents=True, exist_ok=True)
        if os.statvfs(directory).f_flag & os.ST_RDONLY:
            words = f"the store {directory} cannot be written: its file system is mounted read-only"
            raise StorageFull(f"{words}; what is in it has been left as it is")
        if not os.access(directory, os.R_OK | os.W_OK | os.X_OK):
            raise PermissionError
    except OSError as error:
        reason = error.strerror or "it is not for this user to write"
        raise SettingsError(f"DDPM_DATA_DIR {directory} cannot be used: {reason.lower()}") from None


def commits(db: sqlite3.Connection) -> tuple[int, str]:
    """The number of the last transaction, and the store's name."""
    number, store = db.execute("SELECT commits, store FROM total").fetchone()
    return int(number), str(store)


def count_commit(db: sqlite3.Connection) -> int:
    """Counts a transaction, as a part of it -> its number"""
    return int(db.execute("UPDATE total SET commits = commits + 1 RETURNING commits").fetchone()[0])
