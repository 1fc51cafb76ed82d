"""The backend of one local engine process: spawns it, watches it, replaces it, and runs again what had not ended."""

import asyncio
import logging
import signal
import time
from collections import Counter
from collections.abc import AsyncGenerator, Callable, Sequence
from dataclasses import replace

from model import errors as model_errors
from model.engine.events import Stats
from server.engines.backend import Assigned, EngineHealth, Restarting, SampleEvent
from server.engines.inflight import InFlight
from server.engines.process import UNUSABLE, EngineProcess, Patience
from server.engines.quarantine import KILL, Quarantine
from server.engines.step_times import StepTimes
from server.errors import EXIT_CODES, EXIT_ENGINE, EngineFailed, ModelBroken, NotReady
from server.troubles import Troubles
from server.worker import messages
from server.worker.messages import ModelStatus, Spec, Start

logger = logging.getLogger(__name__)
DIED = "the engine died without a step done, and so it was each time it was replaced"
BEGINNING, AGAIN_S = "the start of an engine", 2.0  # for which there may be too little, and the pause until the next
NO_MEMORY = "; memory ran out: a smaller DDPM_SLOTS takes less, and DDPM_MODEL_MEMORY_BYTES fewer models at once"


class EngineSupervisor:
    """One engine process at a time. All methods are called from the event loop."""

    def __init__(
        self,
        start: Start,
        restarts: int,
        on_failed: Callable[[EngineFailed], None],
        on_step: Callable[[str, int, float], None] = lambda model, bucket, seconds: None,
        patience: Patience | None = None,
        quarantine: Quarantine | None = None,
        troubles: Troubles | None = None,
    ) -> None:
        """restarts: consecutive ones without progress before it fails for good, and calls `on_failed`."""
        self._start, self._restarts, self._patience = start, restarts, patience or Patience()
        self._on_failed, self._on_step, self._troubles = on_failed, on_step, troubles or Troubles()
        self._in_flight, self._times = InFlight(quarantine or Quarantine()), StepTimes()
        self._task: asyncio.Task[None] | None = None
        self._process = EngineProcess()  # the present one, or the last
        self._trouble: str | None = "the engine is loading"
        self._models: dict[str, ModelStatus] = {}  # as they were last; empty before the first engine is ready
        self._past, self._stats = Stats(), Stats()  # of former engines; of the present one
        self._memory_bytes, self._replayed, self._causes = 0, 0, Counter[str]()  # causes of restarts

    @property
    def models(self) -> dict[str, ModelStatus]:
        """The models that can be asked for, by name; empty while there is no engine."""
        return self._models if self._trouble is None else {}

    @property
    def replicas(self) -> list[dict[str, ModelStatus]]:
        """The same, of the only engine."""
        return [self.models]

    @property
    def trouble(self) -> str | None:
        """Why no work can be taken right now, or None."""
        if self._trouble is not None or self._process.stopped_s:
            return self._trouble or "the engine process has been stopped"
        silence_s, patience = time.monotonic() - self._process.heard_at, self._patience
        if silence_s <= patience.silence_s or silence_s <= self._limit_s(patience.silence_s, patience.silence_steps):
            return None
        return f"the engine has not answered for {silence_s:.0f} s"

    @property
    def health(self) -> EngineHealth:
        """How the engine is, and what it and its predecessors have done."""
        return EngineHealth(
            stats=self._past + self._stats,
            silence_s=time.monotonic() - self._process.heard_at,
            memory_bytes=self._memory_bytes,
            restarts=dict(self._causes),
            replayed=self._replayed,
        )

    def step_s(self, model: str, buckets: Sequence[int]) -> Sequence[float]:
        """Seconds of a step by the number of pictures in it, 0 .. the largest bucket; zeros if none was seen."""
        return self._times.step_s(model, buckets)

    def load_s(self, model: str) -> float:
        """Seconds until steps of this model can be made; with a suspect in flight, one more start of the engine."""
        status, one_more = self.models.get(model), self._in_flight.suspected
        return self._times.load_s(model, status) + (self._times.start_s if one_more else 0.0)

    async def start(self) -> None:
        """Begins to load."""
        self._task = asyncio.create_task(self._supervise(), name="engine supervisor")
        self._task.add_done_callback(self._on_supervisor_end)

    def _on_supervisor_end(self, task: asyncio.Task[None]) -> None:
        if not task.cancelled() and task.exception() is not None:
            logger.error("the engine's supervisor failed", exc_info=task.exception())
            self._fail(EngineFailed("the engine's supervisor failed", EXIT_ENGINE))

    async def close(self) -> None:
        """Ends the engine process. Runs that are still open end with NotReady."""
        self._trouble = "the server is shutting down"
        if self._task is not None:
            self._task.cancel()
            await asyncio.gather(self._task, return_exceptions=True)
        self._in_flight.fail(self._in_flight.all, NotReady(self._trouble))

    async def run(self, spec: Spec) -> AsyncGenerator[SampleEvent]:
        """The events of these samples until each has ended; `id` is the index of a seed. Closing cancels the rest."""
        if self._task is None or self._task.done():  # else there will be an engine, if there is none now
            raise NotReady(self.trouble or "the engine has not been started")
        if (status := self._models.get(spec.model)) is not None and status.trouble is not None:
            raise ModelBroken(status.trouble)
        run = self._in_flight.enter(spec)
        try:
            self._assign()
            while run.samples or not run.events.empty():
                event = await run.events.get()
                if isinstance(event, Exception):
                    raise event
                yield event
        finally:
            if left := self._in_flight.leave(run):
                self._process.send(messages.Cancel(left))
            self._assign()

    def _assign(self) -> None:
        for run in self._in_flight.next() if self._trouble is None and self._in_flight.waiting else ():
            status = self._models[run.spec.model]
            if status.loaded:
                self._in_flight.tell([run], Assigned(status))
            self._process.send(self._in_flight.assign(run))

    async def _supervise(self) -> None:
        """Runs one engine process after another."""
        failures = 0.0
        while True:
            steps_before, process = self.health.stats.steps, EngineProcess()
            self._process, process.troubles = process, self._troubles
            await process.run(replace(self._start, again=bool(self._models)), self._receive, self._hangs)
            if process.refused is not None:
                code = EXIT_CODES[getattr(model_errors, process.refused.error)]
                return self._fail(EngineFailed(process.refused.message, code))
            if process.lacked is not None:  # no death: it had nothing to do with jobs and models
                self._troubles.begin(BEGINNING, process.lacked)
                await asyncio.sleep(AGAIN_S)
                continue
            death = self._in_flight.on_death(process.killed)
            failures = 0 if death.explained or self.health.stats.steps > steps_before else failures
            failures += 0 if death.isolated else KILL if process.killed else 1
            self._past, self._stats = replace(self._past + self._stats, seated=0, waiting=0), Stats()
            if failures > self._restarts:
                why = f"{DIED} ({self._restarts})" + (NO_MEMORY if process.cause == "memory" else "")
                return self._fail(EngineFailed(why, EXIT_ENGINE))
            self._replayed += death.replayed
            self._note_death(process)
            logger.error("engine died", extra={"failures": failures, "jobs": len(self._in_flight.all)})
            await asyncio.sleep(min(5.0, 0.1 * 2 ** (failures - 1)))

    def _note_death(self, process: EngineProcess) -> None:
        loading = process.loading is not None or self._trouble is not None
        self._trouble = "the engine is being restarted"
        self._causes[process.cause] += 1
        self._times.died()
        if process.signal == signal.SIGILL or (loading and process.signal in UNUSABLE):
            self._start = replace(self._start, unusable=UNUSABLE[signal.Signals(process.signal)])
        self._in_flight.tell(self._in_flight.all, Restarting(self._times.start_s))
        if process.loading is not None and self._in_flight.quarantine.died_loading(process.loading, process.killed):
            self._give_up(process.loading, "the engine died each time it loaded this model")

    def _hangs(self) -> bool:
        patience = self._patience
        hang_s = self._limit_s(patience.hang_s, patience.hang_steps) if self._trouble is None else patience.start_s
        return time.monotonic() - self._process.heard_at > hang_s or self._process.stopped_s > patience.silence_s

    def _limit_s(self, seconds: float, steps: float) -> float:
        """How long it may be silent now, if it may for so long while no model loads."""
        load_s = self._patience.load_s if self._process.loading is not None else 0.0
        return max(seconds, steps * self._times.turn_s(self._in_flight.models), load_s)

    def _receive(self, message: object) -> None:
        if self._task is not None and self._task.cancelling():
            return  # the server shuts down
        self._process.heard_at = time.monotonic()
        match message:
            case messages.Report(stats, _, _, heartbeat):
                self._stats = stats
                if self._in_flight.take(message):
                    self._assign()
                if heartbeat is not None:
                    self._memory_bytes = heartbeat.memory_bytes
                    self._times.learn(heartbeat.steps, sum(1 for status in self._models.values() if status.loaded))
                    for step in heartbeat.steps:
                        self._on_step(step.model, step.bucket, step.seconds)
            case messages.Ready(models, steps):
                self._times.learn(steps, len(models))
                self._become_ready(models)
            case messages.Loading(model):
                self._process.loading = model
            case messages.Changed(model, status):
                self._change(model, status)

    def _become_ready(self, models: dict[str, ModelStatus]) -> None:
        former = self._models or models
        troubles = {name: status.trouble or _trouble(status, models.get(name)) for name, status in former.items()}
        if None not in troubles.values():
            return self._process.end(messages.Refused("ModelRefused", str(next(iter(troubles.values())))))
        for name, status in former.items():
            now = models.get(name, replace(status, loaded=False))
            self._models[name] = replace(now, trouble=status.trouble)
            if (trouble := troubles[name]) is not None:
                self._give_up(name, trouble)
        self._trouble = None
        self._troubles.end(BEGINNING)
        self._times.started(models)
        logger.info("engine ready", extra={name: model.numerics for name, model in models.items()})
        self._assign()

    def _change(self, name: str, status: ModelStatus) -> None:
        """A model has been loaded, or unloaded, or cannot be loaded."""
        self._process.loading = None
        status = replace(status, trouble=self._models[name].trouble or status.trouble)  # given up is given up
        self._models[name] = status
        if status.trouble is not None:
            self._give_up(name, status.trouble)
        elif status.loaded:
            self._in_flight.quarantine.loaded(name)
            self._times.loaded(name, status)
            assigned = [run for run in self._in_flight.assigned if run.spec.model == name]
            self._in_flight.tell(assigned, Assigned(status))
        logger.info("model changed", extra={"model": name, "loaded": status.loaded, "trouble": status.trouble})

    def _give_up(self, name: str, reason: str) -> None:
        """Fails every run of this model, those to come too: it cannot be loaded."""
        self._models[name] = replace(self._models[name], trouble=reason)
        self._in_flight.fail(self._in_flight.of(name), ModelBroken(reason))

    def _fail(self, failure: EngineFailed) -> None:
        self._trouble, self._memory_bytes = str(failure), 0
        logger.critical("engine failed for good", extra={"reason": str(failure)})
        self._in_flight.fail(self._in_flight.all, failure)
        self._on_failed(failure)


def _trouble(before: ModelStatus, now: ModelStatus | None) -> str | None:
    """Why an engine that replaces another cannot serve a model as it was served before."""
    return now.trouble if now is not None and now.digest == before.digest else messages.CHANGED
