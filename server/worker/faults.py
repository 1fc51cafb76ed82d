"""Faults on order, for tests of what becomes of everybody else. Nothing here is reached unless DDPM_FAULTS is set.

DDPM_FAULTS is a list in JSON of faults that happen in the engine process as a step is made:

    [{"do": "nan", "seed": 7, "step": 3}, {"do": "die", "bucket": 4, "once": "/tmp/was-here"}]

`do` is one of the names in KINDS. It happens when a step is made of at least `bucket` slots, in which somebody sits
who has this `seed` and has had this many updates, `step`; what is left out does not matter. `once`: a file that must
not be there, and then is: a fault that the next engine is spared.
"""

import json
import os
import signal
import time
from dataclasses import dataclass
from pathlib import Path

import torch

from model.engine.runner import Runner

FAULTS = "DDPM_FAULTS"  # the same as in server.settings, which would bring pydantic into every engine process


@dataclass(frozen=True, slots=True)
class Fault:
    """What is to happen, and when."""

    do: str
    seed: int | None = None
    step: int | None = None
    bucket: int = 1
    once: str = ""

    def slots(self, runner: Runner, bucket: int) -> list[int]:
        """Those whom this step befalls."""
        columns = (runner.slots.seed, runner.slots.cursor, runner.slots.last)
        sitting = zip(*(column[:bucket].tolist() for column in columns), strict=True)
        hit = [
            slot
            for slot, (seed, step, last) in enumerate(sitting)
            if step < last and self.seed in (None, seed) and self.step in (None, step)
        ]
        if bucket < self.bucket or not hit or (self.once and Path(self.once).exists()):
            return []
        if self.once:
            Path(self.once).touch()
        return hit


def _strike(do: str) -> None:
    """Does what a step does that fails. "nan" comes after the step."""
    match do:
        case "memory":
            raise torch.OutOfMemoryError("CUDA out of memory, on order")
        case "cuda":
            raise torch.AcceleratorError("CUDA error: an illegal memory access was encountered, on order")
        case "raise":
            raise RuntimeError("on order")
        case "hang":
            time.sleep(1e6)
        case "die":
            os._exit(1)
        case "illegal":  # as an instruction does that the processor lacks
            os.kill(os.getpid(), signal.SIGILL)


KINDS = ("memory", "cuda", "raise", "hang", "die", "illegal", "nan")


def plant(runner: Runner) -> None:
    """Makes this runner suffer what DDPM_FAULTS orders, if it is set."""
    ordered = os.environ.get(FAULTS)
    if not ordered:
        return
    faults, usual = [Fault(**fields) for fields in json.loads(ordered)], runner.step
    assert {fault.do for fault in faults} <= set(KINDS)

    def step(bucket: int) -> None:
        hit = {fault: fault.slots(runner, bucket) for fault in faults}
        for fault, slots in hit.items():
            if slots:
                _strike(fault.do)
        usual(bucket)
        for fault, slots in hit.items():
            if fault.do == "nan":
                runner.slots.x[slots] = torch.nan

    runner.step = step  # type: ignore[method-assign]
