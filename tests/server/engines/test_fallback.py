"""An OpenVINO that this processor cannot run: the server goes on with torch, and says so once."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.server.conftest import Server
from tests.server.fakes import read_texts
from tests.server.faults import faulty

NOTE = "run by torch, since OpenVINO ended an engine by an instruction that this processor lacks"
JOB = {"seed": 7, "steps": 12}


@pytest.fixture
def deadly(tmp_path: Path) -> Iterator[str]:
    """A folder for PYTHONPATH with an OpenVINO that kills each process that imports it."""
    package = tmp_path / "deadly" / "openvino"
    package.mkdir(parents=True)
    (package / "__init__.py").write_text("import os, signal\nos.kill(os.getpid(), signal.SIGILL)\n")
    yield str(package.parent)


def levels(log: str) -> list[str]:
    """The level of each line of the log that speaks of OpenVINO."""
    return [json.loads(line)["level"] for line in log.splitlines() if "OpenVINO" in line]


def model_status(server: Server) -> dict[str, Any]:
    """What `GET /models` says of how the only model is run."""
    runs: dict[str, Any] = server.client.get("/models/tiny").json()["runs"]
    return runs


def test_an_engine_that_dies_of_an_illegal_instruction_is_replaced_by_one_of_torch(
    weights: Path, tmp_path: Path
) -> None:
    fault = {"do": "illegal", "seed": JOB["seed"], "step": 3, "once": str(tmp_path / "happened")}
    server = Server(weights, **faulty(fault)).wait_until_ready()
    try:
        before = model_status(server)
        made = server.client.post("/generate", json=JOB)
        after = model_status(server)
    finally:
        code, log = server.stop()

    assert (before["note"], after["note"]) == (None, NOTE)
    assert (made.status_code, read_texts(made.content)["numerics"]) == (200, after["numerics"])
    assert (levels(log), code) == (["warning"], 0)


@pytest.mark.long
def test_a_server_starts_though_openvino_kills_each_process_that_imports_it(weights: Path, deadly: str) -> None:
    server = Server(weights, PYTHONPATH=deadly, DDPM_ENGINE_RESTARTS="2").wait_until_ready()
    try:
        runs, made = model_status(server), server.client.post("/generate", json=JOB)
    finally:
        code, log = server.stop()

    assert (runs["note"], runs["dtype"], made.status_code) == (NOTE, "float32", 200)
    assert (levels(log), code) == (["warning"], 0)
