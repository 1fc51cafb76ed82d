"""How all tests are run: torch computes on one thread, slow files begin first, and collecting costs little.

Tests run side by side, and torch's threads would wait for each other.
"""

import gc
import os
from pathlib import Path

import pytest

import benchmarks  # noqa: F401  # keeps from diffusers, wherever tests run, what it does not need

os.environ.setdefault("OMP_NUM_THREADS", "1")
gc.disable()  # until all is imported: else a quarter of that time goes by

ROOT = Path(__file__).parent
# The files that take longest, the longest first, as `pytest --durations` tells. A worker that began one of them last
# would still be at it when the others have nothing left to do. Those that mostly wait stand beside those that compute.
SLOWEST = (
    "server/engines/test_crashes.py",
    "benchmarks/test_gpu_command.py",
    "model/kernels/test_triton.py",
    "e2e/test_page.py",
    "server/engines/test_supervisor.py",
    "model/kernels/test_compilation.py",
    "server/engines/test_faults.py",
    "test_first_picture.py",
    "server/jobs/test_stream.py",
    "server/web/test_info.py",
    "server/web/test_fuzz.py",
    "model/sampling",
    "server/engines/test_router.py",
    "client/test_threads.py",
    "server/jobs/test_endings.py",
    "server/test_converted.py",
    "model/convert",
    "model/nets",
    "model/checkpoint/test_load.py",
    "benchmarks/test_contenders.py",
    "model/engine/test_footprint.py",
    "deploy/test_torch_build.py",
    "server/worker",
)


@pytest.hookimpl(optionalhook=True)  # xdist is not everywhere
def pytest_xdist_auto_num_workers() -> int:
    """Two tests to a core, since many wait: for a server that starts, for a disk, for a clock."""
    return min(2 * len(os.sched_getaffinity(0)), 16)


def place(path: Path) -> int:
    """When a file's turn is: its place among the slowest, or after all of them."""
    name = path.relative_to(ROOT).as_posix()
    return next((i for i, slow in enumerate(SLOWEST) if f"{name}/".startswith(f"{slow}/")), len(SLOWEST))


def pytest_ignore_collect(collection_path: Path, config: pytest.Config) -> bool | None:
    """Of the tests that want the machine for themselves, only the files that have some are imported."""
    if not config.option.markexpr.startswith("alone and ") or not collection_path.name.startswith("test_"):
        return None
    return "mark.alone" not in collection_path.read_text() or None


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Puts the slowest files first. Within a file nothing changes."""
    items.sort(key=lambda item: place(item.path))


def pytest_collection_finish() -> None:
    """All is imported, and stays: who collects garbage need not look at it again."""
    gc.freeze()
    gc.enable()


def pytest_sessionfinish() -> None:
    """hypothesis, which may be imported only for the summary, asks who refers to the generators of others."""
    gc.unfreeze()
