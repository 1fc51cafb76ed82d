"""Which samples are seated, and in which slots: numbers only, no torch. Seated samples fill slots 0, 1, 2, ...

Owners have equal shares. Each holds as many seats as any other that could use them; the remainder (three owners, eight
seats) is balanced over time, in image-steps. Among the samples of one owner the lowest `rank` is seated first: the
minute of its arrival, less its priority. So priority counts, and a minute of waiting is worth one more. Ties are broken
by the remaining steps, fewest first: the longest sample there is counts as if it had arrived a minute later.

Where no slot is free, a waiting sample preempts the seated one of highest rank. A saved state costs memory, so at any
time at most as many samples are preempted as there are slots, and one for each owner.
"""

import heapq
from dataclasses import dataclass, field
from typing import Generic, Protocol, TypeVar

SEAT = 16  # image-steps by which owners must differ for one of them to have a seat more
HYSTERESIS = SEAT // 2  # and by how many more before a seat changes its owner: each preemption costs a copy
ARREARS = 2 * SEAT  # an owner is never compensated for more than this: a small demand does not accumulate credit


class Schedulable(Protocol):
    """What the scheduler needs to know of a sample."""

    rank: float  # the lowest is seated first
    owner: str  # whose share it uses
    slot: int | None  # written by the scheduler
    arrival: int  # the scheduler's own; negative before the sample is added

    @property
    def left(self) -> int:
        """Steps it still needs; the number falls only while it is seated."""


S = TypeVar("S", bound=Schedulable)


@dataclass(slots=True)
class _Share(Generic[S]):
    """One owner's seats, queue and past use."""

    used: int  # image-steps, counted from what the owner began with
    seats: int = 0
    waiting: dict[int, S] = field(default_factory=dict)  # by number of arrival
    queue: list[tuple[float, int]] = field(default_factory=list)  # a heap of (key, arrival); some may be withdrawn

    @property
    def level(self) -> int:
        """Use so far, with a seat counted as SEAT image-steps: the owner of the lowest level is seated next."""
        return self.used + SEAT * self.seats

    @property
    def next(self) -> tuple[float, int]:
        """Key and arrival of the sample to seat next. There must be one."""
        while self.queue[0][1] not in self.waiting:
            heapq.heappop(self.queue)  # withdrawn
        return self.queue[0]

    def push(self, sample: S, key: float) -> None:
        """Adds a sample to the queue."""
        self.waiting[sample.arrival] = sample
        heapq.heappush(self.queue, (key, sample.arrival))

    def pop(self) -> S:
        """Takes the sample to seat next out of the queue."""
        arrival = self.next[1]
        heapq.heappop(self.queue)
        return self.waiting.pop(arrival)

    def withdraw(self, sample: S) -> None:
        """Takes any sample out of the queue."""
        del self.waiting[sample.arrival]
        if len(self.queue) > 2 * len(self.waiting) + 64:  # most entries are of withdrawn samples
            self.queue = [entry for entry in self.queue if entry[1] in self.waiting]
            heapq.heapify(self.queue)


@dataclass(frozen=True, slots=True)
class Preemption(Generic[S]):
    """A slot whose sample was replaced by another."""

    slot: int
    preempted: S
    seated: S


