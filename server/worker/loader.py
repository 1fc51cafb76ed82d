"""How a model comes into memory: its net is read and built in a thread, then its engine is made between steps."""

import logging
import time
import weakref
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from threading import Lock

import torch

from model.checkpoint.card import ModelCard, read_card
from model.checkpoint.load import Model, load_model
from model.engine.engine import Engine
from model.engine.footprint import footprint
from model.engine.runner import Runner
from model.errors import ModelRefused
from model.nets.cpu import CpuNet
from server.worker import faults
from server.worker.cpus import cores
from server.worker.device import (
    announce,
    choose_device,
    choose_dtype,
    describe,
    give_back,
    has_room,
    held_bytes,
    usual_slots,
)
from server.worker.messages import CHANGED, ModelStatus, Start, Step

logger = logging.getLogger(__name__)


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
    served: ModelStatus
    steps: list[Step]


class Loader:
    """Loads models onto one device. `between` is called between two pieces of a load."""

    def __init__(self, start: Start, between: Callable[[], None]) -> None:
        device = choose_device(start.device)
        if device.type == "cpu":
            # The net brings its own threads; torch's would only take time from them.
            torch.set_num_threads(1)
        else:
            torch.cuda.set_device(device)
        self.device, self._start, self._between = device, start, between
        self._dtype = choose_dtype(start.dtype, device, start.unusable)
        self._slots = start.slots or usual_slots(device)
        self._growing = Lock()  # of several models one grows at a time

    def announce(self, card: ModelCard) -> ModelStatus:
        """What is known of a model before it is loaded."""
        size = footprint(card, self._slots, self.device, self._dtype)
        return announce(card, self.device, self._dtype, self._slots, size)

    def begin(self, card: ModelCard, digest: str) -> Arrival:
        """Sends for a model, whose digest it was announced with."""
        held, thread = held_bytes(self.device), ThreadPoolExecutor(1, "loader")
        return Arrival(card.name, thread, thread.submit(self._read, card, digest), time.monotonic(), held)

    def _read(self, card: ModelCard, digest: str) -> Model:
        """In the thread: the net, on the device."""
        if self.device.type == "cuda":
            torch.cuda.set_device(self.device)
        else:
            torch.set_num_threads(self._start.threads or cores())  # a thread has a number of its own
        card = read_card(card.directory, card.name)
        if card.digest != digest:
            raise ModelRefused(CHANGED)
        return load_model(card, self.device, self._dtype, self._start.unusable)

    def finish(self, arrival: Arrival) -> Arrived:
        """Waits for the net, and makes its engine. Raises ModelRefused or torch.OutOfMemoryError.

        The loader's thread then compiles larger batch sizes, and ends.
        """
        grows = False
        try:
            model = arrival.net.result()
            runner = Runner(model, self._slots, self._start.exact)
            for _ in runner.prepare():
                self._between()
            steps = [Step(arrival.name, *taken) for taken in _time_steps(runner, self._between)]
            grows = runner.next_bytes > 0
            if grows:
                arrival.thread.submit(self._grow, weakref.ref(runner))
        finally:
            arrival.thread.shutdown(wait=not grows)
        faults.plant(runner)
        load_s = round(time.monotonic() - arrival.began, 3)
        grown_bytes = held_bytes(self.device) - arrival.held_bytes
        return Arrived(Engine(runner), describe(runner, model, load_s, grown_bytes), steps)

    def _grow(self, runner: "weakref.ref[Runner]") -> None:
        """Compiles larger batch sizes in the loader's thread, until all are there, the memory is short, or the model
        is unloaded."""
        with self._growing:
            while (here := runner()) is not None:
                if not has_room(here.next_bytes):
                    words = "%s: larger batch sizes are not compiled: the next takes %d bytes, and memory is short"
                    logger.warning(words, here.model.card.name, here.next_bytes)
                    break
                if not here.grow():
                    break
                del here
        here = None
        give_back(self.device)


def _time_steps(runner: Runner, between: Callable[[], None]) -> list[tuple[int, float]]:
    """(batch size, seconds of a step) of the smallest and the largest batch. For a CPU, where a step may take seconds,
    it is estimated from the picture that the net was tried on; the steps that follow correct it."""
    net, largest = runner.model.net, runner.slots.capacity
    if isinstance(net, CpuNet):
        return [(1, net.picture_s), (largest, largest * net.picture_s)]
    taken = []
    for bucket in (runner.bucket_for(1), runner.bucket_for(largest)):
        taken.append((bucket, min(_time_a_step(runner, bucket) for _ in range(2))))
        between()
    return taken


def _time_a_step(runner: Runner, bucket: int) -> float:
    """How long a step takes, with nobody in it."""
    began = time.monotonic()
    runner.step(bucket)
    if runner.device.type == "cuda":
        torch.cuda.synchronize(runner.device)
    return time.monotonic() - began
