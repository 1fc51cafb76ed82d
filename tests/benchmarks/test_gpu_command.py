"""`python -m benchmarks.gpu`: what it refuses, and, dry, every stage with the facts it is there for."""

import json
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from shutil import copyfile
from typing import Any

import numpy as np
import pytest
import torch

from benchmarks.gpu.run import ROOT
from benchmarks.gpu.training import DRY_RECIPE, seen_before
from benchmarks.models import TINY, random_model
from model.checkpoint.card import WEIGHTS, read_card
from model.checkpoint.load import load_model
from model.train.recipe import STATE
from model.train.train import train

STAGES = ["facts", "smoke", "correctness", "speed", "server", "compiled", "tiles", "training"]


def command(
    out: Path, *arguments: str, python: Sequence[str] = (), **environ: str
) -> "subprocess.CompletedProcess[str]":
    """Runs it as one would."""
    line = [sys.executable, *python, "-m", "benchmarks.gpu", *arguments]
    usual = {"PATH": "/usr/bin:/bin", "OUT": str(out)}
    return subprocess.run(line, cwd=ROOT, env=usual | environ, capture_output=True, text=True, check=False)


@pytest.mark.parametrize(
    ("arguments", "refusal"),
    [
        (["--only", "facts", "smok"], f"there is no stage 'smok', but {', '.join(STAGES)}"),
        (["--skip", "speeds"], f"there is no stage 'speeds', but {', '.join(STAGES)}"),
        (["--only", "facts", "--skip", "facts"], "no stage is left to run"),
        (["--minutes", "0"], "--minutes must be a positive number, got 0"),
        (["--minutes", "nan"], "--minutes must be a positive number, got nan"),
        (["--minutes", "soon"], "argument --minutes: invalid float value: 'soon'"),
        (["--train", "docs", "README.md"], "--train: docs is no model directory: it has no config.json"),
        (["--train", "weights/digits", "none.npz"], "--train: there are no pictures at none.npz"),
        (["--train", "weights/digits", "docs"] * 2, "--train takes at most 3 directories, of different names"),
        (["--fast"], "unrecognized arguments: --fast"),
    ],
)
def test_what_cannot_be_meant_is_refused_in_a_line(tmp_path: Path, arguments: list[str], refusal: str) -> None:
    done = command(tmp_path, "--dry", *arguments)

    assert (done.returncode, done.stdout, done.stderr) == (2, "", f"benchmarks.gpu: {refusal}\n")


