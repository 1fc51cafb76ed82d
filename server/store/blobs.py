"""Files named by the SHA-256 of their bytes: whole or not there, whatever happens meanwhile. They are the PNGs of jobs.

A blob is on disk before a row of the journal names it.
"""

import asyncio
import os
import re
import secrets
import stat
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Set
from contextlib import suppress
from hashlib import sha256
from pathlib import Path

from server.errors import Gone
from server.troubles import PATIENCE_S, Troubles, shortage, started

RETRY_S = 1.0  # between attempts to write while the disk is full
BLOB = re.compile("[0-9a-f]{64}")  # the names of blobs
UNFINISHED = ".part"
PART = re.compile(f"(?:[0-9a-f]{{16}}|probe){re.escape(UNFINISHED)}")  # the names of blobs that are being written
ASIDE, ASIDE_S = "aside", 86_400.0  # the folder of what no row names, and how long that is kept
BLOCK_BYTES = 4096  # of a file that are read at once where some may be unreadable
THREADS = 8  # blobs that are synced at once: the file system writes them down together


class Blobs:
    """A folder of blobs. on_error: is called with what keeps a blob from being saved."""

    def __init__(self, folder: Path, on_error: Callable[[OSError], None], troubles: Troubles) -> None:
        self.folder, self._aside = folder, folder.with_name(ASIDE)
        folder.mkdir(mode=0o700, exist_ok=True)
        self._opened = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)  # so that no other folder has its inode number
        self._on_error, self._troubles = on_error, troubles
        self._threads = started(THREADS, "blobs")
        self._pinned: Counter[str] = Counter()
        self._lock = threading.Lock()  # held while a blob is created or deleted
        self._writes = 0  # blobs that were written
        self._waiting = set[int]()  # calls of `save` that have failed and will try again

    def close(self) -> None:
        """Waits for blobs that are being written. Slow: call it in a thread."""
        self._threads.shutdown()
        os.close(self._opened)

    async def save(self, blobs: Mapping[str, bytes]) -> None:
        """Writes blobs by name and pins them: `unpin` them after a row names them. Waits for room on the disk."""
        self.pin(blobs)
        try:
            while True:
                try:
                    return await self._troubles.outlast(lambda: self._write_all(blobs))
                except OSError as error:
                    self._waiting.add(id(blobs))
                    self._on_error(error)
                await asyncio.sleep(RETRY_S)
        finally:
            self._waiting.discard(id(blobs))

    async def _write_all(self, blobs: Mapping[str, bytes]) -> None:
        """Writes blobs, or raises what kept one of them from it."""
        loop = asyncio.get_running_loop()
        writing = [loop.run_in_executor(self._threads, self._write, *blob) for blob in blobs.items()]
        before = -1
        while (await asyncio.wait(writing, timeout=PATIENCE_S))[1]:
            if self._writes == before:  # else there is only much to write
                self._on_error(TimeoutError(f"the disk has not answered for {PATIENCE_S:g} s"))
            before = self._writes
        for error in await asyncio.gather(*writing, return_exceptions=True):
            if error is not None:
                raise error

    def _write(self, name: str, data: bytes) -> None:
        """Writes a blob even if it exists: it may be damaged, and a check would cost as much."""
        part = self.folder / f"{secrets.token_hex(8)}{UNFINISHED}"
        try:
            with open(part, "xb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
            with self._lock:
                os.replace(part, self.folder / name)
        except OSError:
            part.unlink(missing_ok=True)
            raise
        os.fsync(self._opened)
        self._writes += 1

    def read(self, name: str) -> bytes:
        """The bytes of a blob. Raises Gone if it is missing or damaged."""
        try:
            data = (self.folder / name).read_bytes()
        except FileNotFoundError:
            raise Gone("this picture is no longer kept") from None
        except OSError as error:
            if shortage(error) is not None:
                raise
            raise Gone("this picture was damaged on disk") from error
        if not is_sound(name, data):
            raise Gone("this picture was damaged on disk")
        return data

    def has(self, name: str, size_bytes: int) -> bool:
        """Whether there is a blob of this name and size."""
        try:
            return (self.folder / name).stat().st_size == size_bytes
        except OSError:
            return False

    def pin(self, names: Iterable[str]) -> None:
        """Keeps `delete` from deleting these blobs, which rows are about to name."""
        self._pinned.update(list(names))

    def unpin(self, names: Iterable[str]) -> None:
        """Undoes one `pin` of each of these."""
        self._pinned.subtract(list(names))
        self._pinned = +self._pinned

    def delete(self, name: str) -> bool:
        """Deletes a blob -> False if it is pinned."""
        with self._lock:
            if name in self._pinned:
                return False
            (self.folder / name).unlink(missing_ok=True)
            return True

    def set_aside(self, named: Set[str]) -> int:
        """Moves blobs that rows do not name, and unfinished ones, out of the folder -> how many

        A server that died before it wrote the row left them. They are kept for a day, in case it was otherwise. What
        has no name of ours stays where it is.
        """
        with os.scandir(self.folder) as entries:
            others = [entry.name for entry in entries if is_ours(entry) and entry.name not in named]
        if others:
            self._aside.mkdir(mode=0o700, exist_ok=True)
        moved = 0
        for name in others:
            with suppress(FileNotFoundError):  # it was a probe's
                os.utime(self.folder / name)  # their day begins
                os.replace(self.folder / name, self._aside / name)
                moved += 1
        return moved

    def clear_aside(self) -> None:
        """Deletes what was set aside a day ago."""
        if self._aside.is_dir():
            with os.scandir(self._aside) as entries:
                for entry in entries:
                    if is_ours(entry) and entry.stat().st_mtime < time.time() - ASIDE_S:
                        os.unlink(entry.path)

    def probe(self, size_bytes: int) -> None:
        """Does what saving a blob of so many bytes does. Raises OSError, also while a blob waits that cannot be."""
        name = f"probe{UNFINISHED}"
        try:
            self._write(name, b"\0" * size_bytes)
        finally:
            (self.folder / name).unlink(missing_ok=True)
        if self._waiting:
            raise OSError("a picture waits that cannot be written")


def is_blob(entry: "os.DirEntry[str]") -> bool:
    """Whether this is a file that could be a blob, by its name."""
    return BLOB.fullmatch(entry.name) is not None and entry.is_file(follow_symlinks=False)


def blobs_in(folder: Path) -> dict[str, int]:
    """The sizes of all blobs in a folder, by name; none if it is not there."""
    if not folder.is_dir():
        return {}
    with os.scandir(folder) as entries:
        return {entry.name: entry.stat().st_size for entry in entries if is_blob(entry)}


def is_ours(entry: "os.DirEntry[str]") -> bool:
    """Whether this is a blob, or one that was not finished."""
    return is_blob(entry) or (PART.fullmatch(entry.name) is not None and entry.is_file(follow_symlinks=False))


def is_sound(name: str, data: bytes) -> bool:
    """Whether a blob has the bytes that its name says."""
    return sha256(data).hexdigest() == name


def why_unreadable(path: Path) -> str | None:
    """Why the system does not read a file; None if it does, or there is no such file."""
    try:
        if not stat.S_ISREG(path.stat().st_mode):
            return f"{path.name} is not a file"
        with open(path, "rb"):
            return None
    except FileNotFoundError:
        return None
    except OSError as error:
        return f"{path.name} cannot be read: {(error.strerror or str(error)).lower()}"


def copy_file(source: Path, target: Path) -> None:
    """Copies a file, with zeros for what the disk cannot read."""
    with open(source, "rb") as file, open(target, "wb") as copy:
        for at in range(0, os.fstat(file.fileno()).st_size, BLOCK_BYTES):
            try:
                block = os.pread(file.fileno(), BLOCK_BYTES, at)
            except OSError:
                block = bytes(BLOCK_BYTES)
            copy.write(block)


def sync_folder(folder: Path) -> None:
    """Syncs the entries of a folder to disk."""
    opened = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(opened)
    finally:
        os.close(opened)
