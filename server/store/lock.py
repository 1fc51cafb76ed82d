"""The lock file: which process holds the store, whether the last one ended in order, and how far the journal has come.

It is written in place, which works on a full disk, and not synced: what it says of the journal outlives every death of
the server, and is a few seconds old after a power cut. It is written after the transaction that it counts, and before
anyone is told of that, so it is never ahead of the journal.
"""

import fcntl
import os
from contextlib import suppress
from pathlib import Path
from zlib import crc32

from server.errors import StoreInUse, StoreRefused
from server.store.blobs import why_unreadable

LOCK = "lock"
MARK, PARKED = 32, b"."  # the holder's process id, and at MARK whether it ended in order
FLOOR, FLOOR_BYTES = 64, 43  # there: the number of the last transaction that was promised, the store, a checksum
SEEN, SEEN_BYTES = 128, 26  # there: a time at which the store was in use, with a checksum
SEEN_S = 600.0  # after which that time is written again


def opened(directory: Path, how: int) -> int:
    """The lock file, open. how: flags of `os.open`. Raises StoreRefused if it is not a file that can be read."""
    if (reason := why_unreadable(directory / LOCK)) is not None:
        raise StoreRefused(f"the store {directory} cannot be used: {reason}")
    return os.open(directory / LOCK, how, 0o600)


def hold(lock: int, directory: Path) -> None:
    """Locks the store for this process. lock: its open file. Raises StoreInUse, naming the process that holds it, or
    StoreRefused."""
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        holder = os.pread(lock, MARK, 0).decode("ascii", "replace").strip()
        raise StoreInUse(f"the store {directory} is in use by another server, process {holder}") from None
    except OSError as error:  # a file system that knows no locks
        raise StoreRefused(f"the store {directory} cannot be locked: {error.strerror}") from None


def sign(lock: int) -> None:
    """Writes down which process holds the store."""
    os.pwrite(lock, f"{os.getpid()}".ljust(MARK).encode(), 0)


def was_parked(lock: int) -> bool:
    """Whether the last server ended in order, even if it could not write that into the journal."""
    return os.pread(lock, 1, MARK) == PARKED


def mark_parked(lock: int, parked: bool) -> None:
    """Records whether all jobs are parked."""
    with suppress(OSError):  # then one death too many is counted
        os.pwrite(lock, PARKED if parked else b" ", MARK)


def read_floor(lock: int) -> tuple[int, str]:
    """The number of the last transaction that was promised, and the store's name; 0 and "" if nothing is recorded.
    Raises ValueError."""
    found = os.pread(lock, FLOOR_BYTES, FLOOR)
    if not found.strip(b"\0 "):
        return 0, ""
    if found != _sealed(found[:33]):
        raise ValueError(f"{LOCK} is damaged")
    return int(found[:16], 16), found[17:33].decode().strip()


def write_floor(lock: int, number: int, store: str) -> None:
    """Records the number of the last transaction on disk, which is going to be promised. store: its name, or "" """
    with suppress(OSError):  # then a loss of this one transaction alone would not be noticed
        os.pwrite(lock, _sealed(f"{number:016x} {store:16}".encode()), FLOOR)


def read_seen(lock: int) -> float:
    """A time at which the store was in use, by the clock that does not jump; 0 if none can be read."""
    found = os.pread(lock, SEEN_BYTES, SEEN)
    return float(int(found[:16], 16)) if found and found == _sealed(found[:16]) else 0.0


def write_seen(lock: int, now: float) -> None:
    """Records that the store is in use, now and then."""
    if now >= read_seen(lock) + SEEN_S:
        with suppress(OSError):  # then the time between two servers begins earlier
            os.pwrite(lock, _sealed(f"{int(now):016x}".encode()), SEEN)


def _sealed(record: bytes) -> bytes:
    return b"%s %08x\n" % (record, crc32(record))
