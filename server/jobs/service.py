"""The one path a job takes: resolve, admit, run, collect its events, tell its viewers, end.

A job lives in a task of its own. Whoever wants its pictures waits for its end or watches its feed; who leaves does not
matter to it, unless the route says so by `cancel`.
"""

import asyncio
import logging
import math
import time
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import asdict
from typing import Any

from model.checkpoint.card import ModelCard
from server.engines.backend import Backend
from server.errors import (
    JobCancelled,
    KeyReused,
    StillRunning,
)
from server.jobs.admission import Admission
from server.jobs.eta import EtaEstimator
from server.jobs.job import Job
from server.jobs.repository import JobRepository
from server.jobs.request import RequestContext, fingerprints, resolve_request
from server.jobs.runner import JobRunner
from server.jobs.stream import Subscriber, Subscribers
from server.logs import report
from server.metrics import Metrics, MetricValues
from server.settings import Settings
from server.store.rows import IdempotentHit
from server.store.store import Store

logger = logging.getLogger(__name__)
ANIMATIONS = 2  # so many are drawn at once: threads that are left encode frames
TICK_S = 0.25  # how often those who wait hear where they stand
PARKING_S = 5.0  # within which every job has let go of its engine at the end
OUTCOMES = ("succeeded", "failed", "cancelled")


