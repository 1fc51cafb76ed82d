"""Nothing of ours sends anything anywhere. OpenVINO, imported, tells its makers so, unless that is prevented."""

import subprocess
import sys
from importlib.metadata import distributions
from importlib.util import find_spec
from pathlib import Path

import pytest

from tests.server.conftest import Server

ROOT = Path(__file__).parents[3]
TOLD_TO_BE_SILENT = ("CI", "TF_BUILD", "JENKINS_URL")  # variables that turn reports off: without them they are on
MET = "something was about to leave the process: "
WATCH = f"""
import os, sys

def refuse(event, arguments):
    if event.startswith(("socket.connect", "socket.getaddrinfo", "socket.send", "urllib.")) or event in FORKS:
        os.write(2, f"{MET}{{event}}\\n".encode())  # also from a thread or a child, whose exceptions nobody sees
        raise PermissionError(event)

FORKS = ("os.fork", "os.forkpty", "os.exec", "os.posix_spawn", "os.system", "subprocess.Popen")
sys.addaudithook(refuse)
"""
MAKE = """
import torch
from pathlib import Path
from model.checkpoint.card import read_card
from model.checkpoint.load import load_model
from model.engine.engine import Engine
from model.engine.events import Finished, Request
from model.sampling.plan import plan, resolve
from model.engine.runner import prepared

card = read_card(Path("weights/digits"))
engine = Engine(prepared(load_model(card, torch.device("cpu"), torch.float32), slots=2))
engine.submit(Request(0, 207, plan(card.process, resolve(card.process, steps=2))))
events = [event for _ in iter(lambda: engine.busy, False) for event in engine.step()]
print(len(events), isinstance(events[0], Finished), "openvino" in sys.modules)
"""
IMPORT = """
import openvino
openvino.tools.ovc.telemetry.sender.executor.shutdown()
"""


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The empty home of somebody who has told OpenVINO nothing."""
    for name in TOLD_TO_BE_SILENT:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    (tmp_path / "home").mkdir()
    return tmp_path / "home"


def run(code: str) -> tuple[str, list[str]]:
    """What code prints in an interpreter of its own, and what it tried on the way that reaches out of the process."""
    ran = subprocess.run([sys.executable, "-c", WATCH + code], cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert ran.returncode == 0, ran.stderr
    return ran.stdout, [line.removeprefix(MET) for line in ran.stderr.splitlines() if line.startswith(MET)]


def test_a_picture_is_made_without_any_network_traffic(home: Path) -> None:
    assert run(MAKE) == (f"1 True {find_spec('openvino') is not None}\n", [])
    assert list(home.iterdir()) == []


def test_a_server_leaves_nothing_of_openvino_s_in_the_home_of_its_user(home: Path) -> None:
    server = Server(ROOT / "weights" / "digits")
    try:
        made = server.wait_until_ready().client.post("/generate", json={"seed": 207, "steps": 2})
        assert made.status_code == 200
    finally:
        server.stop()

    assert [path.name for path in home.iterdir()] == []


@pytest.mark.skipif(not list(distributions(name="openvino-telemetry")), reason="what would report is not installed")
def test_openvino_alone_would_have_reported(home: Path) -> None:
    assert run(IMPORT)[1] != []
    assert (home / "intel" / "openvino_ga_cid").is_file()
