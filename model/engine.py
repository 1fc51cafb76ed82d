"""The engine: `submit`, `cancel`, `step() -> list[Event]`. The only state machine; no thread, no clock, no I/O.

Call `step` in a loop while `busy`. Samples with any mixture of step counts, samplers and seeds share each step; they
join and leave between two steps. Each submitted sample ends in exactly one of Finished, Cancelled and Failed.
"""

from collections import deque
from collections.abc import Hashable
from dataclasses import dataclass, field

import torch

from model.events import Cancelled, Event, Failed, Finished, Preview, Request, Stats
from model.noise import TorchNoise
from model.plan import U
from model.runner import Runner
from model.scheduler import Scheduler
from model.snapshot import Snapshot, as_bytes

STEPS_AHEAD = 3  # how many steps may be queued on a GPU before the host waits for the oldest


@dataclass(slots=True, eq=False)
class Sample:
    """A request on its way."""

    request: Request
    order: float
    source: TorchNoise | None = None  # of its noise, once it is seated, if that comes from outside
    slot: int | None = None
    arrival: int = -1  # the scheduler's
    step: int = 0  # updates done; the device's cursor says the same, and is never read
    leaving: bool = False  # made, but still on its way off the device

    @property
    def ended(self) -> bool:
        """Whether the last row of its plan has been walked."""
        return self.step == len(self.request.plan)


@dataclass(slots=True, eq=False)
class _Pending:
    """A snapshot on its way, and whom it shows: rows of the snapshot, in order."""

    snapshot: Snapshot
    samples: list[Sample]
    steps: list[int]


