"""Before any test: torch computes on one thread here. Tests run side by side, and its threads wait for each other."""

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")
