"""Whom requests belong to, and how much each owner may ask for."""

import math
import time
from collections.abc import Callable
from dataclasses import dataclass, field

from server.errors import Invalid, QuotaExceeded

WINDOW_S = 60.0


@dataclass(slots=True)
class Quota:
    """The image-steps that an owner may have accepted: `capacity` a minute, a bucket that fills up evenly."""

    capacity: int
    clock: Callable[[], float] = time.monotonic
    _level: float = field(init=False)  # at most capacity, as of `_at`
    _at: float = field(init=False)

    def __post_init__(self) -> None:
        self._level, self._at = self.capacity, self.clock()

    @property
    def left(self) -> float:
        """Image-steps that could be asked for right now; less than none if the capacity has been lowered."""
        return min(self.capacity, self._level + (self.clock() - self._at) * self.capacity / WINDOW_S)

    def require(self, steps: int) -> None:
        """Raises Invalid if a job of so many image-steps can never be within this quota, QuotaExceeded if it is not
        now. Takes nothing yet: it may be refused for other reasons."""
        if steps > self.capacity:
            most = f"at most {self.capacity}, the quota of this key, got {steps}"
            raise Invalid(("n", f"n x steps, twice that with guidance, must be {most}"))
        left = self.left
        if steps > left:
            shown = max(0, math.floor(left))
            wait_s = math.ceil((steps - left) * WINDOW_S / self.capacity)
            detail = f"{shown} of {self.capacity} image-steps per minute are left, {steps} were asked for"
            raise QuotaExceeded(detail, max(1, wait_s), self.capacity, shown)

    def take(self, steps: int) -> None:
        """A job of so many has been accepted."""
        self._level, self._at = self.left - steps, self.clock()

    def continue_from(self, before: "Quota") -> None:
        """What was used up of the quota that this one replaces is used up of this one."""
        self._level, self._at = self.capacity - (before.capacity - before.left), self.clock()

    def give_back(self, steps: int) -> None:
        """A job of so many makes no work after all."""
        self._level += steps


@dataclass(frozen=True, slots=True, eq=False)
class Tenant:
    """Whom requests with one of its keys belong to, and what comes of them."""

    name: str
    quota: Quota | None = None
