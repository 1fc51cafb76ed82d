"""The backend of a local engine process: spawn it, watch it, restart it, and run again what it had not finished.

A sample is a pure function of its spec, so running it again gives the same bytes, and nobody has to know.
"""

import asyncio
import logging
import signal
import time
from collections import Counter
from collections.abc import AsyncGenerator, Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from functools import partial

from model import errors as model_errors
from model.engine.events import ENDS, Stats
from server.engines.backend import Assigned, EngineHealth, Restarting, SampleEvent
from server.engines.inflight import InFlight, Stream
from server.engines.process import Letter, Life
from server.engines.step_times import StepTimes
from server.errors import EXIT_CODES, EXIT_ENGINE, EngineFailed, ModelBroken, NotReady
from server.worker.messages import (
    CHANGED,
    Beat,
    Cancel,
    Changed,
    Died,
    Happened,
    Loading,
    ModelStatus,
    Ready,
    Refused,
    Spec,
    Start,
    Submit,
)

logger = logging.getLogger(__name__)
NO_MEMORY = "; memory ran out: a smaller DDPM_SLOTS takes less, and DDPM_MODEL_MEMORY_BYTES fewer models at once"
LOAD_DEATHS = 3  # of engines while they loaded one model: then it is not loaded any more


@dataclass(frozen=True, slots=True)
class Patience:
    """How long an engine may say nothing, in seconds or in steps, whichever is longer."""

    silence_s: float = 4.0  # then it is not ready; if it is stopped by a signal, it is killed and replaced
    silence_steps: float = 20.0
    hang_s: float = 8.0  # then it is killed and replaced
    hang_steps: float = 40.0
    load_s: float = 600.0  # so long it may load at its start
    settle_s: float = 60.0  # so long a model that is loaded later may hold all others up


def _trouble(before: ModelStatus, now: ModelStatus | None) -> str | None:
    """Why the engine that replaces another cannot serve a model as it was served before."""
    return now.trouble if now is not None and now.digest == before.digest else CHANGED


