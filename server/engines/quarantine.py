"""Who is to blame for the death of an engine? Whoever was seated may have been it, and most of them were not.

A picture is a pure function of its request, so what kills an engine kills it at the same step again. Once a job was on
board of two engines that died, it is run alone, each step of it being told. If the engine dies at the same step of it
twice, it is guilty. Whoever was merely killed along with others is soon alone, and ends.
"""

from collections.abc import Hashable, Mapping
from dataclasses import dataclass, field
from typing import Generic, TypeVar

COMPANY = 2  # deaths in company that bring a job before the court; the third is one that it suffers alone
ALONE = 5  # deaths alone that condemn it, at whatever step

J = TypeVar("J", bound=Hashable)
Place = frozenset[tuple[int, int]]  # how far each seated picture of a job is: (index, updates done)


@dataclass(slots=True)
class _Record:
    deaths: int = 0
    alone: list[Place] = field(default_factory=list)  # where it was when an engine died around it alone


@dataclass(slots=True)
class Quarantine(Generic[J]):
    """What is known against the jobs that have not ended."""

    _records: dict[J, _Record] = field(default_factory=dict)

    @property
    def all(self) -> list[J]:
        """The jobs that are to be run alone, one after the other."""
        return [job for job, record in self._records.items() if record.deaths >= COMPANY]

    def died(self, seated: Mapping[J, Place]) -> list[J]:
        """An engine died while these jobs had pictures seated. Returns those who are guilty of it."""
        guilty = []
        for job, place in seated.items():
            record = self._records.setdefault(job, _Record())
            if record.deaths >= COMPANY:
                if place in record.alone or len(record.alone) + 1 >= ALONE:
                    guilty.append(job)
                record.alone.append(place)
            record.deaths += 1
        return guilty

    def forget(self, job: J) -> bool:
        """It has ended. Whether it was one of those who are run alone."""
        record = self._records.pop(job, None)
        return record is not None and record.deaths >= COMPANY
