"""When will it be done? The queue played forward, with step times learned from the steps that have been taken.

Nothing here is a guess about the future but its speed: step counts, slots and the order of seating are all known.
"""

import heapq
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Generic, TypeVar

import numpy as np

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
    """What is left of a job: the steps each seated picture still needs; the pictures that wait, and their steps."""

    job: K
    seated: Sequence[int]
    waiting: int
    steps: int


@dataclass(frozen=True, slots=True)
class End:
    """When a job is done: after so many steps of the batch from now on, which take so long."""

    step: float = 0.0
    seconds: float = 0.0


def forecast(queue: Sequence[Work[K]], step_s: Sequence[float]) -> Mapping[K, End]:
    """When each job is done. queue: in the order of seating; step_s[b]: seconds of a step of b pictures.

    Pictures sit down as slots become free and leave after their last step, as in `model.scheduler`.
    """
    slots, clock_s, step = len(step_s) - 1, 0.0, 0
    ends: dict[K, End] = {work.job: End() for work in queue}
    seated = [(left, place) for place, work in enumerate(queue) for left in work.seated]  # (its last step, whose)
    heapq.heapify(seated)

    def leave() -> None:
        nonlocal clock_s, step
        count = min(len(seated), slots)
        last, place = heapq.heappop(seated)
        clock_s, step = clock_s + (last - step) * step_s[count], last
        ends[queue[place].job] = End(step, clock_s)

    played, behind = 0, 0
    late: dict[K, int] = {}  # image-steps until those who are not played forward are done
    for place, work in enumerate(queue):
        if late or played + work.waiting > MOST:
            behind += work.waiting * work.steps
            late[work.job] = behind
            continue
        played += work.waiting
        for _ in range(work.waiting):
            if len(seated) >= slots:
                leave()
            heapq.heappush(seated, (step + work.steps, place))
    while seated:
        leave()
    behind_s = step_s[slots] / slots
    return ends | {job: End(step + work / slots, clock_s + work * behind_s) for job, work in late.items()}
