"""The one path a job takes: resolve, admit, run, collect its events, tell its viewers, end.

A job lives in a task of its own. Whoever wants its pictures waits for its end or watches its feed; who leaves does not
matter to it, unless the route says so by `cancel`.
"""

import asyncio
import logging
import secrets
import time
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import aclosing, contextmanager
from dataclasses import asdict, replace
from typing import Any

from model.card import ModelCard
from model.errors import PlanError
from model.events import Cancelled, Failed, Finished, Preview
from server.backend import Backend, Progress, Restarting, SampleEvent, Spec
from server.errors import (
    DeadlinePassed,
    Invalid,
    JobCancelled,
    NotReady,
    SampleLost,
    ServerError,
    TooBusy,
    problem,
)
from server.feed import Audience, Viewer
from server.job import Image, Job, Order
from server.limits import Queue
from server.metrics import Metrics, Standing
from server.orders import take_order
from server.outlooks import Outlooks
from server.owners import Owner, Quota
from server.register import Register
from server.settings import Settings

logger = logging.getLogger(__name__)
ANIMATIONS = 2  # so many are drawn at once: threads that are left encode frames
TICK_S = 0.25  # how often those who wait hear where they stand
OUTCOMES = ("succeeded", "failed", "cancelled")


def _report(task: "asyncio.Task[None]") -> None:
    """Logs what nobody foresaw: the task of a job has nobody who must await it."""
    if not task.cancelled() and (error := task.exception()) is not None:
        logger.error("%s failed", task.get_name(), exc_info=error)


