"""What a step takes beside as many other busy programs as there are cores, against the same on a quiet machine.

python -m benchmarks.busy
"""

import argparse
import statistics
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import torch

from benchmarks.engine import Trial, started, warm
from benchmarks.measure import Measure, interleaved, median_ratio, report
from benchmarks.remote import Remote
from server.worker.cpus import cores

DIGITS = Path(__file__).parent / "digits"
NAMES = ("ours", "diffusers")
BUSY = "print('busy', flush=True)\nwhile True: pass"
QUIET, BESIDE = "quiet", "busy"


@contextmanager
def busy_programs(count: int) -> Iterator[None]:
    """So many programs that each keep a core busy."""
    programs = [subprocess.Popen([sys.executable, "-c", BUSY], stdout=subprocess.PIPE) for _ in range(count)]
    try:
        for program in programs:
            assert program.stdout is not None
            program.stdout.readline()
        yield
    finally:
        for program in programs:
            program.kill()
            program.communicate()


def run_busy(remote: Remote, batch: int, steps: int) -> float:
    """Seconds of so many steps beside busy programs."""
    with busy_programs(cores()):
        took: float = remote.ask("run", batch, steps)
    return took


def compare(trial: Trial, names: Sequence[str], device: torch.device) -> Iterator[Measure]:
    """Everybody at every batch, quiet and busy in turns."""
    fields = list(warm([remote for remote, _ in started(trial, names, device)], trial))
    for batch in trial.batches:
        for remote, steps in fields:
            turns = {
                QUIET: partial(remote.ask, "run", batch, steps[batch]),
                BESIDE: partial(run_busy, remote, batch, steps[batch]),
            }
            took = interleaved(turns, trial.rounds)
            title = f"{trial.name}, batch {batch}: {remote.name}"
            for how, seconds in took.items():
                each = [1000 * s / steps[batch] for s in seconds]
                name = title if how == QUIET else f"{title}, beside {cores()} busy programs"
                yield Measure(name, statistics.median(each), "ms/step", (min(each), max(each)))
            ratio, spread = median_ratio(took[BESIDE], took[QUIET])
            yield Measure(f"{title}, busy against quiet", ratio, "times as long", spread)
    for remote, _ in fields:
        remote.end()


def measures(device: torch.device, digits: Path) -> Iterator[Measure]:
    """Everything this file measures."""
    yield from compare(Trial("digits", digits, (1, 8), 1.0), NAMES, device)


def main() -> None:
    """Measures and prints."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("build/busy.jsonl"), help="(default: %(default)s)")
    args = parser.parse_args()
    report(measures(torch.device("cpu"), DIGITS), args.out)


if __name__ == "__main__":
    main()
