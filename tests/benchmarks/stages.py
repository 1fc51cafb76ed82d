"""Stages for the tests of what runs stages: one that goes well, and those that each go wrong in another way."""

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from functools import partial
from pathlib import Path

from benchmarks.gpu.facts import Fact, Setting
from benchmarks.gpu.stage import Part


def one() -> Iterator[Fact]:
    """A fact of each kind of value."""
    yield Fact("one", 1.0, "apples", (0.5, 1.5), main=True)
    yield Fact("word", "two", more={"third": 3})


def breaks() -> Iterator[Fact]:
    """Raises, having told something."""
    yield Fact("before", True)
    raise ValueError("it broke\nhere")


def hangs() -> Iterator[Fact]:
    """Never ends, and cannot be asked to."""
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    yield Fact("before", True)
    while True:
        signal.pause()


def waits() -> Iterator[Fact]:
    """Never ends, but may be asked to."""
    yield Fact("before", True)
    try:
        signal.pause()
    finally:
        print("tidied up", flush=True)


def dies() -> Iterator[Fact]:
    """Takes the whole process along."""
    yield Fact("before", True)
    os.kill(os.getpid(), signal.SIGSEGV)


def leaves_a_child(folder: Path) -> Iterator[Fact]:
    """Ends well, and leaves a process behind that says whether it lives by holding a pipe open."""
    child = subprocess.Popen([sys.executable, "-c", "import signal; signal.pause()"])
    yield Fact("child", child.pid)


def well(setting: Setting) -> list[Part]:
    return [one]


def broken(setting: Setting) -> list[Part]:
    return [breaks, one]


def hanging(setting: Setting) -> list[Part]:
    return [hangs]


def waiting(setting: Setting) -> list[Part]:
    return [waits]


def dying(setting: Setting) -> list[Part]:
    return [dies]


def with_a_child(setting: Setting) -> list[Part]:
    return [partial(leaves_a_child, Path(setting.scratch))]
