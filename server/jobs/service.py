"""The one path of a job: resolve, admit, write down, run; watched, cancelled and answered on the way.

A job runs in a task of its own. Callers wait for its end or watch its stream; that they leave does not matter to it,
unless the route cancels it.
"""

import asyncio
import math
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from typing import TypeVar

from model.checkpoint.card import ModelCard
from server.catalog import refused
from server.documents import JobDocument
from server.engines.backend import Backend
from server.errors import JobCancelled, KeyReused, StillRunning, StorageFull
from server.jobs.admission import Admission
from server.jobs.deliveries import Deliveries
from server.jobs.eta import EtaEstimator, Pace
from server.jobs.job import Job, State
from server.jobs.repository import JobRepository
from server.jobs.request import RequestContext, fingerprints, resolve_request
from server.jobs.runner import JobRunner
from server.jobs.stream import StreamCounts, Subscriber
from server.logs import report
from server.metrics import Family, Metrics, counter, gauge
from server.settings import Settings
from server.store.rows import IdempotentHit
from server.store.store import Store
from server.troubles import PATIENCE_S, SYSTEM, too_little

T = TypeVar("T")
TICK_S = 0.25  # between two messages to those who wait
PARKING_S = 5.0  # within which every job is parked at the end


class JobService:
    """All jobs of this server."""

    def __init__(
        self, settings: Settings, cards: Mapping[str, ModelCard], backend: Backend, store: Store, metrics: Metrics
    ) -> None:
        self.cards, self.backend, self.metrics, self._settings = cards, backend, metrics, settings
        self.drawing = asyncio.Semaphore(2)  # animations at once: the other threads encode frames
        self.counts = StreamCounts(prefix=settings.path_prefix)
        self.repository = JobRepository(store, settings, self.counts, cards, backend)
        self.admission = Admission(settings, backend, self.repository, metrics)
        self._deliveries = Deliveries(settings, self.repository)
        self._etas = EtaEstimator(self.repository.live, backend)
        self._runner = JobRunner(
            cards=cards,
            backend=backend,
            repository=self.repository,
            admission=self.admission,
            etas=self._etas,
            metrics=metrics,
            deliveries=self._deliveries,
        )
        metrics.show(cards)
        metrics.watch(self.metric_values)
        self.pace = Pace()
        self._accepted, self._accepting, self._cache_hits = 0, 0, 0
        self._ticker: asyncio.Task[None] | None = None

    async def start(self) -> None:
        """Starts the engines, and runs what the last server has not ended."""
        await self.backend.start()
        recovered = await self.repository.start()
        self._accepted += len(recovered)
        self._runner.resume(recovered)
        self._deliveries.start()
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
        await self._deliveries.close()
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
            if (before := await self.repository.store.by_key(context.owner, context.key)) is not None:
                return await self._same_key(before, prints, context)
        quota = context.tenant.quota if context.tenant is not None else None
        job = self.admission.admit(request, quota)
        job.key, job.fingerprint = context.key, next(iter(prints), None)
        job.attached = context.attached and context.key is None
        accepted = None
        self._accepting += 1
        try:
            accepted = await self.repository.accept(job, context.again)
        finally:
            self._accepting -= 1
            if accepted is not job:  # there is nothing to run
                self.admission.revoke(job, quota)
        if isinstance(accepted, IdempotentHit):  # it came while this one was on its way to the disk
            return await self._same_key(accepted, prints, context)
        self._accepted += 1
        if accepted.cached:
            self._cache_hits += 1
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
            raise StillRunning(job.path, max(1, math.ceil(self._etas.of(job).eta_s)))
        return job

    async def cancel(self, job: Job) -> Job:
        """Cancels a job, unless it has ended. Returns when that is on disk. Raises StorageFull if that takes too long;
        the job is stopped nevertheless, and the rest is done when the disk can be written."""
        stopping = asyncio.create_task(self._runner.stop(job, JobCancelled("the job was cancelled")))
        if not (await asyncio.wait([stopping], timeout=PATIENCE_S))[0]:
            stopping.add_done_callback(report)
            raise StorageFull("the job was stopped, but its end is not on disk yet")
        await stopping
        return job

    async def leave(self, job: Job) -> None:
        """Cancels a job whose caller has left, unless an Idempotency-Key lets the caller come back."""
        if job.key is None:
            with suppress(StorageFull):  # nobody waits for the disk
                await self.cancel(job)

    async def result(self, job: Job) -> Job:
        """The job, once it has succeeded. Raises what made it fail, or StorageFull or NotReady if it cannot end."""
        store = self.repository.store
        while job.task is not None and not (await asyncio.wait([job.task], timeout=PATIENCE_S))[0]:
            made = job.state is State.ENDING or len(job.images) == job.request.n
            if made and store.trouble is not None:
                raise StorageFull(f"the pictures are made, and not written yet: {store.trouble}")
            if made and (short := SYSTEM & store.troubles.now.keys()):
                raise too_little(", ".join(short))
        if job.failure is not None:
            raise job.failure
        if job.task is not None:
            job.task.result()  # raises the bug that stopped it
        return job

    async def in_thread(self, work: Callable[[], T]) -> T:
        """What `work` returns, in a thread. Raises NotReady if the system has too little of something for too long."""
        return await self.repository.store.troubles.in_thread(work, PATIENCE_S)

    async def _tick(self) -> None:
        while True:
            await asyncio.sleep(TICK_S)
            self.pace.look(time.monotonic(), self.backend.health.stats.sample_steps, *self.metrics.steps_observed())
            for job in self.repository.live.values():
                if job.state is State.QUEUED and job.stream.subscribers:
                    self._runner.tell_progress(job)
                else:
                    job.stream.remind()

    def watch(self, job: Job, after: int = 0) -> Subscriber:
        """A new subscriber, from message `after` + 1 on. The first one is told at once how far the job is."""
        told = job.stream.transient(len(job.stream.kept))
        restarting = told is not None and told.body["type"] == "restarting"
        if job.state in (State.QUEUED, State.RUNNING) and not job.stream.subscribers and not restarting:
            self._runner.tell_progress(job)
        return Subscriber(job.stream, after)

    def document(self, job: Job) -> JobDocument:
        """The job as clients see it."""
        return job.document(None if job.ended else self._etas.of(job))

    def tally(self) -> tuple[int, int, int]:
        """How many jobs are running, are waiting, and have ended."""
        live = self.repository.live.values()
        running = sum(job.started_at is not None for job in live)
        return running, len(live) - running, self._runner.outcomes.total()

    @property
    def slots(self) -> int:
        """Pictures that can be denoised at once: the slots of all loaded models."""
        return sum(model.slots for replica in self.backend.replicas for model in replica.values() if model.loaded)

    @property
    def refused(self) -> dict[str, str]:
        """Why listed models are not served, by name: those left out at the start, and those given up since."""
        given_up = {name: model.trouble for name, model in self.backend.models.items()}
        return {**refused(self.cards), **{name: reason for name, reason in given_up.items() if reason is not None}}

    def metric_values(self) -> list[Family]:
        """All gauges and counters at this moment. jobs_accepted = the sum of jobs + jobs_running + jobs_waiting."""
        running, waiting, _ = self.tally()
        admission, store, backend, counts = self.admission, self.repository.store, self.backend, self.counts
        health, stats, steps = backend.health, backend.health.stats, admission.capacity.steps
        return [
            gauge("jobs_running", "Jobs with a picture that has been started.", running),
            gauge("jobs_waiting", "Jobs that wait for a slot.", waiting),
            gauge("steps_waiting", "Image-steps left to do of all accepted jobs, waiting and running.", steps),
            gauge("slots", "Slots of all loaded models: pictures that can be denoised at once.", self.slots),
            gauge("slots_used", "Slots in use: pictures being denoised.", stats.seated),
            gauge("viewers", "Clients that watch a job.", counts.subscribers),
            gauge("ready", "1 if jobs are accepted, as /readyz reports.", admission.trouble is None),
            gauge("engine_up", "1 if the engine accepts jobs.", backend.trouble is None),
            gauge("engine_heartbeat_age_seconds", "Seconds since the last heartbeat of the engine.", health.silence_s),
            gauge("gpu_memory_bytes", "Device memory that the engine holds.", health.memory_bytes),
            gauge("storage_full", "1 if the store cannot be written.", store.trouble is not None),
            gauge("models_refused", "Models that are not served though they were listed.", len(self.refused)),
            gauge("store_bytes", "Size of jobs and pictures on disk.", store.size_bytes),
            counter("jobs_accepted", "Accepted jobs.", self._accepted),
            counter("jobs", "Ended jobs by outcome.", self._runner.outcomes, "outcome"),
            counter("rejected", "Refused requests by error code.", admission.rejected, "reason"),
            counter("sample_steps", "Denoising steps of single pictures.", stats.sample_steps),
            counter("engine_steps", "Denoising steps of a batch.", stats.steps),
            counter("padded_slots", "Slots that were computed as padding of a batch.", stats.padded),
            counter("out_of_memory", "Times that device memory ran out, which reduces the batch.", stats.exhausted),
            counter("engine_restarts", "Engine restarts by cause.", health.restarts, "cause"),
            counter("jobs_replayed", "Jobs that were run again after an engine restart.", health.replayed),
            counter("frames", "Frames kept for clients that watch.", counts.frames),
            counter("frames_dropped", "Frames that slow clients missed.", counts.dropped),
            counter("replay_mismatch", "Pictures with other bytes than before.", self.repository.mismatches),
            counter("cache_hits", "Jobs answered with stored pictures of an equal job.", self._cache_hits),
            counter("webhooks", "Attempts to deliver a webhook by outcome.", self._deliveries.outcomes, "outcome"),
            *self.metrics.by_model.families(),
            *self.metrics.by_key.families(),
            self.metrics.by_key.rejected(),
        ]
