"""How a model gets into memory: a thread reads and builds its net, then its engine is made between steps of others."""

import errno
import logging
import time
import weakref
from collections.abc import Callable, Generator, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from threading import Lock
from typing import TypeVar

import torch

from model.checkpoint.card import ModelCard, read_card
from model.checkpoint.load import Model, load_model
from model.engine.engine import Engine
from model.engine.footprint import footprint
from model.engine.runner import Runner
from model.errors import ModelRefused, reason
from model.nets.cpu import CpuNet
from server.troubles import LACKING, RETRY_S, Troubles, shortage
from server.worker import device
from server.worker.cpus import cores
from server.worker.messages import CHANGED, ModelStatus, Start, Step

logger = logging.getLogger(__name__)
NO_MEMORY = "the memory of the device is too small for it"
AWAY = {errno.ESTALE, errno.ETIMEDOUT}  # errors of files on other machines
T = TypeVar("T")
POLL_S = 0.01  # between two looks at the thread, while nothing else is to be done


@dataclass(frozen=True, slots=True)
class Loaded:
    """A model in memory. `steps` were taken to learn how long one takes."""

    engine: Engine
    status: ModelStatus
    steps: list[Step]


class Loader:
    """Loads models onto one device."""

    def __init__(self, start: Start) -> None:
        self.device = device.choose_device(start.device)
        if self.device.type == "cpu":
            # The net brings its own threads; torch's would only take time from them.
            torch.set_num_threads(1)
        else:
            torch.cuda.set_device(self.device)
        self._start = start
        self._dtype = device.choose_dtype(start.dtype, self.device, start.unusable)
        self._slots = start.slots or device.usual_slots(self.device)
        self._growing = Lock()  # of several models one grows at a time

    def announce(self, name: str, directory: Path) -> tuple[ModelCard, ModelStatus]:
        """A model's card, and what is known of it before it is loaded. Raises ModelRefused, also if the card is not
        the one that the API process has read."""
        card = read_card(directory, name, self._start.plans.get(name))
        if self._start.configs.get(name, card.configs) != card.configs:
            raise ModelRefused(CHANGED)
        slots = self._slots_of(card)
        size = footprint(card, slots, self.device, self._dtype)
        try:
            return card, device.announce(card, self.device, self._dtype, slots, size)
        except OSError as error:
            raise ModelRefused(f"{card.weights.name} could not be read: {reason(error)}") from error

    def _slots_of(self, card: ModelCard) -> int:
        """The slots of a model: two at least where pictures may be guided."""
        guides = card.labels is not None and card.labels.null is not None
        return max(2, self._slots) if guides else self._slots

    def announced(self, name: str, directory: Path) -> Generator[float, None, tuple[ModelCard, ModelStatus]]:
        """What `announce` returns, as soon as there is enough for it."""

        def work() -> Generator[float, None, tuple[ModelCard, ModelStatus]]:
            yield 0.0
            return self.announce(name, directory)

        return _outlast(work)

    def load(self, card: ModelCard, digest: str) -> Generator[float, None, Loaded]:
        """Loads a model, which was announced with this digest, in pieces of about a step; yields for how many seconds
        there is no next one. Raises ModelRefused or torch.OutOfMemoryError.

        Afterwards the thread goes on to compile larger batch sizes, and ends.
        """
        return _outlast(lambda: self._load(card, digest))

    def _load(self, card: ModelCard, digest: str) -> Generator[float, None, Loaded]:
        began, held_bytes, grows = time.monotonic(), device.held_bytes(self.device), False
        thread = ThreadPoolExecutor(1, "loader")
        try:
            reading = thread.submit(self._read, card, digest)
            while not reading.done():
                yield POLL_S
            model = reading.result()
            runner = Runner(model, self._slots_of(card), self._start.exact)
            for _ in runner.prepare():
                yield 0.0
            steps = list[Step]()
            for step in _time_steps(card.name, runner):
                steps.append(step)
                yield 0.0
            grows = runner.next_bytes > 0
            if grows:
                thread.submit(self._grow, weakref.ref(runner))
        finally:
            thread.shutdown(wait=not grows)
        load_s = round(time.monotonic() - began, 3)
        grown_bytes = device.held_bytes(self.device) - held_bytes
        return Loaded(Engine(runner), device.describe(runner, model, load_s, grown_bytes), steps)

    def _read(self, card: ModelCard, digest: str) -> Model:
        """In the thread: the net, on the device."""
        if self.device.type == "cuda":
            torch.cuda.set_device(self.device)
        else:
            torch.set_num_threads(self._start.threads or cores())  # a thread has a number of its own
        card = read_card(card.directory, card.name, card.process.plans)
        model = load_model(card, self.device, self._dtype, self._start.unusable)
        if model.digest != digest:  # that of the bytes that were loaded
            raise ModelRefused(CHANGED)
        return model

    def _grow(self, runner: "weakref.ref[Runner]") -> None:
        """In the thread: compiles larger batch sizes, until there is no more, memory is short, or the model is gone."""
        with self._growing:
            while (here := runner()) is not None:
                if not device.has_room(here.next_bytes):
                    words = "%s: larger batch sizes are not compiled: the next takes %d bytes, and memory is short"
                    logger.warning(words, here.model.card.name, here.next_bytes)
                    break
                if not here.grow():
                    break
                del here
        here = None
        device.give_back(self.device)


def _time_steps(name: str, runner: Runner) -> Iterator[Step]:
    """A step of the smallest and one of the largest batch, with nobody in it. For a CPU, where a step may take seconds,
    they are estimated from the picture that the net was tried on; the steps that follow correct them."""
    net, largest = runner.model.net, runner.slots.capacity
    if isinstance(net, CpuNet):
        yield Step(name, 1, net.picture_s)
        yield Step(name, largest, largest * net.picture_s)
        return
    for bucket in (runner.bucket_for(1), runner.bucket_for(largest)):
        yield Step(name, bucket, min(_time_a_step(runner, bucket) for _ in range(2)))


def _time_a_step(runner: Runner, bucket: int) -> float:
    began = time.monotonic()
    runner.step(bucket)
    if runner.device.type == "cuda":
        torch.cuda.synchronize(runner.device)
    return time.monotonic() - began


def _lack(error: Exception) -> str | None:
    """What kept a model from being loaded, if that may pass."""
    cause = error.__cause__ if isinstance(error, ModelRefused) else error
    return "files of a network" if isinstance(cause, OSError) and cause.errno in AWAY else shortage(cause)


def _outlast(work: Callable[[], Generator[float, None, T]]) -> Generator[float, None, T]:
    """What `work` comes to, which begins again while there is too little of something for it: other models make their
    steps meanwhile, and neither this model nor the engine is given up for it."""
    troubles = Troubles()
    try:
        while True:
            try:
                return (yield from work())
            except (*LACKING, ModelRefused) as error:
                if (resource := _lack(error)) is None:
                    raise
                troubles.begin(resource, error.__cause__ or error)
            until = time.monotonic() + RETRY_S
            while (left_s := until - time.monotonic()) > 0:
                yield left_s
    finally:
        for resource in [*troubles.now]:
            troubles.end(resource)
