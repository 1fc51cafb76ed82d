"""How much: work is counted in image-steps, and refused before any is done."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from server.errors import Invalid, TooBusy


@dataclass(slots=True)
class Queue:
    """The image-steps that have been accepted and are not done yet."""

    capacity: int
    taken: int = 0  # 0 <= taken <= capacity, always

    @contextmanager
    def hold(self, steps: int, wait_s: int) -> Iterator[None]:
        """Room for a job while it lasts. Raises Invalid if it can never fit, TooBusy if it does not now.

        wait_s: seconds until what is ahead is done, told to those who are refused.
        """
        if steps > self.capacity:
            raise Invalid(("n", f"n x steps must be at most {self.capacity}, got {steps}"))
        if self.taken + steps > self.capacity:
            detail = f"{self.taken} of {self.capacity} image-steps are taken, {steps} more were asked for"
            raise TooBusy(detail, wait_s)
        self.taken += steps
        try:
            yield
        finally:
            self.taken -= steps
