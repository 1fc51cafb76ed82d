"""Fair shares as numbers: owners have equal shares of the image-steps that are made.

`model.engine.scheduler` carries this out step by step; what it comes to is worked out here, for the placement of new
jobs and for the estimate of their ends.
"""

from bisect import bisect
from collections.abc import Iterable
from itertools import accumulate


class Shares:
    """Owners, each of whom wants a number of image-steps."""

    def __init__(self, wanted: Iterable[float]) -> None:
        self._wanted = sorted(wanted)
        self._sums = [0.0, *accumulate(self._wanted)]

    def done_by(self, own: float) -> float:
        """Image-steps of all owners together when each has had `own` of them, or all it wants."""
        content = bisect(self._wanted, own)
        return self._sums[content] + (len(self._wanted) - content) * own


def steps_before(own: float, others: Iterable[float]) -> float:
    """Image-steps made by the time an owner has had `own`, if the others want so many each."""
    return own + Shares(others).done_by(own)
