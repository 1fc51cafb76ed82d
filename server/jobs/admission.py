"""Whether a job is accepted: are the engines up, and is there room? Work is counted in image-steps and in bytes, and
refused before any of it is done."""

import math
import secrets
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from model.errors import PlanError
from server.engines.backend import Backend
from server.errors import Invalid, ModelBroken, NotReady, ServerError, StorageFull, TooBusy, problem
from server.jobs.job import Job
from server.jobs.repository import JobRepository
from server.jobs.request import ResolvedRequest
from server.jobs.tenants import Quota, Tenant
from server.metrics import Metrics, Usage
from server.settings import Settings


@dataclass(slots=True)
class Capacity:
    """What has been accepted and is not done yet, and how much that may be."""

    most_steps: int  # image-steps
    most_jobs: int = 1 << 20
    most_bytes: int = 1 << 60
    steps: int = 0  # image-steps left to do, of all jobs together
    jobs: int = 0
    size_bytes: int = 0  # what those jobs may come to hold in memory

    def take(self, steps: int, step_s: float, size_bytes: int = 0, load_s: float = 0.0) -> None:
        """Makes room for a job of so many image-steps. Raises Invalid if it can never fit, TooBusy if it does not now.

        step_s: seconds that an image-step takes at present, from which `Retry-After` is computed.
        load_s: seconds until the model is loaded.
        """
        if steps > self.most_steps:
            raise Invalid(("n", f"n x steps, twice that with guidance, must be at most {self.most_steps}, got {steps}"))
        if size_bytes > self.most_bytes:
            most = f"pictures and frames may take {self.most_bytes} bytes of memory, these would take {size_bytes}"
            raise Invalid(("frames", most))
        missing: float = self.steps + steps - self.most_steps  # image-steps that must be done first
        size_missing = self.size_bytes + size_bytes - self.most_bytes
        if missing > 0:
            detail = f"{self.steps} of {self.most_steps} image-steps are taken, {steps} more were asked for"
        elif self.jobs >= self.most_jobs:
            detail = f"{self.jobs} jobs have been accepted and have not ended, as many as may be"
            missing = self.steps / self.jobs
        elif size_missing > 0:
            promised = f"{self.size_bytes} of {self.most_bytes} bytes for pictures and frames are promised"
            detail = f"{promised}, {size_bytes} more were asked for"
            missing = size_missing / self.size_bytes * self.steps
        else:
            return self.add(steps, size_bytes)
        raise TooBusy(detail, max(1, math.ceil(load_s + missing * step_s)))

    def add(self, steps: int, size_bytes: int) -> None:
        """Counts a job that is accepted already, whether there is room or not."""
        self.steps, self.jobs, self.size_bytes = self.steps + steps, self.jobs + 1, self.size_bytes + size_bytes


class Admission:
    """Accepts and refuses jobs, and counts both."""

    def __init__(self, settings: Settings, backend: Backend, repository: JobRepository, metrics: Metrics) -> None:
        self.capacity = Capacity(settings.max_queued_steps, settings.max_queued_jobs, settings.max_live_bytes)
        self.closing = False  # the server shuts down
        self.rejected: Counter[str] = Counter()  # by reason
        self._backend, self._repository, self._metrics = backend, repository, metrics

    @property
    def trouble(self) -> ServerError | None:
        """Why no job is accepted right now, or None."""
        if self.closing:
            return NotReady("the server is shutting down")
        if self._backend.trouble is not None:
            return NotReady(self._backend.trouble)
        full = self._repository.store.trouble
        return StorageFull(full) if full is not None else None

    @contextmanager
    def counting_refusals(self, tenant: Tenant | None) -> Iterator[None]:
        """Counts whatever is refused in here."""
        began = time.perf_counter()
        try:
            yield
        except (ServerError, PlanError) as error:
            self._metrics.refusal_seconds.observe(time.perf_counter() - began)
            self.count_refusal(problem(error).code)
            if tenant is not None:
                self._metrics.by_key.of(tenant.name).rejected += 1
            raise

    def count_refusal(self, code: str) -> None:
        """Counts a refusal."""
        self.rejected[code] += 1

    def admit(self, request: ResolvedRequest, quota: Quota | None) -> Job:
        """A job that there is room for. Raises NotReady, StorageFull, ModelBroken, Invalid if it can never fit, TooBusy
        if it does not now."""
        if (trouble := self.trouble) is not None:
            raise trouble
        model = self._backend.models.get(request.model)
        if model is None:
            raise NotReady("the model is not loaded")
        if model.trouble is not None:
            raise ModelBroken(model.trouble)
        times = self._backend.step_s(request.model, model.admitted)
        step_s, load_s = times[-1] / (len(times) - 1), self._backend.load_s(request.model)
        if quota is not None:
            quota.require(request.work)
        self.capacity.take(request.work, step_s, request.size_bytes, load_s)
        if quota is not None:
            quota.take(request.work)
        id, arrived = secrets.token_hex(12), self._repository.clock.now()
        job = Job(id=id, request=request, model=model, counts=self._repository.counts, arrived=arrived)
        self._count_steps(job, request.work)
        return job

    def resume(self, job: Job) -> None:
        """Counts a job that an earlier server accepted."""
        self.capacity.add(job.request.work, job.request.size_bytes)
        self._count_steps(job, job.request.work)

    def usages(self, job: Job) -> list[Usage]:
        """Where a job counts."""
        return self._metrics.usages(job.request.model, job.request.owner)

    def _count_steps(self, job: Job, waiting: int, done: int = 0) -> None:
        for usage in self.usages(job):
            usage.steps_waiting += waiting
            usage.sample_steps += done

    def advance(self, job: Job, index: int, step: int) -> None:
        """Notes how many updates a picture has had, and that so much less is left to do; nothing if more is known."""
        more = max(0, step - job.steps[index])
        work = job.work_of(more)
        self.capacity.steps -= work
        self._count_steps(job, -work, work)
        job.steps[index] += more

    def restart(self, job: Job, index: int) -> None:
        """Notes that a picture begins again."""
        work = job.work_of(job.steps[index])
        self.capacity.steps += work
        self._count_steps(job, work)
        job.steps[index] = 0

    def release(self, job: Job) -> None:
        """A job has ended: what is left of its work will not be done, and its memory is free."""
        left = job.request.work - job.work_of(sum(job.steps))
        self.capacity.steps -= left
        self._count_steps(job, -left)
        self.capacity.jobs -= 1
        self.capacity.size_bytes -= job.request.size_bytes

    def revoke(self, job: Job, quota: Quota | None) -> None:
        """A job that was admitted makes no work after all."""
        self.release(job)
        if quota is not None:
            quota.give_back(job.request.work)
