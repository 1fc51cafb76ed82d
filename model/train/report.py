"""What whoever watches a training is told: lines, and how it stands."""

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

LINE_S = 10  # seconds between two lines


@dataclass(frozen=True, slots=True, kw_only=True)
class Standing:
    """How a training stands after an update."""

    seen: int  # pictures
    images: int | None  # to see; None: as many as the minutes allow
    loss: float
    images_per_s: float
    left_s: float
    done: float  # the part of the training, from 0 to 1

    def __str__(self) -> str:
        of = "" if self.images is None else f" of {self.images:,}"
        speed = f"{self.images_per_s:.1f} pictures/s"
        return f"{self.seen:,}{of} pictures, loss {self.loss:.4f}, {speed}, {duration(self.left_s)} left"


class Report(Protocol):
    """Tells whoever watches how a training goes."""

    def say(self, line: str) -> None:
        """Something to be read."""

    def reading(self, done: int, count: int) -> None:
        """Of the pictures of a folder, so many have been read."""

    def update(self, standing: Standing) -> None:
        """After each update."""


class Lines:
    """A report on standard output: while it reads or trains, a line every ten seconds."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock, self._next = clock, clock() + LINE_S

    def say(self, line: str) -> None:
        """See `Report`."""
        print(line, flush=True)

    def reading(self, done: int, count: int) -> None:
        """See `Report`."""
        self._now_and_then(f"{done:,} of {count:,} pictures read")

    def update(self, standing: Standing) -> None:
        """See `Report`."""
        self._now_and_then(str(standing))

    def _now_and_then(self, line: str) -> None:
        if self._clock() >= self._next:
            self._next = self._clock() + LINE_S
            self.say(line)


def duration(seconds: float) -> str:
    """45 s, 12 min, 3 h 05 min."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 90 else f"{minutes // 60} h {minutes % 60:02} min"
