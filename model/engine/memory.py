"""The policy for memory exhaustion: a smaller batch from then on, and every seated sample starts again.

After a failed step the contents of the slots cannot be trusted; a sample that starts again comes to the same bytes. A
sample that exhausts the memory alone fails.
"""

from collections.abc import Callable, Hashable, Mapping
from typing import Protocol

import torch

from model.engine.runner import Runner
from model.engine.sample import Sample
from model.engine.scheduler import Scheduler

REASON = "memory ran out with this picture alone"
NARROW = "memory is left for one slot, and a guided picture takes two"


class Batch(Protocol):
    """What the policy acts on: an engine."""

    runner: Runner
    scheduler: Scheduler[Sample]
    exhausted: int  # how often memory ran out

    @property
    def samples(self) -> Mapping[Hashable, Sample]:
        """All samples that have not ended, by the ids of their requests."""

    def release(self, sample: Sample) -> None:
        """Takes a seated sample out of its slot."""

    def fail(self, sample: Sample, reason: str) -> None:
        """Ends a sample, wherever it is."""


def within_memory(batch: Batch, work: Callable[[], None]) -> None:
    """Does this work, and recovers if memory runs out during it."""
    try:
        return work()
    except torch.OutOfMemoryError:
        batch.exhausted += 1
    # Outside of the handler the exception is gone, and with its traceback all tensors of the step that failed.
    seated = batch.scheduler.seated
    _shrink(batch, seated)
    if len(seated) == 1:
        batch.fail(seated[0], REASON)
    else:
        _restart(batch, seated)
    for sample in list(batch.samples.values()):
        if sample.slots or sample.leaving:
            continue
        if sample.width > batch.scheduler.capacity:
            batch.fail(sample, NARROW)
        elif sample.step and sample.saved is None:
            sample.restart()  # memory ran out while its state was being saved, and was lost
    if batch.runner.device.type == "cuda":
        torch.cuda.empty_cache()


def _shrink(batch: Batch, seated: list[Sample]) -> None:
    """Limits the batch to the next smaller admitted size, or to one sample."""
    taken, widest = sum(sample.width for sample in seated), max((sample.width for sample in seated), default=1)
    smaller = [size for size in batch.runner.admitted if size < batch.runner.bucket_for(taken)]
    batch.scheduler.capacity = max(smaller[-1] if smaller else 1, widest)


def _restart(batch: Batch, seated: list[Sample]) -> None:
    """Sends seated samples back to the queue, at step 0."""
    for sample in reversed(seated):  # from the last slot down, so that few have to move
        batch.release(sample)
        sample.restart()
        batch.scheduler.add(sample)
