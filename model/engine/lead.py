"""How far the host is ahead of a GPU: some steps, so that the GPU never waits for it, but no more than a moment, so
that who joins or leaves the batch does so soon.
"""

from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch

MOST_STEPS = 3
MOST_MS = 20.0


class Mark(Protocol):
    """A place in a GPU's work, as torch.cuda.Event is."""

    def synchronize(self) -> None:
        """Wait until the GPU is there."""

    def elapsed_time(self, later: Any, /) -> float:
        """Milliseconds from this place to a later one, when the GPU has been at both."""


def mark(device: torch.device) -> Mark:
    """Behind all that has been queued on a GPU. Who waits for it sleeps."""
    event = torch.cuda.Event(enable_timing=True, blocking=True)
    event.record(torch.cuda.current_stream(device))
    return event


@dataclass(slots=True)
class Lead:
    """Steps that are queued on a GPU. Their time is known from its own marks, so nobody here has a clock."""

    mark: Callable[[], Mark]  # behind all that has been queued
    _queued: deque[tuple[Mark, Mark]] = field(default_factory=deque)  # where each step begins and ends
    _step_ms: float = 0.0  # of the last that is known to be done

    @property
    def most(self) -> int:
        """How many steps may be queued, and not done: always one, so that there is something to do."""
        return MOST_STEPS if MOST_STEPS * self._step_ms <= MOST_MS else max(1, int(MOST_MS / self._step_ms))

    def queue(self, step: Callable[[], object]) -> None:
        """One more step. Waits for the oldest ones as long as there are too many."""
        began = self.mark()
        step()
        self._queued.append((began, self.mark()))
        while len(self._queued) > self.most:
            began, ended = self._queued.popleft()
            ended.synchronize()
            self._step_ms = began.elapsed_time(ended)