class Jobs:
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
        self.audience = Subscribers()
        self.repository = JobRepository(store, settings, self.audience)
        self.register = self.repository.register
        self.metrics = metrics or Metrics()
        self.metrics.watch(self.standing)
        self.admission = Admission(settings, backend, self.repository, self.metrics)
        self._outlooks = EtaEstimator(self.register.live, backend)
        self._accepted, self._arriving = 0, 0
        self._outcomes = Counter(dict.fromkeys(OUTCOMES, 0))
        self._cache_hits = 0
        self._ticker: asyncio.Task[None] | None = None
        self._courses = JobRunner(
            cards, backend, self.repository, self.admission, self._outlooks, self.metrics, count=self._count
        )

    async def start(self) -> None:
        """Starts the engines, takes up what the last server had not ended, and tells who waits where they stand."""
        await self.backend.start()
        for job in await self.repository.start():
            self._accepted += 1
            self.admission.queue.enter(job.request.image_steps, job.request.size_bytes)
            self._begin(job)
        self._ticker = asyncio.create_task(self._tick(), name="queue positions")
        self._ticker.add_done_callback(report)

    async def drain(self, seconds: float, hurried: Callable[[], bool] = lambda: False) -> None:
        """Nothing new is taken; what is there may end, for so long, or until it is `hurried`. The rest is parked: it
        stays on disk, and runs when the server has been started anew."""
        self.admission.closing = True
        until = time.monotonic() + seconds
        while (self.register.live or self._arriving) and time.monotonic() < until and not hurried():
            await asyncio.sleep(0.05)
        lives = [job.life for job in self.register.live.values() if job.life is not None]
        for job in self.register.live.values():
            if job.life is not None and not job.ending:
                job.life.cancel()
        if lives:
            await asyncio.wait(lives, timeout=PARKING_S)

    async def close(self) -> None:
        """Parks every job, and ends the engines."""
        await self.drain(0)
        if self._ticker is not None:
            self._ticker.cancel()
        await self.backend.close()
        await self.repository.close()

    async def submit(self, body: bytes, context: RequestContext) -> Job:
        """Takes a job on: it is on disk now, and ends, one way or another. Or finds the job that came with this key.

        Raises BadInput, PlanError, TooBusy, NotReady, StorageFull or StillRunning.
        """
        order, prints = resolve_request(body, self.cards, self._settings, context), list[str]()
        if context.key is not None:
            prints = fingerprints(body, context)
            before = await self.repository.store.by_key(context.owner_name, context.key)
            if before is not None:
                return await self._found(before, prints, context)
        job = self.admission.admit(order, context.owner)
        job.key, job.fingerprint = context.key, next(iter(prints), None)
        job.attached = context.attached and context.key is None
        self._arriving += 1
        try:
            made = await self.repository.accept(job, context.again)
        except BaseException:
            self.admission.take_back(job, context.owner)
            raise
        finally:
            self._arriving -= 1
        if isinstance(made, IdempotentHit):  # it came while this one was on its way to the disk
            self.admission.take_back(job, context.owner)
            return await self._found(made, prints, context)
        self._accepted += 1
        if made.cached:
            self._cache_hits += 1
            self.admission.take_back(job, context.owner)
            self._count(made, "succeeded")
        else:
            self._begin(made)
        return made

    async def _found(self, found: IdempotentHit, prints: list[str], context: RequestContext) -> Job:
        """The job that came with this key before."""
        if found.fingerprint not in prints:
            raise KeyReused("this Idempotency-Key came with another request before")
        job = await self.repository.find(found.id, context.owner_name)
        if context.attached and not job.stream.ended:
            raise StillRunning(job.id, max(1, math.ceil(self._outlooks.of(job).eta_s)))
        return job

    def _begin(self, job: Job) -> None:
        steps = job.request.image_steps
        logger.info("job accepted", extra={"job": job.id, "model": job.request.model, "image_steps": steps})
        job.life = asyncio.create_task(self._courses.run(job), name=f"job {job.id}")
        job.life.add_done_callback(report)

    async def cancel(self, job: Job) -> Job:
        """Gives a job up, if it has not ended. Returns once it has."""
        if job.life is None or job.stream.ended or job.stream.parked:
            return job
        if not job.ending:
            job.giving_up = True
            job.life.cancel()
        await asyncio.wait([job.life])
        if not job.ending:  # it was cancelled before its life had begun
            job.ending, job.failure = True, JobCancelled("the job was cancelled")
            await self._courses.end(job, "cancelled")
        return job

    async def leave(self, job: Job) -> None:
        """Its caller has gone away, and gives it up; unless it holds a key to come back with."""
        if job.key is None:
            await self.cancel(job)

    async def result(self, job: Job) -> Job:
        """The job, once it has succeeded. Raises what made it fail."""
        if job.life is not None:
            await asyncio.wait([job.life])
        if job.failure is not None:
            raise job.failure
        if job.life is not None:
            job.life.result()  # raises what nobody foresaw
        return job

    def _count(self, job: Job, outcome: str) -> None:
        self._outcomes[outcome] += 1
        self.metrics.job_seconds.observe(self.repository.clock.now() - job.arrived)
        self.register.retire(job)

    async def _tick(self) -> None:
        while True:
            await asyncio.sleep(TICK_S)
            for job in self.register.live.values():
                if job.started_at is None and job.stream.viewers:
                    job.stream.tell("queued", **asdict(self._outlooks.of(job)))
                else:
                    job.stream.remind()

    def watch(self, job: Job, after: int = 0) -> Subscriber:
        """A new viewer, from message `after` + 1 on. It hears at once where a job stands that has not begun."""
        if job.started_at is None and not job.stream.ended and not job.stream.viewers:
            job.stream.tell("queued", **asdict(self._outlooks.of(job)))
        return Subscriber(job.stream, after)

    def document(self, job: Job) -> dict[str, Any]:
        """The job as clients see it."""
        return job.document(None if job.stream.ended else self._outlooks.of(job))

    def standing(self) -> MetricValues:
        """Where the server stands, for its metrics."""
        live, health = self.register.live.values(), self.backend.health
        running = sum(job.started_at is not None for job in live)
        return MetricValues(
            jobs_running=running,
            jobs_waiting=len(live) - running,
            steps_waiting=self.admission.queue.taken,
            slots=sum(served.slots for place in self.backend.places for served in place.values() if served.loaded),
            slots_used=health.stats.seated,
            viewers=self.audience.viewers,
            ready=self.admission.trouble is None,
            engine_up=self.backend.trouble is None,
            engine_heartbeat_age_seconds=health.silence_s,
            gpu_memory_bytes=health.memory_bytes,
            storage_full=self.repository.store.trouble is not None,
            store_bytes=self.repository.store.size_bytes,
            jobs_accepted=self._accepted,
            jobs=self._outcomes,
            rejected=self.admission.rejected,
            sample_steps=health.stats.sample_steps,
            engine_steps=health.stats.steps,
            padded_slots=health.stats.padded,
            out_of_memory=health.stats.exhausted,
            engine_restarts=health.restarts,
            jobs_replayed=health.replayed,
            frames=self.audience.frames,
            frames_dropped=self.audience.dropped,
            replay_mismatch=self.repository.mismatches,
            cache_hits=self._cache_hits,
        )
