"""How far the host runs ahead of a GPU: by some steps, so that the GPU never waits for the host, but for no more than
20 ms, so that samples join and leave the batch soon.
"""

from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch

MOST_STEPS = 3
MOST_MS = 20.0


class Mark(Protocol):
    """A point in a GPU's work, such as a torch.cuda.Event."""

    def synchronize(self) -> None:
        """Blocks until the GPU has reached it."""

    def elapsed_time(self, later: Any, /) -> float:
        """Milliseconds from this point to a later one; the GPU must have reached both."""


def mark(device: torch.device) -> Mark:
    """A mark behind all work that is queued on a GPU. A thread that waits for it sleeps."""
    event = torch.cuda.Event(enable_timing=True, blocking=True)
    event.record(torch.cuda.current_stream(device))
    return event


@dataclass(slots=True)
class Lead:
    """The steps that are queued on a GPU. Their duration is read from its own marks, so no clock is needed here."""

    mark: Callable[[], Mark]  # makes one behind all queued work
    _queued: deque[tuple[Mark, Mark]] = field(default_factory=deque)  # the begin and end of each step
    _step_ms: float = 0.0  # duration of the last step that is known to have ended

    @property
    def most(self) -> int:
        """How many steps may be queued and not have ended: at least one, so that the GPU has work."""
        return MOST_STEPS if MOST_STEPS * self._step_ms <= MOST_MS else max(1, int(MOST_MS / self._step_ms))

    def queue(self, step: Callable[[], object]) -> None:
        """Queues a step, then waits for the oldest steps while more than `most` are queued."""
        began = self.mark()
        step()
        self._queued.append((began, self.mark()))
        while len(self._queued) > self.most:
            began, ended = self._queued.popleft()
            ended.synchronize()
            self._step_ms = began.elapsed_time(ended)
