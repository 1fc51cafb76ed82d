"""The memory and the threads of an engine process between two steps."""

import subprocess
import sys
from pathlib import Path

from tests.model.convert.directories import write_model

STEPS = """
import resource, statistics, sys, torch
from pathlib import Path
from model.checkpoint.card import read_card
from model.checkpoint.load import load_model
from model.nets.cpu import grow_up
from model.engine.runner import prepared

model = load_model(read_card(Path(sys.argv[1])), torch.device("cpu"), torch.float32)
grow_up(model.net, 16)
runner, faults = prepared(model, 16), []
for _ in range(9):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    runner.step(16)
    faults.append(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
print(statistics.median(faults))
"""


def test_an_engine_on_a_cpu_keeps_its_memory_from_step_to_step() -> None:
    """glibc gives large blocks back to the system as soon as they are free: a net has to keep those it works in."""
    command = [sys.executable, "-c", STEPS, str(Path(__file__).parents[3] / "weights" / "digits")]
    faults = float(subprocess.run(command, capture_output=True, check=True).stdout)

    assert faults < 50  # pages of 4 KiB, of thousands that a step writes to


LOADED = """
import sys, threading, time
from pathlib import Path
from model.checkpoint.card import read_card
from server.worker.loader import Loader
from server.worker.messages import Start

card = read_card(Path(sys.argv[1]), "tiny")
models = (("tiny", card.directory),)
numbers = dict(device="cpu", dtype="float32", slots=1, threads=2, exact=True)
loader = Loader(Start(models=models, log_level="warning", **numbers))
for pause_s in loader.load(card, card.digest):
    time.sleep(pause_s)
print(*(thread.name for thread in threading.enumerate()))
"""


def test_a_load_leaves_no_thread_that_would_slow_down_those_of_a_step(tmp_path: Path) -> None:
    command = [sys.executable, "-c", LOADED, str(write_model(tmp_path / "tiny"))]
    ran = subprocess.run(command, capture_output=True, check=True, text=True)

    assert ran.stdout.split() == ["MainThread"]