class Jobs:
    """All jobs of this server."""

    def __init__(
        self, settings: Settings, cards: Mapping[str, ModelCard], backend: Backend, metrics: Metrics | None = None
    ) -> None:
        self.cards, self.backend, self._settings = cards, backend, settings
        self.queue = Queue(settings.max_queued_steps)
        self.register = Register()
        self.drawing = asyncio.Semaphore(ANIMATIONS)
        self.audience = Audience()
        self.metrics = metrics or Metrics()
        self.metrics.watch(self.standing)
        self._outlooks = Outlooks(self.register.live, backend)
        self._accepted = 0
        self._outcomes = Counter(dict.fromkeys(OUTCOMES, 0))
        self._rejected: Counter[str] = Counter()
        self._ticker: asyncio.Task[None] | None = None

    async def start(self) -> None:
        """Starts the engines, and to tell those who wait where they stand."""
        await self.backend.start()
        self._ticker = asyncio.create_task(self._tick(), name="queue positions")
        self._ticker.add_done_callback(_report)

    async def close(self) -> None:
        """Ends every job and the engines."""
        if self._ticker is not None:
            self._ticker.cancel()
        await self.backend.close()
        await asyncio.gather(*(job.life for job in self.register.live.values() if job.life), return_exceptions=True)

    def submit(
        self, body: bytes, floats: bool = False, shows: bool = False, draws: bool = False, owner: Owner | None = None
    ) -> Job:
        """Takes a job on: from now on it ends, one way or another. Raises BadInput, PlanError, TooBusy or NotReady.

        floats: whether the pictures are wanted unrounded, too. shows: whether frames are shown if nothing is said of
        them. draws: whether the answer is drawn from them, so that there must be some.
        """
        order = take_order(body, self.cards, self._settings, floats, shows or draws)
        if draws and order.watched is None:
            raise Invalid(("frames", "frames must not be null: an animation is made of them"))
        if owner is None:
            return self._admit(order)
        return self._admit(replace(order, owner=owner.name), owner.quota)

    @contextmanager
    def counting_refusals(self) -> Iterator[None]:
        """Whatever is refused in here is counted."""
        try:
            yield
        except (ServerError, PlanError) as error:
            self.count_refusal(problem(error).code)
            raise

    def count_refusal(self, code: str) -> None:
        """Something was refused, for this reason."""
        self._rejected[code] += 1

    def _admit(self, order: Order, quota: Quota | None = None) -> Job:
        served = self.backend.served.get(order.card.name)
        if self.backend.trouble is not None or served is None:
            raise NotReady(self.backend.trouble or "the model is not loaded")
        if len(self.register.live) >= self._settings.max_queued_jobs:
            raise TooBusy(f"{self._settings.max_queued_jobs} jobs have been accepted and have not ended")
        step_s = self.backend.step_s(order.card.name, served.admitted)[-1] / served.slots
        if quota is not None:
            quota.require(order.image_steps)
        self.queue.take(order.image_steps, step_s)
        if quota is not None:
            quota.take(order.image_steps)
        job = Job(secrets.token_hex(12), order, served, self.audience)
        self.register.add(job)
        self._accepted += 1
        logger.info("job accepted", extra={"job": job.id, "model": order.card.name, "image_steps": order.image_steps})
        job.life = asyncio.create_task(self._live(job), name=f"job {job.id}")
        job.life.add_done_callback(_report)
        return job

    async def cancel(self, job: Job) -> Job:
        """Gives a job up, if it has not ended. Returns once it has."""
        if job.life is not None and not job.feed.ended:
            job.giving_up = True
            job.life.cancel()
            await asyncio.wait([job.life])
            if not job.feed.ended:  # it was cancelled before its life had begun
                job.failure = JobCancelled("the job was cancelled")
                self._end(job, "cancelled")
        return job

    async def result(self, job: Job) -> Job:
        """The job, once it has succeeded. Raises what made it fail."""
        assert job.life is not None
        await asyncio.wait([job.life])
        if job.failure is not None:
            raise job.failure
        job.life.result()  # raises what nobody foresaw
        return job

    async def _live(self, job: Job) -> None:
        outcome = "failed"
        try:
            async with asyncio.timeout(job.order.deadline_s) as deadline:
                await self._collect(job)
            await asyncio.to_thread(job.encode)
            outcome = "succeeded"
        except TimeoutError:
            if not deadline.expired():
                raise
            job.failure = DeadlinePassed(f"the deadline of {job.order.deadline_s:g} s was not met")
        except ServerError as error:
            job.failure = error
        except asyncio.CancelledError:
            outcome, job.failure = "cancelled", JobCancelled("the job was cancelled")
            if not job.giving_up:
                raise
        finally:
            self._end(job, outcome)

    async def _collect(self, job: Job) -> None:
        order, watched = job.order, job.order.watched
        spec = Spec(
            order.card.name,
            tuple(range(order.seed, order.seed + order.n)),
            order.sampling,
            job.rank,
            frozenset(watched.points if watched else ()),
            watched is not None and watched.frames.kind != "x0",
            watched is not None and watched.frames.kind != "x_t",
            order.wants_floats,
        )
        async with aclosing(self.backend.run(spec)) as events:
            async for event in events:
                self._take(job, event)

    def _take(self, job: Job, event: SampleEvent) -> None:
        if job.started_at is None and isinstance(event, Preview | Progress | Finished):
            job.started_at, job.status = time.time(), "running"
            self.metrics.queue_seconds.observe(job.started_at - job.created_at)
            job.feed.say("started", steps=job.order.image_steps)
        match event:
            case Preview(int(index), step, x, x0):
                job.show_frame(index, step, "x_t", x)
                job.show_frame(index, step, "x0", x0)
            case Progress(steps):
                self._advance(job, steps)
                job.feed.tell("progress", **job.progress, eta_s=self._outlooks.of(job).eta_s)
            case Finished(int(index), picture, floats):
                self._advance(job, {index: job.order.sampling.steps})
                job.finish(Image(index, job.order.seed + index, picture, floats, job.texts(job.order.seed + index)))
            case Restarting(retry_after_s):
                self._advance(job, {i: 0 for i in range(job.order.n) if i not in job.images})
                job.feed.tell("restarting", urgent=True, retry_after_s=retry_after_s)
            case Failed(_, reason):
                raise SampleLost(reason)
            case Cancelled():
                raise SampleLost("the picture was given up")

    def _advance(self, job: Job, steps: Mapping[int, int]) -> None:
        for index, step in steps.items():
            self.queue.give_back(step - job.steps[index])
            job.steps[index] = step

    def _end(self, job: Job, outcome: str) -> None:
        job.status, job.finished_at = outcome, time.time()
        if outcome == "failed":
            job.error = problem(job.failure or RuntimeError()).body("")
        self._outcomes[outcome] += 1
        logger.info("job ended", extra={"job": job.id, "outcome": outcome, "code": job.error and job.error["code"]})
        self.metrics.job_seconds.observe(job.finished_at - job.created_at)
        self.queue.give_back(job.order.image_steps - sum(job.steps))
        job.feed.end(outcome, document=job.document())
        self.register.retire(job)

    async def _tick(self) -> None:
        while True:
            await asyncio.sleep(TICK_S)
            for job in self.register.live.values():
                if job.started_at is None and job.feed.viewers:
                    job.feed.tell("queued", **asdict(self._outlooks.of(job)))
                else:
                    job.feed.remind()

    def watch(self, job: Job, after: int = 0) -> Viewer:
        """A new viewer, from message `after` + 1 on. It hears at once where a job stands that has not begun."""
        if job.started_at is None and not job.feed.ended and not job.feed.viewers:
            job.feed.tell("queued", **asdict(self._outlooks.of(job)))
        return Viewer(job.feed, after)

    def document(self, job: Job) -> dict[str, Any]:
        """The job as clients see it."""
        return job.document(None if job.feed.ended else self._outlooks.of(job))

    def standing(self) -> Standing:
        """Where the server stands, for its metrics."""
        live, vitals = self.register.live.values(), self.backend.vitals
        running = sum(job.started_at is not None for job in live)
        return Standing(
            jobs_running=running,
            jobs_waiting=len(live) - running,
            steps_waiting=self.queue.taken,
            slots=sum(served.slots for served in self.backend.served.values()),
            slots_used=vitals.stats.seated,
            viewers=self.audience.viewers,
            engine_up=self.backend.trouble is None,
            engine_heartbeat_age_seconds=vitals.silence_s,
            gpu_memory_bytes=vitals.memory_bytes,
            jobs_accepted=self._accepted,
            jobs=self._outcomes,
            rejected=self._rejected,
            sample_steps=vitals.stats.sample_steps,
            engine_steps=vitals.stats.steps,
            padded_slots=vitals.stats.padded,
            engine_restarts=vitals.restarts,
            jobs_replayed=vitals.replayed,
            frames=self.audience.frames,
            frames_dropped=self.audience.dropped,
        )
