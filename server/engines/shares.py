"""The one policy of fair shares, as numbers: owners have equal shares of the image-steps that are made.

`model.engine.scheduler` carries it out; what it will come to is worked out here, for estimates and for placement.
"""

from bisect import bisect
from collections.abc import Iterable
from itertools import accumulate


class Shares:
    """Owners who each want so many image-steps."""

    def __init__(self, wanted: Iterable[float]) -> None:
        self._wanted = sorted(wanted)
        self._sums = [0.0, *accumulate(self._wanted)]

    def done_by(self, own: float) -> float:
        """Image-steps that all owners together have had when one of them has had `own`: each as many, or all it wants."""
        content = bisect(self._wanted, own)
        return self._sums[content] + (len(self._wanted) - content) * own
