"""When a job will be done: image-steps before it, times the time of a step, by the number of slots.

By the time an owner has had some number of image-steps, every other owner has had as many, or all it wants
(`server.engines.shares`). A picture takes at least its own steps; while its last steps are made, those beside it are
halfway on average. tests/server/jobs/test_eta.py has the error, against what the scheduler does.
"""

import time
from collections import defaultdict, deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from server.engines.backend import Backend
from server.engines.shares import Shares
from server.jobs.job import Eta, Job

FRESH_S = 0.25  # how old an estimate may be
PACE_S = 3.0  # over which the pace is measured
BUDGET = 0.05  # of the time may be spent on estimates


class Pace:
    """How fast pictures were denoised in the last seconds."""

    def __init__(self) -> None:
        self._looks: deque[tuple[float, float, float, float]] = deque()

    def look(self, now: float, image_steps: float, steps: float, steps_s: float) -> None:
        """Notes how many image-steps and steps of a batch there have been, and how long those took together."""
        self._looks.append((now, image_steps, steps, steps_s))
        while self._looks[0][0] < now - PACE_S:
            self._looks.popleft()

    def measure(self) -> tuple[float, float | None]:
        """Image-steps a second; seconds of a step, None if there was none."""
        if len(self._looks) < 2:
            return 0.0, None
        seconds, image_steps, steps, steps_s = (b - a for a, b in zip(self._looks[0], self._looks[-1], strict=True))
        return image_steps / seconds, steps_s / steps if steps else None


@dataclass(frozen=True, slots=True, kw_only=True)
class Work:
    """What is left of a job."""

    rank: float  # its place among those of its owner, smaller first
    owner: str = ""
    begun: Sequence[int] = ()  # steps left of each picture that has been begun
    waiting: int = 0  # pictures that have not
    steps: int = 1  # of each picture

    @property
    def image_steps(self) -> int:
        """All steps left."""
        return sum(self.begun) + self.waiting * self.steps

    @classmethod
    def of(cls, job: Job) -> "Work":
        """What is left of this job."""
        steps = job.request.sampling.steps
        begun = [steps - done for i, done in enumerate(job.steps) if done and i not in job.images]
        waiting = job.request.n - len(job.images) - len(begun)
        if job.request.sampling.guided:  # as much work as two others
            begun, waiting = 2 * begun, 2 * waiting
        rank = job.rank + steps / (job.request.T + 1)  # as the scheduler has it: of equals, the shortest first
        return cls(rank=rank, owner=job.request.owner or "", begun=begun, waiting=waiting, steps=steps)


@dataclass(frozen=True, slots=True)
class End:
    """When a job is begun, in image-steps made before, and when it is done, in steps of the batch and in seconds."""

    begun: float
    steps: float
    seconds: float


def estimate(queue: Sequence[Work], step_s: Sequence[float]) -> list[End]:
    """The end of each job of one model, in the order of `queue`. step_s[b]: seconds of a step of b pictures, b = 0 ..
    slots; the last pictures share smaller batches."""
    slots, had = len(step_s) - 1, defaultdict[str, float](float)
    wanted = defaultdict[str, float](float)
    for work in queue:
        wanted[work.owner] += work.image_steps
    is_full = sum(len(work.begun) + work.waiting for work in queue) > slots
    shares, begun = Shares(wanted.values()), [0.0] * len(queue)
    ends = list[tuple[float, int, int]]()  # (step of the batch, pictures that end then, whose they are)
    for place in sorted(range(len(queue)), key=lambda place: queue[place].rank):
        work = queue[place]
        begun[place] = shares.done_by(had[work.owner])
        had[work.owner] += work.image_steps
        ends += [(left, 1, place) for left in work.begun]
        if work.waiting:
            last = (shares.done_by(had[work.owner]) + work.steps * (slots - 1) / 2) / slots if is_full else 0
            ends.append((max(work.steps, last), work.waiting, place))
    left, clock_s, now = sum(count for _, count, _ in ends), 0.0, 0.0
    steps, seconds = [0.0] * len(queue), [0.0] * len(queue)
    for step, count, place in sorted(ends):
        clock_s, now = clock_s + (step - now) * step_s[min(slots, left)], step
        left -= count
        steps[place], seconds[place] = step, clock_s
    return [End(*end) for end in zip(begun, steps, seconds, strict=True)]


class EtaEstimator:
    """The estimates of all jobs that have not ended: made together, and only when one is asked for."""

    def __init__(self, live: Mapping[str, Job], backend: Backend) -> None:
        self._live, self._backend = live, backend
        self._etas: dict[str, Eta] = {}  # by job
        self._last = Eta()  # of a job that arrives next
        self._at, self._took_s = 0.0, 0.0

    def of(self, job: Job) -> Eta:
        """The estimate of this job."""
        age_s = time.monotonic() - self._at
        if age_s > max(FRESH_S if job.id in self._etas else 0.0, self._took_s / BUDGET):
            self._estimate_all()
            age_s = self._took_s
        found = self._etas.get(job.id, self._last)
        return replace(found, eta_s=round(max(0.0, found.eta_s - age_s), 2))

    def _estimate_all(self) -> None:
        self._at, self._etas = time.monotonic(), {}
        queues: defaultdict[str, list[Job]] = defaultdict(list)
        for job in self._live.values():
            queues[job.request.model].append(job)
        ends = {
            name: estimate([Work.of(job) for job in jobs], self._backend.step_s(name, jobs[0].model.admitted))
            for name, jobs in queues.items()
        }
        lasts = {name: max(of_model, key=lambda end: end.steps) for name, of_model in ends.items()}
        for name, jobs in queues.items():
            ahead, load_s = 0, self._backend.load_s(name)
            for job, end in sorted(zip(jobs, ends[name], strict=True), key=lambda pair: pair[1].begun):
                eta_s = load_s + end.seconds
                for other, last in lasts.items():  # models take turns, step by step, as long as both have work
                    if other != name and last.steps:
                        eta_s += last.seconds * min(1.0, end.steps / last.steps)
                self._etas[job.id] = Eta(ahead if job.started_at is None else 0, eta_s)
                if job.started_at is None:
                    ahead += 1
        waiting = sum(job.started_at is None for job in self._live.values())
        self._last = Eta(waiting, max((eta.eta_s for eta in self._etas.values()), default=0.0))
        self._took_s = time.monotonic() - self._at
