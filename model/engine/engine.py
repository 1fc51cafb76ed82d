"""The engine: `submit`, `cancel`, `step() -> list[Event]`. The only state machine; no thread, no clock, no I/O.

Call `step` in a loop while `busy`. Samples with any mixture of step counts, samplers and seeds share each step; they
join and leave between two steps. Each submitted sample ends in exactly one of Finished, Cancelled and Failed.
"""

from collections import deque
from collections.abc import Callable, Hashable
from dataclasses import dataclass, field
from functools import partial

import torch

from model.engine.events import Cancelled, Event, Failed, Finished, Preview, Request, Stats
from model.engine.lead import Lead, mark
from model.engine.runner import Runner
from model.engine.scheduler import Scheduler
from model.engine.slots import Newcomer, Parked, upload
from model.engine.snapshot import Snapshot
from model.sampling.noise import TorchNoise
from model.sampling.plan import U

CHECK_EVERY = 64  # steps after which everybody is looked at, whether the numbers are finite


@dataclass(slots=True, eq=False)
class Sample:
    """A request on its way."""

    request: Request
    order: float
    owner: str
    source: TorchNoise | None = None  # of its noise, once it is seated, if that comes from outside
    slot: int | None = None
    arrival: int = -1  # the scheduler's
    step: int = 0  # updates done; the device's cursor says the same, and is never read
    parked: Parked | None = None  # its state, if it was unseated and waits to go on
    leaving: bool = False  # made, but still on its way off the device
    stops: frozenset[int] = field(init=False)  # numbers of updates after which it is looked at

    def __post_init__(self) -> None:
        self.stops = self.request.frames | {len(self.request.plan)}

    @property
    def left(self) -> int:
        """Updates still to do."""
        return len(self.request.plan) - self.step

    @property
    def ended(self) -> bool:
        """Whether the last row of its plan has been walked."""
        return self.left == 0

    def begin_again(self) -> None:
        """Forgets how far it was."""
        self.step, self.source, self.parked = 0, None, None


@dataclass(slots=True, eq=False)
class _Pending:
    """A snapshot on its way, and of whom it is: its rows, in order."""

    snapshot: Snapshot
    samples: list[Sample]
    steps: list[int]


