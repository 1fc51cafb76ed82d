"""Before any test: torch computes on one thread here. Tests run side by side, and its threads wait for each other."""

import os

import benchmarks  # noqa: F401  # keeps from diffusers, wherever tests run, what it does not need

os.environ.setdefault("OMP_NUM_THREADS", "1")
