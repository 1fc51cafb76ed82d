"""How many processors this process may use. Knows no torch."""

import math
import os
from pathlib import Path

UNLIMITED = 1 << 20
QUOTA = Path("/sys/fs/cgroup/cpu.max")  # microseconds in so many: "200000 100000", or "max 100000"


def cores() -> int:
    """How many processors this process may use: those it may run on, and no more than its container's share of time.

    Threads beyond that share only wait for each other.
    """
    count = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return min(count, quota(QUOTA))


def quota(path: Path) -> int:
    """How many processors' time a control group may take by its `cpu.max`, rounded up; UNLIMITED if it does not say."""
    try:
        limit, period = path.read_text().split()
        return UNLIMITED if limit == "max" else max(1, math.ceil(int(limit) / int(period)))
    except (OSError, ValueError):
        return UNLIMITED
