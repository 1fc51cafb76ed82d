"""Python imports this at the start of every process that has its folder in PYTHONPATH. See `tests.server.faults`."""

import sys

if any("spawn_main" in word for word in sys.orig_argv):  # an engine process: the API process must not import torch
    from tests.server import faults

    faults.install()
