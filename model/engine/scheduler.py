"""Which samples are seated, and in which slots: numbers only, no torch. Seated samples fill slots 0, 1, 2, ...

A sample takes one slot, or two if its picture is guided: both at once, and no sample behind it in the queue is seated
in a slot that is free meanwhile.

Owners have equal shares. Each holds as many seats as any other that could use them; the remainder (three owners, eight
seats) is balanced over time, in image-steps; a guided picture's seats and steps count twice. Among the samples of one
owner the lowest `rank` is seated first: the minute of its arrival, less its priority. So priority counts, and a minute
of waiting is worth one more. Ties are broken by the remaining steps, fewest first: the longest sample there is counts
as if it had arrived a minute later.

Where too few slots are free, a waiting sample preempts the seated ones of highest rank. A saved state costs memory, so
at any time at most as many samples are preempted as there are slots, and one for each owner.
"""

import heapq
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Generic, Protocol, TypeVar

SEAT = 16  # image-steps by which owners must differ for one of them to have a seat more
HYSTERESIS = SEAT // 2  # and by how many more before a seat changes its owner: each preemption costs a copy
ARREARS = 2 * SEAT  # an owner is never compensated for more than this: a small demand does not accumulate credit


class Schedulable(Protocol):
    """What the scheduler needs to know of a sample."""

    rank: float  # the lowest is seated first
    owner: str  # whose share it uses
    width: int  # how many slots it takes
    slots: tuple[int, ...]  # where it is seated, written by the scheduler; () while it is not
    arrival: int  # the scheduler's own; negative before the sample is added

    @property
    def left(self) -> int:
        """Steps it still needs; the number falls only while it is seated."""


S = TypeVar("S", bound=Schedulable)


@dataclass(slots=True, eq=False)
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

    @property
    def first(self) -> S:
        """The sample to seat next. There must be one."""
        return self.waiting[self.next[1]]

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
    """Samples that were seated and wait again, and the one that was seated in their place."""

    preempted: list[tuple[S, int]]  # each with the first of the slots it had
    moves: list[tuple[int, int | None]]  # as of `release`
    seated: S


