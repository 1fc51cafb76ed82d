"""What the journal holds of a job, and the checksums that rows are written and compared with."""

import json
import sqlite3
from collections.abc import Iterable
from dataclasses import dataclass
from operator import attrgetter
from urllib.parse import urlsplit
from zlib import crc32

from server.documents import DeliveryState, WebhookDocument


@dataclass(frozen=True, slots=True, kw_only=True)
class ImageRow:
    """An image of a job. Its bytes are the blob named `sha256`."""

    index: int
    seed: int
    sha256: str
    size: int  # bytes
    message: int  # its number in the job's stream


@dataclass(frozen=True, slots=True, kw_only=True)
class Delivery:
    """How far the delivery of a job's webhook is."""

    host: str
    due: float | None = 0.0  # of the next attempt, by the clock that does not jump; 0: at once; None: there is none
    state: DeliveryState = "pending"
    attempts: int = 0
    status: int | None = None  # of the last answer
    error: str | None = None  # why there was no answer
    delivered_at: float | None = None

    @classmethod
    def to(cls, url: str) -> "Delivery":
        """A delivery to this URL that has not been attempted."""
        return cls(host=urlsplit(url).hostname or "")

    @property
    def document(self) -> WebhookDocument:
        """What clients see of it."""
        return {
            "state": self.state,
            "attempts": self.attempts,
            "last_status": self.status,
            "last_error": self.error,
            "delivered_at": self.delivered_at,
        }


@dataclass(frozen=True, slots=True, kw_only=True)
class Record:
    """A job as it is on disk. request, served (a ModelStatus), steps and error are JSON."""

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
    images: tuple[ImageRow, ...] = ()
    delivery: Delivery | None = None  # of its webhook, once it has ended


FIELDS = tuple(name for name in Record.__slots__ if name not in ("number", "images", "delivery"))
_values = attrgetter(*ImageRow.__slots__)
_json = json.JSONEncoder(default=repr).encode
TIMES = {"created_at", "arrived", "started_at", "finished_at", "ended"}


def checksum(*values: object) -> int:
    """The CRC-32 of a row. It is written with the row, and compared whenever the row is read."""
    return crc32(_json(values).encode())


def job_checksum(record: Record) -> int:
    """The checksum of a job's own row."""
    values = {name: getattr(record, name) for name in FIELDS}
    values |= {name: float(values[name]) for name in TIMES if isinstance(values[name], int)}  # as SQLite returns them
    return checksum(values)


def images_checksum(images: Iterable[ImageRow]) -> int:
    """The checksum of the rows of a job's images. It is in the job's row beside its own: damage to these rows costs no
    job, for its pictures can be made again."""
    return checksum([_values(image) for image in images])


def checksums(record: Record) -> tuple[int, int]:
    """Both checksums of a job, in the order of their columns."""
    return job_checksum(record), images_checksum(record.images)


def record_of(row: sqlite3.Row, images: Iterable[sqlite3.Row]) -> Record:
    """A job as its rows have it."""
    values = {name: row[name] for name in ("number", *FIELDS)} | {"attached": bool(row["attached"])}
    return Record(**values, images=tuple(map(image_of, images)))


def image_of(row: sqlite3.Row) -> ImageRow:
    """An image as its rows have it."""
    return ImageRow(**{name: row[name] for name in ImageRow.__slots__})
