"""The one path a job takes: resolve, admit, run, collect its events, encode. Whoever waits, waits for its end."""

import asyncio
import base64
import secrets
import time
from collections import OrderedDict
from collections.abc import Mapping
from contextlib import aclosing
from dataclasses import asdict, dataclass, field
from functools import cached_property
from hashlib import sha256
from typing import Any

from model.card import ModelCard
from model.events import Cancelled, Failed, Finished, Floats, Picture
from model.plan import Sampling, resolve
from server import images
from server.backend import Backend, SampleEvent, Served, Spec
from server.errors import DeadlinePassed, Invalid, NotFound, NotReady, SampleLost
from server.limits import Queue
from server.schemas import MAX_SEED, GenerateRequest
from server.settings import Settings

KEPT_BYTES = 64 << 20  # pictures of ended jobs are kept in memory up to this size, the latest first


@dataclass(frozen=True, slots=True)
class Order:
    """A request with every choice made."""

    card: ModelCard
    seed: int
    n: int
    sampling: Sampling
    priority: int = 0
    deadline_s: float | None = None
    wants_floats: bool = False

    @property
    def image_steps(self) -> int:
        """The work in it."""
        return self.n * self.sampling.steps

    def request(self) -> dict[str, Any]:
        """Every field of the request, defaults filled in."""
        fields = {"model": self.card.name, "seed": self.seed, "n": self.n, **asdict(self.sampling)}
        return fields | {"priority": self.priority, "deadline_s": self.deadline_s}


@dataclass(eq=False)
class Image:
    """A finished picture and the files made of it."""

    seed: int
    picture: Picture
    floats: Floats | None
    texts: Mapping[str, str]

    @cached_property
    def png(self) -> bytes:
        """The PNG, with what made it. Slow at first: call it in a thread."""
        return images.png(self.picture, self.texts)

    @cached_property
    def sha256(self) -> str:
        """Hash of the PNG."""
        return sha256(self.png).hexdigest()


@dataclass(eq=False)
class Job:
    """What a client asked for: n pictures of one kind."""

    id: str
    order: Order
    served: Served
    created_at: float = field(default_factory=time.time)
    started_at: float | None = None
    finished_at: float | None = None
    status: str = "queued"
    images: dict[int, Image] = field(default_factory=dict)  # by index; complete if and only if succeeded
    error: str | None = None

    def texts(self, seed: int) -> dict[str, str]:
        """All that decides a picture, as text chunks of its PNG."""
        decides = {"model": self.order.card.name, "digest": self.served.digest, "seed": seed}
        decides |= asdict(self.order.sampling) | {"numerics": self.served.numerics}
        words = {True: "true", False: "false"}
        return {
            key: words.get(v, str(v)) if isinstance(v, bool) else str(v) for key, v in decides.items() if v is not None
        }

    def document(self, pictures: bool = False) -> dict[str, Any]:
        """The job as clients see it; with `pictures`, each image as base64 too."""
        made = []
        for index, image in sorted(self.images.items()):
            entry: dict[str, Any] = {"index": index, "seed": image.seed, "url": f"/jobs/{self.id}/images/{index}"}
            entry["sha256"] = image.sha256
            if pictures:
                entry["b64_png"] = base64.b64encode(image.png).decode()
            made.append(entry)
        return {
            "id": self.id,
            "status": self.status,
            "model": self.order.card.name,
            "digest": self.served.digest,
            "request": self.order.request(),
            "created_at": self.created_at,
            "started_at": self.started_at,
            "finished_at": self.finished_at,
            "progress": {"step": len(made) * self.order.sampling.steps, "steps": self.order.image_steps},
            "images": made,
            "error": self.error,
        }


class Jobs:
    """All jobs of this server."""

    def __init__(self, settings: Settings, cards: Mapping[str, ModelCard], backend: Backend) -> None:
        self.cards, self.backend, self._settings = cards, backend, settings
        self.queue = Queue(settings.max_queued_steps)
        self._ended: OrderedDict[str, Job] = OrderedDict()
        self._kept_bytes = 0

    def order(self, request: GenerateRequest, wants_floats: bool = False) -> Order:
        """A request with every choice made. Raises Invalid or PlanError naming the field that cannot be."""
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
        return Order(card, seed, request.n, sampling, request.priority, request.deadline_s, wants_floats)

    def _model(self, wanted: str | None) -> str:
        name = wanted or self._settings.default_model or (next(iter(self.cards)) if len(self.cards) == 1 else "")
        if name not in self.cards:
            known = ", ".join(self.cards)
            raise Invalid(("model", f"model must be one of {known}" if wanted else f"name a model, one of {known}"))
        return name

    async def run(self, order: Order) -> Job:
        """Makes the pictures, to the last. Cancelling the caller cancels the job.

        Raises TooBusy, NotReady, DeadlinePassed, SampleLost or EngineFailed.
        """
        served = self.backend.served.get(order.card.name)
        if self.backend.trouble is not None or served is None:
            raise NotReady(self.backend.trouble or "the model is not loaded")
        wait_s = self.backend.seconds_for(self.queue.taken)
        with self.queue.hold(order.image_steps, wait_s):
            job = Job(secrets.token_hex(12), order, served)
            try:
                async with asyncio.timeout(order.deadline_s):
                    await self._collect(job)
            except TimeoutError:
                raise DeadlinePassed(f"the deadline of {order.deadline_s:g} s was not met") from None
        await asyncio.to_thread(lambda: [image.sha256 for image in job.images.values()])
        job.status, job.finished_at = "succeeded", time.time()
        self._keep(job)
        return job

    async def _collect(self, job: Job) -> None:
        order = job.order
        spec = Spec(
            order.card.name,
            tuple(range(order.seed, order.seed + order.n)),
            order.sampling,
            time.time() / 60 - order.priority,
            wants_floats=order.wants_floats,
        )
        job.status, job.started_at = "running", time.time()
        async with aclosing(self.backend.run(spec)) as events:
            async for event in events:
                self._take(job, event)

    def _take(self, job: Job, event: SampleEvent) -> None:
        match event:
            case Finished(int(index), picture, floats):
                seed = job.order.seed + index
                job.images[index] = Image(seed, picture, floats, job.texts(seed))
            case Failed(_, reason):
                raise SampleLost(reason)
            case Cancelled():
                raise SampleLost("the picture was given up")

    def _keep(self, job: Job) -> None:
        self._ended[job.id] = job
        self._kept_bytes += _size(job)
        while self._kept_bytes > KEPT_BYTES and len(self._ended) > 1:
            self._kept_bytes -= _size(self._ended.popitem(last=False)[1])

    def find(self, id: str) -> Job:
        """A job that has ended and is still kept. Raises NotFound."""
        if id not in self._ended:
            raise NotFound("there is no such job, or it is no longer kept")
        return self._ended[id]


def _size(job: Job) -> int:
    return sum(
        len(i.png) + i.picture.nbytes + (0 if i.floats is None else i.floats.nbytes) for i in job.images.values()
    )
