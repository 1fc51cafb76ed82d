"""SQLite's write-ahead log, frame by frame (https://www.sqlite.org/fileformat2.html#walformat).

SQLite reads a log up to its first bad frame and takes the rest for what a power cut left. This walk goes on behind it.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

HEADER, FRAME_HEADER = 32, 24  # bytes
MAGIC = 0x377F0682  # with 1 added, checksums are of big-endian words
Words = npt.NDArray[np.uint32]


@dataclass(frozen=True, slots=True)
class Frames:
    """The frames of a log whose header is sound. Arrays of [frames]."""

    page_size: int
    pages: Words  # numbers of the pages
    sizes: Words  # pages of the database, in the last frame of a transaction; else 0
    written: npt.NDArray[np.bool_]  # since the log was begun anew: the salts are those of the header
    sound: npt.NDArray[np.bool_]  # and the checksum follows from that of the frame before

    @property
    def committed(self) -> int:
        """How many frames SQLite reads: those up to the end of the last transaction before the first bad frame."""
        first_bad = int(np.argmin(self.sound)) if not self.sound.all() else len(self.sound)
        ends = np.flatnonzero(self.sizes[:first_bad])
        return int(ends[-1]) + 1 if len(ends) else 0

    @property
    def is_torn(self) -> bool:
        """Whether what follows is at most the transaction that a death or a power cut interrupted: no frame behind the
        end of a transaction. Each transaction is synced before the next begins."""
        behind = np.flatnonzero(self.written[self.committed :])
        ends = np.flatnonzero((self.sizes != 0)[self.committed :] & self.written[self.committed :])
        return len(ends) == 0 or behind[-1] <= ends[0]


def read(path: Path) -> Frames | None:
    """The frames of a log; None if it has none. Raises ValueError if its header is damaged."""
    data = np.fromfile(path, np.uint8) if path.exists() else np.zeros(0, np.uint8)
    if not data.any():
        return None
    if len(data) < HEADER:
        raise ValueError("its header is cut off")
    words = data[:HEADER].view(">u4").astype(np.uint32)
    if words[0] | 1 != MAGIC | 1 or words[1] != 3_007_000:
        raise ValueError("its header is damaged")
    order, page_size = (">u4" if words[0] & 1 else "<u4"), 65536 if words[2] == 1 else int(words[2])
    start = np.zeros((1, 2), np.uint32)
    if (_checksums(data[None, :24].view(order), start) != words[6:8]).any() or page_size & (page_size - 1):
        raise ValueError("its header is damaged")
    return _frames(data, page_size, order, words[4:6], words[6:8])


def read_without_header(path: Path, page_size: int) -> Frames | None:
    """The frames of a log whose header is damaged: pages of this size, with the salts that most of them have."""
    data = np.fromfile(path, np.uint8)
    heads = _heads(data, page_size)[0]
    if not len(heads):
        return None
    salts, counts = np.unique(heads[:, 2:4], axis=0, return_counts=True)
    return _frames(data, page_size, "<u4", salts[np.argmax(counts)], data[24:HEADER].view(">u4").astype(np.uint32))


def _heads(data: npt.NDArray[np.uint8], page_size: int) -> tuple[Words, npt.NDArray[np.uint8]]:
    """The headers of frames as words, and what their checksums are of."""
    count = max(0, len(data) - HEADER) // (FRAME_HEADER + page_size)
    frames = data[HEADER : HEADER + count * (FRAME_HEADER + page_size)].reshape(count, FRAME_HEADER + page_size)
    heads = np.ascontiguousarray(frames[:, :FRAME_HEADER]).view(">u4").astype(np.uint32)
    return heads, np.ascontiguousarray(np.delete(frames, np.s_[8:FRAME_HEADER], axis=1))


def _frames(data: npt.NDArray[np.uint8], page_size: int, order: str, salts: Words, first: Words) -> Frames:
    """first: the checksum before the first frame."""
    heads, summed = _heads(data, page_size)
    before = np.concatenate([first[None], heads[:-1, 4:6]])
    written = (heads[:, 2:4] == salts).all(1)
    sound = written & (_checksums(summed.view(order), before) == heads[:, 4:6]).all(1) & (heads[:, 0] > 0)
    return Frames(page_size, heads[:, 0], heads[:, 1], written, sound)


def _checksums(words: Any, before: Words) -> Words:
    """The checksums after these words, [rows, 2 n], from those before them, [rows, 2] -> [rows, 2]

    For each pair (a, b) of words: s0 += a + s1, then s1 += b + s0; that is s = M s + (a, a + b), M = ((1, 1), (1, 2)).
    """
    n = words.shape[1] // 2
    powers = np.empty((n + 1, 2, 2), np.uint32)  # of M
    powers[0] = np.eye(2)
    for i in range(n):
        powers[i + 1] = powers[i] @ np.array([[1, 1], [1, 2]], np.uint32)
    pairs = words.astype(np.uint32).reshape(-1, n, 2)
    pairs[:, :, 1] += pairs[:, :, 0]
    added = np.einsum("nij,rnj->ri", powers[n - 1 :: -1][:n], pairs, dtype=np.uint32, casting="unsafe")
    return np.asarray(before @ powers[n].T + added, np.uint32)


def apply(log: Path, frames: Frames, database: Path, most: int) -> None:
    """Copies the sound pages of the first `most` frames into a database, up to the end of a transaction."""
    ends = np.flatnonzero((frames.sound & (frames.sizes != 0))[:most])
    with open(log, "rb") as source, open(database, "r+b") as target:
        for index in np.flatnonzero(frames.sound[: ends[-1] + 1 if len(ends) else 0]):
            source.seek(HEADER + int(index) * (FRAME_HEADER + frames.page_size) + FRAME_HEADER)
            target.seek((int(frames.pages[index]) - 1) * frames.page_size)
            target.write(source.read(frames.page_size))
