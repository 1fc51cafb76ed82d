"""Who sits where: numbers only, no torch. Seated samples fill slots 0, 1, 2, ...; the others wait, in this order:

Owners have equal shares. Each holds as many seats as any other who could use them; what is left uneven by that (three
owners, eight seats) is made up for in image-steps. Among the samples of one owner the smaller `order` is first: the
minute it came, less its priority. So priority counts, and a minute of waiting is worth one more. Samples that are equal
by that go by what is left of them, the shortest first: the longest there is stands as if it had come a minute later.

A sample that should sit and finds no free slot takes that of the one that should least. What is unseated costs a copy
of its state, so there are never more of these than there are slots, and one for each owner.
"""

import heapq
from dataclasses import dataclass, field
from typing import Generic, Protocol, TypeVar

SEAT = 16  # image-steps: so far must owners be apart for one of them to have a seat more
PATIENCE = SEAT // 2  # and so much farther before a seat changes its owner: each exchange costs a copy
ARREARS = 2 * SEAT  # more than this is never made up for: who asked for little does not save it up


class Orderly(Protocol):
    """What the scheduler needs to know of a sample."""

    order: float  # smaller is seated first: the minute it arrived, less its priority
    owner: str  # whose share it takes
    slot: int | None
    arrival: int  # the scheduler's own; negative before it has been added

    @property
    def left(self) -> int:
        """Steps it still needs; they grow less only while it is seated."""


S = TypeVar("S", bound=Orderly)


@dataclass(slots=True)
class _Share(Generic[S]):
    """What one owner has, and has had."""

    used: int  # image-steps, counted from where the owner began
    seats: int = 0
    waiting: dict[int, S] = field(default_factory=dict)  # by number of arrival
    queue: list[tuple[float, int]] = field(default_factory=list)  # a heap of (rank, arrival); some may have withdrawn

    @property
    def level(self) -> int:
        """How well off the owner is."""
        return self.used + SEAT * self.seats

    @property
    def next(self) -> tuple[float, int]:
        """Rank and arrival of the sample that is to be seated next. There must be one."""
        while self.queue[0][1] not in self.waiting:
            heapq.heappop(self.queue)  # withdrawn
        return self.queue[0]

    def push(self, sample: S, rank: float) -> None:
        """One more waits."""
        self.waiting[sample.arrival] = sample
        heapq.heappush(self.queue, (rank, sample.arrival))

    def pop(self) -> S:
        """The one that is to be seated next."""
        arrival = self.next[1]
        heapq.heappop(self.queue)
        return self.waiting.pop(arrival)

    def withdraw(self, sample: S) -> None:
        """One that waited does not any more."""
        del self.waiting[sample.arrival]
        if len(self.queue) > 2 * len(self.waiting) + 64:  # mostly withdrawn ones
            self.queue = [entry for entry in self.queue if entry[1] in self.waiting]
            heapq.heapify(self.queue)


@dataclass(frozen=True, slots=True)
class Exchange(Generic[S]):
    """A seat that has changed hands."""

    slot: int
    leaves: S
    sits: S


@dataclass(slots=True)
class Scheduler(Generic[S]):
    """A sample is waiting, then seated, perhaps unseated and waiting again, then gone."""

    capacity: int
    longest: int = 1000  # steps that a sample may have
    seated: list[S] = field(default_factory=list)  # seated[i].slot == i, always
    waiting: int = 0
    _shares: dict[str, _Share[S]] = field(default_factory=dict)  # by owner
    _unseated: set[int] = field(default_factory=set)  # by number of arrival, of those that wait
    _arrivals: int = 0
    _news: bool = False  # somebody has come since all who should sit did

    def add(self, sample: S) -> None:
        """A sample joins the queue, behind those of its own rank; one that has been in it before, where it was."""
        if sample.arrival < 0:
            sample.arrival = self._arrivals
            self._arrivals += 1
        if sample.owner not in self._shares:
            lead = max((share.used for share in self._shares.values()), default=0)
            self._shares[sample.owner] = _Share(max(0, lead - ARREARS))
        self._shares[sample.owner].push(sample, self._rank(sample))
        self.waiting += 1
        self._news = True

    def admit(self) -> list[S]:
        """Seats as many waiting samples as there are free slots; these have just sat down."""
        new = []
        while self.waiting and len(self.seated) < self.capacity:
            sample = self._call(min(self._backlogged(), key=lambda share: share.level))
            sample.slot = len(self.seated)
            self.seated.append(sample)
            new.append(sample)
        return new

    def exchange(self) -> Exchange[S] | None:
        """One seat changes hands, if one must. To be called until none does, once nobody can be admitted."""
        if not self.waiting or len(self.seated) < self.capacity:
            return None
        for poor, rich in self._pairs():
            rank, arrival = poor.next
            leaves = max((s for s in self.seated if self._shares[s.owner] is rich), key=self._rank)
            if poor is rich and rank >= self._rank(leaves):
                continue
            room = self.capacity + (0 if poor is rich else len(self._shares))
            if arrival not in self._unseated and len(self._unseated) >= room:
                continue
            sits, slot = self._call(poor), leaves.slot
            assert slot is not None
            sits.slot, leaves.slot, self.seated[slot] = slot, None, sits
            rich.seats -= 1
            self.add(leaves)
            self._unseated.add(leaves.arrival)
            return Exchange(slot, leaves, sits)
        self._news = False
        return None

    def charge(self) -> None:
        """A step of everybody who is seated has been done."""
        for share in self._shares.values():
            share.used += share.seats
        lead = max((share.used for share in self._shares.values()), default=0)
        for owner, share in list(self._shares.items()):
            share.used = max(share.used, lead - ARREARS)
            if not (share.seats or share.waiting) and share.used == lead - ARREARS:
                del self._shares[owner]  # as well off as one who has never been here

    def withdraw(self, sample: S) -> None:
        """A waiting sample leaves the queue."""
        self._shares[sample.owner].withdraw(sample)
        self._unseated.discard(sample.arrival)
        self.waiting -= 1

    def release(self, sample: S) -> tuple[int, int] | None:
        """A seated sample leaves; the last one moves into the hole. Returns that move, (from, to), if there is one."""
        hole, last = sample.slot, self.seated.pop()
        assert hole is not None
        sample.slot = None
        self._shares[sample.owner].seats -= 1
        if last is sample:
            return None
        self.seated[hole] = last
        last.slot = hole
        return len(self.seated), hole

    def _rank(self, sample: S) -> float:
        return sample.order + sample.left / (self.longest + 1)

    def _backlogged(self) -> list[_Share[S]]:
        return [share for share in self._shares.values() if share.waiting]

    def _call(self, share: _Share[S]) -> S:
        sample = share.pop()
        share.seats += 1
        self._unseated.discard(sample.arrival)
        self.waiting -= 1
        return sample

    def _pairs(self) -> list[tuple[_Share[S], _Share[S]]]:
        """Between whom a seat may change hands: the poorest and the richest owner, if they are far apart; and, if
        somebody has come, among the samples of one owner."""
        backlogged, having = self._backlogged(), [share for share in self._shares.values() if share.seats]
        poor, rich = min(backlogged, key=lambda share: share.level), max(having, key=lambda share: share.level)
        apart = poor.level + SEAT + PATIENCE < rich.level
        return ([(poor, rich)] if apart else []) + [(s, s) for s in backlogged if s.seats and self._news]
