"""Pictures as files, each under the hash of its bytes: whole or not there at all, whatever happens meanwhile.

A picture is on disk before any row of the journal names it.
"""

import os
import secrets
import threading
from collections import Counter
from collections.abc import Iterable, Set
from hashlib import sha256
from pathlib import Path

from server.errors import Gone
from server.store.schema import sync_folder

UNFINISHED = ".part"


class Pictures:
    """A folder of pictures."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        folder.mkdir(mode=0o700, exist_ok=True)
        self._pinned: Counter[str] = Counter()  # those that a row is going to name
        self._moving = threading.Lock()  # held while a picture comes or goes: one is pinned before it comes

    def save(self, png: bytes, name: str) -> None:
        """Puts a picture on disk, for good. name: its hash. Slow: in a thread. Raises OSError.

        What is there already is written again: it may have been damaged, and this costs no more than looking.
        """
        part = self.folder / f"{secrets.token_hex(8)}{UNFINISHED}"
        try:
            with open(part, "xb") as file:
                file.write(png)
                file.flush()
                os.fsync(file.fileno())
            with self._moving:
                os.replace(part, self.folder / name)
        except OSError:
            part.unlink(missing_ok=True)
            raise
        sync_folder(self.folder)

    def read(self, name: str) -> bytes:
        """A picture. Raises Gone if it is not here, or not what it was."""
        try:
            png = (self.folder / name).read_bytes()
        except FileNotFoundError:
            raise Gone("this picture is no longer kept") from None
        if sha256(png).hexdigest() != name:
            raise Gone("this picture was damaged on disk")
        return png

    def has(self, name: str, size_bytes: int) -> bool:
        """Whether a picture is here, by the looks of it."""
        try:
            return (self.folder / name).stat().st_size == size_bytes
        except OSError:
            return False

    def pin(self, names: Iterable[str]) -> None:
        """These are about to be named: `delete` leaves them alone until they are `unpin`ned."""
        self._pinned.update(list(names))

    def unpin(self, names: Iterable[str]) -> None:
        """A row names these now, or never will."""
        self._pinned.subtract(list(names))
        self._pinned = +self._pinned

    def delete(self, names: Iterable[str]) -> None:
        """These are named by no row any more, and left alone if one is going to."""
        for name in names:
            with self._moving:
                if name not in self._pinned:
                    (self.folder / name).unlink(missing_ok=True)

    def delete_others(self, named: Set[str]) -> int:
        """Whatever a server left behind that died between a picture and its row. -> how many"""
        left = [entry.name for entry in os.scandir(self.folder) if entry.name not in named]
        self.delete(left)
        return len(left)

    def probe(self, size_bytes: int) -> None:
        """Raises OSError unless there is room for so much."""
        part = self.folder / f"probe{UNFINISHED}"
        try:
            part.write_bytes(b"\0" * size_bytes)
        finally:
            part.unlink(missing_ok=True)
