"""Which jobs are suspected of killing engines, and which are shown to: the one rule of blame, for all engines.

A picture is a pure function of its request, so a job that kills an engine kills it at the same step again. A job that
had samples seated at DEATHS_IN_COMPANY deaths is isolated: it has an engine to itself, which reports each of its steps.
Only deaths in isolation are evidence, and how much depends on what ended the engine:

- The engine crashed (an exit, a signal of its own fault, an error of the device, a hang): the job fails when an engine
  crashes at the same step of it again, or at crash number CRASHES_ALONE, whatever the step.
- It was killed (SIGKILL): by the kernel, an operator or a preempted host, whatever the job did. The job fails only at
  KILLS_ALONE kills in a row at one step of it, none of them while nothing was seated. Else it runs again, and lets
  others go first.

A job that merely sat beside the killer completes. A model loads by itself, and is given up after DEATHS_LOADING deaths,
of which a kill counts KILL.

A device that breaks is no job's doing, and shows when its engine is replaced: an engine takes work only after its
loads, and each load runs the net, on a GPU in whole steps of the smallest and the largest batch. An engine that dies
there has no sample, so no job is blamed: the server ends after DDPM_ENGINE_RESTARTS of them, and the next one runs its
jobs. What no load meets, as a part of a device that only some batches use, cannot be told from a job's doing.
"""

from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TypeAlias
from weakref import WeakValueDictionary

from server.worker.messages import Spec

DEATHS_IN_COMPANY = 2
CRASHES_ALONE, KILLS_ALONE = 5, 5
DEATHS_LOADING = 3
KILL = 0.2  # of a death: what a kill counts where deaths are counted whatever a job did

Place: TypeAlias = frozenset[tuple[int, int]]  # how far each seated sample of a job is: (index, updates done)


@dataclass(eq=False, kw_only=True)
class Record:
    """What is known against a job."""

    isolated: bool  # whether the job is to have an engine to itself
    yields: bool  # whether it lets others go first: it asked for isolation, or was killed in it
    deaths: int = 0  # of engines, while the job was seated
    crashes: list[Place] = field(default_factory=list)  # where it was at the crashes that it met in isolation
    kills: list[Place] = field(default_factory=list)  # at the last kills in isolation: all at one place

    def shown(self, place: Place, killed: bool) -> bool:
        """Notes a death in isolation. Returns whether the job is shown to be the reason."""
        if killed:
            self.yields = True
            self.kills = [*(kill for kill in self.kills if kill == place), place]
            return len(self.kills) >= KILLS_ALONE
        self.crashes.append(place)
        return place in self.crashes[:-1] or len(self.crashes) >= CRASHES_ALONE


class Quarantine:
    """What is known against jobs that have not ended, and against models. One for all engines of a server."""

    def __init__(self) -> None:
        self._records: WeakValueDictionary[str, Record] = WeakValueDictionary()  # kept by the runs of a job
        self._loads: defaultdict[str, float] = defaultdict(float)  # deaths of engines while they loaded a model

    def record(self, spec: Spec) -> Record:
        """The record of a spec's job, the same for all of its runs; of this run only, if the spec names no job."""
        fresh = Record(isolated=spec.alone, yields=spec.alone)
        return self._records.setdefault(spec.job, fresh) if spec.job else fresh

    def died(self, seated: Mapping[Record, Place], killed: bool) -> list[Record]:
        """Counts the death of an engine with these jobs seated. -> those that are shown to be the reason

        killed: SIGKILL ended it, and this server had not sent it.
        """
        if killed and not seated:  # somebody kills engines whatever they do
            for record in self._records.values():
                record.kills.clear()
        shown = []
        for record, place in seated.items():
            if len(seated) == 1 and record.isolated and record.shown(place, killed):
                shown.append(record)
            record.deaths += 1
            if record.deaths >= DEATHS_IN_COMPANY:
                record.isolated = True
        return shown

    def died_loading(self, model: str, killed: bool) -> bool:
        """Counts the death of an engine that was loading a model. Returns whether the model is to be given up."""
        self._loads[model] += KILL if killed else 1
        return self._loads[model] >= DEATHS_LOADING

    def loaded(self, model: str) -> None:
        """Forgets what was held against a model: it can be loaded."""
        self._loads.pop(model, None)
