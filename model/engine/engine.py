"""The engine: `submit`, `cancel`, `step() -> list[Event]`. The only state machine; no thread, no clock, no I/O.

Call `step` in a loop while `busy`. Samples with any mixture of step counts, samplers and seeds share each step; they
join and leave between two steps. Each submitted sample ends in exactly one of Finished, Cancelled and Failed.
"""

from collections.abc import Hashable
from dataclasses import dataclass, field
from functools import partial

import torch

from model.engine.events import Cancelled, Event, Failed, Finished, Request, Stats
from model.engine.lead import Lead, mark
from model.engine.memory import NARROW, within_memory
from model.engine.readout import Readout
from model.engine.runner import Runner
from model.engine.sample import Sample
from model.engine.scheduler import Scheduler
from model.engine.slots import Seating, upload
from model.sampling.noise import TorchNoise
from model.sampling.table import U

CHECK_EVERY = 64  # steps after which all seated samples are checked for numbers that are not finite


@dataclass(slots=True)
class Engine:
    """Drives a prepared runner. Not safe for threads: one caller, between whose calls nothing happens."""

    runner: Runner
    samples: dict[Hashable, Sample] = field(init=False, default_factory=dict)  # that have not ended
    scheduler: Scheduler[Sample] = field(init=False)
    exhausted: int = field(init=False, default=0)  # how often memory ran out
    _readout: Readout = field(init=False)
    _lead: Lead | None = field(init=False, default=None)  # on a GPU
    _events: list[Event] = field(init=False, default_factory=list)  # not returned by `step` yet
    _steps: int = field(init=False, default=0)
    _sample_steps: int = field(init=False, default=0)
    _padded: int = field(init=False, default=0)

    def __post_init__(self) -> None:
        slots, device = self.runner.slots, self.runner.device
        self.scheduler = Scheduler(slots.capacity, slots.rows.shape[1] - 1)
        self._readout = Readout(slots)
        if device.type == "cuda":
            self._readout.stream = torch.cuda.Stream(device)
            self._lead = Lead(partial(mark, device))

    @property
    def busy(self) -> bool:
        """Whether `step` has anything to do or to return."""
        return bool(self.samples or self._events)

    @property
    def stats(self) -> Stats:
        """Gauges, and counters since the start."""
        return Stats(
            seated=len(self.scheduler.slots),
            waiting=self.scheduler.waiting,
            steps=self._steps,
            sample_steps=self._sample_steps,
            padded=self._padded,
            exhausted=self.exhausted,
        )

    @property
    def progress(self) -> list[tuple[Hashable, int]]:
        """(id, updates done) of each seated sample."""
        return [(sample.request.id, sample.step) for sample in self.scheduler.seated]

    def submit(self, request: Request) -> None:
        """Adds a sample to the queue. Raises ValueError while another sample of this id has not ended, and if it takes
        more slots than there are."""
        if request.id in self.samples:
            raise ValueError(f"a sample {request.id!r} is on its way already")
        if len(request.labels) > self.runner.slots.capacity:
            raise ValueError("a guided picture takes two slots, and there is one")
        self.samples[request.id] = sample = Sample(request)
        self.scheduler.add(sample)
        if sample.width > self.scheduler.capacity:  # since memory ran out
            self.fail(sample, NARROW)

    @torch.inference_mode()
    def cancel(self, id: Hashable) -> None:
        """Cancels a sample and frees its slot at once. Does nothing if it has ended or was never submitted."""
        sample = self.samples.get(id)
        if sample is not None and not sample.leaving:
            self._end(sample, Cancelled(id))

    @torch.inference_mode()
    def seat(self) -> list[tuple[Hashable, int]]:
        """Seats waiting samples: (id, updates done) of those seated now. `step` does so too; this is for callers that
        need to know them before their first step."""
        if not self.scheduler.waiting:
            return []
        before = set(self.scheduler.seated)
        within_memory(self, self._seat)
        return [(s.request.id, s.step) for s in self.scheduler.seated if s not in before]

    @torch.inference_mode()
    def step(self) -> list[Event]:
        """Seats waiting samples and updates all seated ones once. Returns the events since the last call."""
        within_memory(self, self._step)
        for arrival in self._readout.arrivals(wait=not self.scheduler.seated):
            sample = arrival.sample
            if self.samples.get(sample.request.id) is not sample:
                continue  # it was cancelled meanwhile
            if not arrival.finite:
                self.fail(sample, f"the picture was not finite after {arrival.step} steps")
                continue
            for event in arrival.events():
                self._events.append(event)
                if isinstance(event, Finished):
                    del self.samples[event.id]
        events, self._events = self._events, []
        return events

    def _step(self) -> None:
        self._seat()
        if seated := self.scheduler.seated:
            self._run(seated)
            self._count(seated)
            self._release(self._copy_out(seated))

    def _seat(self) -> None:
        """Fills free slots, preempts seated samples for waiting ones of lower rank, and writes all these to slots."""
        if not self.scheduler.waiting:
            return
        slots, new = self.runner.slots, self.scheduler.admit()
        while (preemption := self.scheduler.preempt()) is not None:
            for sample, slot in preemption.preempted:
                if sample in new:  # it was seated just now, and is not in its slot yet
                    new.remove(sample)
                else:
                    sample.saved = slots.save(slot)
            self._vacate(preemption.moves)
            new += [preemption.seated, *self.scheduler.admit()]
        slots.seat_all([seating for sample in new if sample.saved is None for seating in self._seatings(sample)])
        for sample in new:
            if sample.saved is not None:
                for seating in self._seatings(sample):
                    slots.resume(seating, sample.step, sample.saved)
                sample.saved = None
            self._join(sample)
        self._readout.copy([sample for sample in new if sample.step == 0 and 0 in sample.request.frames], [])

    def _seatings(self, sample: Sample) -> list[Seating]:
        """A sample in each of its slots, with its x_T if that comes from outside."""
        seed, plan, x = sample.request.seed, sample.request.plan, None
        if plan.noise == "torch" and sample.source is None:
            sample.source = TorchNoise(seed, self.runner.slots.shape)
            x = sample.source.draw()
        labels = sample.request.labels or (self.runner.model.card.unlabelled,)
        return [Seating(slot, seed, plan, x, label) for slot, label in zip(sample.slots, labels, strict=True)]

    def _join(self, sample: Sample) -> None:
        """Tells the two slots of a guided sample of each other."""
        if sample.width > 1:
            self.runner.slots.join(*sample.slots)

    def _vacate(self, moves: list[tuple[int, int | None]]) -> None:
        """Clears slots, into some of which others move."""
        for hole, successor in moves:
            self.runner.slots.vacate(hole, successor)
        for hole, successor in moves:
            if successor is not None and hole < len(self.scheduler.slots):
                self._join(self.scheduler.slots[hole])

    def _run(self, seated: list[Sample]) -> None:
        """One step of the batch."""
        self._bring_noise(seated)
        bucket = self.runner.bucket_for(len(self.scheduler.slots))
        if self._lead is None:
            self.runner.step(bucket)
        else:
            self._lead.queue(partial(self.runner.step, bucket))

    def _bring_noise(self, seated: list[Sample]) -> None:
        """Noise that the step does not draw itself: from outside, and, on a CPU, drawn ahead."""
        slots = self.runner.slots
        for sample in seated:
            if sample.source is not None and sample.request.plan.rows[sample.step, U]:
                given = sample.source.draw()
                for slot in sample.slots:
                    upload(slots.given[slot], given)
        if (ahead := slots.ahead_steps) > 0:
            for sample in seated:
                if sample.step % ahead == 0 and sample.request.plan.draws:
                    slots.draw_ahead(sample.slots, sample.request.seed, sample.step)

    def _count(self, seated: list[Sample]) -> None:
        """Counts the step that was done, here and in each sample."""
        taken = len(self.scheduler.slots)
        self._steps += 1
        self._sample_steps += taken
        self._padded += self.runner.bucket_for(taken) - taken
        self.scheduler.charge()
        for sample in seated:
            sample.step += 1

    def _copy_out(self, seated: list[Sample]) -> list[Sample]:
        """Starts to copy the states that are to be shown, and returns their samples."""
        shown = [sample for sample in seated if sample.step in sample.stops]
        check = self._steps % CHECK_EVERY == 0
        self._readout.copy(shown, [sample for sample in seated if sample.step not in sample.stops] if check else [])
        return shown

    def _release(self, shown: list[Sample]) -> None:
        """Frees the slots of samples that have walked their whole plan."""
        for sample in shown:
            if sample.ended:
                sample.leaving = True
                self.release(sample)

    def release(self, sample: Sample) -> None:
        """Takes a seated sample out of its slots; the last ones move into the holes."""
        self._vacate(self.scheduler.release(sample))

    def fail(self, sample: Sample, reason: str) -> None:
        """Ends a sample, wherever it is, with this reason."""
        self._end(sample, Failed(sample.request.id, reason))

    def _end(self, sample: Sample, event: Cancelled | Failed) -> None:
        if sample.slots:
            self.release(sample)
        elif not sample.leaving:
            self.scheduler.withdraw(sample)
        del self.samples[sample.request.id]
        self._events.append(event)
