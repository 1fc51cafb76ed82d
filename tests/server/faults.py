"""Faults that a test puts into the engine processes of a server, to see what becomes of other jobs:

    Server(weights, **faulty({"do": "nan", "seed": 7, "step": 3}, {"do": "die", "bucket": 4, "once": "/tmp/was-here"}))

`do` is one of the names in KINDS. It happens at a step of at least `bucket` slots with a sample that has this `seed`
and has had `step` updates; what is left out does not matter. `once` names a file that must be absent and is then
created, so that the next engine is spared.
"""

import json
import os
import signal
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from model.engine.engine import Engine
from model.engine.runner import Runner

ROOT = Path(__file__).parent.parent.parent
FAULTS = "ENGINE_FAULTS"  # the environment variable that has them, in JSON


def faulty(*faults: dict[str, Any]) -> dict[str, str]:
    """The environment of a server whose engines have these faults."""
    path = (Path(__file__).parent / "faulty", ROOT, ROOT / "client")
    return {"PYTHONPATH": os.pathsep.join(map(str, path)), FAULTS: json.dumps(faults)}


@dataclass(frozen=True, slots=True)
class Fault:
    """What is to happen, and when."""

    do: str
    seed: int | None = None
    step: int | None = None
    bucket: int = 1
    once: str = ""

    def slots(self, runner: Runner, bucket: int) -> list[int]:
        """The slots that this step befalls."""
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
    """Fails as a step may fail. "nan" comes after the step."""
    match do:
        case "memory":
            raise torch.OutOfMemoryError("CUDA out of memory, by a test")
        case "cuda":
            raise torch.AcceleratorError("CUDA error: an illegal memory access was encountered, by a test")
        case "raise":
            raise RuntimeError("by a test")
        case "hang":
            time.sleep(1e6)
        case "die":
            os._exit(1)
        case "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        case "illegal":  # as an instruction does that the processor lacks
            os.kill(os.getpid(), signal.SIGILL)


KINDS = ("memory", "cuda", "raise", "hang", "die", "kill", "illegal", "nan")


def install() -> None:
    """Gives every runner that this process prepares the faults in its environment."""
    usual, faults = Engine.__post_init__, [Fault(**fields) for fields in json.loads(os.environ[FAULTS])]
    assert {fault.do for fault in faults} <= set(KINDS)

    def after_init(engine: Engine) -> None:
        usual(engine)
        plant(engine.runner, faults)

    Engine.__post_init__ = after_init  # type: ignore[assignment, method-assign]


def plant(runner: Runner, faults: Sequence[Fault]) -> None:
    """Makes the steps of a runner fail."""
    usual = runner.step

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
