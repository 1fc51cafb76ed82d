"""The jobs that are in memory: those that live, and those that have ended lately, as long as there is room.

All of them are in the store, too; but only here are their frames.
"""

from collections import OrderedDict
from collections.abc import Iterable

from server.jobs.job import Job

KEPT_BYTES = 256 << 20  # what ended jobs hold in memory, at most
KEPT_JOBS = 10_000  # and how many of them there are


class Register:
    """A job is in `live` until it is `retire`d; then it is kept for a while."""

    def __init__(self) -> None:
        self.live: dict[str, Job] = {}  # in order of arrival
        self._ended: OrderedDict[str, Job] = OrderedDict()
        self._kept_bytes = 0

    def add(self, job: Job) -> None:
        """A new job."""
        self.live[job.id] = job

    def retire(self, job: Job) -> None:
        """A job has ended, and has said so: what it holds does not change any more."""
        self._ended[job.id] = self.live.pop(job.id)
        self._kept_bytes += job.size_bytes
        while len(self._ended) > 1 and (self._kept_bytes > KEPT_BYTES or len(self._ended) > KEPT_JOBS):
            self.forget([next(iter(self._ended))])

    def forget(self, ids: Iterable[str]) -> None:
        """These are not to be found here any more."""
        for id in ids:
            job = self._ended.pop(id, None)
            if job is not None:
                self._kept_bytes -= job.size_bytes

    def find(self, id: str) -> Job | None:
        """A job by its id, if it is in memory."""
        return self.live.get(id) or self._ended.get(id)
