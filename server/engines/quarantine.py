"""Which jobs are suspected of killing engines, and which are shown to: the one rule of blame, for all engines.

A picture is a pure function of its request, so a job that kills an engine kills it at the same step again. A job that
had samples seated at DEATHS_IN_COMPANY deaths is isolated: it has an engine to itself, which reports each of its steps.
It fails when an engine dies at the same step of it again, or at its death number DEATHS_ALONE in isolation, whatever
the step. A job that merely sat beside the killer completes. A model loads by itself, and is given up after
DEATHS_LOADING deaths.
"""

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TypeAlias
from weakref import WeakValueDictionary

from server.worker.messages import Spec

DEATHS_IN_COMPANY = 2
DEATHS_ALONE = 5
DEATHS_LOADING = 3

Place: TypeAlias = frozenset[tuple[int, int]]  # how far each seated sample of a job is: (index, updates done)


@dataclass(eq=False)
class Record:
    """What is known against a job."""

    isolated: bool  # whether the job is to have an engine to itself
    deaths: int = 0  # of engines, while the job was seated
    places: list[Place] = field(default_factory=list)  # where it was at the deaths that it met in isolation


class Quarantine:
    """What is known against jobs that have not ended, and against models. One for all engines of a server."""

    def __init__(self) -> None:
        self._records: WeakValueDictionary[str, Record] = WeakValueDictionary()  # kept by the runs of a job
        self._loads: Counter[str] = Counter()  # deaths of engines while they loaded a model

    def record(self, spec: Spec) -> Record:
        """The record of a spec's job, the same for all of its runs; of this run only, if the spec names no job."""
        fresh = Record(spec.alone)
        return self._records.setdefault(spec.job, fresh) if spec.job else fresh

    def died(self, seated: Mapping[Record, Place]) -> list[Record]:
        """Counts the death of an engine with these jobs seated. -> those that are shown to have killed it"""
        shown = []
        for record, place in seated.items():
            if len(seated) == 1 and record.isolated:
                if place in record.places or len(record.places) + 1 >= DEATHS_ALONE:
                    shown.append(record)
                record.places.append(place)
            record.deaths += 1
            if record.deaths >= DEATHS_IN_COMPANY:
                record.isolated = True
        return shown

    def died_loading(self, model: str) -> bool:
        """Counts the death of an engine that was loading a model. Returns whether the model is to be given up."""
        self._loads[model] += 1
        return self._loads[model] >= DEATHS_LOADING

    def loaded(self, model: str) -> None:
        """Forgets what was held against a model: it can be loaded."""
        del self._loads[model]