@dataclass(slots=True)
class Scheduler(Generic[S]):
    """A sample waits, is seated, perhaps is preempted and waits again, and is then released."""

    capacity: int
    longest: int = 1000  # steps that a sample may have
    seated: list[S] = field(init=False, default_factory=list)  # seated[i].slot == i, always
    waiting: int = field(init=False, default=0)
    _shares: dict[str, _Share[S]] = field(init=False, default_factory=dict)  # by owner
    _preempted: set[int] = field(init=False, default_factory=set)  # arrivals of the waiting samples that are preempted
    _arrivals: int = field(init=False, default=0)
    _changed: bool = field(init=False, default=False)  # whether a sample was added since `preempt` returned None

    def add(self, sample: S) -> None:
        """Adds a sample to the queue, behind those of equal rank; one that returns keeps its former place."""
        if sample.arrival < 0:
            sample.arrival = self._arrivals
            self._arrivals += 1
        if sample.owner not in self._shares:
            most = max((share.used for share in self._shares.values()), default=0)
            self._shares[sample.owner] = _Share(max(0, most - ARREARS))
        self._shares[sample.owner].push(sample, self._key(sample))
        self.waiting += 1
        self._changed = True

    def admit(self) -> list[S]:
        """Seats waiting samples in all free slots, and returns them."""
        new = []
        while self.waiting and len(self.seated) < self.capacity:
            sample = self._take_next(min(self._backlogged(), key=lambda share: share.level))
            sample.slot = len(self.seated)
            self.seated.append(sample)
            new.append(sample)
        return new

    def preempt(self) -> Preemption[S] | None:
        """Replaces one seated sample, if one must give way. Call it after `admit`, until it returns None."""
        if not self.waiting or len(self.seated) < self.capacity:
            return None
        for poor, rich in self._rivals():
            key, arrival = poor.next
            last = max((s for s in self.seated if self._shares[s.owner] is rich), key=self._key)
            if poor is rich and key >= self._key(last):
                continue
            room = self.capacity + (0 if poor is rich else len(self._shares))
            if arrival not in self._preempted and len(self._preempted) >= room:
                continue
            first, slot = self._take_next(poor), last.slot
            assert slot is not None
            first.slot, last.slot, self.seated[slot] = slot, None, first
            rich.seats -= 1
            self.add(last)
            self._preempted.add(last.arrival)
            return Preemption(slot, last, first)
        self._changed = False
        return None

    def charge(self) -> None:
        """Charges each owner for a step of its seated samples."""
        for share in self._shares.values():
            share.used += share.seats
        most = max((share.used for share in self._shares.values()), default=0)
        for owner, share in list(self._shares.items()):
            share.used = max(share.used, most - ARREARS)
            if not (share.seats or share.waiting) and share.used == most - ARREARS:
                del self._shares[owner]  # equal to an owner that was never here

    def withdraw(self, sample: S) -> None:
        """Takes a waiting sample out of the queue."""
        self._shares[sample.owner].withdraw(sample)
        self._preempted.discard(sample.arrival)
        self.waiting -= 1

    def release(self, sample: S) -> tuple[int, int] | None:
        """Frees a seated sample's slot; the last sample moves there. Returns that move, (from, to), if there is one."""
        hole, last = sample.slot, self.seated.pop()
        assert hole is not None
        sample.slot = None
        self._shares[sample.owner].seats -= 1
        if last is sample:
            return None
        self.seated[hole] = last
        last.slot = hole
        return len(self.seated), hole

    def _key(self, sample: S) -> float:
        """The rank, with the remaining steps as a fraction that breaks ties."""
        return sample.rank + sample.left / (self.longest + 1)

    def _backlogged(self) -> list[_Share[S]]:
        return [share for share in self._shares.values() if share.waiting]

    def _take_next(self, share: _Share[S]) -> S:
        """Takes this owner's next sample out of the queue, for a seat."""
        sample = share.pop()
        share.seats += 1
        self._preempted.discard(sample.arrival)
        self.waiting -= 1
        return sample

    def _rivals(self) -> list[tuple[_Share[S], _Share[S]]]:
        """Pairs of shares between which a seat may change hands: the lowest and the highest level, if they are far
        apart; and, if a sample was added, each share and itself."""
        backlogged, seated = self._backlogged(), [share for share in self._shares.values() if share.seats]
        poor, rich = min(backlogged, key=lambda share: share.level), max(seated, key=lambda share: share.level)
        apart = poor.level + SEAT + HYSTERESIS < rich.level
        return ([(poor, rich)] if apart else []) + [(s, s) for s in backlogged if s.seats and self._changed]
