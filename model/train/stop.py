"""When a training ends: after SIGINT or SIGTERM, once all processes that share its batch know of it."""

import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import TypeVar

import torch
from torch import distributed

from model.train.trainer import Trainer

T = TypeVar("T")


class Interrupted(Exception):
    """A signal came within `Stop.interruptible`."""


class Stop:
    """Notes the first of the two signals. The same one again raises KeyboardInterrupt (torchrun sends one of each)."""

    def __init__(self) -> None:
        self.signal = 0  # of this process, or of one that shares the batch
        self._received, self._at_once = 0, False

    @contextmanager
    def listening(self) -> Iterator[None]:
        """Within it the signals are noted."""

        def note(number: int, _: FrameType | None) -> None:
            if number == self._received:
                raise KeyboardInterrupt
            self._received = self._received or number
            self.signal = self.signal or number
            if self._at_once:
                raise Interrupted

        before = {each: signal.signal(each, note) for each in (signal.SIGINT, signal.SIGTERM)}
        try:
            yield
        finally:
            for each, handler in before.items():
                signal.signal(each, handler)

    def interruptible(self, look: Callable[[], T]) -> T | None:
        """What `look` returns; None if a signal came before or meanwhile. It must be something that changes nothing."""
        if self.signal:
            return None
        try:
            self._at_once = True
            return look()
        except Interrupted:
            return None
        finally:
            self._at_once = False

    def agree(self, trainer: Trainer) -> bool:
        """Whether a signal came to any of the processes that share the batch. All note it, and their clocks become
        the same."""
        if trainer.world > 1:
            told = torch.tensor([float(self.signal), trainer.seconds], device=trainer.device)
            distributed.all_reduce(told, distributed.ReduceOp.MAX)
            self.signal, trainer.seconds = int(told[0]), float(told[1])
        return bool(self.signal)
