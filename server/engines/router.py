"""Many engines as one backend: each picture goes to where it is likely to be done first.

A picture depends on its request alone, so it may be made by any engine of the same numerics class; those of one job
are all made within one class, as long as it has an engine left. An engine that dies is replaced by its own backend, and
what it had runs there again. Only when it is lost for good do its pictures move.

A job that had pictures seated when an engine died may be what killed it. From then on all of it is made there, so that
it can kill no other; what becomes of it is for that engine's suspects to say. It moves only if the engine is lost by
another death than one that it was there at again: its device may be gone.
"""

import asyncio
from collections import Counter, defaultdict
from collections.abc import AsyncGenerator, Callable, Mapping, Sequence
from contextlib import aclosing
from dataclasses import dataclass, field, replace
from functools import partial
from typing import TypeAlias

from model.engine.events import Cancelled, Failed, Finished, Preview, Stats
from server.engines.backend import Backend, EngineHealth, Progress, Restarting, SampleEvent
from server.errors import EXIT_ENGINE, EngineFailed, ModelBroken, NotReady, SampleLost
from server.worker.messages import ModelStatus, Spec

LOADS = 4.0  # a load counts as so many times its seconds: others wait for it, too
UNKNOWN_S = 1e-3  # of an image-step, as long as none was seen
LOOK_S = 0.05  # how often it is looked whether an engine takes work again


@dataclass(slots=True, eq=False)
class _Part:
    """Pictures of a job that are made by one engine."""

    engine: Backend
    indices: list[int]  # of the job's seeds, in the order in which the engine knows them
    left: dict[int, int]  # updates still to do, by index, of those that have not ended
    begun: bool = False  # whether any of them has been seated since the engine was there
    suspect: bool = False  # whether the engine has died before, while any of them was
    task: "asyncio.Task[None] | None" = None


News: TypeAlias = "asyncio.Queue[tuple[_Part, SampleEvent | BaseException]]"


@dataclass(slots=True)
class _Work:
    """What an engine has before it."""

    steps: Counter[str] = field(default_factory=Counter)  # image-steps, by owner
    models: Counter[str] = field(default_factory=Counter)  # parts of jobs, by model

    def before(self, owner: str) -> int:
        """Image-steps that will be done before those of a newcomer are: owners have equal shares."""
        owners = sum(steps > 0 for name, steps in self.steps.items() if name != owner)
        return min(self.steps.total(), self.steps[owner] * (owners + 1))


