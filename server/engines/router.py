"""Many engines as one backend: each sample goes to the engine that is likely to be done with it first.

A sample depends on its request alone, so any engine of the same numerics class may make it; those of one job are made
within one class, as long as that has an engine left. A run is split into shards, one for each engine. A shard stays
with its engine through restarts, and moves when the engine is lost for good. An isolated job is one shard.
"""

import asyncio
import secrets
from collections import Counter
from collections.abc import AsyncGenerator, Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace

from model.engine.events import Stats
from server.engines.backend import Backend, EngineHealth, Restarting, SampleEvent
from server.engines.quarantine import Quarantine, Record
from server.engines.shards import News, Shard, offers_of, spread
from server.errors import EXIT_ENGINE, EngineFailed, ModelBroken, NotReady
from server.worker.messages import ModelStatus, Spec

POLL_S = 0.05  # between two looks for an engine that takes work


@dataclass(slots=True, eq=False)
class _Run:
    """A spec that is being run, split into shards."""

    spec: Spec
    record: Record
    shards: list[Shard] = field(default_factory=list)
    news: News = field(default_factory=asyncio.Queue)


class Router:
    """Engines that are asked for samples as if they were one."""

    def __init__(self, on_failed: Callable[[EngineFailed], None], quarantine: Quarantine) -> None:
        """quarantine: the one that the engines have, too."""
        self._engines: list[Backend] = []
        self._shards: set[Shard] = set()  # of all runs
        self._on_failed, self._quarantine = on_failed, quarantine
        self._failures: list[EngineFailed] = []
        self._closing = False
        self._waiter: asyncio.Task[None] | None = None  # for an engine that takes work

    def join(self, engine: Backend) -> None:
        """Adds an engine, before the start."""
        self._engines.append(engine)

    def lose(self, failure: EngineFailed) -> None:
        """Notes that an engine is down for good. The router is if none is left, or if an engine refused to start."""
        self._failures.append(failure)
        refused = failure.exit_code != EXIT_ENGINE and not self.models
        if refused or len(self._failures) == len(self._engines):
            self._on_failed(failure)

    async def start(self) -> None:
        """Begins to load, on every engine."""
        await asyncio.gather(*(engine.start() for engine in self._engines))

    async def close(self) -> None:
        """Stops all engines."""
        self._closing = True
        await asyncio.gather(*(engine.close() for engine in self._engines))
        if self._waiter is not None:
            await self._waiter

    @property
    def _up(self) -> list[Backend]:
        return [engine for engine in self._engines if engine.trouble is None]

    @property
    def _over(self) -> bool:
        return self._closing or len(self._failures) == len(self._engines)

    @property
    def models(self) -> dict[str, ModelStatus]:
        """Each model as an engine has it that takes work: as the one that is readiest to make it."""
        best: dict[str, ModelStatus] = {}
        for name, status in (item for engine in self._up for item in engine.models.items()):
            if name not in best or _readiness(status) > _readiness(best[name]):
                best[name] = status
        return best

    @property
    def replicas(self) -> list[Mapping[str, ModelStatus]]:
        """The models, engine by engine."""
        return [models for engine in self._engines for models in engine.replicas]

    @property
    def trouble(self) -> str | None:
        """Why no engine takes work, or None if one does."""
        return None if self._up else "; ".join(dict.fromkeys(str(engine.trouble) for engine in self._engines))

    @property
    def health(self) -> EngineHealth:
        """The sums over all engines, and the longest silence."""
        each = [engine.health for engine in self._engines]
        return EngineHealth(
            stats=sum((health.stats for health in each), Stats()),
            silence_s=max(health.silence_s for health in each),
            memory_bytes=sum(health.memory_bytes for health in each),
            restarts=sum((Counter(health.restarts) for health in each), Counter[str]()),
            replayed=sum(health.replayed for health in each),
        )

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
        """The events of these samples until each has ended, wherever they are made. Closing cancels the rest."""
        await self._until_up()
        spec = replace(spec, job=spec.job or secrets.token_hex(8))
        run = _Run(spec, self._quarantine.record(spec))
        try:
            kind = self._place(run, range(len(spec.seeds)))
            while any(shard.left for shard in run.shards):
                shard, event = await run.news.get()
                if shard not in run.shards:
                    continue  # its samples are made elsewhere
                if isinstance(event, BaseException):
                    await self._require_others(event)
                    self._place(run, self._close(run, [shard]), kind)
                    continue
                shard.note(event)
                if isinstance(event, Restarting) and run.record.isolated and len(run.shards) > 1:
                    self._open(run, shard.engine, self._close(run, list(run.shards)))
                yield event
        finally:
            tasks = [shard.task for shard in run.shards]
            self._close(run, list(run.shards))
            await asyncio.gather(*tasks, return_exceptions=True)

    async def _require_others(self, error: BaseException) -> None:
        """Waits for an engine that takes what another has lost. Raises the error, or NotReady, if none ever will."""
        if not isinstance(error, NotReady | EngineFailed | ModelBroken) or self._over:
            raise error
        await self._until_up()

    async def _until_up(self) -> None:
        """Waits until an engine takes work. Raises NotReady if none ever will. One task polls, for all who wait."""
        while not self._up:
            if self._over:
                raise NotReady(self.trouble or "")
            if self._waiter is None or self._waiter.done():
                self._waiter = asyncio.create_task(self._poll(), name="wait for an engine")
            await asyncio.shield(self._waiter)

    async def _poll(self) -> None:
        while not self._up and not self._over:
            await asyncio.sleep(POLL_S)

    def _place(self, run: _Run, indices: Iterable[int], kind: str | None = None) -> str:
        """Opens shards for these samples where each is likely to be done first, within one numerics class: this `kind`
        if it has an engine. -> the class. Raises NotReady, ModelBroken."""
        able = {engine: engine.models[run.spec.model] for engine in self._up if run.spec.model in engine.models}
        if not able:
            raise NotReady(self.trouble or "the model is not served")
        sound = {engine: status for engine, status in able.items() if status.trouble is None}
        if not sound:
            raise ModelBroken(str(next(iter(able.values())).trouble))
        offers, steps = offers_of(sound, run.spec, self._shards), run.spec.sampling.image_steps
        offers = [offer for offer in offers if offer.numerics == kind] or offers
        first = min(offers, key=lambda offer: offer.due_s(steps))
        if run.record.isolated:
            offers = [first]
        offers = [offer for offer in offers if offer.numerics == first.numerics]
        spread(offers, indices, steps)
        for offer in offers:
            if offer.indices:
                self._open(run, offer.engine, offer.indices)
        return first.numerics

    def _open(self, run: _Run, engine: Backend, indices: list[int]) -> None:
        """Has an engine make these samples."""
        seeds = tuple(run.spec.seeds[index] for index in indices)
        shard = Shard(engine, replace(run.spec, indices=tuple(indices), seeds=seeds), run.news)
        run.shards.append(shard)
        self._shards.add(shard)

    def _close(self, run: _Run, shards: Iterable[Shard]) -> list[int]:
        """Gives up these shards. -> the indices of samples that have not ended"""
        for shard in shards:
            shard.task.cancel()
            run.shards.remove(shard)
            self._shards.discard(shard)
        return [index for shard in shards for index in shard.left]


def _readiness(status: ModelStatus) -> int:
    """How soon an engine can make pictures of a model, larger is sooner."""
    return 0 if status.trouble is not None else 2 if status.loaded else 1
