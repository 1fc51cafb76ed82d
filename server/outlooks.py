"""What every job that has not ended has before it, played forward from where all of them stand."""

import time
from collections.abc import Mapping
from dataclasses import replace

from server.backend import Backend
from server.forecast import forecast
from server.job import Job, Outlook

FRESH_S, AGAIN_S = 0.25, 0.02  # how old an outlook may be; how soon one is made again for a job that has none


class Outlooks:
    """Made for all jobs at once, at most every now and then, and only when somebody asks."""

    def __init__(self, live: Mapping[str, Job], backend: Backend) -> None:
        self._live, self._backend = live, backend
        self._all: dict[Job, Outlook] = {}
        self._last = Outlook()  # of whoever comes next
        self._at = 0.0

    def of(self, job: Job) -> Outlook:
        """What this job has before it."""
        age_s = time.monotonic() - self._at
        if age_s > FRESH_S or (job not in self._all and age_s > AGAIN_S):
            self._look()
            age_s = 0.0
        found = self._all.get(job, self._last)
        return replace(found, eta_s=round(max(0.0, found.eta_s - age_s), 2))

    def _look(self) -> None:
        queues: dict[str, list[Job]] = {}
        for job in sorted(self._live.values(), key=lambda job: job.rank):
            queues.setdefault(job.order.card.name, []).append(job)
        times = {name: self._backend.step_s(name, jobs[0].served.slots) for name, jobs in queues.items()}
        crowded = {
            name: times[name][min(sum(job.order.n for job in jobs), -1 + len(times[name]))]
            for name, jobs in queues.items()
        }
        self._all, self._at = {}, time.monotonic()
        for name, jobs in queues.items():
            others_s = sum(seconds for other, seconds in crowded.items() if other != name)  # models take turns
            ends = forecast([job.work for job in jobs], [seconds + others_s for seconds in times[name]])
            ahead = 0
            for job in jobs:
                self._all[job] = Outlook(ahead if job.started_at is None else 0, ends[job])
                ahead += job.started_at is None
        latest_s = max((outlook.eta_s for outlook in self._all.values()), default=0.0)
        self._last = Outlook(sum(job.started_at is None for job in self._live.values()), latest_s)