@dataclass(slots=True)
class Scheduler(Generic[S]):
    """A sample waits, is seated, perhaps is preempted and waits again, and is then released."""

    capacity: int
    longest: int = 1000  # steps that a sample may have
    slots: list[S] = field(init=False, default_factory=list)  # i in slots[i].slots, always
    waiting: int = field(init=False, default=0)
    _shares: dict[str, _Share[S]] = field(init=False, default_factory=dict)  # by owner
    _preempted: set[int] = field(init=False, default_factory=set)  # arrivals of the waiting samples that are preempted
    _arrivals: int = field(init=False, default=0)
    _changed: bool = field(init=False, default=False)  # whether a sample was added since `preempt` returned None

    @property
    def seated(self) -> list[S]:
        """The seated samples, by their first slots."""
        return list(dict.fromkeys(self.slots))

    def add(self, sample: S) -> None:
        """Adds a sample to the queue, behind those of equal rank; one that returns keeps its former place."""
        if sample.arrival < 0:
            sample.arrival, self._arrivals = self._arrivals, self._arrivals + 1
        if sample.owner not in self._shares:
            most = max((share.used for share in self._shares.values()), default=0)
            self._shares[sample.owner] = _Share(max(0, most - ARREARS))
        self._shares[sample.owner].push(sample, self._key(sample))
        self.waiting += 1
        self._changed = True

    def admit(self) -> list[S]:
        """Seats waiting samples in free slots until the next one does not fit, and returns them."""
        new = []
        while self.waiting:
            share = min(self._backlogged(), key=lambda share: share.level)
            if self._missing(share.first) > 0:
                break
            new.append(self._seat_next(share))
        return new

    def _seat_next(self, share: _Share[S]) -> S:
        """Seats an owner's next sample, for which there is room."""
        sample = share.pop()
        sample.slots = tuple(range(len(self.slots), len(self.slots) + sample.width))
        self.slots += [sample] * sample.width
        share.seats += sample.width
        self._preempted.discard(sample.arrival)
        self.waiting -= 1
        return sample

    def preempt(self) -> Preemption[S] | None:
        """Replaces seated samples by one other, if some must. Call it after `admit` until it returns None, with `admit`
        after each: it may leave a slot."""
        if not self.waiting:
            return None
        head = min(backlogged := self._backlogged(), key=lambda share: share.level)
        if last := self._chosen(head, self._of_others(head)):
            return self._replace(last, head)
        for share in backlogged if self._changed else ():
            if last := self._chosen(share, self._of_own(share), spare=share is head):
                return self._replace(last, share)
        self._changed = False
        return None

    def _of_others(self, poor: _Share[S]) -> Iterator[S]:
        """Seated samples of the owners of the highest levels, as long as these are far above that of `poor`."""
        levels = {share: float(share.level) for share in self._shares.values() if share.seats and share is not poor}
        seated = dict[_Share[S], list[S]]()  # that are left of the richest
        while levels:
            rich = max(levels, key=levels.__getitem__)
            apart = (levels[rich] - poor.level - HYSTERESIS) / SEAT
            if apart <= poor.first.width:
                return
            last, *seated[rich] = seated.get(rich) or self._last_first(rich)
            if apart <= last.width:
                return
            yield last
            levels[rich] = levels[rich] - SEAT * last.width if seated[rich] else float("-inf")

    def _of_own(self, share: _Share[S]) -> Iterator[S]:
        """Seated samples of an owner that are behind its next one."""
        return (sample for sample in self._last_first(share) if self._key(sample) > share.next[0])

    def _last_first(self, share: _Share[S]) -> list[S]:
        return sorted((s for s in self.seated if self._shares[s.owner] is share), key=self._key, reverse=True)

    def _chosen(self, share: _Share[S], candidates: Iterator[S], spare: bool = True) -> list[S]:
        """As many of them as must give way to the next sample of this owner; none if they are too few, or too many are
        preempted already. spare: whether free slots may be taken"""
        first, last = share.first, list[S]()
        missing = self._missing(first) if spare else first.width
        while missing > 0 and (sample := next(candidates, None)) is not None:
            last.append(sample)
            missing -= sample.width
        for sample in list(last):
            if missing + sample.width <= 0:  # without it enough give way
                last.remove(sample)
                missing += sample.width
        own = bool(last) and self._shares[last[0].owner] is share
        before, room = len(self._preempted), self.capacity + (0 if own else len(self._shares))
        after = before - (first.arrival in self._preempted) + len(last)
        return last if missing <= 0 and not before < after > room else []

    def _replace(self, last: list[S], poor: _Share[S]) -> Preemption[S]:
        """Sends seated samples back to the queue, and seats this owner's next one."""
        preempted, moves = [(sample, sample.slots[0]) for sample in last], list[tuple[int, int | None]]()
        seated = poor.first
        for sample in last:
            moves += self.release(sample)
        self._seat_next(poor)
        for sample in last:
            self.add(sample)
            self._preempted.add(sample.arrival)
        return Preemption(preempted, moves, seated)

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

    def release(self, sample: S) -> list[tuple[int, int | None]]:
        """Frees a seated sample's slots. The last sample's slot moves into each hole: returns (hole, the slot that
        moves there, or None), in the order in which they are to be done."""
        moves: list[tuple[int, int | None]] = []
        self._shares[sample.owner].seats -= sample.width
        holes, sample.slots = sorted(sample.slots, reverse=True), ()
        for hole in holes:
            last, end = self.slots.pop(), len(self.slots)
            moves.append((hole, end if end > hole else None))
            if end > hole:
                self.slots[hole] = last
                last.slots = tuple(hole if slot == end else slot for slot in last.slots)
        return moves

    def _missing(self, sample: S) -> int:
        """How many slots must become free before this sample can be seated."""
        return sample.width - (self.capacity - len(self.slots))

    def _key(self, sample: S) -> float:
        """The rank, with the remaining steps as a fraction that breaks ties."""
        return sample.rank + sample.left / (self.longest + 1)

    def _backlogged(self) -> list[_Share[S]]:
        return [share for share in self._shares.values() if share.waiting]
