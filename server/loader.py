"""How a model comes into memory: its net is read and built in a thread, then its engine is made between steps."""

import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass

import torch

from model.card import ModelCard, read_card
from model.checkpoint import Model, load_model
from model.engine import Engine
from model.errors import ModelRefused
from model.footprint import footprint
from model.runner import Runner
from server import faults, machine
from server.backend import Served
from server.devices import cores
from server.messages import CHANGED, Start, Step


@dataclass(frozen=True, slots=True)
class Arrival:
    """A model on its way into memory."""

    name: str
    thread: ThreadPoolExecutor
    net: "Future[Model]"
    began: float
    held_bytes: int  # of a GPU, before


@dataclass(frozen=True, slots=True)
class Arrived:
    """It is there. `steps` were taken to learn how long one takes."""

    engine: Engine
    served: Served
    steps: list[Step]


class Loader:
    """Loads models onto one device. `between` is called between two pieces of a load."""

    def __init__(self, start: Start, between: Callable[[], None]) -> None:
        device = machine.choose_device(start.device)
        if device.type == "cpu":
            machine.prepare_cpu(start.threads)
        else:
            torch.cuda.set_device(device)
        self.device, self._start, self._between = device, start, between
        self._dtype, self._slots = machine.choose_dtype(start.dtype, device), start.slots or machine.usual_slots(device)

    def announce(self, card: ModelCard) -> Served:
        """What is known of a model before it is loaded."""
        size = footprint(card, self._slots, self.device, self._dtype)
        return machine.announce(card, self.device, self._dtype, self._slots, size)

    def begin(self, card: ModelCard, digest: str) -> Arrival:
        """Sends for a model, whose digest it was announced with."""
        held_bytes, thread = machine.held_bytes(self.device), ThreadPoolExecutor(1, "loader")
        return Arrival(card.name, thread, thread.submit(self._read, card, digest), time.monotonic(), held_bytes)

    def _read(self, card: ModelCard, digest: str) -> Model:
        """In the thread: the net, on the device."""
        if self.device.type == "cuda":
            torch.cuda.set_device(self.device)
        else:
            torch.set_num_threads(self._start.threads or cores())  # a thread has a number of its own
        card = read_card(card.directory, card.name)
        if card.digest != digest:
            raise ModelRefused(CHANGED)
        return load_model(card, self.device, self._dtype)

    def finish(self, arrival: Arrival) -> Arrived:
        """Waits for the net, and makes its engine. Raises ModelRefused or torch.OutOfMemoryError.

        The thread ends here. One that stays keeps threads of its own for OpenMP, which then counts more of them than
        there are processors, and lets those of a step sleep at every barrier: half the speed of an engine on two cores.
        """
        with arrival.thread:
            model = arrival.net.result()
        runner = Runner(model, self._slots, self._start.exact, between=self._between)
        faults.plant(runner)
        steps = []
        for count in (1, runner.slots.capacity):
            steps.append(Step(arrival.name, runner.bucket_for(count), _time_a_step(runner, count)))
            self._between()
        load_s = round(time.monotonic() - arrival.began, 3)
        grown_bytes = machine.held_bytes(self.device) - arrival.held_bytes
        return Arrived(Engine(runner), machine.describe(runner, model, load_s, grown_bytes), steps)


def _time_a_step(runner: Runner, count: int) -> float:
    """How long a step takes that has room for so many pictures, with nobody in it: the shorter of two."""
    took = []
    for _ in range(2):
        began = time.monotonic()
        runner.step(runner.bucket_for(count))
        if runner.device.type == "cuda":
            torch.cuda.synchronize(runner.device)
        took.append(time.monotonic() - began)
    return min(took)
