"""What every job that has not ended has before it, played forward from where all of them stand."""

import time
from collections.abc import Mapping
from dataclasses import replace

from server.engines.backend import Backend
from server.jobs.forecast import forecast
from server.jobs.job import Job, Outlook

FRESH_S = 0.25  # how old an outlook may be
SHARE = 0.05  # of the time may be spent on looking


class EtaEstimator:
    """Made for all jobs at once, at most every now and then, and only when somebody asks."""

    def __init__(self, live: Mapping[str, Job], backend: Backend) -> None:
        self._live, self._backend = live, backend
        self._all: dict[str, Outlook] = {}  # by job
        self._last = Outlook()  # of whoever comes next
        self._at, self._took_s = 0.0, 0.0

    def of(self, job: Job) -> Outlook:
        """What this job has before it."""
        age_s = time.monotonic() - self._at
        if age_s > max(FRESH_S if job.id in self._all else 0.0, self._took_s / SHARE):
            self._look()
            age_s = self._took_s
        found = self._all.get(job.id, self._last)
        return replace(found, eta_s=round(max(0.0, found.eta_s - age_s), 2))

    def _look(self) -> None:
        self._at = time.monotonic()
        queues: dict[str, list[Job]] = {}
        for job in self._live.values():
            queues.setdefault(job.request.model, []).append(job)
        times = {name: self._backend.step_s(name, jobs[0].served.admitted) for name, jobs in queues.items()}
        longest = {name: jobs[0].request.T for name, jobs in queues.items()}
        ends = {name: forecast([job.work for job in jobs], times[name], longest[name]) for name, jobs in queues.items()}
        lasts = {name: max(of_model.values(), key=lambda end: end.step) for name, of_model in ends.items()}
        self._all = {}
        for name, jobs in queues.items():
            ahead = 0
            for job in sorted(jobs, key=lambda job: ends[name][job].turn):
                end = ends[name][job]
                eta_s = self._backend.load_s(name) + end.seconds
                for other, last in lasts.items():  # models take turns, step by step, as long as both have work
                    if other != name and last.step:
                        eta_s += last.seconds * min(1.0, end.step / last.step)
                self._all[job.id] = Outlook(ahead if job.started_at is None else 0, eta_s)
                ahead += job.started_at is None
        latest_s = max((outlook.eta_s for outlook in self._all.values()), default=0.0)
        self._last = Outlook(sum(job.started_at is None for job in self._live.values()), latest_s)
        self._took_s = time.monotonic() - self._at