def test_a_folder_that_cannot_be_written_is_refused_in_a_line(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    done = command(tmp_path / "file" / "folder", "--dry")
    refusal = f"benchmarks.gpu: {tmp_path}/file/folder cannot be written: Not a directory\n"

    assert (done.returncode, done.stdout, done.stderr) == (2, "", refusal)


def test_without_torch_there_is_nothing_to_run(tmp_path: Path) -> None:
    done = command(tmp_path, "--dry", python=["-S"])
    refusal = "benchmarks.gpu: torch is not installed, and nothing here runs without\n"

    assert (done.returncode, done.stdout, done.stderr) == (2, "", refusal)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU here")
def test_without_a_gpu_only_the_dry_run_is_of_use(tmp_path: Path) -> None:
    done = command(tmp_path)
    refusal = "benchmarks.gpu: there is no GPU that torch can use (--dry runs the same on the CPU)\n"

    assert (done.returncode, done.stdout, done.stderr) == (2, "", refusal)


def test_its_help_names_the_stages(tmp_path: Path) -> None:
    assert all(stage in command(tmp_path, "--help").stdout for stage in STAGES)


@dataclass(frozen=True)
class Run:
    """What a dry run has left."""

    out: Path
    code: int
    printed: list[str]
    facts: dict[str, dict[str, Any]]  # by stage and name


@pytest.fixture(scope="module")
def dry(tmp_path_factory: pytest.TempPathFactory) -> Run:
    """A dry run of all stages, in as much time as a busy machine may take."""
    out, facts = tmp_path_factory.mktemp("dry") / "out", dict[str, dict[str, Any]]()
    done = command(out, "--dry", "--minutes", "4.5", "--commit", "abc123")
    for line in (out / "facts.jsonl").read_text().splitlines():
        fact = json.loads(line)
        facts.setdefault(fact["stage"], {})[fact["name"]] = fact["value"]
    assert done.returncode in (0, 1), done.stderr
    return Run(out, done.returncode, done.stdout.splitlines(), facts)


@pytest.mark.long
def test_a_dry_run_ends_well_in_every_stage(dry: Run) -> None:
    outcomes = {stage: found["outcome"] for stage, found in dry.facts.items()}

    assert outcomes == dict.fromkeys(STAGES, "ended"), (dry.out / "stages.log").read_text()
    assert dry.code == 0
    assert [name for found in dry.facts.values() for name in found if "failed" in name or "left out" in name] == []


OURS = "tiny net, batch 1: ours"
EXPECTED = {
    "facts": [
        "kernels compiled beforehand",
        "commit",
        "torch",
        "device",
        "copies",
        "bfloat16 matrix products",
        "convolution, a new shape",
    ],
    "smoke": [
        "tiny: buckets whose replay is the eager step, bit for bit",
        "digits, float32, 2 steps: the most that a pixel differs from the CPU's",
        "tiny, not exact, batch 1, by a graph",
    ],
    "correctness": [
        "tests that passed",
        "cuDNN's bits agree: 3 x 3 from 3 to 8 on 8 x 8",
        "cuDNN's bits agree: attention of 16 on 4 x 4, heads=1, memories=0",
        "the invariant kernel's bits agree in batches of 1 and 2",
        "a call: 3 x 3 from 8 to 8 on 8 x 8, stride 2, below",
        "convolutions and attention of a step, batch 2, chosen",
    ],
    "speed": [
        OURS,
        f"{OURS} against ours, EXACT=0",
        f"{OURS} against diffusers",
        "tiny net, batch 4 always full: requests of 1000 steps",
        "tiny net, batch 4 always full: 50 steps against 1000",
        "tiny net, batch 4 always full: 20 steps against 1000",
        "larger tiny net, batch 1: ours",
    ],
    "server": [
        "digits: pictures in company with the bytes they have alone, of 8",
        "tiny, 4 slots: the first start",
        "digits, 4 at once: server against engine loop",
    ],
    "training": ["tiny: held-out loss before", "tiny: held-out loss after", "tiny: pace of training"],
    "tiles": ["3 x 3 from 3 to 8 on 8 x 8, batch 1"],
    "compiled": [f"{OURS} against torch.compile, eager"],
}


@pytest.mark.long
@pytest.mark.parametrize("stage", STAGES)
def test_a_stage_tells_what_it_is_there_for(dry: Run, stage: str) -> None:
    assert [name for name in EXPECTED[stage] if name not in dry.facts[stage]] == []


@pytest.mark.long
def test_what_can_be_right_or_wrong_is_right(dry: Run) -> None:
    assert dry.facts["facts"]["commit"] == "abc123"
    assert dry.facts["smoke"]["digits, float32, 2 steps: the most that a pixel differs from the CPU's"] == 0
    assert dry.facts["correctness"]["tests that passed"] == 2
    assert dry.facts["server"]["digits: pictures in company with the bytes they have alone, of 8"] == 8


@pytest.mark.long
def test_few_files_come_back_and_what_was_trained_can_be_served_and_trained_on(dry: Run, tmp_path: Path) -> None:
    weights, state = "tiny.safetensors", "tiny.training.safetensors"
    directory = random_model(tmp_path / "tiny", TINY)
    untrained = (directory / WEIGHTS).read_bytes()
    copyfile(dry.out / weights, directory / WEIGHTS)
    copyfile(dry.out / state, directory / STATE)

    assert sorted(path.name for path in dry.out.iterdir()) == ["facts.jsonl", "stages.log", weights, state]
    assert (directory / WEIGHTS).read_bytes() != untrained
    assert load_model(read_card(directory), torch.device("cpu"), torch.float32).parameters > 0
    assert seen_before(directory) == 64
    np.savez(tmp_path / "pictures.npz", images=np.zeros((40, 8, 8, 3), np.uint8))
    train(tmp_path / "pictures.npz", directory, replace(DRY_RECIPE, images=96), "cpu")
    assert seen_before(directory) == 96


@pytest.mark.long
def test_the_last_lines_printed_are_a_table_of_facts(dry: Run) -> None:
    assert "facts, of which these 40:" in dry.printed[-41]
    assert [line.split()[:2] for line in dry.printed[-40:][: len(STAGES)]] == [[stage, "outcome"] for stage in STAGES]
    assert all(len(line) <= 200 for line in dry.printed[-40:])


def test_only_and_skip_choose_stages(tmp_path: Path) -> None:
    done = command(tmp_path, "--dry", "--only", "facts", "training", "--skip", "training", DDPM_COMMIT="def456")
    lines = [json.loads(line) for line in (tmp_path / "facts.jsonl").read_text().splitlines()]

    assert done.returncode == 0, done.stdout
    assert {line["stage"] for line in lines} == {"facts"}
    assert [line["value"] for line in lines if line["name"] == "commit"] == ["def456"]
    assert all(line["dry"] for line in lines)
