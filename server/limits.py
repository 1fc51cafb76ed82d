"""How much: work is counted in image-steps, and refused before any is done."""

import math
from dataclasses import dataclass

from server.errors import Invalid, TooBusy


@dataclass(slots=True)
class Queue:
    """The image-steps that have been accepted and are not done yet."""

    capacity: int
    taken: int = 0  # what is left to do of all jobs together

    def take(self, steps: int, step_s: float) -> None:
        """Room for a job of so many. Raises Invalid if it can never fit, TooBusy if it does not now.

        step_s: seconds that an image-step takes at present, from which those who are refused hear when to come back.
        """
        if steps > self.capacity:
            raise Invalid(("n", f"n x steps must be at most {self.capacity}, got {steps}"))
        missing = self.taken + steps - self.capacity
        if missing > 0:
            detail = f"{self.taken} of {self.capacity} image-steps are taken, {steps} more were asked for"
            raise TooBusy(detail, max(1, math.ceil(missing * step_s)))
        self.taken += steps

    def give_back(self, steps: int) -> None:
        """So many are done, or will not be."""
        self.taken -= steps
