"""A plugin of pytest: `-p benchmarks.gpu.told` writes what becomes of each test, the moment it is known, to $TOLD."""

import json
import os

import pytest


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    """Called for each of a test's three phases; side by side, in every worker and again in the process that waits."""
    if "PYTEST_XDIST_WORKER" in os.environ or (report.when != "call" and report.passed):
        return
    line = {"test": report.nodeid, "outcome": report.outcome, "seconds": round(report.duration, 2)}
    with open(os.environ["TOLD"], "a") as file:
        file.write(json.dumps(line) + "\n")
