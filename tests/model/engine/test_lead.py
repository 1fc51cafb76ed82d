"""How far the host runs ahead of a GPU, shown with a GPU that is a list of its work and a clock of its own."""

from dataclasses import dataclass, field

import pytest
import torch

import model.engine.engine
from model.engine.engine import Engine
from model.engine.lead import MOST_MS, MOST_STEPS, Lead
from tests.model.tiny import a_request, pictures, quick_engine
from tests.model.tiny import run as run_engine


@dataclass
class Device:
    """A GPU that does its work when the host waits for it, and not before."""

    step_ms: float
    given: list[float] = field(default_factory=list)  # milliseconds of each step
    done: int = 0

    def step(self) -> None:
        """One more step is queued."""
        self.given.append(self.step_ms)

    def mark(self) -> "Place":
        """Behind what has been queued."""
        return Place(self, len(self.given))

    @property
    def queued(self) -> int:
        """Steps that are not done."""
        return len(self.given) - self.done


@dataclass
class Place:
    """A place in the device's work: behind so many steps."""

    device: Device
    steps: int

    def synchronize(self) -> None:
        self.device.done = max(self.device.done, self.steps)

    def elapsed_time(self, later: "Place") -> float:
        assert later.steps <= self.device.done, "the device would be waited for"
        return sum(self.device.given[self.steps : later.steps])


def run(lead: Lead, device: Device, steps: int) -> list[int]:
    """How many steps are queued behind each of so many."""
    queued = []
    for _ in range(steps):
        lead.queue(device.step)
        queued.append(device.queued)
    return queued


def test_short_steps_are_bounded_by_their_number() -> None:
    device = Device(step_ms=0.5)

    assert run(Lead(device.mark), device, 6) == [1, 2, 3, 3, 3, 3]
    assert MOST_STEPS == 3


@pytest.mark.parametrize(
    ("step_ms", "most"), [(6.0, 3), (7.0, 2), (9.9, 2), (11.0, 1), (19.0, 1), (70.0, 1), (900.0, 1)]
)
def test_long_steps_are_bounded_by_their_time_but_one_is_always_queued(step_ms: float, most: int) -> None:
    device = Device(step_ms)
    queued = run(Lead(device.mark), device, 8)

    assert queued[-1] == most
    assert most == 1 or most * step_ms <= MOST_MS


def test_a_batch_that_grows_shortens_the_lead_within_three_steps_and_one_that_shrinks_makes_it_long_again() -> None:
    device = Device(step_ms=1.0)
    lead = Lead(device.mark)
    run(lead, device, 5)
    device.step_ms = 70.0
    assert run(lead, device, 4)[-1] == 1

    device.step_ms = 1.0
    assert run(lead, device, 5)[-1] == 3


def test_a_pause_between_two_steps_is_not_taken_for_a_long_step() -> None:
    device = Device(step_ms=1.0)
    lead = Lead(device.mark)
    run(lead, device, 4)
    device.given.append(5000.0)  # others' work

    assert run(lead, device, 6)[-1] == 3


def test_a_step_that_fails_leaves_nothing_to_wait_for() -> None:
    device = Device(step_ms=1.0)
    lead = Lead(device.mark)

    def fails() -> None:
        raise MemoryError

    for _ in range(5):
        with pytest.raises(MemoryError):
            lead.queue(fails)
    assert run(lead, device, 4) == [1, 2, 3, 3]


def test_an_engine_on_a_gpu_queues_its_steps_and_makes_the_same_pictures(monkeypatch: pytest.MonkeyPatch) -> None:
    device, requests = Device(step_ms=8.0), [a_request(i, 4 + i, seed=i) for i in range(3)]
    expected = pictures(run_engine(quick_engine(2), *requests))
    runner = quick_engine(2).runner
    usual, ahead = runner.step, list[int]()

    def step(bucket: int) -> None:
        usual(bucket)
        device.step()
        ahead.append(device.queued)

    monkeypatch.setattr(runner, "step", step)
    monkeypatch.setattr(runner, "device", torch.device("cuda"))
    monkeypatch.setattr(torch.cuda, "Stream", lambda device: None)  # so that pictures are copied as on a CPU
    monkeypatch.setattr(model.engine.engine, "mark", lambda of: device.mark())

    assert pictures(run_engine(Engine(runner), *requests)) == expected
    assert ahead[:6] == [1, 2, 3, 4, 3, 3] and max(ahead) == 4  # the fourth is waited for once it has been queued
