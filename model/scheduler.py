"""Who sits where: integers only, no torch. Waiting samples are seated by order; seated ones fill slots 0, 1, 2, ..."""

import heapq
from dataclasses import dataclass, field
from typing import Generic, Protocol, TypeVar


class Orderly(Protocol):
    """What the scheduler needs to know of a sample."""

    order: float  # smaller is seated first: the minute it arrived, less its priority
    slot: int | None


S = TypeVar("S", bound=Orderly)


@dataclass(slots=True)
class Scheduler(Generic[S]):
    """Two queues. A sample is waiting, then seated, then gone."""

    capacity: int
    seated: list[S] = field(default_factory=list)  # seated[i].slot == i, always
    _waiting: list[tuple[float, int, S]] = field(default_factory=list)  # a heap
    _arrivals: int = 0

    @property
    def waiting(self) -> int:
        """How many samples wait for a slot."""
        return len(self._waiting)

    def add(self, sample: S) -> None:
        """A sample joins the queue, behind those of its own order."""
        heapq.heappush(self._waiting, (sample.order, self._arrivals, sample))
        self._arrivals += 1

    def admit(self) -> list[S]:
        """Seats as many waiting samples as there are free slots; these have just sat down."""
        new = []
        while self._waiting and len(self.seated) < self.capacity:
            sample = heapq.heappop(self._waiting)[2]
            sample.slot = len(self.seated)
            self.seated.append(sample)
            new.append(sample)
        return new

    def withdraw(self, sample: S) -> None:
        """A waiting sample leaves the queue."""
        self._waiting = [entry for entry in self._waiting if entry[2] is not sample]
        heapq.heapify(self._waiting)

    def release(self, sample: S) -> tuple[int, int] | None:
        """A seated sample leaves; the last one moves into the hole. Returns that move, (from, to), if there is one."""
        hole, last = sample.slot, self.seated.pop()
        assert hole is not None
        sample.slot = None
        if last is sample:
            return None
        self.seated[hole] = last
        last.slot = hole
        return len(self.seated), hole
