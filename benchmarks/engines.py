"""One engine with all threads of a CPU beside several that share them: image-steps per second when saturated.

    python -m benchmarks.engines [--engines N] [--slots B]

Both servers stand side by side and are asked in turns.
"""

import argparse
import json
import time
import urllib.request
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch

from benchmarks.loopback import a_server
from benchmarks.measure import Measure, median_ratio
from server.worker.cpus import cores

JOBS, PICTURES, STEPS, ROUNDS = 4, 32, 50, 3


def make(url: str, seed: int) -> None:
    """One job, to its end."""
    body = json.dumps({"seed": seed, "n": PICTURES, "steps": STEPS}).encode()
    request = urllib.request.Request(f"{url}/generate", body, {"content-type": "application/json"})
    with urllib.request.urlopen(request) as answer:
        answer.read()


def run(url: str) -> float:
    """Seconds for all jobs, asked for at once."""
    began = time.monotonic()
    with ThreadPoolExecutor(JOBS) as callers:
        list(callers.map(lambda seed: make(url, seed * PICTURES), range(JOBS)))
    return time.monotonic() - began


def measures(digits: Path, engines: int, slots: int) -> Iterator[Measure]:
    """Everything this file measures."""
    one, several = list[float](), list[float]()
    cpu, work = torch.device("cpu"), JOBS * PICTURES * STEPS
    with a_server(digits, slots, cpu) as whole:
        with a_server(digits, slots, cpu, engines=engines) as shared:
            for _ in range(ROUNDS + 1):  # the first is for warming up
                one.append(run(whole))
                several.append(run(shared))
    threads = cores()
    for name, took in ((f"1 engine, {threads} threads", one), (f"{engines} engines, {threads} threads", several)):
        rates = sorted(work / seconds for seconds in took[1:])
        yield Measure(f"{name}, batch {slots}", rates[len(rates) // 2], "image-steps/s", (rates[0], rates[-1]))
    ratio, spread = median_ratio(one[1:], several[1:])
    yield Measure(f"{engines} engines beside one", ratio, "times the throughput", spread)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--weights", type=Path, default=Path(__file__).parent / "digits")
    parser.add_argument("--engines", type=int, default=cores())
    parser.add_argument("--slots", type=int, default=32)
    arguments = parser.parse_args()
    for measure in measures(arguments.weights, arguments.engines, arguments.slots):
        print(f"{measure.name:50} {measure.value:8.3f} {measure.unit} {measure.spread}", flush=True)
