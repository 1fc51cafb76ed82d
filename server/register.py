"""All jobs that are known: those that live, and those that have ended, the latest first, as long as there is room."""

from collections import OrderedDict
from collections.abc import Iterator

from server.errors import Gone, NotFound
from server.job import Job

KEPT_BYTES = 256 << 20  # what ended jobs hold in memory, at most
KEPT_JOBS = 10_000  # and how many of them there are
EXPIRED = 10_000  # so many ids of jobs that are not kept any more are remembered


class Register:
    """A job is in `live` until it is `retire`d; then it is kept for a while."""

    def __init__(self) -> None:
        self.live: dict[str, Job] = {}  # in order of arrival
        self._ended: OrderedDict[str, Job] = OrderedDict()
        self._expired: OrderedDict[str, str | None] = OrderedDict()  # and their owners
        self._kept_bytes = 0

    def add(self, job: Job) -> None:
        """A new job."""
        self.live[job.id] = job

    def retire(self, job: Job) -> None:
        """A job has ended."""
        self._ended[job.id] = self.live.pop(job.id)
        self._kept_bytes += job.size_bytes
        while len(self._ended) > 1 and (self._kept_bytes > KEPT_BYTES or len(self._ended) > KEPT_JOBS):
            id, oldest = self._ended.popitem(last=False)
            self._kept_bytes -= oldest.size_bytes
            self._expired[id] = oldest.order.owner
            if len(self._expired) > EXPIRED:
                self._expired.popitem(last=False)

    def find(self, id: str, owner: str | None) -> Job:
        """A job by its id, if it is this owner's. Raises NotFound, or Gone if it was kept once."""
        job = self.live.get(id) or self._ended.get(id)
        if job is not None and job.order.owner == owner:
            return job
        if id in self._expired and self._expired[id] == owner:
            raise Gone("this job is no longer kept")
        raise NotFound("there is no such job")

    def newest_first(self, status: str | None, after: str | None, owner: str | None) -> Iterator[Job]:
        """The jobs of an owner, newest first, those after (older than) the one with id `after`."""
        jobs = [job for job in (*self.live.values(), *self._ended.values()) if job.order.owner == owner]
        jobs.sort(key=lambda job: job.created_at, reverse=True)
        start = 0 if after is None else jobs.index(self.find(after, owner)) + 1
        return (job for job in jobs[start:] if status is None or job.status == status)