class EngineSupervisor:
    """One engine process. All methods are called from the event loop; one thread reads the pipe, one writes it."""

    def __init__(
        self,
        start: Start,
        restarts: int,
        on_failed: Callable[[EngineFailed], None],
        on_step: Callable[[int, float], None] = lambda bucket, seconds: None,
        patience: Patience = Patience(),
    ) -> None:
        self._start, self._restarts, self._on_failed, self._patience = start, restarts, on_failed, patience
        self._on_step = on_step
        self._in_flight = InFlight()
        self._models: dict[str, ModelStatus] = {}
        self._life: Life | None = None
        self._known: dict[str, ModelStatus] = {}  # as they were served at first
        self._supervisor: asyncio.Task[None] | None = None
        self._trouble: str | None = "the engine is loading"
        self._past, self._stats = Stats(), Stats()  # of engines that are gone; of the one that lives
        self._beat_at = time.monotonic()  # of the last sign
        self._memory_bytes = 0
        self._times = StepTimes()
        self._loading: str | None = None  # the model that an engine is busy to load
        self._load_deaths: Counter[str] = Counter()  # of engines, by the model that they loaded
        self._broken: dict[str, str] = {}  # models that cannot be loaded, and why
        self._causes: Counter[str] = Counter()  # of restarts
        self._replayed = 0

    @property
    def models(self) -> dict[str, ModelStatus]:
        """The models that can be asked for, by name; empty while there is no engine."""
        return self._models

    @property
    def replicas(self) -> list[dict[str, ModelStatus]]:
        """The same: there is one engine."""
        return [self._models]

    @property
    def trouble(self) -> str | None:
        """Why no work can be taken right now, or None."""
        if self._trouble is None and self._life is not None and self._life.stopped_s:
            return "the engine process has been stopped"
        silence_s, patience = time.monotonic() - self._beat_at, self._patience
        limit_s = max(patience.silence_s, patience.silence_steps * self._times.longest_s)
        if self._loading is not None:
            limit_s = max(limit_s, patience.settle_s)
        if self._trouble is None and silence_s > limit_s:
            return f"the engine has not answered for {silence_s:.0f} s"
        return self._trouble

    @property
    def health(self) -> EngineHealth:
        """How the engine is, and what it and those before it have done."""
        silence_s = time.monotonic() - self._beat_at
        return EngineHealth(self._all_stats, silence_s, self._memory_bytes, dict(self._causes), self._replayed)

    @property
    def _all_stats(self) -> Stats:
        past, now = self._past, self._stats
        names = [name for name in Stats.__slots__ if name not in ("seated", "waiting")]
        return Stats(now.seated, now.waiting, *(getattr(past, name) + getattr(now, name) for name in names))

    def step_s(self, model: str, buckets: Sequence[int]) -> Sequence[float]:
        """Seconds of a step by the number of pictures in it, 0 .. the largest bucket; zeros before there was any."""
        return self._times.step_s(model, buckets)

    def load_s(self, model: str) -> float:
        """Seconds until steps of this model can be made, if it or the engine has to be loaded."""
        suspects_s = (
            self._times.start_s if self._in_flight.suspects.all else 0.0
        )  # they are run alone, and may kill it again
        return suspects_s + self._times.load_s(model, self._models.get(model))

    async def start(self) -> None:
        """Begin to load."""
        self._supervisor = asyncio.create_task(self._supervise(), name="engine supervisor")
        self._supervisor.add_done_callback(self._supervisor_ended)

    def _supervisor_ended(self, task: asyncio.Task[None]) -> None:
        if not task.cancelled() and task.exception() is not None:
            logger.error("the engine's supervisor failed", exc_info=task.exception())
            self._fail(EngineFailed("the engine's supervisor failed", EXIT_ENGINE))

    async def close(self) -> None:
        """End the engine process. Streams that are still open end with NotReady."""
        self._trouble = "the server is shutting down"
        if self._supervisor is not None:
            self._supervisor.cancel()
            await asyncio.gather(self._supervisor, return_exceptions=True)
        self._in_flight.tell(self._in_flight.all, NotReady(self._trouble))

    async def run(self, spec: Spec) -> AsyncGenerator[SampleEvent]:
        """The events of these samples until each has ended; `id` is the index of a seed. Closing cancels the rest."""
        if self._supervisor is None or self._supervisor.done():  # else there will be an engine, if there is none now
            raise NotReady(self.trouble or "the engine has not been started")
        if spec.model in self._broken:
            raise ModelBroken(self._broken[spec.model])
        stream = self._in_flight.enter(spec)
        try:
            self._board([stream])
            ended = 0
            while ended < len(spec.seeds):
                event = await stream.events.get()
                if isinstance(event, Exception):
                    raise event
                ended += isinstance(event, ENDS)
                yield event
        finally:
            left = self._in_flight.leave(stream)
            if left and stream.aboard:
                self._send(Cancel(left))
            self._ended(stream)

    def _send(self, message: Letter) -> None:
        if self._life is not None:
            self._life.send(message)

    async def _supervise(self) -> None:
        """One engine after another, until one refuses to start or too many have died."""
        failures = 0
        while True:
            steps_before, life = self._all_stats.steps, Life()
            self._life, self._beat_at = life, time.monotonic()
            try:
                await life.last(
                    replace(self._start, again=bool(self._known)), partial(self._receive, life=life), self._hangs
                )
            finally:
                self._life = None
            if life.refused is not None:
                kind = getattr(model_errors, life.refused.error)
                return self._fail(EngineFailed(life.refused.message, EXIT_CODES[kind]))
            if life.signal == signal.SIGILL and not self._start.unusable:
                self._start = replace(
                    self._start, unusable="ended an engine by an instruction that this processor lacks"
                )
            loss = self._in_flight.perish()
            if loss.explained or self._all_stats.steps > steps_before:
                failures = 0
            failures += not loss.tried
            self._past, self._stats = replace(self._all_stats, seated=0, waiting=0), Stats()
            if failures > self._restarts:
                words = "the engine died without a step done, and so it was each time it was replaced"
                why = NO_MEMORY if life.cause == "memory" else ""
                return self._fail(EngineFailed(f"{words} ({self._restarts}){why}", EXIT_ENGINE))
            self._causes[life.cause] += 1
            self._replayed += loss.again
            self._trouble, self._models = "the engine is being restarted", {}
            self._times.died()
            logger.error("engine died", extra={"failures": failures, "jobs": len(self._in_flight.all)})
            self._in_flight.tell(self._in_flight.all, Restarting(self._times.start_s))
            self._accuse_load()
            await asyncio.sleep(min(5.0, 0.1 * 2 ** (failures - 1)))

    def _hangs(self) -> bool:
        """Whether the engine has said nothing for so long that it never will."""
        patience = self._patience
        if self._life is not None and self._life.stopped_s > patience.silence_s:
            return True
        limit_s = max(patience.hang_s, patience.hang_steps * self._times.longest_s)
        if self._loading is not None:
            limit_s = max(limit_s, patience.settle_s)
        if not self._models:
            limit_s = patience.load_s
        return time.monotonic() - self._beat_at > limit_s

    def _receive(self, message: object, life: Life) -> None:
        match message:
            case Happened(events, stats, begun):
                self._stats = stats
                self._in_flight.sit(begun, alone=False)
                for event in events:
                    if (ended := self._in_flight.hear(event)) is not None:
                        self._ended(ended)
            case Beat(stats, steps, progress, memory_bytes):
                self._beat_at, self._stats, self._memory_bytes = time.monotonic(), stats, memory_bytes
                self._times.learn(steps, sum(model.loaded for model in self._models.values()))
                for step in steps:
                    self._on_step(step.bucket, step.seconds)
                self._in_flight.sit(progress, alone=True)
            case Ready(served, steps):
                self._times.learn(steps, len(served))
                self._become_ready(served, life)
            case Loading(model):
                self._loading = model
            case Changed(model, served):
                self._change(model, served)
            case Died(cause, words):
                life.cause = cause
                life.over.set()  # it has nothing more to say, and what is left of it may never end by itself
                logger.error("engine failed", extra={"traceback": words})
            case Refused():
                life.refused = message
                life.over.set()  # it may still be compiling something

    def _become_ready(self, served: dict[str, ModelStatus], life: Life) -> None:
        self._known = self._known or served
        troubles = {name: _trouble(model, served.get(name)) for name, model in self._known.items()}
        reasons = {name: reason for name, reason in troubles.items() if reason is not None}
        if len(reasons) == len(self._known):
            life.refused = Refused("ModelRefused", next(iter(reasons.values())))
            return life.over.set()
        self._trouble, self._beat_at = None, time.monotonic()
        for name, reason in reasons.items():  # of one that was changed, other bytes would come than were promised
            self._give_up(name, reason)
        now = {name: replace(model, loaded=False) for name, model in self._known.items()} | served
        self._models = {name: replace(model, trouble=self._broken.get(name)) for name, model in now.items()}
        self._times.started(served)
        logger.info("engine ready", extra={name: model.numerics for name, model in served.items()})
        self._board(self._in_flight.all)

    def _change(self, name: str, served: ModelStatus) -> None:
        """A model has come, gone, or cannot come."""
        self._loading, self._beat_at = None, time.monotonic()
        self._models = self._models | {name: served}
        if served.trouble is not None:
            self._give_up(name, served.trouble)
        elif served.loaded:
            self._load_deaths.pop(name, None)
            self._times.loaded(name, served)
            self._in_flight.tell(self._in_flight.of(name), Assigned(served))
        logger.info("model changed", extra={"model": name, "loaded": served.loaded, "trouble": served.trouble})

    def _give_up(self, name: str, reason: str) -> None:
        """Whoever asked for this model, and whoever will, hears that it cannot be loaded."""
        self._broken[name] = reason
        self._in_flight.tell(self._in_flight.of(name), ModelBroken(reason))

    def _board(self, waiting: Iterable[Stream]) -> None:
        """Sends the engine those of these who may go on board."""
        for stream in self._in_flight.next(waiting) if self._models else ():
            if stream.spec.model in self._broken:
                continue  # it has been told, and is about to leave
            stream.aboard = True
            if (served := self._models[stream.spec.model]).loaded:
                stream.events.put_nowait(Assigned(served))
            seeds = tuple(stream.spec.seeds[i] for i in stream.index.values())
            watched = stream in self._in_flight.suspects.all
            self._send(Submit(tuple(stream.index), replace(stream.spec, seeds=seeds), watched))

    def _ended(self, stream: Stream) -> None:
        """Nothing of it is left to be made. Whoever waited for the end of a suspect may go on board."""
        if self._in_flight.suspects.forget(stream):
            self._board(self._in_flight.all)

    def _accuse_load(self) -> None:
        """If the engine died while it loaded a model, that may be why."""
        name, self._loading = self._loading, None
        if name is None:
            return
        self._load_deaths[name] += 1
        if self._load_deaths[name] >= LOAD_DEATHS:
            self._give_up(name, "the engine died each time it loaded this model")

    def _fail(self, failure: EngineFailed) -> None:
        self._trouble, self._models, self._memory_bytes = str(failure), {}, 0
        logger.critical("engine failed for good", extra={"reason": str(failure)})
        self._in_flight.tell(self._in_flight.all, failure)
        self._on_failed(failure)
