"""Pictures in changing company, a thousand or as many as are asked for, each against the same picture alone: bytes,
nothing less.

Samplers, step counts and seeds are drawn; pictures arrive, are given up and end at random, so that buckets, slots and
companions change all the time.
"""

import random
from collections.abc import Iterator
from pathlib import Path

import torch

from benchmarks.measure import Measure
from benchmarks.models import our_engine
from model.engine.engine import Engine
from model.engine.events import Finished, Request
from model.sampling.plan import SAMPLERS, plan, resolve
from model.sampling.samplers import Sampling
from model.sampling.table import Plan

LONGEST = 6  # steps


def alone(engine: Engine, wanted: Request) -> bytes:
    """A picture made with nobody else in the batch."""
    engine.submit(wanted)
    while True:
        for event in engine.step():
            assert isinstance(event, Finished)
            return event.picture.tobytes()


def measures(device: torch.device, digits: Path) -> Iterator[Measure]:
    """Everything this file measures."""
    yield compare(our_engine(digits, device, 16), 1000)


def compare(engine: Engine, comparisons: int) -> Measure:
    """How many of so many pictures have the same bytes in company as alone. The engine must be idle."""
    draw = random.Random(0)
    process, plans = engine.runner.model.card.process, dict[Sampling, Plan]()
    wanted: list[Request] = []
    for id in range(comparisons):
        sampler = draw.choice(list(SAMPLERS))
        sampling = resolve(process, sampler, draw.randint(1, LONGEST))
        table = plans.setdefault(sampling, plan(process, sampling))
        wanted.append(Request(id, draw.randrange(1 << 40), table, rank=draw.random()))
    made, waiting = dict[int, bytes](), list(wanted)
    while len(made) < comparisons:
        for _ in range(min(draw.choice([0, 1, 1, 2, 3, 20]), len(waiting))):
            engine.submit(waiting.pop())
        if draw.random() < 0.2:  # somebody else comes, and leaves within a few steps
            engine.submit(Request("guest", draw.randrange(1 << 40), plans[draw.choice(list(plans))], rank=-1.0))
        made |= {int(e.id): e.picture.tobytes() for e in engine.step() if isinstance(e, Finished) and e.id != "guest"}  # type: ignore[call-overload]
        engine.cancel("guest")
    while engine.busy:
        engine.step()
    same = sum(alone(engine, each) == made[index] for index, each in enumerate(wanted))
    name = f"{engine.runner.model.card.name}: pictures in company with the bytes they have alone, of {comparisons}"
    return Measure(name, same, f"(buckets {len(engine.runner.admitted)}, exact: {engine.runner.exact})")
