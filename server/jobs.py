"""The one path a job takes: resolve, admit, run, collect its events, tell its viewers, end.

A job lives in a task of its own. Whoever wants its pictures waits for its end or watches its feed; who leaves does not
matter to it, unless the route says so by `cancel`.
"""

import asyncio
import secrets
import time
from collections import Counter, OrderedDict
from collections.abc import Mapping
from contextlib import AsyncExitStack, aclosing

from model.card import ModelCard
from model.events import Cancelled, Failed, Finished, Preview
from model.plan import resolve
from server.backend import Backend, Progress, Restarting, SampleEvent, Spec
from server.errors import (
    DeadlinePassed,
    Gone,
    Invalid,
    JobCancelled,
    NotFound,
    NotReady,
    SampleLost,
    ServerError,
    problem,
)
from server.job import Image, Job, Order, Watched, frame_points
from server.limits import Queue
from server.schemas import MAX_SEED, Frames, GenerateRequest
from server.settings import Settings

KEPT_BYTES = 256 << 20  # pictures and frames of ended jobs are kept in memory up to this size, the latest first
EXPIRED = 10_000  # so many ids of jobs that are not kept any more are remembered
TICK_S = 0.25  # how often those who wait hear where they stand
USUAL_FRAMES = Frames(count=30)


