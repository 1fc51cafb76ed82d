"""What an engine process does to itself before it makes a step."""

import ctypes
import subprocess
import sys
from pathlib import Path

import pytest

from tests.model.directories import write_model

AGAIN = """
import resource, statistics, sys, torch
from server.machine import prepare_cpu

if sys.argv[1] == "prepared":
    prepare_cpu(1)
faults = []
for _ in range(9):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    torch.ones(16 << 20)  # 64 MiB, larger than what malloc keeps
    faults.append(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
print(statistics.median(faults))  # a small block that lies behind the large one can cost one more, once
"""


@pytest.mark.skipif(not hasattr(ctypes.CDLL(None), "mallopt"), reason="this C library has no mallopt")
def test_an_engine_on_a_cpu_does_not_fetch_its_memory_anew_at_every_step() -> None:
    anew, kept = (
        float(subprocess.run([sys.executable, "-c", AGAIN, how], capture_output=True, check=True).stdout)
        for how in ("as it is", "prepared")
    )

    assert kept < anew / 10


LOADED = """
import sys, threading
from pathlib import Path
from model.card import read_card
from server.loader import Loader
from server.messages import Start

card = read_card(Path(sys.argv[1]), "tiny")
loader = Loader(Start((("tiny", card.directory),), "cpu", "float32", 1, 2, True, "warning"), lambda: None)
loader.finish(loader.begin(card, card.digest))
print(*(thread.name for thread in threading.enumerate()))
"""


def test_no_thread_stays_behind_a_load_that_would_slow_down_those_of_a_step(tmp_path: Path) -> None:
    command = [sys.executable, "-c", LOADED, str(write_model(tmp_path / "tiny"))]
    ran = subprocess.run(command, capture_output=True, check=True, text=True)

    assert ran.stdout.split() == ["MainThread"]
