"""A batch that is always full: as one picture ends, the next takes its slot. Short requests beside those of 1000 steps.

What seating costs shows only here: with 50 steps to a picture 64 slots change hands 1.3 times a step.
"""

import math
import statistics
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import torch

from benchmarks.measure import Measure, median_ratio
from benchmarks.models import our_engine
from model.engine.engine import Engine
from model.engine.events import Finished, Request
from model.sampling.plan import plan, resolve
from model.sampling.table import Plan

LENGTHS = (1000, 50, 20)  # steps of a request; the first is what the others are held against
ROUNDS, FIRST_STEPS, TRIED_STEPS = 4, 5, 10


@dataclass(slots=True)
class Crowd:
    """Requests of one length, as many as there are slots to be filled, each at another place on its way."""

    engine: Engine
    plans: dict[int, Plan] = field(default_factory=dict)  # by their steps
    batch: int = 0
    length: int = 0
    _next: int = 0

    def _submit(self, steps: int) -> None:
        if steps not in self.plans:
            process = self.engine.runner.model.card.process
            self.plans[steps] = plan(process, resolve(process, "ddpm", steps))
        self.engine.submit(Request(self._next, self._next, self.plans[steps]))
        self._next += 1

    def come(self, batch: int, length: int) -> None:
        """They take their slots: the first ends soonest, and the others after it at equal distances."""
        self.batch, self.length = batch, length
        for i in range(batch):
            self._submit(max(1, length * (i + 1) // batch))
        self.walk(FIRST_STEPS)

    def walk(self, steps: int) -> tuple[float, int]:
        """So many steps. Whoever leaves is replaced before the next one, as from a queue: not when it is told, which on
        a GPU is some steps later. -> seconds, image-steps"""
        device, before = self.engine.runner.device, self.engine.stats.sample_steps
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        began = time.perf_counter()
        for _ in range(steps):
            stats = self.engine.stats
            for _ in range(self.batch - stats.seated - stats.waiting):
                self._submit(self.length)
            for event in self.engine.step():
                assert isinstance(event, Finished), event
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        return time.perf_counter() - began, self.engine.stats.sample_steps - before

    def leave(self) -> None:
        """Every slot is free again."""
        for id in range(self._next):
            self.engine.cancel(id)
        while self.engine.busy:
            self.engine.step()


def rates(engine: Engine, batch: int, block_s: float) -> dict[int, list[float]]:
    """Image-steps per second by the length of requests, round by round. The engine must be idle."""
    found: dict[int, list[float]] = {length: [] for length in LENGTHS}
    crowd, steps = Crowd(engine), 0
    for turn in range(ROUNDS + 1):  # the first is for warming up
        for length in LENGTHS:
            crowd.come(batch, length)
            steps = steps or max(TRIED_STEPS, math.ceil(block_s / (crowd.walk(TRIED_STEPS)[0] / TRIED_STEPS)))
            seconds, image_steps = crowd.walk(steps)
            crowd.leave()
            if turn:
                found[length].append(image_steps / seconds)
    return found


def compare(name: str, batch: int, found: dict[int, list[float]]) -> Iterator[Measure]:
    """What `rates` found, and what part of the throughput is left with short requests."""
    for length, each in found.items():
        title = f"{name}, batch {batch} always full: requests of {length} steps"
        yield Measure(title, statistics.median(each), "image-steps/s", (min(each), max(each)))
    for length in LENGTHS[1:]:
        ratio, spread = median_ratio(found[length], found[LENGTHS[0]])
        title = f"{name}, batch {batch} always full: {length} steps against {LENGTHS[0]}"
        yield Measure(title, ratio, "of the throughput", spread)


def measures(device: torch.device, digits: Path) -> Iterator[Measure]:
    """Everything this file measures."""
    batch = 8
    yield from compare("digits", batch, rates(our_engine(digits, device, batch), batch, 2.0))