@dataclass(slots=True)
class Engine:
    """Drives a runner. Not safe for threads: one caller, between whose calls nothing happens."""

    runner: Runner
    begun: list[Hashable] = field(default_factory=list)  # the samples that the last step has seated
    _samples: dict[Hashable, Sample] = field(default_factory=dict)
    _pending: deque[_Pending] = field(default_factory=deque)
    _events: list[Event] = field(default_factory=list)
    _scheduler: Scheduler[Sample] = field(init=False)
    _copies: "torch.cuda.Stream | None" = field(init=False, default=None)
    _queued: "deque[torch.cuda.Event]" = field(default_factory=deque)
    _steps: int = 0
    _sample_steps: int = 0
    _padded: int = 0

    def __post_init__(self) -> None:
        self._scheduler = Scheduler(self.runner.slots.capacity)
        if self.runner.device.type == "cuda":
            self._copies = torch.cuda.Stream(self.runner.device)

    @property
    def busy(self) -> bool:
        """Whether `step` has anything to do or to tell."""
        return bool(self._samples or self._events)

    @property
    def stats(self) -> Stats:
        """Counters since the start."""
        seated, waiting = len(self._scheduler.seated), self._scheduler.waiting
        return Stats(seated, waiting, self._steps, self._sample_steps, self._padded)

    @property
    def progress(self) -> list[tuple[Hashable, int]]:
        """The samples that are seated, and how many updates each has had."""
        return [(sample.request.id, sample.step) for sample in self._scheduler.seated]

    def submit(self, request: Request) -> None:
        """A sample joins the queue. Its id must not be on its way already, else ValueError."""
        if request.id in self._samples:
            raise ValueError(f"a sample {request.id!r} is on its way already")
        sample = Sample(request, request.order)
        self._samples[request.id] = sample
        self._scheduler.add(sample)

    def cancel(self, id: Hashable) -> None:
        """Gives a sample up. Its slot is free at once; nothing happens if it has ended or was never submitted."""
        sample = self._samples.get(id)
        if sample is None or sample.leaving:
            return
        if sample.slot is None:
            self._scheduler.withdraw(sample)
        else:
            self._release(sample)
        del self._samples[id]
        self._events.append(Cancelled(id))

    @torch.inference_mode()
    def step(self) -> list[Event]:
        """Seats who waits, denoises everybody seated by one step, and tells what has become known since."""
        new = self._scheduler.admit()
        self.begun = [sample.request.id for sample in new]
        if new:
            self._seat(new)
        self._show([sample for sample in new if 0 in sample.request.frames])
        seated = self._scheduler.seated
        if seated:
            self._bring_noise(seated)
            bucket = self.runner.bucket_for(len(seated))
            self.runner.step(bucket)
            self._wait_for_oldest()
            self._steps += 1
            self._sample_steps += len(seated)
            self._padded += bucket - len(seated)
            for sample in seated:
                sample.step += 1
            self._show([s for s in seated if s.ended or s.step in s.request.frames])
            for sample in [s for s in seated if s.ended]:
                sample.leaving = True
                self._release(sample)
        self._harvest(stand_still=not self._scheduler.seated)
        events, self._events = self._events, []
        return events

    def _seat(self, new: list[Sample]) -> None:
        """Puts x_T and the plans of samples that have just sat down, side by side, into their slots."""
        slots = self.runner.slots
        x = slots.draw_initial([sample.request.seed for sample in new])
        for row, sample in enumerate(new):
            assert sample.slot is not None
            if sample.request.plan.noise == "torch":
                sample.source = TorchNoise(sample.request.seed, slots.shape)
            first = x[row] if sample.source is None else sample.source.draw()
            slots.seat(sample.slot, sample.request.seed, sample.request.plan, first)

    def _release(self, sample: Sample) -> None:
        move = self._scheduler.release(sample)
        if move is not None:
            self.runner.slots.move(*move)
        self.runner.slots.clear(len(self._scheduler.seated))

    def _bring_noise(self, seated: list[Sample]) -> None:
        """Noise that the step does not draw itself: from outside, and, on a CPU, drawn ahead."""
        slots = self.runner.slots
        for sample in seated:
            assert sample.slot is not None
            plan, request = sample.request.plan, sample.request
            if sample.source is not None and plan.rows[sample.step, U]:
                slots.upload(slots.given[sample.slot], sample.source.draw())
            elif slots.ahead_steps and plan.draws and sample.step % slots.ahead_steps == 0:
                slots.draw_ahead(sample.slot, request.seed, sample.step)

    def _wait_for_oldest(self) -> None:
        """Keeps the host a few steps ahead of a GPU, and no further."""
        if self._copies is not None:
            event = torch.cuda.current_stream(self.runner.device).record_event()
            self._queued.append(event)
            if len(self._queued) > STEPS_AHEAD:
                self._queued.popleft().synchronize()

    def _show(self, samples: list[Sample]) -> None:
        """Starts to bring the state of these samples to the host."""
        if not samples:
            return
        slots = self.runner.slots
        numbers = [s.slot for s in samples if s.slot is not None]
        x, x0 = torch.stack([slots.x[i] for i in numbers]), torch.stack([slots.x0[i] for i in numbers])  # [n, C, H, W]
        tensors = [as_bytes(x), as_bytes(x0), x.isfinite().flatten(1).all(1)]
        if any(s.ended and s.request.wants_floats for s in samples):
            tensors.append(x.clamp(-1, 1))
        self._pending.append(_Pending(Snapshot(tensors, self._copies), samples, [s.step for s in samples]))

    def _harvest(self, stand_still: bool) -> None:
        """Turns what has arrived into events, in order."""
        while self._pending:
            pending = self._pending[0]
            if stand_still:
                pending.snapshot.wait()
            elif not pending.snapshot.ready:
                return
            self._pending.popleft()
            x, x0, finite, *floats = pending.snapshot.arrays()
            for row, (sample, step) in enumerate(zip(pending.samples, pending.steps, strict=True)):
                request = sample.request
                if self._samples.get(request.id) is not sample:
                    continue  # cancelled since
                if step in request.frames:
                    shown_x = x[row].copy() if request.shows_x else None
                    shown_x0 = x0[row].copy() if request.shows_x0 and step > 0 else None
                    self._events.append(Preview(request.id, step, shown_x, shown_x0))
                if step == len(request.plan):
                    del self._samples[request.id]
                    kept = floats[0][row].copy() if request.wants_floats else None
                    made = Finished(request.id, x[row].copy(), kept)
                    failed = Failed(request.id, f"the picture was not finite after {step} steps")
                    self._events.append(made if finite[row] else failed)