@dataclass(slots=True)
class Engine:
    """Drives a runner. Not safe for threads: one caller, between whose calls nothing happens."""

    runner: Runner
    _samples: dict[Hashable, Sample] = field(default_factory=dict)
    _pending: deque[_Pending] = field(default_factory=deque)
    _events: list[Event] = field(default_factory=list)
    _scheduler: Scheduler[Sample] = field(init=False)
    _copies: "torch.cuda.Stream | None" = field(init=False, default=None)
    _lead: Lead | None = field(init=False, default=None)  # on a GPU
    _steps: int = 0
    _sample_steps: int = 0
    _padded: int = 0
    _exhausted: int = 0

    def __post_init__(self) -> None:
        self._scheduler = Scheduler(self.runner.slots.capacity, self.runner.slots.rows.shape[1] - 1)
        if self.runner.device.type == "cuda":
            self._copies = torch.cuda.Stream(self.runner.device)
            self._lead = Lead(partial(mark, self.runner.device))

    @property
    def busy(self) -> bool:
        """Whether `step` has anything to do or to tell."""
        return bool(self._samples or self._events)

    @property
    def stats(self) -> Stats:
        """Counters since the start."""
        seated, waiting = len(self._scheduler.seated), self._scheduler.waiting
        return Stats(seated, waiting, self._steps, self._sample_steps, self._padded, self._exhausted)

    @property
    def progress(self) -> list[tuple[Hashable, int]]:
        """The samples that are seated, and how many updates each has had."""
        return [(sample.request.id, sample.step) for sample in self._scheduler.seated]

    def submit(self, request: Request) -> None:
        """A sample joins the queue. Its id must not be on its way already, else ValueError."""
        if request.id in self._samples:
            raise ValueError(f"a sample {request.id!r} is on its way already")
        sample = Sample(request, request.order, request.owner)
        self._samples[request.id] = sample
        self._scheduler.add(sample)

    @torch.inference_mode()
    def cancel(self, id: Hashable) -> None:
        """Gives a sample up. Its slot is free at once; nothing happens if it has ended or was never submitted."""
        sample = self._samples.get(id)
        if sample is None or sample.leaving:
            return
        self._give_up(sample, Cancelled(id))

    @torch.inference_mode()
    def seat(self) -> list[tuple[Hashable, int]]:
        """Seats who waits: (id, updates done) of those who have just sat down. `step` does it, too; this is for who
        wants to know of them before their first step."""
        before = set(self._scheduler.seated)
        self._within_memory(self._admit)
        return [(s.request.id, s.step) for s in self._scheduler.seated if s not in before]

    @torch.inference_mode()
    def step(self) -> list[Event]:
        """Seats who waits, denoises everybody seated by one step, and tells what has become known since."""
        self._within_memory(self._admit)
        if self._scheduler.seated:
            self._within_memory(self._advance)
        self._harvest(stand_still=not self._scheduler.seated)
        events, self._events = self._events, []
        return events

    def _admit(self) -> None:
        new = self._scheduler.admit()
        while (exchange := self._scheduler.exchange()) is not None:
            exchange.leaves.parked = self.runner.slots.take(exchange.slot)
            new.append(exchange.sits)
        self._seat([sample for sample in new if sample.parked is None])
        for sample in new:
            if sample.parked is not None:
                assert sample.slot is not None
                request = sample.request
                self.runner.slots.put_back(sample.slot, request.seed, request.plan, sample.step, sample.parked)
                sample.parked = None
        self._show([sample for sample in new if sample.step == 0 and 0 in sample.request.frames], [])

    def _advance(self) -> None:
        seated = self._scheduler.seated
        self._bring_noise(seated)
        bucket = self.runner.bucket_for(len(seated))
        self._make_step(bucket)
        self._steps += 1
        self._sample_steps += len(seated)
        self._padded += bucket - len(seated)
        self._scheduler.charge()
        for sample in seated:
            sample.step += 1
        shown = [sample for sample in seated if sample.step in sample.stops]
        check = self._steps % CHECK_EVERY == 0
        self._show(shown, [sample for sample in seated if sample.step not in sample.stops] if check else [])
        for sample in shown:
            if sample.ended:
                sample.leaving = True
                self._release(sample)

    def _within_memory(self, work: Callable[[], None]) -> None:
        """Does this; if memory runs out, the batch is smaller from now on, and whoever is seated begins again: what
        their slots hold cannot be trusted, and they come to the same bytes. A batch of one that runs out fails."""
        try:
            return work()
        except torch.OutOfMemoryError:
            self._exhausted += 1
        seated = list(self._scheduler.seated)
        smaller = [b for b in self.runner.admitted if b < self.runner.bucket_for(len(seated))]
        self._scheduler.capacity = smaller[-1] if smaller else 1
        for sample in reversed(seated):
            if len(seated) == 1:
                self._give_up(sample, Failed(sample.request.id, "memory ran out with this picture alone"))
            else:
                self._release(sample)
                sample.begin_again()
                self._scheduler.add(sample)
        for sample in self._samples.values():
            if sample.step and sample.slot is None and sample.parked is None and not sample.leaving:
                sample.begin_again()  # it was being unseated, and its state was lost
        if self.runner.device.type == "cuda":
            torch.cuda.empty_cache()

    def _give_up(self, sample: Sample, ending: Event) -> None:
        """Ends a sample before its time, wherever it is."""
        if sample.slot is not None:
            self._release(sample)
        elif not sample.leaving:
            self._scheduler.withdraw(sample)
        del self._samples[sample.request.id]
        self._events.append(ending)

    def _seat(self, new: list[Sample]) -> None:
        """Puts x_T and the plans of samples that have just sat down, side by side, into their slots."""
        newcomers = []
        for sample in new:
            assert sample.slot is not None
            seed, plan = sample.request.seed, sample.request.plan
            if plan.noise == "torch":
                sample.source = TorchNoise(seed, self.runner.slots.shape)
            newcomers.append(Newcomer(sample.slot, seed, plan, sample.source.draw() if sample.source else None))
        self.runner.slots.seat_all(newcomers)

    def _release(self, sample: Sample) -> None:
        hole, move = sample.slot, self._scheduler.release(sample)
        assert hole is not None
        self.runner.slots.vacate(hole, None if move is None else move[0])

    def _bring_noise(self, seated: list[Sample]) -> None:
        """Noise that the step does not draw itself: from outside, and, on a CPU, drawn ahead."""
        slots = self.runner.slots
        for sample in [sample for sample in seated if sample.source is not None]:
            assert sample.slot is not None and sample.source is not None
            if sample.request.plan.rows[sample.step, U]:
                upload(slots.given[sample.slot], sample.source.draw())
        if (ahead := slots.ahead_steps) > 0:
            for slot, sample in enumerate(seated):
                if sample.step % ahead == 0 and sample.request.plan.draws:
                    slots.draw_ahead(slot, sample.request.seed, sample.step)

    def _make_step(self, bucket: int) -> None:
        if self._lead is None:
            self.runner.step(bucket)
        else:
            self._lead.queue(lambda: self.runner.step(bucket))

    def _show(self, shown: list[Sample], checked: list[Sample]) -> None:
        """Starts to bring the state of these samples to the host, and of others only whether it is finite."""
        samples = [*shown, *checked]
        if not samples:
            return
        slots = [sample.slot for sample in samples if sample.slot is not None]
        floats = any(sample.ended and sample.request.wants_floats for sample in shown)
        split = len(shown)
        snapshot = Snapshot(self.runner.slots, slots[:split], slots[split:], floats, self._copies)
        self._pending.append(_Pending(snapshot, samples, [sample.step for sample in samples]))

    def _harvest(self, stand_still: bool) -> None:
        """Turns what has arrived into events, in order."""
        while self._pending:
            pending = self._pending[0]
            if stand_still:
                pending.snapshot.wait()
            elif not pending.snapshot.ready:
                return
            self._pending.popleft()
            frames = pending.snapshot.frames()
            for row, (sample, step) in enumerate(zip(pending.samples, pending.steps, strict=True)):
                request = sample.request
                if self._samples.get(request.id) is not sample:
                    continue  # cancelled since
                if not frames.finite[row]:
                    self._give_up(sample, Failed(request.id, f"the picture was not finite after {step} steps"))
                    continue
                if step in request.frames:
                    shown_x = frames.x[row].copy() if request.shows_x else None
                    shown_x0 = frames.x0[row].copy() if request.shows_x0 and step > 0 else None
                    self._events.append(Preview(request.id, step, shown_x, shown_x0))
                if step == len(request.plan):
                    del self._samples[request.id]
                    kept = frames.floats[row].copy() if request.wants_floats and frames.floats is not None else None
                    self._events.append(Finished(request.id, frames.x[row].copy(), kept))
