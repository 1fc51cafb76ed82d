"""A clock that starts at the time of day and does not jump: what waits and what is kept is ordered by it.

The clock on the wall may be put forward or back by years while a server runs; what was accepted first stays first.
"""

import time


class Clock:
    """Seconds since 1970, as the wall clock had it when this was made, or later if something has happened since."""

    def __init__(self, not_before: float = 0.0) -> None:
        self._offset_s = max(time.time(), not_before) - time.monotonic()

    def now(self) -> float:
        """The time."""
        return time.monotonic() + self._offset_s
