"""The course of a job: it waits until the engines take work, is run, tells its viewers, and ends."""

import asyncio
import logging
import math
import time
from collections.abc import Callable, Mapping
from contextlib import aclosing, nullcontext
from dataclasses import dataclass, field

from model.checkpoint.card import ModelCard
from model.engine.events import Cancelled, Failed, Finished, Preview
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
from server.jobs.capacity import check_deadline
from server.jobs.eta import EtaEstimator
from server.jobs.job import Image, Job
from server.jobs.repository import JobRepository
from server.metrics import Metrics
from server.worker.messages import ModelStatus, Spec

logger = logging.getLogger(__name__)
DEATHS = 3  # of servers while a job ran: then it is given up


@dataclass(slots=True)
class JobRunner:
    """Where every job of this server takes its course, each in a task of its own."""

    cards: Mapping[str, ModelCard]
    backend: Backend
    repository: JobRepository
    admission: Admission
    outlooks: EtaEstimator
    metrics: Metrics
    count: Callable[[Job, str], None]  # hears of every end, once it is on disk
    _suspect: asyncio.Lock = field(default_factory=asyncio.Lock)  # held by a job that may have killed two servers

    async def run(self, job: Job) -> None:
        """From its acceptance to its end, or until it is parked."""
        outcome: str | None = "failed"  # None: it is parked, and goes on when the server has been started anew
        try:
            if job.attached and job.attempt > 1:
                raise JobCancelled("its caller went away with the server before")
            async with asyncio.timeout(self._time_left_s(job)) as deadline:
                job.due = deadline.when() or math.inf
                self._check_deadline(job)
                async with self._suspect if job.deaths == DEATHS - 1 else nullcontext():
                    await self._collect(job)
            await asyncio.to_thread(job.encode)
            outcome = "succeeded"
        except TimeoutError:
            if not deadline.expired():
                raise
            job.failure = DeadlinePassed(f"the deadline of {job.request.deadline_s:g} s was not met")
        except JobCancelled as error:
            outcome, job.failure = "cancelled", error
        except (NotReady, EngineFailed) as error:
            outcome, job.failure = None, error
        except ServerError as error:
            job.failure = error
        except asyncio.CancelledError:
            if job.giving_up:
                outcome, job.failure = "cancelled", JobCancelled("the job was cancelled")
            else:
                outcome, job.failure = None, NotReady("the server is shutting down")
                raise
        finally:
            job.ending = True
            if outcome is None:
                job.stream.park()
            else:
                await self.end(job, outcome)

    def _time_left_s(self, job: Job) -> float | None:
        """Until the deadline that the client set, counted from the acceptance, even if that was by another server."""
        if job.request.deadline_s is None:
            return None
        return max(0.0, job.request.deadline_s - (self.repository.clock.now() - job.arrived))

    def _note_what_serves(self, job: Job, served: ModelStatus) -> None:
        """What its pictures are made by, once that is known. Raises ModelChanged."""
        if served.digest != job.served.digest:
            raise ModelChanged("the model was changed after this job had been accepted")
        if served.numerics != job.served.numerics and served.loaded and job.served.numerics:
            logger.warning(
                "a job is run on another kind of machine", extra={"job": job.id, "numerics": served.numerics}
            )
        job.served = served

    async def _collect(self, job: Job) -> None:
        if job.deaths >= DEATHS:
            raise SampleLost(f"the server died {job.deaths} times while it made this job")
        order, watched = job.request, job.request.watched
        spec = Spec(
            order.model,
            tuple(range(order.seed, order.seed + order.n)),
            order.sampling,
            job.rank,
            frozenset(watched.points if watched else ()),
            watched is not None and watched.frames.kind != "x0",
            watched is not None and watched.frames.kind != "x_t",
            order.wants_floats,
            order.owner or "",
        )
        if order.model not in self.cards:
            raise ModelChanged("the model that this job was accepted for is not served any more")
        if (served := self.backend.served.get(order.model)) is not None:  # else the backend waits for it, and tells
            self._note_what_serves(job, served)
        suspected = job.deaths > 0
        async with aclosing(self.backend.run(spec)) as events:
            async for event in events:
                if suspected and not isinstance(event, Restarting):  # it has begun: a server that dies while it loads
                    await self.repository.store.mark_running_durably(job.id)  # does so for other reasons
                    suspected = False
                self._take(job, event)

    def _take(self, job: Job, event: SampleEvent) -> None:
        if job.started_at is None and isinstance(event, Preview | Progress | Finished):
            job.started_at, job.status = time.time(), "running"
            self.metrics.queue_seconds.observe(self.repository.clock.now() - job.arrived)
            if not job.deaths:
                self.repository.store.mark_running(job.id)
            job.stream.say("started", steps=job.request.image_steps)
        match event:
            case Preview(int(index), step, x, x0):
                job.show_frame(index, step, "x_t", x)
                job.show_frame(index, step, "x0", x0)
            case Progress(steps):
                self._advance(job, steps)
                self._check_deadline(job)
                job.stream.tell("progress", **job.progress, eta_s=self.outlooks.of(job).eta_s)
            case Finished(int(index), picture, floats):
                self._advance(job, {index: job.request.sampling.steps})
                job.finish(Image(index, job.request.seed + index, picture, floats, job.texts(job.request.seed + index)))
            case Assigned(served):
                self._note_what_serves(job, served)
            case Restarting(retry_after_s):
                self._advance(job, {i: 0 for i in range(job.request.n) if i not in job.images})
                job.stream.tell("restarting", urgent=True, retry_after_s=retry_after_s)
            case Failed(_, reason):
                raise SampleLost(reason)
            case Cancelled():
                raise SampleLost("the picture was given up")

    def _check_deadline(self, job: Job) -> None:
        """Gives up, and leaves the slots to others, as soon as it is certain that the deadline will not be met."""
        if job.due < math.inf:
            left_s = job.due - asyncio.get_running_loop().time()
            steps = job.request.sampling.steps - min(job.steps)
            check_deadline(left_s, steps, self.backend.step_s(job.request.model, job.served.admitted)[1])

    def _advance(self, job: Job, steps: Mapping[int, int]) -> None:
        for index, step in steps.items():
            self.admission.queue.give_back(step - job.steps[index])
            job.steps[index] = step

    async def end(self, job: Job, outcome: str) -> None:
        """Writes down what has come of a job, and then tells it; or parks it, if it cannot be written any more."""
        finished_at = time.time()
        error = problem(job.failure or RuntimeError()).body("") if outcome == "failed" else None
        self.admission.done(job)  # it may take until there is room on the disk, and others need not wait for that
        try:
            await self.repository.end(job, outcome, finished_at, error)
        except StorageFull as failure:  # the server ends before there is any: the next one runs it again
            job.failure = failure
            return job.stream.park()
        job.status, job.finished_at, job.error = outcome, finished_at, error
        logger.info("job ended", extra={"job": job.id, "outcome": outcome, "code": error and error["code"]})
        job.stream.end(outcome, document=job.document())
        self.count(job, outcome)  # now that it holds all that it will
