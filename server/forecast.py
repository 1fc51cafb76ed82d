"""When will it be done? The queue played forward, with step times learned from the steps that have been taken.

Nothing here is a guess about the future but its speed: step counts, slots and the order of seating are all known.
"""

import heapq
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Generic, TypeVar

import numpy as np

from model.scheduler import SEAT

MEMORY = 0.1  # the weight of the newest step in the mean of its batch size
MOST = 4096  # pictures that are played forward one by one; those behind them are counted as so much work

K = TypeVar("K", bound=Hashable)


@dataclass(slots=True)
class Pace:
    """How long a step takes, by the number of pictures in it."""

    _mean_s: dict[int, float] = field(default_factory=dict)

    def learn(self, batch: int, seconds: float) -> None:
        """A step of so many slots took so long."""
        before = self._mean_s.get(batch, seconds)
        self._mean_s[batch] = before + MEMORY * (seconds - before)

    def step_s(self, buckets: Sequence[int]) -> list[float]:
        """Seconds of a step by how many pictures are in it, 0 .. the largest bucket; they take what their bucket takes,
        and between the buckets that were seen lies a line. Zeros if none was."""
        if not self._mean_s:
            return [0.0] * (buckets[-1] + 1)
        seen = sorted(self._mean_s)
        times = np.interp(buckets, seen, [self._mean_s[bucket] for bucket in seen])
        counts = range(buckets[-1] + 1)
        by_count: list[float] = times[np.searchsorted(buckets, counts)].tolist()
        return by_count


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
class _Share(Generic[K]):
    """What an owner has before it: (rank, steps, how many such pictures, whose), the first last."""

    pieces: list[tuple[float, int, int, int]] = field(default_factory=list)
    used: int = 0
    seats: int = 0

    def pop(self) -> tuple[int, int]:
        """The next picture: its steps, and whose it is."""
        rank, steps, count, place = self.pieces.pop()
        if count > 1:
            self.pieces.append((rank, steps, count - 1, place))
        return steps, place


def forecast(queue: Sequence[Work[K]], step_s: Sequence[float], longest: int = 1000) -> Mapping[K, End]:
    """When each job is done. step_s[b]: seconds of a step of b pictures; longest: as the scheduler has it.

    Pictures sit down as in `model.scheduler`, if nobody else comes. Only those exchanges are left out by which owners
    make up for what a number of seats that does not divide leaves uneven.
    """
    slots, clock_s, step, turn = len(step_s) - 1, 0.0, 0, 0
    shares, late = _share_out(queue, longest)
    ends: dict[K, End] = {work.job: End() for work in queue}
    seated: list[tuple[int, int]] = []  # a heap of (its last step, whose)
    turns: dict[int, int] = {}
    while True:
        while len(seated) < slots and (able := [share for share in shares.values() if share.pieces]):
            share = min(able, key=lambda share: share.used + SEAT * share.seats)
            steps, place = share.pop()
            share.seats += 1
            turns.setdefault(place, turn)
            turn += 1
            heapq.heappush(seated, (step + steps, place))
        if not seated:
            break
        count, (last, place) = len(seated), heapq.heappop(seated)
        for share in shares.values():
            share.used += share.seats * (last - step)
        shares[queue[place].owner].seats -= 1
        clock_s, step = clock_s + (last - step) * step_s[count], last
        ends[queue[place].job] = End(step, clock_s, turns[place])
    for place, work in late.items():
        behind_s = work * step_s[slots] / slots
        ends[queue[place].job] = End(step + work / slots, clock_s + behind_s, turns.get(place, turn + work))
    return ends


def _share_out(queue: Sequence[Work[K]], longest: int) -> tuple[dict[str, _Share[K]], dict[int, int]]:
    """The pictures of each owner in their order, as far as they are played forward; and the image-steps until each of
    the jobs is done that are not."""
    shares: dict[str, _Share[K]] = {work.owner: _Share() for work in queue}
    counts, most = dict.fromkeys(shares, 0), MOST // max(1, len(shares))
    behind, late = 0, dict[int, int]()
    for place in sorted(range(len(queue)), key=lambda place: queue[place].order):
        work = queue[place]
        pieces = shares[work.owner].pieces
        pieces += [(work.order + left / (longest + 1), left, 1, place) for left in work.begun]
        counts[work.owner] += work.waiting
        if counts[work.owner] > most:
            behind += work.waiting * work.steps
            late[place] = behind
        elif work.waiting:
            pieces.append((work.order + work.steps / (longest + 1), work.steps, work.waiting, place))
    for share in shares.values():
        share.pieces.sort(key=lambda piece: (piece[0], piece[3]), reverse=True)
    return shares, late
