"""Samples' states on their way off the device, in the order in which they were copied, and the events they become."""

from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass, field

import torch

from model.engine.events import Event, Finished, Preview
from model.engine.sample import Sample
from model.engine.slots import Slots
from model.engine.snapshot import Frames, Snapshot


@dataclass(frozen=True, slots=True)
class Arrival:
    """A sample's state as it was after `step` updates: one row of what a snapshot has brought."""

    sample: Sample
    step: int
    frames: Frames
    row: int

    @property
    def finite(self) -> bool:
        """Whether x has neither NaN nor infinity."""
        return bool(self.frames.finite[self.row])

    def events(self) -> Iterator[Event]:
        """The preview that the request asked for at this step, then the finished picture if this is its last one."""
        request, frames, row = self.sample.request, self.frames, self.row
        if self.step in request.frames:
            x = frames.x[row].copy() if request.shows_x else None
            x0 = frames.x0[row].copy() if request.shows_x0 and self.step > 0 else None
            yield Preview(request.id, self.step, x, x0)
        if self.step == len(request.plan):
            floats = frames.floats[row].copy() if request.wants_floats and frames.floats is not None else None
            yield Finished(request.id, frames.x[row].copy(), floats)


@dataclass(slots=True, eq=False)
class _Pending:
    """A snapshot in transit, and the samples in its rows with their steps."""

    snapshot: Snapshot
    samples: list[Sample]
    steps: list[int]


@dataclass(slots=True)
class Readout:
    """Copies samples' states to the host beside the steps that follow."""

    slots: Slots
    stream: "torch.cuda.Stream | None" = None  # of the copies, on a GPU
    _pending: deque[_Pending] = field(default_factory=deque)

    def copy(self, shown: list[Sample], checked: list[Sample]) -> None:
        """Starts to copy the states of seated samples; of those `checked`, only whether they are finite."""
        if not shown and not checked:
            return
        floats = any(sample.ended and sample.request.wants_floats for sample in shown)
        slots = [sample.seat for sample in shown], [sample.seat for sample in checked]
        samples = [*shown, *checked]
        snapshot = Snapshot(self.slots, *slots, floats, self.stream)
        self._pending.append(_Pending(snapshot, samples, [sample.step for sample in samples]))

    def arrivals(self, wait: bool) -> Iterator[Arrival]:
        """The states that have arrived; all of them, if it may `wait`."""
        while self._pending:
            pending = self._pending[0]
            if wait:
                pending.snapshot.wait()
            elif not pending.snapshot.ready:
                return
            self._pending.popleft()
            frames = pending.snapshot.frames()
            for row, (sample, step) in enumerate(zip(pending.samples, pending.steps, strict=True)):
                yield Arrival(sample, step, frames, row)
