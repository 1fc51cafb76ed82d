"""Stage correctness: the tests that need a GPU, and, layer by layer of the CIFAR-10 configuration, whose bits can be
trusted and what either kernel takes.

The tests run in processes of their own while bits are compared here; nothing is timed before they have ended.
"""

import atexit
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch

from benchmarks.convolutions import BATCHES, kinds_of, name_of, same_bits, times
from benchmarks.gpu.facts import Fact, Setting
from benchmarks.gpu.run import ROOT
from benchmarks.gpu.stage import Part, each_by_itself
from benchmarks.gpu.worlds import device_of, small
from model.checkpoint.card import read_card
from model.checkpoint.load import load_layers
from model.engine.runner import usual_buckets
from model.nets.exact import Kind
from server.worker.device import choose_dtype

TESTS = [f"tests/model/test_{name}.py" for name in ("gpu", "invariance", "triton")]
DRY_TESTS = ["tests/benchmarks/test_facts.py"]
SIDE_BY_SIDE = 6
SHARE = 0.7  # of the stage's time is for the tests
NAMED = 8  # tests that failed are named one by one, up to so many


def parts(setting: Setting) -> list[Part]:
    """The tests begin at once."""
    layers, tests = Layers(setting), Tests(setting, time.monotonic() + SHARE * setting.left_s)
    return [
        partial(bits, layers, "cuDNN's bits", False),
        partial(bits, layers, "the invariant kernel's bits", True),
        tests.results,
        partial(microseconds, layers),
    ]


@dataclass(slots=True)
class Tests:
    """The tests that need a GPU, on their way."""

    setting: Setting
    until_s: float  # by the monotonic clock
    told: Path = field(init=False)
    process: "subprocess.Popen[bytes]" = field(init=False)

    def __post_init__(self) -> None:
        self.told = Path(self.setting.scratch) / "tests.jsonl"
        chosen = DRY_TESTS if self.setting.dry else ["-m", "gpu", *TESTS]
        if not self.setting.dry and find_spec("xdist") is not None:
            chosen += ["-n", str(SIDE_BY_SIDE)]
        command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "-p", "benchmarks.gpu.told"]
        if (timeout := shutil.which("timeout")) is not None:  # should nobody be left to end them
            command = [timeout, "--kill-after=5", f"{max(1.0, self.setting.left_s):.0f}", *command]
        command += ["-W", "default", "--tb", "short", *chosen]
        environ = os.environ | {"TOLD": str(self.told)}
        self.process = subprocess.Popen(
            command, cwd=ROOT, env=environ, stdin=subprocess.DEVNULL, start_new_session=True
        )
        atexit.register(self.end)

    def end(self) -> None:
        """Ends them, and all that they have started."""
        if self.process.poll() is None:
            os.killpg(self.process.pid, signal.SIGKILL)
            self.process.wait()

    def results(self) -> Iterator[Fact]:
        """How many passed, and which did not; of those that were run, should there be no time for all."""
        try:
            code = self.process.wait(max(0.0, self.until_s - time.monotonic()))
            outcome = "all were run" if code in (0, 1) else f"pytest ended with exit code {code}"
        except subprocess.TimeoutExpired:
            outcome = "stopped: no time was left"
        finally:
            self.end()
        lines = [json.loads(line) for line in self.told.read_text().splitlines()] if self.told.exists() else []
        counted = Counter(line["outcome"] for line in lines)
        more = {name: counted[name] for name in ("failed", "skipped")}
        yield Fact("tests that passed", counted["passed"], f"of {len(lines)}", more=more | {"run": outcome}, main=True)
        for line in [line for line in lines if line["outcome"] == "failed"][:NAMED]:
            yield Fact(f"failed: {line['test']}", line["seconds"], "s", main=True)
        if outcome != "all were run" or not lines:
            raise RuntimeError(f"tests: {outcome}, {len(lines)} had ended")


@dataclass(slots=True)
class Layers:
    """The kinds of layers of a net, loaded when they are asked for."""

    setting: Setting
    found: list[Kind] = field(default_factory=list)
    agreed: set[str] = field(default_factory=set)  # names of those whose bits by the library do not depend on the batch

    @property
    def batches(self) -> tuple[int, ...]:
        """Those that are timed, the largest last."""
        return (1, 2) if self.setting.dry else BATCHES

    def kinds(self) -> list[Kind]:
        """All of them."""
        if not self.found:
            device = device_of(self.setting)
            dtype = choose_dtype("auto", device)
            self.found = kinds_of(load_layers(read_card(small(self.setting)), device, dtype))
        return self.found


@torch.inference_mode()
def bits(layers: Layers, whose: str, invariant: bool) -> Iterator[Fact]:
    """Of each kind, whether bits stay the same over all buckets; by our kernel, alone and among most, whose tiles may
    be others."""
    kinds, most, agreed = layers.kinds(), max(layers.batches), list[str]()
    buckets = [1, most] if invariant else usual_buckets(most)

    def of_one(kind: Kind) -> Iterator[Fact]:
        began = time.perf_counter()
        same = same_bits(kind, buckets, invariant)
        agreed.extend([name_of(kind)] if same else [])
        more: dict[str, Any] = {"layers": len(kind.layers), "seconds": round(time.perf_counter() - began, 2)}
        yield Fact(f"{whose} agree: {name_of(kind)}", same, more=more)

    yield from each_by_itself(kinds, of_one)
    if not invariant:
        layers.agreed = set(agreed)
    spoken = f"{whose} agree in batches of {buckets[0]} {'and' if invariant else 'to'} {most}"
    yield Fact(spoken, len(agreed), f"of {len(kinds)} kinds of layers", main=True)


@torch.inference_mode()
def microseconds(layers: Layers) -> Iterator[Fact]:
    """Of each kind what a call takes by either kernel, and what they sum up to in the net."""
    batches = layers.batches
    sums = {name: [0.0] * len(batches) for name in ("cuDNN", "Triton", "chosen")}

    def of_one(kind: Kind) -> Iterator[Fact]:
        took = {"cuDNN": times(kind, batches, False), "Triton": times(kind, batches, True)}
        took["chosen"] = took["cuDNN" if name_of(kind) in layers.agreed else "Triton"]
        for which, each in took.items():
            sums[which] = [a + len(kind.layers) * b for a, b in zip(sums[which], each, strict=True)]
        more: dict[str, Any] = {"layers": len(kind.layers), "batches": batches}
        more |= {f"{which} us": [round(us, 2) for us in took[which]] for which in ("cuDNN", "Triton")}
        yield Fact(f"a call: {name_of(kind)}", took["chosen"][0], "us", more=more)

    yield from each_by_itself(layers.kinds(), of_one)
    for which, each in sums.items():
        for batch, time_us in zip(batches, each, strict=True):
            yield Fact(f"convolutions and attention of a step, batch {batch}, {which}", time_us, "us")
