"""How all benchmarks measure and report: rounds in turns, medians, ratios within one run, a JSON line a measure."""

import json
import math
import os
import platform
import shutil
import statistics
import subprocess
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch

from server.worker.device import device_name

ROOT = Path(__file__).parent.parent


@dataclass(frozen=True, slots=True)
class Measure:
    """One number with its name; ratios say against what."""

    name: str
    value: float
    unit: str
    spread: tuple[float, float] | None = None  # least and greatest of the rounds

    def line(self) -> str:
        """As one JSON line."""
        fields = {"name": self.name, "value": round(self.value, 4), "unit": self.unit}
        return json.dumps(fields | ({"spread": [round(s, 4) for s in self.spread]} if self.spread else {}))


def commit(root: Path = ROOT) -> str:
    """What is measured: as `DDPM_COMMIT` says, else as git does, where there is one and it knows this folder."""
    if named := os.environ.get("DDPM_COMMIT"):
        return named
    if not (root / ".git").exists() or shutil.which("git") is None:
        return "unknown"
    command = ["git", "-C", str(root), "describe", "--always", "--dirty"]
    return subprocess.run(command, capture_output=True, text=True, check=False).stdout.strip() or "unknown"


def machine() -> str:
    """Where and with what this ran, as one JSON line."""
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    facts = {
        "cpu": f"{device_name(torch.device('cpu'))}, {torch.get_num_threads()} threads",
        "gpu": gpu,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "commit": commit(),
    }
    return json.dumps({"machine": facts})


def report(measures: Iterator[Measure], out: Path, minutes: float = math.inf) -> None:
    """Prints a table as it grows, and writes it as JSON lines. What has not begun after so many minutes is left out."""
    out.parent.mkdir(parents=True, exist_ok=True)
    until = time.monotonic() + 60 * minutes
    with out.open("w") as lines:
        print(machine(), file=lines, flush=True)
        print(machine())
        for measure in measures:
            low, high = measure.spread or (measure.value, measure.value)
            print(f"{measure.name:75} {measure.value:10.3f} {measure.unit:18} ({low:.3f} .. {high:.3f})", flush=True)
            print(measure.line(), file=lines, flush=True)
            if time.monotonic() > until:
                print(f"left out: all that was to be measured after {minutes:g} minutes", flush=True)
                break


def interleaved(
    contenders: Mapping[str, Callable[[], object]], rounds: int, excused: type[Exception] | tuple[()] = ()
) -> dict[str, list[float]]:
    """Seconds of each contender in each round. They take turns, so that a noisy machine is noisy for all.

    A contender that returns a float has taken its time itself. One that raises an `excused` exception is left out from
    then on, and is not in what is returned.
    """
    seconds: dict[str, list[float]] = {name: [] for name in contenders}
    for turn in range(rounds + 1):  # the first is for warming up
        for name in list(seconds):
            began = time.perf_counter()
            try:
                took = contenders[name]()
            except excused as reason:
                print(f"left out: {reason}", flush=True)
                del seconds[name]
                continue
            if turn:
                seconds[name].append(took if isinstance(took, float) else time.perf_counter() - began)
    return seconds


def seconds_of(work: Callable[[], object], device: torch.device, times: int = 10) -> float:
    """How long this takes on the device, the least of five blocks."""
    blocks = []
    for _ in range(6):
        began = time.perf_counter()
        for _ in range(times):
            work()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        blocks.append((time.perf_counter() - began) / times)
    return min(blocks[1:])


def median_ratio(slow: list[float], fast: list[float]) -> tuple[float, tuple[float, float]]:
    """How many times faster, round by round: the median, and the least and greatest."""
    ratios = [a / b for a, b in zip(slow, fast, strict=True)]
    return statistics.median(ratios), (min(ratios), max(ratios))
