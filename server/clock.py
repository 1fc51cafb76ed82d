"""The clock by which jobs wait in order and are kept: it does not jump, whatever becomes of the one on the wall."""

import time

DAY_S = 86_400.0
MOST_OFF_S = DAY_S  # of the time between two servers that counts


class Clock:
    """Seconds since 1970 that do not jump. It starts at the time of day, or later if the store has later times.

    last: the latest time that the store has, if any. The clock starts at most a day after it: a wall clock that is
    wrong by years, as on a machine that starts before it is told the time, must not end the retention of everything.
    """

    def __init__(self, last: float = 0.0) -> None:
        now = max(time.time(), last)
        self._offset_s = (min(now, last + MOST_OFF_S) if last else now) - time.monotonic()

    def now(self) -> float:
        """The time."""
        return time.monotonic() + self._offset_s
