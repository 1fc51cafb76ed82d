"""The estimated end of a job, against what the scheduler does; and the step times that it is computed from."""

import random
import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass

import pytest

from model.engine.scheduler import Scheduler
from server.jobs.eta import Work, estimate


@dataclass(eq=False)
class Picture:
    """A picture for the scheduler."""

    job: int
    left: int
    rank: float = 0.0
    owner: str = ""
    width: int = 1
    slots: tuple[int, ...] = ()
    arrival: int = -1


@dataclass(frozen=True)
class Arrival:
    """A job of n pictures that arrives after so many seconds."""

    seconds: float
    n: int
    steps: int
    owner: str


def work_left(arrival: Arrival, pictures: Sequence[Picture]) -> Work:
    """What is left of a job."""
    left = [picture for picture in pictures if picture.left]
    begun = [picture.left for picture in left if picture.slots or picture.left < arrival.steps]
    waiting, rank = len(left) - len(begun), arrival.seconds / 60 + arrival.steps / 1001
    return Work(rank=rank, owner=arrival.owner, begun=begun, waiting=waiting, steps=arrival.steps)


def errors(arrivals: Sequence[Arrival], step_s: Sequence[float], look_every: int = 37) -> list[float]:
    """Relative errors of the time left, of every job at every look, while the scheduler works the jobs off."""
    scheduler, clock_s, turn = Scheduler[Picture](len(step_s) - 1), 0.0, 0
    coming, live = list(enumerate(arrivals)), dict[int, list[Picture]]()
    looks, ends = list[tuple[float, dict[int, float]]](), dict[int, float]()
    while coming or live:
        clock_s = clock_s if live else max(clock_s, coming[0][1].seconds)
        while coming and coming[0][1].seconds <= clock_s:
            job, arrival = coming.pop(0)
            rank = arrival.seconds / 60
            live[job] = [Picture(job, arrival.steps, rank, arrival.owner) for _ in range(arrival.n)]
            for picture in live[job]:
                scheduler.add(picture)
        while scheduler.admit() or scheduler.preempt():
            pass
        if turn % look_every == 0:
            told = estimate([work_left(arrivals[job], pictures) for job, pictures in live.items()], step_s)
            looks.append((clock_s, dict(zip(live, (end.seconds for end in told), strict=True))))
        clock_s, turn = clock_s + step_s[len(scheduler.seated)], turn + 1
        scheduler.charge()
        for picture in list(scheduler.seated):
            picture.left -= 1
            if not picture.left:
                scheduler.release(picture)
        for job in [job for job, pictures in live.items() if not any(picture.left for picture in pictures)]:
            ends[job] = clock_s
            del live[job]
    pairs = [(ends[job] - then, seconds) for then, told in looks for job, seconds in told.items()]
    return [abs(seconds - left) / left for left, seconds in pairs]


def some_arrivals(seed: int, jobs: int, owners: int, apart_s: float) -> list[Arrival]:
    """Jobs of one to sixteen pictures, of 10 to 250 steps, that arrive so far apart on average."""
    draw, seconds, found = random.Random(seed), 0.0, []
    for _ in range(jobs):
        n, steps = draw.choice([1, 1, 1, 2, 4, 16]), draw.choice([10, 20, 50, 50, 100, 250])
        found.append(Arrival(seconds, n, steps, str(draw.randrange(owners))))
        seconds += draw.expovariate(1 / apart_s) if apart_s else 0.0
    return found


def times(slots: int) -> list[float]:
    """Seconds of a step by the number of pictures in it."""
    return [0.0, *(1.0 + 0.35 * batch for batch in range(slots))]


@pytest.mark.parametrize("slots", [1, 8, 64])
@pytest.mark.parametrize("owners", [1, 5])
@pytest.mark.parametrize("apart_s", [0.0, 60.0, 250.0])
def test_the_error_is_a_few_percent_of_the_time_left(slots: int, owners: int, apart_s: float) -> None:
    found = [error for seed in range(3) for error in errors(some_arrivals(seed, 40, owners, apart_s), times(slots))]

    assert statistics.median(found) < 0.1


def test_pictures_that_all_fit_in_a_batch_are_estimated_exactly() -> None:
    queue = [Work(rank=0, begun=[4], waiting=1, steps=10), Work(rank=1, waiting=1, steps=6)]

    # Three pictures for four steps, two for two more, and one for the last four.
    ends = [end.seconds for end in estimate(queue, [0.0, 1.0, 1.5, 1.7, 1.8])]
    assert ends == pytest.approx([4 * 1.7 + 2 * 1.5 + 4 * 1.0, 4 * 1.7 + 2 * 1.5])


def test_one_slot_works_jobs_off_in_order_of_rank() -> None:
    queue = [Work(rank=rank, waiting=1, steps=10) for rank in (3, 1, 2)]

    ends = estimate(queue, [0.0, 0.5])
    assert [end.seconds for end in ends] == [15.0, 5.0, 10.0]
    assert [end.begun for end in ends] == [20, 0, 10]


def test_owners_take_turns_whoever_came_first() -> None:
    first = Work(rank=0, owner="a", waiting=100, steps=10)
    late = Work(rank=9, owner="b", waiting=1, steps=10)

    many, one = estimate([first, late], [0.0, 1.0])
    assert (one.seconds, many.seconds) == (20.0, 1010.0)


def test_a_thousand_owners_cost_little_more_than_one() -> None:
    def cost_s(owners: int) -> float:
        jobs = [Work(rank=i, owner=str(i % owners), waiting=1, steps=100 + i % 900) for i in range(4096)]
        took_s = []
        for _ in range(3):
            began = time.process_time()
            estimate(jobs, [0.01] * 65)
            took_s.append(time.process_time() - began)
        return min(took_s)

    assert cost_s(1000) < 5 * cost_s(1)
