"""How long a server takes until it is ready, with an empty data directory and with the same one again, and what memory
its engine holds then, after a picture, and when it has nothing left to do.

    python -m benchmarks.start [--only NAME ...]
"""

import argparse
import json
import os
import statistics
import tempfile
import time
import urllib.request
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path

import torch

from benchmarks.loopback import Running, started
from benchmarks.measure import Measure, report
from benchmarks.models import LARGEST, MODELS, model_directory
from server.worker.device import usual_slots

DIGITS = Path(__file__).parent / "digits"
READY_S, REST_S = 900.0, 300.0  # the longest that is waited
ASKED_EVERY_S, LOOKED_EVERY_S = 0.02, 0.5
QUIET_S = 5.0  # an engine rests if for so long it has computed next to nothing and its memory has stayed as it is
IDLE_SHARE, SAME_BYTES = 0.05, 1 << 20  # what next to nothing is: of one core; and what passes for the same memory


@dataclass(frozen=True, slots=True)
class Held:
    """What an engine process holds at a moment, in bytes, and the processor time it has used so far."""

    resident: int
    peak: int
    used_s: float


@dataclass(frozen=True, slots=True)
class Start:
    """One start of a server: seconds until it was ready, and what its engine held after that. rested: None: it never"""

    ready_s: float
    ready: Held
    pictured: Held
    rested: Held | None
    rested_s: float  # from the start of the process until the engine began to rest
    counted: int  # bytes, as /models says in the end


def engine_of(server: int) -> int:
    """The process id of the engine of a server: its child that multiprocessing has spawned for a function of ours."""
    children = Path(f"/proc/{server}/task").glob("*/children")
    for child in chain.from_iterable(path.read_text().split() for path in children):
        if b"spawn_main" in Path(f"/proc/{child}/cmdline").read_bytes():
            return int(child)
    raise RuntimeError(f"the server {server} has no engine process")


def held(process: int) -> Held:
    """By /proc."""
    lines = (line.partition(":") for line in Path(f"/proc/{process}/status").read_text().splitlines())
    fields = {name: value.split() for name, _, value in lines}
    times = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[11:13]  # of the user, of the system
    used_s = sum(map(int, times)) / os.sysconf("SC_CLK_TCK")
    return Held(1024 * int(fields["VmRSS"][0]), 1024 * int(fields["VmHWM"][0]), used_s)


def until_ready(server: Running) -> None:
    """Waits for it. Raises RuntimeError if it takes too long or ends."""
    deadline = time.monotonic() + READY_S
    while not server.ready():
        if time.monotonic() > deadline:
            raise RuntimeError(f"the server was not ready within {READY_S:g} s")
        time.sleep(ASKED_EVERY_S)


def until_it_rests(engine: int) -> tuple[Held | None, float]:
    """What it holds when it has rested for QUIET_S, and when that began; None if it has not within REST_S."""
    since, before = time.monotonic(), held(engine)
    deadline = since + REST_S
    while time.monotonic() < deadline:
        time.sleep(LOOKED_EVERY_S)
        at, now = time.monotonic(), held(engine)
        busy = now.used_s - before.used_s > IDLE_SHARE * max(at - since, 1.0)
        if busy or abs(now.resident - before.resident) > SAME_BYTES:
            since, before = at, now
        elif at - since >= QUIET_S:
            return now, since
    return None, deadline


def start(directory: Path, data: Path, steps: int) -> Start:
    """A server starts, makes a picture of so many steps, comes to rest and ends."""
    device = torch.device("cpu")
    began = time.monotonic()
    with started(directory, usual_slots(device), device, data=data) as server:
        until_ready(server)
        ready_s, engine = time.monotonic() - began, engine_of(server.process.pid)
        ready = held(engine)
        body = json.dumps({"seed": 0, "steps": steps}).encode()
        asked = urllib.request.Request(f"{server.url}/generate", body, {"content-type": "application/json"})
        with urllib.request.urlopen(asked) as answer:
            answer.read()
        pictured, (rested, since) = held(engine), until_it_rests(engine)
        with urllib.request.urlopen(f"{server.url}/models") as answer:
            counted = json.load(answer)["models"][0]["engines"][0]["memory_bytes"]
    return Start(ready_s, ready, pictured, rested, since - began, counted)


def measures_of(name: str, rounds: int, steps: int, digits: Path) -> Iterator[Measure]:
    """So many times a first start and one with the same data again."""
    starts: dict[str, list[Start]] = {"the first time": [], "again": []}
    with model_directory(name, digits) as directory:
        for _ in range(rounds):
            with tempfile.TemporaryDirectory() as data:
                for each in starts.values():
                    each.append(start(directory, Path(data), steps))
    for which, found in starts.items():
        took = [each.ready_s for each in found]
        yield Measure(f"{name}: /readyz, {which}", statistics.median(took), "s", (min(took), max(took)))
        rested = [each.rested_s for each in found if each.rested is not None]
        if rested:
            title = f"{name}: the engine rests, {which}"
            yield Measure(title, statistics.median(rested), "s from the start", (min(rested), max(rested)))
        else:
            print(f"left out: {name}: the engine did not rest within {REST_S:g} s, {which}", flush=True)
        yield from memory(f"{name}, {which}", found[-1], steps)


def memory(title: str, found: Start, steps: int) -> Iterator[Measure]:
    """What the engine process held: resident, and the most so far."""
    pictured = f"after a picture of {steps} steps"
    moments = {"ready": found.ready, pictured: found.pictured, "all batch sizes there": found.rested}
    for moment, each in moments.items():
        if each is not None:
            yield Measure(f"{title}: engine process, {moment}: resident", each.resident / 2**20, "MiB")
            yield Measure(f"{title}: engine process, {moment}: peak", each.peak / 2**20, "MiB")
    yield Measure(f"{title}: counted by /models", found.counted / 2**20, "MiB")


def measures(device: torch.device, digits: Path, names: Sequence[str] = tuple(MODELS)) -> Iterator[Measure]:
    """Everything this file measures."""
    with tempfile.TemporaryDirectory() as data, started(digits, 1, device, data=Path(data)) as server:
        until_ready(server)  # what all starts read from the disk is in memory now
    for name in names:
        yield from measures_of(name, *((1, 2) if name == LARGEST else (3, 10)), digits)


def main() -> None:
    """Measures and prints."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=[*MODELS], default=[*MODELS], help="(default: all)")
    parser.add_argument("--out", type=Path, default=Path("build/start.jsonl"), help="(default: %(default)s)")
    args = parser.parse_args()
    report(measures(torch.device("cpu"), DIGITS, args.only), args.out)


if __name__ == "__main__":
    main()
