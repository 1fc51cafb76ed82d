"""The runs that an engine has or is to have: which are next, whose events are whose, what its death does to each."""

import asyncio
import itertools
import math
import time
from collections.abc import Collection, Iterable
from dataclasses import dataclass, field, replace
from typing import cast

from model.engine.events import ENDS, Event
from server.engines.backend import Progress, SampleEvent
from server.engines.quarantine import Place, Quarantine, Record
from server.errors import SampleLost
from server.worker.messages import Report, Spec, Submit

ALONE_WAIT_S = 300.0  # after so long a run that lets others go first is waited for, as another suspect is


@dataclass(slots=True, eq=False)
class Run:
    """A spec whose samples are being made."""

    spec: Spec
    record: Record
    samples: dict[int, tuple[int, int]]  # sample id -> (index, seed), for samples that have not ended
    events: asyncio.Queue[SampleEvent | Exception] = field(default_factory=asyncio.Queue)
    entered_at: float = field(default_factory=time.monotonic)


@dataclass(frozen=True, slots=True)
class Death:
    """What the death of an engine did to its runs."""

    replayed: int  # runs that the engine had and the next one gets
    isolated: bool  # whether an isolated job was seated: then the death counts against the job, not the engine
    explained: bool  # whether a job is shown to be the reason


@dataclass(slots=True)
class InFlight:
    """The runs of one engine and of those that replace it."""

    quarantine: Quarantine
    waiting: dict[Run, None] = field(default_factory=dict)
    assigned: dict[Run, None] = field(default_factory=dict)  # that the engine process was given
    _by_sample: dict[int, Run] = field(default_factory=dict)
    _seated: dict[int, int] = field(default_factory=dict)  # updates done, by sample, of those known to be seated
    _alone_at: float = -math.inf  # when a run that lets others go first was assigned last
    _ids: "itertools.count[int]" = field(default_factory=itertools.count)

    @property
    def all(self) -> list[Run]:
        """The runs that have not ended."""
        return [*self.assigned, *self.waiting]

    @property
    def models(self) -> set[str]:
        """The models that the engine has work for."""
        return {run.spec.model for run in self.assigned}

    @property
    def isolated(self) -> list[Run]:
        """The runs that have the engine to themselves, or wait to have it."""
        alone = self.assigned if len(self.assigned) == 1 else {}
        return [run for run in (*alone, *self.waiting) if run.record.isolated]

    @property
    def suspected(self) -> bool:
        """Whether an isolated run is suspected of killing engines: one that only asked to be alone is not."""
        return any(not run.spec.alone for run in self.isolated)

    def of(self, model: str) -> list[Run]:
        """The runs of a model."""
        return [run for run in self.all if run.spec.model == model]

    def enter(self, spec: Spec) -> Run:
        """A new run, which waits."""
        indices = spec.indices or range(len(spec.seeds))
        samples = {next(self._ids): sample for sample in zip(indices, spec.seeds, strict=True)}
        run = Run(spec, self.quarantine.record(spec), samples)
        self._by_sample.update(dict.fromkeys(run.samples, run))
        self.waiting[run] = None
        return run

    def leave(self, run: Run) -> tuple[int, ...]:
        """Forgets a run that nobody reads any more. -> its samples that have not ended"""
        self._drop(run)
        for id in run.samples:
            del self._by_sample[id]
        return tuple(run.samples)

    def next(self) -> list[Run]:
        """The waiting runs that the engine is to be given now. An isolated one has it to itself, once it is free;
        others wait until then, unless its record says that it lets them go first."""
        isolated, overdue = self.isolated, time.monotonic() - ALONE_WAIT_S
        others = [run for run in self.waiting if not run.record.isolated]
        urgent = [
            run
            for run in isolated
            if not run.record.yields or max(run.entered_at, self._alone_at) < overdue or run in self.assigned
        ]
        if others and not urgent:
            return others
        return [] if self.assigned else (urgent or isolated)[:1]

    def assign(self, run: Run) -> Submit:
        """Notes that the engine is given a run. -> the message that does it"""
        del self.waiting[run]
        self.assigned[run] = None
        if run.record.yields:
            self._alone_at = time.monotonic()
        seeds = tuple(seed for _, seed in run.samples.values())
        return Submit(tuple(run.samples), replace(run.spec, seeds=seeds, alone=run.record.isolated))

    def take(self, report: Report) -> bool:
        """Hands each run its events, and how far its samples are. Returns whether a run has ended."""
        running = len(self.assigned)
        for event in report.events:
            self._deliver(event)
        progress = report.seated
        if report.heartbeat is not None:
            self._seated.clear()
            progress = report.heartbeat.progress
        steps: dict[Run, dict[int, int]] = {}
        for id, step in progress:
            if (run := self._by_sample.get(id)) is not None:
                self._seated[id] = step
                steps.setdefault(run, {})[run.samples[id][0]] = step
        for run, of_run in steps.items():
            run.events.put_nowait(Progress(of_run))
        return len(self.assigned) < running

    def _deliver(self, event: Event) -> None:
        id = cast(int, event.id)
        run = self._by_sample.get(id)
        if run is None:
            return  # it was cancelled
        run.events.put_nowait(replace(event, id=run.samples[id][0]))
        if isinstance(event, ENDS):
            del run.samples[id], self._by_sample[id]
            self._seated.pop(id, None)
            if not run.samples:
                self._drop(run)

    def on_death(self, killed: bool) -> Death:
        """The engine has died: its runs wait for the next one, but for those shown to be the reason, which fail.

        killed: SIGKILL ended it, and this server had not sent it.
        """
        seated: dict[Record, Place] = {}
        for id, step in self._seated.items():
            if (run := self._by_sample.get(id)) is not None:
                seated[run.record] = seated.get(run.record, frozenset()) | {(run.samples[id][0], step)}
        alone = len(seated) == 1 and all(record.isolated for record in seated)
        shown = self.quarantine.died(seated, killed)
        killers = [run for run in self.all if run.record in shown]
        self.fail(killers, SampleLost("the engine died each time it came to the same step of this job"))
        replayed = len(self.assigned)
        self.waiting, self.assigned = self.assigned | self.waiting, {}
        self._seated.clear()
        return Death(replayed, alone, bool(shown))

    def tell(self, runs: Iterable[Run], event: SampleEvent) -> None:
        """Tells the readers of these runs something."""
        for run in runs:
            run.events.put_nowait(event)

    def fail(self, runs: Collection[Run], error: Exception) -> None:
        """Ends these runs with an error."""
        for run in runs:
            self._drop(run)
            run.events.put_nowait(error)

    def _drop(self, run: Run) -> None:
        self.waiting.pop(run, None)
        self.assigned.pop(run, None)
