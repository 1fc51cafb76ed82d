"""How much: work is counted in image-steps and in bytes, and refused before any of it is done."""

import math
from dataclasses import dataclass

from server.errors import DeadlinePassed, Invalid, TooBusy

CERTAIN = 0.5  # of the time a step usually takes: no step will be faster than this


@dataclass(slots=True)
class Queue:
    """What has been accepted and is not done yet."""

    capacity: int  # image-steps
    capacity_jobs: int = 1 << 20
    capacity_bytes: int = 1 << 60
    taken: int = 0  # image-steps left to do, of all jobs together
    jobs: int = 0
    size_bytes: int = 0  # what those jobs may come to hold in memory

    def take(self, steps: int, step_s: float, size_bytes: int = 0, load_s: float = 0.0) -> None:
        """Room for a job of so many image-steps. Raises Invalid if it can never fit, TooBusy if it does not now.

        step_s: seconds that an image-step takes at present, from which those who are refused hear when to come back.
        load_s: seconds until any is made.
        """
        if steps > self.capacity:
            raise Invalid(("n", f"n x steps must be at most {self.capacity}, got {steps}"))
        if size_bytes > self.capacity_bytes:
            most = f"pictures and frames may take {self.capacity_bytes} bytes of memory, these would take {size_bytes}"
            raise Invalid(("frames", most))
        if self.taken + steps > self.capacity:
            detail = f"{self.taken} of {self.capacity} image-steps are taken, {steps} more were asked for"
            raise self._busy(detail, self.taken + steps - self.capacity, step_s, load_s)
        if self.jobs >= self.capacity_jobs:
            detail = f"{self.jobs} jobs have been accepted and have not ended, as many as may be"
            raise self._busy(detail, self.taken / self.jobs, step_s, load_s)
        if self.size_bytes + size_bytes > self.capacity_bytes:
            detail = f"{self.size_bytes} of {self.capacity_bytes} bytes for pictures and frames are promised"
            missing = (self.size_bytes + size_bytes - self.capacity_bytes) / self.size_bytes
            raise self._busy(f"{detail}, {size_bytes} more were asked for", missing * self.taken, step_s, load_s)
        self.enter(steps, size_bytes)

    def enter(self, steps: int, size_bytes: int) -> None:
        """A job that is here already, room or not."""
        self.taken, self.jobs, self.size_bytes = self.taken + steps, self.jobs + 1, self.size_bytes + size_bytes

    @staticmethod
    def _busy(detail: str, steps: float, step_s: float, load_s: float) -> TooBusy:
        """There will be room when so many image-steps have been done."""
        return TooBusy(detail, max(1, math.ceil(load_s + steps * step_s)))

    def give_back(self, steps: int) -> None:
        """So many image-steps are done, or will not be."""
        self.taken -= steps

    def leave(self, size_bytes: int) -> None:
        """A job has ended."""
        self.jobs, self.size_bytes = self.jobs - 1, self.size_bytes - size_bytes


def check_deadline(left_s: float, steps: int, step_s: float) -> None:
    """Raises DeadlinePassed if what is due in `left_s` seconds cannot be done in them, whatever happens: `steps` steps,
    one after the other. step_s: what the shortest step usually takes."""
    if left_s < CERTAIN * steps * step_s:
        at_least = CERTAIN * steps * step_s
        raise DeadlinePassed(f"the deadline cannot be met: {left_s:.3g} s are left, at least {at_least:.3g} s needed")