class Jobs:
    """All jobs of this server."""

    def __init__(self, settings: Settings, cards: Mapping[str, ModelCard], backend: Backend) -> None:
        self.cards, self.backend, self._settings = cards, backend, settings
        self.queue = Queue(settings.max_queued_steps)
        self.live: dict[str, Job] = {}  # in order of arrival
        self.ended: OrderedDict[str, Job] = OrderedDict()
        self.accepted = 0
        self.outcomes: Counter[str] = Counter()
        self._expired: OrderedDict[str, None] = OrderedDict()
        self._kept_bytes = 0
        self._ticker: asyncio.Task[None] | None = None

    async def start(self) -> None:
        """Starts the engines, and to tell those who wait where they stand."""
        await self.backend.start()
        self._ticker = asyncio.create_task(self._tick(), name="queue positions")

    async def close(self) -> None:
        """Ends every job and the engines."""
        if self._ticker is not None:
            self._ticker.cancel()
        await self.backend.close()
        await asyncio.gather(*(job.life for job in self.live.values() if job.life), return_exceptions=True)

    def order(self, request: GenerateRequest, wants_floats: bool = False, shows: bool = False) -> Order:
        """A request with every choice made. Raises Invalid or PlanError naming the field that cannot be.

        shows: whether the answer is made of frames, so that some are needed even if none were asked for.
        """
        card = self.cards[self._model(request.model)]
        if request.n > self._settings.max_n:
            raise Invalid(("n", f"n must lie in 1..{self._settings.max_n}, got {request.n}"))
        if request.seed is not None and request.seed > MAX_SEED - request.n:
            raise Invalid(("seed", f"seed must lie in 0..2^53 - n = {MAX_SEED - request.n}, got {request.seed}"))
        sampling = resolve(
            card.process,
            request.sampler,
            request.steps,
            variance=request.variance,
            eta=request.eta,
            spacing=request.spacing,
            clip=request.clip,
            noise=request.noise,
        )
        seed = secrets.randbelow(MAX_SEED - request.n) if request.seed is None else request.seed
        frames = request.frames if "frames" in request.model_fields_set or not shows else USUAL_FRAMES
        watched = self._watched(frames, request.n, sampling.steps)
        return Order(card, seed, request.n, sampling, watched, request.priority, request.deadline_s, wants_floats)

    def _watched(self, frames: Frames | None, n: int, steps: int) -> Watched | None:
        if frames is None:
            return None
        points = frame_points(frames, steps, self._settings.max_frames)
        count = n * len(points) * (1 + (frames.kind == "both"))
        if count > self._settings.max_frames:
            limit = self._settings.max_frames
            raise Invalid(("frames", f"frames: pictures x points x kinds must be at most {limit}, got {count}"))
        return Watched(frames, points)

    def _model(self, wanted: str | None) -> str:
        name = wanted or self._settings.default_model or (next(iter(self.cards)) if len(self.cards) == 1 else "")
        if name not in self.cards:
            known = ", ".join(self.cards)
            raise Invalid(("model", f"model must be one of {known}" if wanted else f"name a model, one of {known}"))
        return name

    async def submit(self, order: Order) -> Job:
        """Takes a job on: from now on it ends, one way or another. Raises TooBusy, Invalid or NotReady."""
        served = self.backend.served.get(order.card.name)
        if self.backend.trouble is not None or served is None:
            raise NotReady(self.backend.trouble or "the model is not loaded")
        room = AsyncExitStack()
        room.enter_context(self.queue.hold(order.image_steps, self.backend.seconds_for(self.queue.taken)))
        job = Job(secrets.token_hex(12), order, served)
        self.live[job.id] = job
        self.accepted += 1
        self._say_position(job)
        job.life = asyncio.create_task(self._live(job, room), name=f"job {job.id}")
        return job

    async def cancel(self, job: Job) -> Job:
        """Gives a job up, if it has not ended. Returns once it has."""
        if job.life is not None and not job.feed.ended:
            job.giving_up = True
            job.life.cancel()
            await asyncio.wait([job.life])
        return job

    async def result(self, job: Job) -> Job:
        """The job, once it has succeeded. Raises what made it fail."""
        assert job.life is not None
        await asyncio.wait([job.life])
        if job.failure is not None:
            raise job.failure
        job.life.result()  # raises what nobody foresaw
        return job

    async def _live(self, job: Job, room: AsyncExitStack) -> None:
        outcome = "failed"
        async with room:
            try:
                async with asyncio.timeout(job.order.deadline_s):
                    await self._collect(job)
                await asyncio.to_thread(job.encode)
                outcome = "succeeded"
            except TimeoutError:
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
            job.created_at / 60 - order.priority,
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
            job.feed.say("started", steps=job.order.image_steps)
        match event:
            case Preview(int(index), step, x, x0):
                job.show_frame(index, step, "x_t", x)
                job.show_frame(index, step, "x0", x0)
            case Progress(steps):
                for index, step in steps.items():
                    job.steps[index] = step
                job.feed.tell("progress", **job.progress(self.backend.step_s))
            case Finished(int(index), picture, floats):
                job.steps[index] = job.order.sampling.steps
                job.finish(Image(index, job.order.seed + index, picture, floats, job.texts(job.order.seed + index)))
            case Restarting(retry_after_s):
                job.steps = [job.order.sampling.steps if i in job.images else 0 for i in range(job.order.n)]
                job.feed.tell("restarting", retry_after_s=retry_after_s)
            case Failed(_, reason):
                raise SampleLost(reason)
            case Cancelled():
                raise SampleLost("the picture was given up")

    def _end(self, job: Job, outcome: str) -> None:
        job.status, job.finished_at = outcome, time.time()
        if outcome == "failed":
            job.error = problem(job.failure or RuntimeError()).body("")
        self.outcomes[outcome] += 1
        del self.live[job.id]
        job.feed.end(outcome, document=job.document())
        self.ended[job.id] = job
        self._kept_bytes += job.size_bytes
        while self._kept_bytes > KEPT_BYTES and len(self.ended) > 1:
            id, oldest = self.ended.popitem(last=False)
            self._kept_bytes -= oldest.size_bytes
            self._expired[id] = None
            if len(self._expired) > EXPIRED:
                self._expired.popitem(last=False)

    async def _tick(self) -> None:
        while True:
            await asyncio.sleep(TICK_S)
            for job in self.live.values():
                if job.started_at is None and job.feed.viewers:
                    self._say_position(job)

    def _say_position(self, job: Job) -> None:
        ahead = 0
        for other in self.live.values():
            if other is job:
                break
            ahead += other.started_at is None
        job.position = ahead
        job.feed.tell("queued", position=ahead, eta_s=float(self.backend.seconds_for(self.queue.taken)))

    def find(self, id: str) -> Job:
        """A job by its id. Raises NotFound, or Gone if it was kept once."""
        job = self.live.get(id) or self.ended.get(id)
        if job is None:
            raise Gone("this job is no longer kept") if id in self._expired else NotFound("there is no such job")
        return job

    def list(self, status: str | None, limit: int, after: str | None) -> "list[Job]":
        """Jobs, newest first, those after (older than) the one with id `after`."""
        jobs = [*reversed(self.live.values()), *reversed(self.ended.values())]
        jobs.sort(key=lambda job: -job.created_at)
        if after is not None:
            older = self.find(after)
            jobs = jobs[jobs.index(older) + 1 :]
        return [job for job in jobs if status is None or job.status == status][:limit]
