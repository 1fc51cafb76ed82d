"""Whether a job is taken on: is anybody there to do it, and is there room? What is refused is counted here."""

import secrets
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager

from model.errors import PlanError
from server.engines.backend import Backend
from server.errors import ModelBroken, NotReady, ServerError, StorageFull, problem
from server.jobs.capacity import Queue
from server.jobs.job import Job, ResolvedRequest
from server.jobs.repository import JobRepository
from server.jobs.tenants import Tenant
from server.metrics import Metrics
from server.settings import Settings


class Admission:
    """What has been promised, and what may still be."""

    def __init__(self, settings: Settings, backend: Backend, repository: JobRepository, metrics: Metrics) -> None:
        self.queue = Queue(settings.max_queued_steps, settings.max_queued_jobs, settings.max_live_bytes)
        self.closing = False  # nothing is taken on any more
        self.rejected: Counter[str] = Counter()  # by reason
        self._backend, self._repository, self._metrics = backend, repository, metrics

    @property
    def trouble(self) -> ServerError | None:
        """Why no work can be taken right now, or None."""
        if self.closing:
            return NotReady("the server is shutting down")
        if self._backend.trouble is not None:
            return NotReady(self._backend.trouble)
        store = self._repository.store
        return StorageFull(store.trouble) if store.trouble is not None else None

    @contextmanager
    def counting_refusals(self) -> Iterator[None]:
        """Whatever is refused in here is counted."""
        began = time.perf_counter()
        try:
            yield
        except (ServerError, PlanError) as error:
            self._metrics.refusal_seconds.observe(time.perf_counter() - began)
            self.count_refusal(problem(error).code)
            raise

    def count_refusal(self, code: str) -> None:
        """Something was refused, for this reason."""
        self.rejected[code] += 1

    def admit(self, order: ResolvedRequest, owner: Tenant | None) -> Job:
        """A job there is room for. Raises NotReady, StorageFull, ModelBroken, Invalid if it can never fit,
        TooBusy if not now."""
        served = self._backend.models.get(order.model)
        if self.trouble is not None:
            raise self.trouble
        if served is None:
            raise NotReady("the model is not loaded")
        if served.trouble is not None:
            raise ModelBroken(served.trouble)
        times = self._backend.step_s(order.model, served.admitted)
        step_s, load_s = times[-1] / (len(times) - 1), self._backend.load_s(order.model)
        quota = owner.quota if owner is not None else None
        if quota is not None:
            quota.require(order.image_steps)
        self.queue.take(order.image_steps, step_s, order.size_bytes, load_s)
        if quota is not None:
            quota.take(order.image_steps)
        return Job(
            secrets.token_hex(12), order, served, self._repository.audience, arrived=self._repository.clock.now()
        )

    def done(self, job: Job) -> None:
        """What is left of its work will not be done, and what it held is free."""
        self.queue.give_back(job.request.image_steps - sum(job.steps))
        self.queue.leave(job.request.size_bytes)

    def take_back(self, job: Job, owner: Tenant | None) -> None:
        """A job that was admitted makes no work after all."""
        self.done(job)
        if owner is not None and owner.quota is not None:
            owner.quota.give_back(job.request.image_steps)
