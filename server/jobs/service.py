"""The one path of a job: resolve, admit, write down, run; watched, cancelled and answered on the way.

A job runs in a task of its own. Callers wait for its end or watch its stream; that they leave does not matter to it,
unless the route cancels it.
"""

import asyncio
import logging
import math
import time
from collections.abc import Callable, Mapping
from typing import Any

from model.checkpoint.card import ModelCard
from server.engines.backend import Backend
from server.errors import JobCancelled, KeyReused, StillRunning
from server.jobs.admission import Admission
from server.jobs.eta import EtaEstimator
from server.jobs.job import Job, State
from server.jobs.repository import JobRepository
from server.jobs.request import RequestContext, fingerprints, resolve_request
from server.jobs.runner import JobRunner
from server.jobs.stream import StreamCounts, Subscriber
from server.logs import report
from server.metrics import Metrics, MetricValues
from server.settings import Settings
from server.store.rows import IdempotentHit
from server.store.store import Store

logger = logging.getLogger(__name__)
ANIMATIONS = 2  # so many are drawn at once: the other threads encode frames
TICK_S = 0.25  # between two messages to those who wait
PARKING_S = 5.0  # within which every job is parked at the end


class JobService:
    """All jobs of this server."""

    def __init__(
        self,
        settings: Settings,
        cards: Mapping[str, ModelCard],
        backend: Backend,
        store: Store,
        metrics: Metrics | None = None,
    ) -> None:
        self.cards, self.backend, self._settings = cards, backend, settings
        self.drawing = asyncio.Semaphore(ANIMATIONS)
        self.counts = StreamCounts()
        self.repository = JobRepository(store, settings, self.counts)
        self.metrics = metrics or Metrics()
        self.metrics.watch(self.metric_values)
        self.admission = Admission(settings, backend, self.repository, self.metrics)
        self._etas = EtaEstimator(self.repository.live, backend)
        self._runner = JobRunner(
            cards=cards,
            backend=backend,
            repository=self.repository,
            admission=self.admission,
            etas=self._etas,
            metrics=self.metrics,
        )
        self._accepted, self._accepting, self._cache_hits = 0, 0, 0
        self._ticker: asyncio.Task[None] | None = None

    async def start(self) -> None:
        """Starts the engines, and runs what the last server has not ended."""
        await self.backend.start()
        recovered = await self.repository.start()
        self._accepted += len(recovered)
        self._runner.resume(recovered)
        self._ticker = asyncio.create_task(self._tick(), name="queue positions")
        self._ticker.add_done_callback(report)

    async def drain(self, seconds: float, hurried: Callable[[], bool] = lambda: False) -> None:
        """Accepts no more jobs, lets those that are there end for so long, or until `hurried()`, and parks the rest:
        they stay on disk, and the next server runs them."""
        self.admission.closing = True
        until = time.monotonic() + seconds
        live = self.repository.live
        while (live or self._accepting) and time.monotonic() < until and not hurried():
            await asyncio.sleep(0.05)
        stopping = [asyncio.create_task(self._runner.stop(job, None)) for job in live.values()]
        if stopping:
            await asyncio.wait(stopping, timeout=PARKING_S)

    async def close(self) -> None:
        """Parks every job, and ends the engines."""
        await self.drain(0)
        if self._ticker is not None:
            self._ticker.cancel()
        await self.backend.close()
        await self.repository.close()

    async def submit(self, body: bytes, context: RequestContext) -> Job:
        """Accepts a job: it is on disk when this returns, and will end in one way or another. Or finds the job that
        came with the same Idempotency-Key.

        Raises BadInput, PlanError, TooBusy, NotReady, StorageFull or StillRunning.
        """
        request, prints = resolve_request(body, self.cards, self._settings, context), list[str]()
        if context.key is not None:
            prints = fingerprints(body, context)
            before = await self.repository.store.by_key(context.owner, context.key)
            if before is not None:
                return await self._same_key(before, prints, context)
        job = self.admission.admit(request, context.tenant)
        job.key, job.fingerprint = context.key, next(iter(prints), None)
        job.attached = context.attached and context.key is None
        self._accepting += 1
        try:
            accepted = await self.repository.accept(job, context.again)
        except BaseException:
            self.admission.revoke(job, context.tenant)
            raise
        finally:
            self._accepting -= 1
        if isinstance(accepted, IdempotentHit):  # it came while this one was on its way to the disk
            self.admission.revoke(job, context.tenant)
            return await self._same_key(accepted, prints, context)
        self._accepted += 1
        if accepted.cached:
            self._cache_hits += 1
            self.admission.revoke(job, context.tenant)
            self._runner.count(accepted, State.SUCCEEDED)
        else:
            self._runner.start(accepted)
        return accepted

    async def _same_key(self, hit: IdempotentHit, prints: list[str], context: RequestContext) -> Job:
        """The job that came with this Idempotency-Key before. Raises KeyReused, StillRunning."""
        if hit.fingerprint not in prints:
            raise KeyReused("this Idempotency-Key came with another request before")
        job = await self.repository.find(hit.id, context.owner)
        if context.attached and not job.ended:
            raise StillRunning(job.id, max(1, math.ceil(self._etas.of(job).eta_s)))
        return job

    async def cancel(self, job: Job) -> Job:
        """Cancels a job, unless it has ended. Returns when it has."""
        await self._runner.stop(job, JobCancelled("the job was cancelled"))
        return job

    async def leave(self, job: Job) -> None:
        """Cancels a job whose caller has left, unless an Idempotency-Key lets the caller come back."""
        if job.key is None:
            await self.cancel(job)

    async def result(self, job: Job) -> Job:
        """The job, once it has succeeded. Raises what made it fail."""
        if job.task is not None:
            await asyncio.wait([job.task])
        if job.failure is not None:
            raise job.failure
        if job.task is not None:
            job.task.result()  # raises the bug that stopped it
        return job

    async def _tick(self) -> None:
        while True:
            await asyncio.sleep(TICK_S)
            for job in self.repository.live.values():
                if job.state is State.QUEUED and job.stream.subscribers:
                    self._runner.tell_progress(job)
                else:
                    job.stream.remind()

    def watch(self, job: Job, after: int = 0) -> Subscriber:
        """A new subscriber, from message `after` + 1 on. The first one is told at once how far the job is."""
        if job.state in (State.QUEUED, State.RUNNING) and not job.stream.subscribers:
            self._runner.tell_progress(job)
        return Subscriber(job.stream, after)

    def document(self, job: Job) -> dict[str, Any]:
        """The job as clients see it."""
        return job.document(None if job.ended else self._etas.of(job))

    def metric_values(self) -> MetricValues:
        """All gauges and counters at this moment."""
        live, health = self.repository.live.values(), self.backend.health
        running = sum(job.started_at is not None for job in live)
        replicas = [model for replica in self.backend.replicas for model in replica.values()]
        return MetricValues(
            jobs_running=running,
            jobs_waiting=len(live) - running,
            steps_waiting=self.admission.capacity.steps,
            slots=sum(model.slots for model in replicas if model.loaded),
            slots_used=health.stats.seated,
            viewers=self.counts.subscribers,
            ready=self.admission.trouble is None,
            engine_up=self.backend.trouble is None,
            engine_heartbeat_age_seconds=health.silence_s,
            gpu_memory_bytes=health.memory_bytes,
            storage_full=self.repository.store.trouble is not None,
            store_bytes=self.repository.store.size_bytes,
            jobs_accepted=self._accepted,
            jobs=self._runner.outcomes,
            rejected=self.admission.rejected,
            sample_steps=health.stats.sample_steps,
            engine_steps=health.stats.steps,
            padded_slots=health.stats.padded,
            out_of_memory=health.stats.exhausted,
            engine_restarts=health.restarts,
            jobs_replayed=health.replayed,
            frames=self.counts.frames,
            frames_dropped=self.counts.dropped,
            replay_mismatch=self.repository.mismatches,
            cache_hits=self._cache_hits,
        )
