"""When will it be done? The queue played forward, with step times learned from the steps that have been taken.

Nothing here is a guess about the future but its speed: step counts, slots and the order of seating are all known.
"""

import heapq
from bisect import bisect
from collections.abc import Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import accumulate
from typing import Generic, TypeAlias, TypeVar

from model.engine.scheduler import SEAT

MOST = 256  # pictures that are played forward one by one; those behind them are counted as so much work

K = TypeVar("K", bound=Hashable)
Piece: TypeAlias = tuple[float, int, int, int]  # pictures of a job: (their rank, whose, steps of each, how many)


@dataclass(frozen=True, slots=True)
class Work(Generic[K]):
    """What is left of a job: the steps each picture still needs that has been begun; those that have not, and their
    steps."""

    job: K
    begun: Sequence[int]
    waiting: int
    steps: int
    order: float = 0.0
    owner: str = ""


@dataclass(frozen=True, slots=True)
class End:
    """When a job is done: after so many steps of the batch from now on, which take so long."""

    step: float = 0.0
    seconds: float = 0.0
    turn: int = 0  # when it is begun: this many are seated before it


@dataclass(slots=True)
class _Share:
    """What an owner has before it. Its image-steps are `used + seats * step`, so that a step changes nothing here."""

    number: int
    pieces: list[Piece] = field(default_factory=list)  # the first of them last
    used: int = 0
    seats: int = 0
    left: int = 0  # image-steps, once no more is played forward

    def pop(self) -> tuple[int, int]:
        """The next picture: its steps, and whose it is."""
        rank, place, steps, count = self.pieces.pop()
        if count > 1:
            self.pieces.append((rank, place, steps, count - 1))
        return steps, place


class _Shares:
    """The owners, ready to be asked who is worst off. Those with equally many seats keep their order as steps are done;
    so there is a heap for each number of seats, with entries (used, owner), some of them out of date."""

    def __init__(self, owners: Iterable[str]) -> None:
        self.all = {owner: _Share(number) for number, owner in enumerate(dict.fromkeys(owners))}
        self._list = list(self.all.values())
        self._heaps: dict[int, list[tuple[int, int]]] = {0: [(0, share.number) for share in self._list]}

    def poorest(self, step: int) -> _Share | None:
        """Who is to have the next seat, of those who wait for one."""
        best: tuple[int, int] | None = None
        for seats, heap in list(self._heaps.items()):
            while heap and self._is_stale(seats, *heap[0]):
                heapq.heappop(heap)
            if not heap:
                del self._heaps[seats]
                continue
            used, number = heap[0]
            level = (used + seats * (step + SEAT), number)
            best = level if best is None or level < best else best
        return None if best is None else self._list[best[1]]

    def _is_stale(self, seats: int, used: int, number: int) -> bool:
        share = self._list[number]
        return (share.seats, share.used) != (seats, used) or not share.pieces

    def seat(self, share: _Share, step: int, seats: int) -> None:
        """An owner has one seat more or less: so many."""
        share.used -= (seats - share.seats) * step
        share.seats = seats
        heapq.heappush(self._heaps.setdefault(seats, []), (share.used, share.number))


def forecast(queue: Sequence[Work[K]], step_s: Sequence[float], longest: int = 1000) -> Mapping[K, End]:
    """When each job is done. step_s[b]: seconds of a step of b pictures; longest: as the scheduler has it.

    Pictures sit down as in `model.engine.scheduler`, if nobody else comes. Only those exchanges are left out by which
    owners make up for what a number of seats that does not divide leaves uneven.
    """
    slots, clock_s, step, turn = len(step_s) - 1, 0.0, 0, 0
    shares = _share_out(queue, longest)
    ends: dict[K, End] = {work.job: End() for work in queue}
    seated: list[tuple[int, int]] = []  # a heap of (its last step, whose)
    turns: dict[int, int] = {}
    while True:
        share = shares.poorest(step)
        while share is not None and len(seated) < slots and turn < MOST:
            steps, place = share.pop()
            shares.seat(share, step, share.seats + 1)
            turns.setdefault(place, turn)
            turn += 1
            heapq.heappush(seated, (step + steps, place))
            share = shares.poorest(step)
        if not seated or (share is not None and turn == MOST):
            break
        count, (last, place) = len(seated), heapq.heappop(seated)
        owner = shares.all[queue[place].owner]
        clock_s, step = clock_s + (last - step) * step_s[count], last
        shares.seat(owner, step, owner.seats - 1)
        ends[queue[place].job] = End(step, clock_s, turns[place])
    if share is not None:
        ends |= _extrapolate(queue, shares, seated, End(step, clock_s, turn), turns, step_s)
    return ends


def _share_out(queue: Sequence[Work[K]], longest: int) -> _Shares:
    """The pictures of each owner, in their order."""
    shares = _Shares(work.owner for work in queue)
    for place, work in enumerate(queue):
        pieces = shares.all[work.owner].pieces
        pieces += [(work.order + left / (longest + 1), place, left, 1) for left in work.begun]
        if work.waiting:
            pieces.append((work.order + work.steps / (longest + 1), place, work.steps, work.waiting))
    for share in shares.all.values():
        share.pieces.sort(reverse=True)
    return shares


def _extrapolate(
    queue: Sequence[Work[K]],
    shares: _Shares,
    seated: Sequence[tuple[int, int]],
    now: End,
    turns: dict[int, int],
    step_s: Sequence[float],
) -> dict[K, End]:
    """The ends of those that were not played to theirs, in a batch that is always full: by then each owner has had as
    many image-steps as the one whose picture it is, or all it wants."""
    slots, ends = len(step_s) - 1, dict[K, End]()

    def note(place: int, steps: float) -> None:
        ends[queue[place].job] = End(now.step + steps, now.seconds + steps * step_s[slots], turns[place])

    for last, place in sorted(seated):
        shares.all[queue[place].owner].left += last - int(now.step)
        note(place, last - now.step)
    owners = shares.all.values()
    wanted = sorted(share.left + sum(steps * count for *_, steps, count in share.pieces) for share in owners)
    sums = [0, *accumulate(wanted)]
    for share in owners:
        had = share.left
        for _, place, steps, count in reversed(share.pieces):
            had += steps * count
            content = bisect(wanted, had)
            done = sums[content] + (len(wanted) - content) * had
            turns.setdefault(place, now.turn + done)
            note(place, (done + steps * (slots - 1) / 2) / slots)  # as it ends, the others are halfway
    return ends
