"""Opens a store: for one server at a time, and only if it is sound and of a known version."""

import fcntl
import os
import sqlite3
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from server.errors import SettingsError, StorageFull, StoreInUse, StoreRefused
from server.store.blobs import sync_folder
from server.troubles import shortage

JOURNAL, LOCK = "jobs.sqlite3", "lock"
MARK, PARKED = 32, b"."  # the lock file holds the holder's process id, and at MARK whether it ended in order
FULL = {sqlite3.SQLITE_FULL, sqlite3.SQLITE_IOERR, sqlite3.SQLITE_CANTOPEN, sqlite3.SQLITE_READONLY}
APPLICATION, VERSION = 0x6464706D, 1  # "ddpm"
SCHEMA = f"""
PRAGMA application_id = {APPLICATION};
PRAGMA user_version = {VERSION};
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
    """Creates the directory, readable for this user alone. Raises SettingsError."""
    try:
        directory.mkdir(mode=0o700, parents=True, exist_ok=True)
        if not os.access(directory, os.R_OK | os.W_OK | os.X_OK):
            raise PermissionError
    except OSError as error:
        reason = error.strerror or "it is not for this user to write"
        raise SettingsError(f"DDPM_DATA_DIR {directory} cannot be used: {reason.lower()}") from None


def take_lock(lock: int, directory: Path) -> None:
    """Locks the store for this process. lock: its open file. Raises StoreInUse, naming the process that holds it."""
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        holder = os.pread(lock, MARK, 0).decode("ascii", "replace").strip()
        raise StoreInUse(f"the store {directory} is in use by another server, process {holder}") from None
    os.pwrite(lock, f"{os.getpid()}".ljust(MARK).encode(), 0)


def was_parked(lock: int) -> bool:
    """Whether the last server ended in order, even if it could not write that into the journal."""
    return os.pread(lock, 1, MARK) == PARKED


def mark_parked(lock: int, parked: bool) -> None:
    """Records whether all jobs are parked. It writes in place, which works on a full disk."""
    with suppress(OSError):  # then one death too many is counted
        os.pwrite(lock, PARKED if parked else b" ", MARK)


def open_journal(directory: Path) -> sqlite3.Connection:
    """The journal, ready to be written. Raises StoreRefused, without changing a byte, or the error of a full disk."""
    path = directory / JOURNAL
    try:
        if path.exists():
            _check(path)
        else:
            _create(path)
        db = sqlite3.connect(path, isolation_level=None, check_same_thread=False)
        db.row_factory = sqlite3.Row
        for pragma in ("locking_mode = EXCLUSIVE", "journal_mode = WAL", "synchronous = FULL"):
            db.execute(f"PRAGMA {pragma}")
        return db
    except sqlite3.DatabaseError as error:
        if is_full(error):
            raise
        raise StoreRefused(f"the store {path} is damaged ({error}); it has been left as it is") from None


def _create(path: Path) -> None:
    """Creates an empty journal, atomically."""
    new = path.with_suffix(".new")
    for left in path.parent.glob(f"{new.name}*"):
        left.unlink()
    db = sqlite3.connect(new, isolation_level=None)
    db.execute("PRAGMA journal_mode = WAL")
    db.executescript(f"BEGIN; {SCHEMA} COMMIT;")
    db.close()
    os.replace(new, path)
    sync_folder(path.parent)


def _check(path: Path) -> None:
    """Checks the whole journal through a connection that cannot write, not even when it is closed."""
    db = sqlite3.connect(f"{path.absolute().as_uri()}?mode=ro", uri=True)
    try:
        (found,) = db.execute("PRAGMA quick_check(1)").fetchone()
        if found != "ok":
            raise sqlite3.DatabaseError(found.splitlines()[-1])
        (version,) = db.execute("PRAGMA user_version").fetchone()
        if version > VERSION:
            raise StoreRefused(f"the store {path} is of version {version}, this server knows versions up to {VERSION}")
        if (db.execute("PRAGMA application_id").fetchone(), version) != ((APPLICATION,), VERSION):
            raise StoreRefused(f"{path} is a database of something else")
    finally:
        db.close()
        path.with_name(f"{path.name}-shm").unlink(missing_ok=True)
