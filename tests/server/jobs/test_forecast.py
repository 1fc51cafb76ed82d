"""How long it will take is worked out, not guessed: the queue played forward."""

import random
import time
from collections.abc import Sequence
from dataclasses import dataclass

import pytest

from model.engine.scheduler import Scheduler
from server.jobs import forecast as forecasts
from server.jobs.forecast import MOST, Work, forecast


@dataclass(eq=False)
class Picture:
    """A picture for the scheduler."""

    job: int
    left: int
    order: float = 0.0
    owner: str = ""
    slot: int | None = None
    arrival: int = -1


def play(queue: Sequence[Work[int]], step_s: Sequence[float]) -> dict[int, float]:
    """The same by the real scheduler, step by step."""
    scheduler, clock_s, ends = Scheduler[Picture](len(step_s) - 1), 0.0, {}
    for work in queue:
        for left in [*work.begun, *[work.steps] * work.waiting]:
            scheduler.add(Picture(work.job, left, work.order, work.owner))
    while scheduler.admit() or scheduler.seated:
        while scheduler.exchange():
            pass
        clock_s += step_s[len(scheduler.seated)]
        scheduler.charge()
        for picture in list(scheduler.seated):
            picture.left -= 1
            if picture.left == 0:
                scheduler.release(picture)
                ends[picture.job] = clock_s
    return ends


@pytest.mark.parametrize("seed", range(20))
def test_the_forecast_is_what_the_scheduler_does(seed: int) -> None:
    draw = random.Random(seed)
    slots = draw.randint(1, 8)
    step_s = [0.0, *sorted(draw.uniform(0.001, 0.1) for _ in range(slots))]
    queue = some_jobs(draw, [""])

    assert {job: end.seconds for job, end in forecast(queue, step_s).items()} == pytest.approx(play(queue, step_s))


@pytest.mark.parametrize("seed", range(10))
def test_with_owners_who_share_it_is_nearly_that(seed: int) -> None:
    draw = random.Random(seed)
    queue = some_jobs(draw, ["a", "b", "c"], most=60)
    step_s = [0.0, *(1.0 + 0.5 * batch for batch in range(8))]
    played, told = play(queue, step_s), forecast(queue, step_s)
    errors = [abs(told[job].seconds - end) / end for job, end in played.items()]

    assert sum(errors) / len(errors) < 0.1


def some_jobs(draw: random.Random, owners: Sequence[str], most: int = 12) -> list[Work[int]]:
    """A few jobs, some of whose pictures have been begun."""
    queue = []
    for job in range(draw.randint(2, 12)):
        begun = [draw.randint(1, 40) for _ in range(draw.randint(0, 3))]
        waiting, order = draw.randint(0 if begun else 1, most), draw.choice([0.0, 0.01, 1.0])
        queue.append(Work(job, begun, waiting, draw.randint(1, 40), order, draw.choice(owners)))
    return queue


def test_who_is_far_behind_is_counted_as_work_in_order() -> None:
    jobs = [Work(i, [], 64, 10, i) for i in range(2 * MOST // 64)]
    jobs.insert(MOST // 64, Work(-1, [], 1, 10, MOST // 64 - 0.5))
    ends = forecast(jobs, [0.0, 0.5, 0.75, 0.9, 1.0])

    assert ends[2 * MOST // 64 - 1].seconds == pytest.approx(2 * MOST * 10 / 4, rel=0.01)
    in_order = [ends[work.job].seconds for work in jobs]
    assert in_order == sorted(in_order)


@pytest.mark.parametrize("seed", range(3))
def test_with_owners_who_are_far_behind_it_is_nearly_what_the_scheduler_does(
    seed: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(forecasts, "MOST", 64)
    draw, step_s = random.Random(seed), [0.0, *(1.0 + 0.5 * batch for batch in range(8))]
    owners = [str(owner) for owner in range(20)]
    queue = [Work(job, [], draw.randint(1, 9), draw.randint(1, 40), job / 9, draw.choice(owners)) for job in range(120)]
    played, told = play(queue, step_s), forecast(queue, step_s)
    errors = [abs(told[job].seconds - end) / end for job, end in played.items()]

    assert sum(errors) / len(errors) < 0.15


def test_a_thousand_owners_cost_little_more_than_one() -> None:
    def cost_s(owners: int) -> float:
        jobs = [Work(i, [], 1, 100 + i % 900, float(i), str(i % owners)) for i in range(4096)]
        took_s = []
        for _ in range(3):
            began = time.process_time()
            forecast(jobs, [0.01] * 65)
            took_s.append(time.process_time() - began)
        return min(took_s)

    assert cost_s(1000) < 5 * cost_s(1)