class Router:
    """Engines that are asked for pictures as if they were one."""

    def __init__(self, on_failed: Callable[[EngineFailed], None]) -> None:
        self._engines: list[Backend] = []
        self._work: dict[Backend, _Work] = defaultdict(_Work)
        self._on_failed = on_failed
        self._failures: list[EngineFailed] = []
        self._closing = False
        self._looking: asyncio.Task[None] | None = None  # for an engine that takes work

    def join(self, engine: Backend) -> None:
        """One more engine. Before the start."""
        self._engines.append(engine)

    def lose(self, failure: EngineFailed) -> None:
        """One of the engines is down for good. So are all if none is left, or if they could not even start."""
        self._failures.append(failure)
        refused = failure.exit_code != EXIT_ENGINE and not self.models
        if refused or len(self._failures) == len(self._engines):
            self._on_failed(failure)

    async def start(self) -> None:
        """Begin to load, everywhere."""
        await asyncio.gather(*(engine.start() for engine in self._engines))

    async def close(self) -> None:
        """Stop all of them."""
        self._closing = True
        await asyncio.gather(*(engine.close() for engine in self._engines))
        if self._looking is not None:
            await self._looking

    @property
    def _up(self) -> list[Backend]:
        return [engine for engine in self._engines if engine.trouble is None]

    @property
    def models(self) -> dict[str, ModelStatus]:
        """Of each model what an engine says that takes work: one that has it loaded, if there is one."""
        best: dict[str, ModelStatus] = {}
        for engine in self._up:
            for name, served in engine.models.items():
                if name not in best or _ability(served) > _ability(best[name]):
                    best[name] = served
        return best

    @property
    def replicas(self) -> list[Mapping[str, ModelStatus]]:
        """What each engine serves."""
        return [place for engine in self._engines for place in engine.replicas]

    @property
    def trouble(self) -> str | None:
        """Why no engine takes work, or None if one does."""
        return None if self._up else "; ".join(dict.fromkeys(str(engine.trouble) for engine in self._engines))

    @property
    def health(self) -> EngineHealth:
        """All together; the longest silence."""
        each = [engine.health for engine in self._engines]
        stats = Stats(*(sum(getattr(v.stats, name) for v in each) for name in Stats.__slots__))
        restarts: Counter[str] = Counter()
        for health in each:
            restarts.update(health.restarts)
        silence_s, memory_bytes = max(v.silence_s for v in each), sum(v.memory_bytes for v in each)
        return EngineHealth(stats, silence_s, memory_bytes, dict(restarts), sum(v.replayed for v in each))

    def step_s(self, model: str, buckets: Sequence[int]) -> Sequence[float]:
        """Seconds of a step by how many pictures all engines that take work hold, 0 .. as many as they can."""
        engines = self._up or self._engines
        each = [engine.step_s(model, buckets) for engine in engines]
        times, count = next(filter(any, each), each[0]), len(engines)
        return [times[-(-held // count)] for held in range(count * (len(times) - 1) + 1)]

    def load_s(self, model: str) -> float:
        """Seconds until any engine can make steps of this model."""
        return min(engine.load_s(model) for engine in self._up or self._engines)

    async def run(self, spec: Spec) -> AsyncGenerator[SampleEvent]:
        """The events of these samples, wherever they are made, until each has ended. Closing cancels the rest."""
        await self._until_up()
        news: News = asyncio.Queue()
        todo = dict.fromkeys(range(len(spec.seeds)), spec.sampling.steps)
        parts = self._send(self._place(spec, todo), spec, news)
        kind = _numerics(parts[0].engine.models[spec.model])
        try:
            while any(part.left for part in parts):
                part, event = await news.get()
                if part not in parts:
                    continue  # what it had is made elsewhere
                if isinstance(event, BaseException):
                    if isinstance(event, EngineFailed) and part.suspect and part.begun:
                        raise SampleLost("the engine is lost that this job may have killed, more than once")
                    await self._require_others(event)
                    self._take_back([part], spec)
                    parts.remove(part)
                    todo = dict.fromkeys(part.left, spec.sampling.steps)
                    parts += self._send(self._place(spec, todo, kind), spec, news)
                    continue
                if isinstance(event, Restarting) and part.begun:
                    parts = self._gather_at(part, parts, spec, news)
                self._note(part, event, spec)
                yield _by_index(part, event)
        finally:
            self._take_back(parts, spec)
            await asyncio.gather(*(part.task for part in parts if part.task is not None), return_exceptions=True)

    async def _require_others(self, error: BaseException) -> None:
        """Waits until an engine takes what another has lost. Raises the error if none ever will."""
        if not isinstance(error, NotReady | EngineFailed | ModelBroken) or self._over:
            raise error
        try:
            await self._until_up()
        except NotReady:
            raise error from None

    async def _until_up(self) -> None:
        """Until an engine takes work. Raises NotReady if none ever will. However many wait, one looks."""
        while not self._up:
            if self._over:
                raise NotReady(self.trouble or "")
            if self._looking is None or self._looking.done():
                self._looking = asyncio.create_task(self._look(), name="look for an engine")
            await asyncio.shield(self._looking)

    async def _look(self) -> None:
        while not self._up and not self._over:
            await asyncio.sleep(LOOK_S)

    @property
    def _over(self) -> bool:
        return self._closing or len(self._failures) == len(self._engines)

    def _place(self, spec: Spec, todo: Mapping[int, int], kind: str | None = None) -> list[_Part]:
        """Where each picture is likely to be done first, all within one numerics class, of this `kind` if there is one.
        Raises NotReady, ModelBroken."""
        able = {engine: engine.models[spec.model] for engine in self._up if spec.model in engine.models}
        if not able:
            raise NotReady(self.trouble or "the model is not served")
        sound = {engine: served for engine, served in able.items() if served.trouble is None}
        if not sound:
            raise ModelBroken(str(next(iter(able.values())).trouble))
        sound = {engine: served for engine, served in sound.items() if _numerics(served) == kind} or sound
        costs = {engine: self._cost(engine, spec) for engine in sound}
        first = min(costs, key=lambda engine: costs[engine].due_s)
        group = [engine for engine in sound if _numerics(sound[engine]) == _numerics(sound[first])]
        parts: dict[Backend, _Part] = {}
        for index, steps in todo.items():
            engine = min(group, key=lambda engine: costs[engine].due_s)
            part = parts.setdefault(engine, _Part(engine, [], {}))
            part.indices.append(index)
            part.left[index] = steps
            costs[engine].add(steps)
        return list(parts.values())

    def _cost(self, engine: Backend, spec: Spec) -> "_Cost":
        """What an engine has to do before it can make pictures of this kind."""
        work, times = self._work[engine], engine.step_s(spec.model, engine.models[spec.model].admitted)
        pace_s = times[-1] / (len(times) - 1) or UNKNOWN_S
        load_s = 0.0 if work.models[spec.model] else LOADS * engine.load_s(spec.model)
        return _Cost(pace_s, work.before(spec.owner), load_s)

    def _send(self, parts: list[_Part], spec: Spec, news: News) -> list[_Part]:
        """Gives the engines their parts."""
        for part in parts:
            self._work[part.engine].steps[spec.owner] += sum(part.left.values())
            self._work[part.engine].models[spec.model] += 1
            own = replace(spec, seeds=tuple(spec.seeds[index] for index in part.indices))
            part.task = asyncio.create_task(_carry(part, own, news), name="part of a job")
            part.task.add_done_callback(partial(_tell_of_failure, part, news))
        return parts

    def _take_back(self, parts: Sequence[_Part], spec: Spec) -> None:
        """Gives up what is left of these."""
        for part in parts:
            assert part.task is not None
            part.task.cancel()
            self._work[part.engine].steps[spec.owner] -= sum(part.left.values())
            self._work[part.engine].models[spec.model] -= 1

    def _gather_at(self, here: _Part, parts: list[_Part], spec: Spec, news: News) -> list[_Part]:
        """All that is left of a job is made by the engine that has one part of it."""
        others = [part for part in parts if part.engine is not here.engine and part.left]
        self._take_back(others, spec)
        indices = [index for part in others for index in part.left]
        kept = [part for part in parts if part not in others]
        if not indices:
            return kept
        moved = _Part(here.engine, indices, dict.fromkeys(indices, spec.sampling.steps))
        return kept + self._send([moved], spec, news)

    def _note(self, part: _Part, event: SampleEvent, spec: Spec) -> None:
        """Keeps count of what is left to do."""
        before = sum(part.left.values())
        match event:
            case Progress(steps):
                part.begun = True
                for id, step in steps.items():
                    part.left[part.indices[id]] = spec.sampling.steps - step
            case Restarting():
                part.suspect, part.begun = part.suspect or part.begun, False
                part.left = dict.fromkeys(part.left, spec.sampling.steps)
            case Finished(int(id)) | Cancelled(int(id)) | Failed(int(id)):
                part.left.pop(part.indices[id], None)
        self._work[part.engine].steps[spec.owner] += sum(part.left.values()) - before


@dataclass(slots=True)
class _Cost:
    """When an engine would be done with a picture: seconds that an image-step takes, steps before, seconds to load."""

    pace_s: float
    steps: int
    load_s: float

    @property
    def due_s(self) -> float:
        """Seconds from now."""
        return self.load_s + self.steps * self.pace_s

    def add(self, steps: int) -> None:
        """One more picture. Who loads for one has loaded for all."""
        self.steps, self.load_s = self.steps + steps, 0.0


async def _carry(part: _Part, spec: Spec, news: News) -> None:
    async with aclosing(part.engine.run(spec)) as events:
        async for event in events:
            news.put_nowait((part, event))


def _tell_of_failure(part: _Part, news: News, task: "asyncio.Task[None]") -> None:
    if not task.cancelled() and (error := task.exception()) is not None:
        news.put_nowait((part, error))


def _by_index(part: _Part, event: SampleEvent) -> SampleEvent:
    """An event of a part as one of its job."""
    match event:
        case Progress(steps):
            return Progress({part.indices[id]: step for id, step in steps.items()})
        case Preview(int(id)) | Finished(int(id)) | Cancelled(int(id)) | Failed(int(id)):
            return replace(event, id=part.indices[id])
    return event


def _numerics(served: ModelStatus) -> str:
    """The class of its bytes. A model that has never been loaded is taken to be like others on such a device."""
    return served.numerics or served.device.partition(" ")[2]


def _ability(served: ModelStatus) -> int:
    """How well an engine can make pictures of a model."""
    return (served.trouble is None) + (served.trouble is None and served.loaded)
