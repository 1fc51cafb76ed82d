"""Who sits where: integers only, no torch. Waiting samples are seated by order; seated ones fill slots 0, 1, 2, ..."""

import heapq
from dataclasses import dataclass, field
from typing import Generic, Protocol, TypeVar


class Orderly(Protocol):
    """What the scheduler needs to know of a sample."""

    order: float  # smaller is seated first: the minute it arrived, less its priority
    slot: int | None
    arrival: int  # the scheduler's own


S = TypeVar("S", bound=Orderly)


@dataclass(slots=True)
class Scheduler(Generic[S]):
    """Two queues. A sample is waiting, then seated, then gone."""

    capacity: int
    seated: list[S] = field(default_factory=list)  # seated[i].slot == i, always
    _waiting: dict[int, S] = field(default_factory=dict)  # by number of arrival
    _queue: list[tuple[float, int]] = field(default_factory=list)  # a heap of (order, arrival); some may have withdrawn
    _arrivals: int = 0

    @property
    def waiting(self) -> int:
        """How many samples wait for a slot."""
        return len(self._waiting)

    def add(self, sample: S) -> None:
        """A sample joins the queue, behind those of its own order."""
        sample.arrival = self._arrivals
        self._waiting[sample.arrival] = sample
        heapq.heappush(self._queue, (sample.order, sample.arrival))
        self._arrivals += 1

    def admit(self) -> list[S]:
        """Seats as many waiting samples as there are free slots; these have just sat down."""
        new = []
        while self._waiting and len(self.seated) < self.capacity:
            sample = self._waiting.pop(heapq.heappop(self._queue)[1], None)
            if sample is None:
                continue  # withdrawn
            sample.slot = len(self.seated)
            self.seated.append(sample)
            new.append(sample)
        return new

    def withdraw(self, sample: S) -> None:
        """A waiting sample leaves the queue."""
        del self._waiting[sample.arrival]
        if len(self._queue) > 2 * len(self._waiting) + 64:  # mostly withdrawn ones
            self._queue = [entry for entry in self._queue if entry[1] in self._waiting]
            heapq.heapify(self._queue)

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
