"""Runs a command on a machine that stops now and then, as one that is shared does: `python -m tests.stalls COMMAND`.

All of the command's processes are stopped together, for up to half a second, about every second, while clocks go on.
Besides, `--busy` processes compete with it for the cores. A test that fails here and passes alone counts on the speed
of its machine.
"""

import argparse
import ctypes
import multiprocessing
import os
import random
import signal
import sys
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

PR_SET_CHILD_SUBREAPER = 36
STOPPED_S, RUNNING_S = (0.02, 0.5), (0.1, 2.0)


def descendants(pid: int) -> Iterator[int]:
    """The processes that a process has started, and those that they have started."""
    with suppress(FileNotFoundError, ProcessLookupError):  # it has ended
        for task in Path(f"/proc/{pid}/task").iterdir():
            for child in map(int, (task / "children").read_text().split()):
                yield child
                yield from descendants(child)


def runs(pid: int) -> bool:
    """Whether a process is there, and nobody has stopped it."""
    with suppress(FileNotFoundError, ProcessLookupError):
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "TtZX"
    return False


def stall(pids: list[int], seconds: float) -> None:
    """Stops processes for that time, except those that a test has stopped itself."""
    stopped = []
    for pid in filter(runs, pids):
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGSTOP)
            stopped.append(pid)
    time.sleep(seconds)
    for pid in reversed(stopped):  # children first: nobody sees a child of his stopped
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGCONT)


def spin() -> None:
    """Computes for ever, without a pause, while its parent lives."""
    parent = os.getppid()
    while os.getppid() == parent:
        sum(range(10**6))


def ended(command: int) -> int | None:
    """The status of the command if it has ended. Whoever else has ended is waited for, as by init."""
    while (came := os.waitpid(-1, os.WNOHANG))[0]:
        if came[0] == command:
            return came[1]
    return None


def main() -> int:
    """Runs the command, and returns its exit status."""
    parser = argparse.ArgumentParser(prog="python -m tests.stalls", description=__doc__)
    parser.add_argument("--busy", type=int, default=0, help="processes that compute beside it (0)")
    parser.add_argument("--seed", type=int, default=0, help="of the times (0)")
    parser.add_argument("command", nargs=argparse.REMAINDER)
    args = parser.parse_args()
    if not args.command:
        parser.error("no command was given")
    # Processes whose parent has ended become children of this one, and are stopped with the others.
    ctypes.CDLL(None).prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)
    busy = [multiprocessing.Process(target=spin, daemon=True) for _ in range(args.busy)]
    for process in busy:
        process.start()
    spared, chance = {process.pid for process in busy}, random.Random(args.seed)
    command = os.spawnvp(os.P_NOWAIT, args.command[0], args.command)
    while (status := ended(command)) is None:
        time.sleep(chance.uniform(*RUNNING_S))
        stall([pid for pid in descendants(os.getpid()) if pid not in spared], chance.uniform(*STOPPED_S))
    return os.waitstatus_to_exitcode(status)


if __name__ == "__main__":
    sys.exit(main())
