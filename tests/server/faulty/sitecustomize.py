"""Python imports this at the start of every process that has its folder in PYTHONPATH. See `tests.server.faults`."""

import gc
import sys

if any("spawn_main" in word for word in sys.orig_argv):  # an engine process: the API process must not import torch
    gc.disable()  # as an engine does while it imports torch
    from tests.server import faults

    gc.enable()
    faults.install()
