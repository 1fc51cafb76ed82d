"""A run split over engines: what each of them makes, and which engine is likely to be done with a sample first."""

import asyncio
from collections import Counter, defaultdict
from collections.abc import Collection, Iterable, Mapping
from contextlib import aclosing
from dataclasses import dataclass, field
from typing import TypeAlias

from model.engine.events import Cancelled, Failed, Finished
from server.engines.backend import Backend, Progress, Restarting, SampleEvent
from server.engines.shares import steps_before
from server.worker.messages import ModelStatus, Spec

LOAD_WEIGHT = 4.0  # a load counts as so many times its seconds, since others wait for it too
UNKNOWN_S = 1e-3  # of an image-step, before one was seen

News: TypeAlias = "asyncio.Queue[tuple[Shard, SampleEvent | BaseException]]"


@dataclass(slots=True, eq=False)
class Shard:
    """Samples of a run that one engine makes. Its events, and the error that ends it, are put into `news`."""

    engine: Backend
    spec: Spec  # of these samples only
    news: News
    task: "asyncio.Task[None]" = field(init=False)
    left: dict[int, int] = field(init=False)  # image-steps still to do, by index, of samples that have not ended

    def __post_init__(self) -> None:
        self.left = dict.fromkeys(self.spec.indices, self.spec.sampling.image_steps)
        self.task = asyncio.create_task(self._run(), name="shard")
        self.task.add_done_callback(self._on_end)

    async def _run(self) -> None:
        async with aclosing(self.engine.run(self.spec)) as events:
            async for event in events:
                self.news.put_nowait((self, event))

    def _on_end(self, task: "asyncio.Task[None]") -> None:
        if not task.cancelled() and (error := task.exception()) is not None:
            self.news.put_nowait((self, error))

    def note(self, event: SampleEvent) -> None:
        """Keeps count of what is left to do."""
        match event:
            case Progress(steps):
                sampling = self.spec.sampling
                cost = sampling.image_steps // sampling.steps
                self.left |= {index: cost * (sampling.steps - step) for index, step in steps.items()}
            case Restarting():
                self.left = dict.fromkeys(self.left, self.spec.sampling.image_steps)
            case Finished(int(index)) | Cancelled(int(index)) | Failed(int(index)):
                self.left.pop(index, None)


@dataclass(slots=True, kw_only=True)
class Offer:
    """What an engine would take for the next sample of a run, and which samples it is to get."""

    engine: Backend
    status: ModelStatus
    load_s: float  # before the first of them
    image_step_s: float
    own: float  # image-steps of the run's tenant there
    others: Collection[float]  # of each other tenant
    indices: list[int] = field(default_factory=list)

    @property
    def numerics(self) -> str:
        """The class of its bytes. A model that was never loaded is taken to be like others on such a device."""
        return self.status.numerics or self.status.device.partition(" ")[2]

    def due_s(self, steps: int) -> float:
        """Seconds from now until one more sample of so many steps is done."""
        return self.load_s + self.image_step_s * steps_before(self.own + steps, self.others)


def offers_of(engines: Mapping[Backend, ModelStatus], spec: Spec, shards: Collection[Shard]) -> list[Offer]:
    """What these engines would take for samples of a spec. shards: all that are open on them."""
    work: dict[Backend, Counter[str]] = defaultdict(Counter)  # image-steps, by tenant
    for shard in shards:
        work[shard.engine][shard.spec.owner] += sum(shard.left.values())
    loaded = {shard.engine for shard in shards if shard.spec.model == spec.model}  # or about to be
    offers = []
    for engine, status in engines.items():
        times, own = engine.step_s(spec.model, status.admitted), work[engine].pop(spec.owner, 0)
        offer = Offer(
            engine=engine,
            status=status,
            load_s=0.0 if engine in loaded else LOAD_WEIGHT * engine.load_s(spec.model),
            image_step_s=times[-1] / (len(times) - 1) or UNKNOWN_S,
            own=own,
            others=work[engine].values(),
        )
        offers.append(offer)
    return offers


def spread(offers: Collection[Offer], indices: Iterable[int], steps: int) -> None:
    """Gives each of these samples, of so many steps, to the engine that is likely to be done with it first."""
    for index in indices:
        first = min(offers, key=lambda offer: offer.due_s(steps))
        first.indices.append(index)
        first.own, first.load_s = first.own + steps, 0.0
