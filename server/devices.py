"""Which devices there are to give engines to. Knows no torch: the API process holds no device."""

import ctypes
import math
import os
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

ANSWER_S = 30.0
UNLIMITED = 1 << 20
QUOTA = Path("/sys/fs/cgroup/cpu.max")  # microseconds in so many: "200000 100000", or "max 100000"


def cores() -> int:
    """How many processors this process may use: those it may run on, and no more than its container's share of time,
    since threads beyond that share only keep each other waiting."""
    count = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return min(count, quota(QUOTA))


def quota(path: Path) -> int:
    """How many processors' time a control group may take, rounded up, by its `cpu.max`; else more than there are."""
    try:
        limit, period = path.read_text().split()
        return UNLIMITED if limit == "max" else max(1, math.ceil(int(limit) / int(period)))
    except (OSError, ValueError):
        return UNLIMITED


def count_gpus() -> int:
    """How many GPUs torch will see. The driver is asked by a process of its own, which leaves nothing behind.

    Raises NoSuchDevice if the driver does not answer.
    """
    if version("torch").endswith("+cpu"):
        return 0
    try:
        asked = subprocess.run([sys.executable, "-I", __file__], capture_output=True, text=True, timeout=ANSWER_S)
    except subprocess.TimeoutExpired:
        from model.errors import NoSuchDevice  # not above: what asks the driver finds none of our packages

        raise NoSuchDevice(
            f"the driver of the GPUs said nothing for {ANSWER_S:g} s; DDPM_DEVICE=cpu needs none"
        ) from None
    return int(asked.stdout) if asked.returncode == 0 else 0


def _ask_driver() -> int:
    """As `CUDA_VISIBLE_DEVICES` has it. Raises OSError where there is no driver."""
    driver, count = ctypes.CDLL("libcuda.so.1"), ctypes.c_int()
    sound = driver.cuInit(0) == 0 and driver.cuDeviceGetCount(ctypes.byref(count)) == 0
    return count.value if sound else 0


def choose_devices(wanted: str, gpus: int) -> list[str]:
    """One name for each engine, of those in the settings, on a machine with so many GPUs."""
    kind, _, numbers = wanted.partition(":")
    if numbers:
        return [f"{kind}:{number}" for number in dict.fromkeys(map(int, numbers.split(",")))]
    if gpus > 1 and kind != "cpu":
        return [f"cuda:{number}" for number in range(gpus)]
    return [wanted]


if __name__ == "__main__":
    print(_ask_driver())
