"""How long requests wait by rank: the engine's own scheduler played forward, without a model.

    python -m benchmarks.order

Nothing here takes time but a step, and a step takes what its batch is said to take, so that a run is over in seconds
and the same everywhere. Beside it: requests of equal step counts in one batch, run to its end, as micro-batchers do;
and first come, first served, without preemption.
"""

import heapq
import math
import random
import statistics
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

from benchmarks.measure import Measure
from model.engine.scheduler import Scheduler

MIXTURE = {50: 0.4, 100: 0.3, 250: 0.15, 500: 0.1, 1000: 0.05}  # share of requests by steps


@dataclass(eq=False, slots=True)
class Picture:
    """A requested picture."""

    at_s: float
    steps: int
    owner: str = ""
    rank: float = 0.0
    left: int = 0
    width: int = 1
    slots: tuple[int, ...] = ()
    arrival: int = -1
    end_s: float = math.inf

    def __post_init__(self) -> None:
        self.left, self.rank = self.steps, self.at_s / 60

    @property
    def took_s(self) -> float:
        """From its arrival to its end."""
        return self.end_s - self.at_s


@dataclass(slots=True)
class World:
    """What runs steps: so many slots, and the seconds of a step of b pictures."""

    slots: int
    step_s: Callable[[int], float]
    preemptions: int = field(default=0)

    @property
    def image_steps_per_s(self) -> float:
        """When every slot is taken."""
        return self.slots / self.step_s(self.slots)


CPU = World(8, lambda batch: 0.002 + 0.004 * batch)  # about what weights/digits takes on two cores
GPU = World(64, lambda batch: 0.001 + 0.00003 * batch)  # a small net


def seated_by_rank(
    world: World, pictures: Sequence[Picture], preemptions: bool = True, until_s: float = math.inf
) -> None:
    """The scheduler of the engine. preemptions: whether it may preempt."""
    scheduler, queue, clock_s = Scheduler[Picture](world.slots), list(reversed(pictures)), 0.0
    while (queue or scheduler.seated or scheduler.waiting) and clock_s < until_s:
        if not (scheduler.seated or scheduler.waiting):
            clock_s = max(clock_s, queue[-1].at_s)
        while queue and queue[-1].at_s <= clock_s:
            scheduler.add(queue.pop())
        scheduler.admit()
        while preemptions and scheduler.preempt():
            world.preemptions += 1
        clock_s += world.step_s(len(scheduler.seated))
        scheduler.charge()
        for picture in list(scheduler.seated):
            picture.left -= 1
            if picture.left == 0:
                picture.end_s = clock_s
                scheduler.release(picture)


def first_come(world: World, pictures: Sequence[Picture]) -> None:
    """Whoever came first sits first and stays."""
    clock_s, queue, seated = 0.0, list(reversed(pictures)), list[Picture]()
    while queue or seated:
        if not seated:
            clock_s = max(clock_s, queue[-1].at_s)
        while queue and queue[-1].at_s <= clock_s and len(seated) < world.slots:
            seated.append(queue.pop())
        clock_s += world.step_s(len(seated))
        for picture in list(seated):
            picture.left -= 1
            if picture.left == 0:
                picture.end_s = clock_s
                seated.remove(picture)


def equal_steps(world: World, pictures: Sequence[Picture], window_s: float = 0.02) -> None:
    """The eldest request and those of as many steps that are there share a batch, which runs to its end."""
    clock_s, left = 0.0, list(pictures)
    while left:
        clock_s = max(clock_s, left[0].at_s) + window_s
        there = [picture for picture in left if picture.at_s <= clock_s and picture.steps == left[0].steps][
            : world.slots
        ]
        clock_s += left[0].steps * world.step_s(len(there))
        for picture in there:
            picture.end_s = clock_s
        taken = set(map(id, there))
        left = [picture for picture in left if id(picture) not in taken]


def poisson(world: World, load: float, count: int, seed: int = 0) -> list[Picture]:
    """Requests of the mixture that come at random and ask for this share of what the world can do."""
    draw, mean = random.Random(seed), sum(steps * share for steps, share in MIXTURE.items())
    rate, at_s, pictures = load * world.image_steps_per_s / mean, 0.0, []
    for _ in range(count):
        at_s += draw.expovariate(rate)
        pictures.append(Picture(at_s, draw.choices(list(MIXTURE), list(MIXTURE.values()))[0]))
    return pictures


def late(pictures: Sequence[Picture], steps: int) -> float:
    """The 99th percentile of what requests of so many steps took."""
    return statistics.quantiles([picture.took_s for picture in pictures if picture.steps == steps], n=100)[98]


def beside_a_flood(world: World, steps: int, pictures: int = 5000, apart: bool = True) -> list[float]:
    """One owner asks for `pictures` of so many steps, another now and then for one of 50. -> what each took, in the
    time it takes if each owner gets half of the image-steps"""
    flood = [Picture(0.0, steps, "flood" if apart else "") for _ in range(pictures)]
    half_s = 50 * world.step_s(world.slots) * (2 if world.slots == 1 else 1)
    draw = random.Random(1)
    asked = [Picture((i + draw.random() / 2) * 3 * half_s, 50, "other" if apart else "") for i in range(1, 200)]
    last_s = asked[-1].at_s + 10 * half_s
    seated_by_rank(world, list(heapq.merge(flood, asked, key=lambda picture: picture.at_s)), until_s=last_s)
    return [picture.took_s / half_s for picture in asked]


def measures() -> Iterator[Measure]:
    """Everything this file measures."""
    for name, world in {"CPU, 8 slots": CPU, "GPU, 64 slots": GPU}.items():
        for load in (0.6, 0.8, 0.95):
            ways: dict[str, Callable[[World, list[Picture]], None]] = {
                "equal step counts": equal_steps,
                "first come": first_come,
                "by rank, without preemption": lambda world, pictures: seated_by_rank(world, pictures, False),
                "by rank": seated_by_rank,
            }
            for way, run in ways.items():
                pictures = poisson(world, load, 4000)
                world.preemptions = 0
                run(world, pictures)
                for steps in (50, 1000):
                    yield Measure(f"{name}, {load:.0%} load, {way}: {steps} steps, p99", late(pictures, steps), "s")
                if world.preemptions:
                    yield Measure("   preemptions", world.preemptions / 4000, "per picture")
    for name, world in {"1 slot": World(1, CPU.step_s), "8 slots": CPU, "64 slots": GPU}.items():
        for steps in (50, 1000):
            took = beside_a_flood(world, steps)
            yield Measure(f"{name}: beside 5,000 pictures of {steps} steps", max(took), "of the time at half share")


if __name__ == "__main__":
    for measure in measures():
        print(f"{measure.name:70} {measure.value:10.4f} {measure.unit}")
