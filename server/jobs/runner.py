"""Runs jobs, each in a task of its own, to their end. The only module that changes a job's state."""

import asyncio
import logging
import math
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from contextlib import aclosing
from dataclasses import dataclass, field

from model.checkpoint.card import ModelCard
from model.engine.events import Cancelled, Failed, Finished, Preview
from server.catalog import require_unchanged
from server.engines.backend import Assigned, Backend, Progress, Restarting, SampleEvent
from server.errors import (
    DeadlinePassed,
    EngineFailed,
    JobCancelled,
    ModelChanged,
    NotReady,
    SampleLost,
    ServerError,
    StorageFull,
    problem,
)
from server.jobs.admission import Admission
from server.jobs.deliveries import Deliveries
from server.jobs.eta import EtaEstimator
from server.jobs.job import Image, Job, State
from server.jobs.repository import JobRepository
from server.logs import report
from server.metrics import Metrics
from server.worker.messages import ModelStatus, Spec

logger = logging.getLogger(__name__)
CERTAIN = 0.5  # of the time a step usually takes: no step will be faster than this
DEATHS = 2  # of servers while a job was running: from then on it runs alone, and after the others


@dataclass(slots=True, kw_only=True)
class JobRunner:
    """Where all jobs of a server are run."""

    cards: Mapping[str, ModelCard]
    backend: Backend
    repository: JobRepository
    admission: Admission
    etas: EtaEstimator
    metrics: Metrics
    deliveries: Deliveries
    outcomes: Counter[str] = field(default_factory=lambda: Counter({"succeeded": 0, "failed": 0, "cancelled": 0}))

    def resume(self, jobs: Sequence[Job]) -> None:
        """Runs what the last server has not ended. Jobs that were running at several deaths of a server may be what
        killed it: their engine runs them alone, after the others. None of them fails for it."""
        for job in sorted(jobs, key=lambda job: job.deaths >= DEATHS):
            self.admission.resume(job)
            self.start(job)

    def start(self, job: Job) -> None:
        """Runs an accepted job."""
        extra = {"job": job.id, "model": job.request.model, "image_steps": job.request.work}
        logger.info("job accepted", extra=extra)
        job.task = asyncio.create_task(self._run(job), name=f"job {job.id}")
        job.task.add_done_callback(report)

    async def stop(self, job: Job, cancelled: JobCancelled | None) -> None:
        """Cancels a job that has not ended, or parks it, and returns when that is done."""
        if job.task is None or job.ended or job.state is State.PARKED:
            return
        if job.state is not State.ENDING:
            job.failure = job.failure or cancelled  # a drain does not revoke what a client has cancelled
            job.task.cancel()
        await asyncio.wait([job.task])
        if job.state is State.QUEUED:  # its task had not begun
            outcome = State.PARKED if job.failure is None else State.CANCELLED
            job.failure = job.failure or NotReady("the server is shutting down")
            await self._end(job, outcome)

    async def _run(self, job: Job) -> None:
        outcome = State.FAILED  # also if a bug stops it
        try:
            await self._make(job)
            outcome = State.SUCCEEDED
        except JobCancelled as failure:
            outcome, job.failure = State.CANCELLED, failure
        except (NotReady, EngineFailed) as failure:  # what is wrong with the server is not the job's failure
            outcome, job.failure = State.PARKED, failure
        except ServerError as failure:
            job.failure = failure
        except asyncio.CancelledError:
            if job.failure is None:
                outcome, job.failure = State.PARKED, NotReady("the server is shutting down")
                raise
            outcome = State.CANCELLED  # by the client, which ends here: a traceback would hold the job's frames
        finally:
            await self._end(job, outcome)

    async def _make(self, job: Job) -> None:
        """Makes all pictures of a job and their PNGs. Raises the ServerError that stops it."""
        if job.attached and job.attempt > 1:
            raise JobCancelled("its caller went away with the server before")
        left_s = job.request.deadline_s
        if left_s is not None:  # counted from the acceptance, even if that was by another server
            left_s = max(0.0, left_s - (self.repository.clock.now() - job.arrived))
        try:
            async with asyncio.timeout(left_s) as deadline:
                if left_s is not None:
                    job.due = asyncio.get_running_loop().time() + left_s
                    self._check_deadline(job)
                await self._collect(job)
        except TimeoutError:
            if not deadline.expired():
                raise
            raise DeadlinePassed(f"the deadline of {job.request.deadline_s:g} s was not met") from None
        images, troubles = job.images.values(), self.repository.store.troubles
        await troubles.in_thread(lambda: [image.sha256 for image in images])  # makes the PNGs

    async def _collect(self, job: Job) -> None:
        require_unchanged(job.request.model, job.request.sampling, self.cards)
        unmarked = job.deaths > 0  # others are marked as running when they start, without waiting for the disk
        async with aclosing(self.backend.run(_spec(job))) as events:
            async for event in events:
                if unmarked and not isinstance(event, Restarting):
                    await self.repository.store.mark_running_durably(job.id)
                    unmarked = False
                self._take(job, event)

    def _take(self, job: Job, event: SampleEvent) -> None:
        if job.state is State.QUEUED and isinstance(event, Preview | Progress | Finished):
            self._mark_started(job)
        match event:
            case Preview(int(index), step, x, x0):
                self.admission.advance(job, index, step)
                job.show_frame(index, step, "x_t", x)
                job.show_frame(index, step, "x0", x0)
            case Progress(steps):
                for index, step in steps.items():
                    self.admission.advance(job, index, step)
                if job.due < math.inf:
                    self._check_deadline(job)
                if job.stream.subscribers:
                    self.tell_progress(job)
                else:
                    job.stream.drop_transient()
            case Finished(int(index), picture, floats):
                self.admission.advance(job, index, job.request.sampling.steps)
                seed = job.request.seed + index
                job.finish(Image.made(index, seed, picture, floats, job.texts(seed)))
            case Assigned(model):
                self._note_model(job, model)
            case Restarting(retry_after_s):
                for index in range(job.request.n):
                    if index not in job.images:
                        self.admission.restart(job, index)
                job.stream.send_transient("restarting", urgent=True, retry_after_s=retry_after_s)
            case Failed(_, reason):
                raise SampleLost(reason)
            case Cancelled():
                raise SampleLost("the picture was given up")

    def _mark_started(self, job: Job) -> None:
        job.move(State.RUNNING)
        job.started_at = time.time()
        self.metrics.observe_wait(job.request.model, self.repository.clock.now() - job.arrived)
        if not job.deaths:
            self.repository.store.mark_running(job.id)
        job.stream.keep_text("started", steps=job.updates)

    def tell_progress(self, job: Job) -> None:
        """Tells subscribers how far a job is, or how long it has to wait."""
        eta = self.etas.of(job)
        if job.state is State.QUEUED:
            job.stream.send_transient("queued", position=eta.position, eta_s=eta.eta_s)
        else:
            level = job.levels[min(job.steps)]  # of the picture furthest behind
            job.stream.send_transient("progress", step=sum(job.steps), steps=job.updates, t=level, eta_s=eta.eta_s)

    def _note_model(self, job: Job, model: ModelStatus) -> None:
        """Notes what makes the pictures. Raises ModelChanged."""
        if model.digest != job.model.digest:
            raise ModelChanged("the model was changed after this job had been accepted")
        if model.numerics != job.model.numerics and model.loaded and job.model.numerics:
            extra = {"job": job.id, "numerics": model.numerics}
            logger.warning("a job is run on another kind of machine", extra=extra)
        job.model = model

    def _check_deadline(self, job: Job) -> None:
        """Gives up, and frees the slots, as soon as it is certain that the deadline cannot be met."""
        left_s = job.due - asyncio.get_running_loop().time()
        step_s = self.backend.step_s(job.request.model, job.model.admitted)[1]
        at_least = CERTAIN * (job.request.sampling.steps - min(job.steps)) * step_s
        if left_s < at_least:
            detail = f"{left_s:.3g} s are left, at least {at_least:.3g} s needed"
            raise DeadlinePassed(f"the deadline cannot be met: {detail}")

    async def _end(self, job: Job, outcome: State) -> None:
        """Writes down the end of a job, then tells it. Or parks the job, also if its end cannot be written any more."""
        if outcome is not State.PARKED:
            job.move(State.ENDING)
            finished_at = time.time()
            error = problem(job.failure or RuntimeError()).body("") if outcome is State.FAILED else None
            self.admission.release(job)  # now: writing may take until there is room on the disk
            try:
                await self.repository.end(job, outcome, finished_at, error)
            except StorageFull as failure:
                outcome, job.failure = State.PARKED, failure
        job.move(outcome)
        if outcome is State.PARKED:
            return job.stream.close()
        job.finished_at, job.error = finished_at, error
        job.stream.end(outcome, document=job.document())
        logger.info("job ended", extra={"job": job.id, "outcome": str(outcome), "code": error and error["code"]})
        self.count(job, outcome)

    def count(self, job: Job, outcome: State) -> None:
        """Counts a job that has ended, and moves it to those."""
        self.outcomes[outcome] += 1
        for usage in self.admission.usages(job):
            usage.jobs[outcome] += 1
        self.metrics.job_seconds.observe(self.repository.clock.now() - job.arrived)
        self.repository.retire(job)
        if job.delivery is not None:
            self.deliveries.wake()


def _spec(job: Job) -> Spec:
    request = job.request
    return Spec(
        model=request.model,
        seeds=tuple(range(request.seed, request.seed + request.n)),
        sampling=request.sampling,
        rank=job.rank,
        frames=frozenset(request.frames.points if request.frames else ()),
        shows_x=request.frames is not None and request.frames.frames.kind != "x0",
        shows_x0=request.frames is not None and request.frames.frames.kind != "x_t",
        wants_floats=request.floats,
        owner=request.owner or "",
        labels=dict(zip(range(request.seed, request.seed + request.n), request.labels or (), strict=False)),
        job=job.id,
        alone=job.deaths >= DEATHS,
    )
