"""Stages: each runs whatever became of those before, in the time it has, and what it found is on disk at once."""

import json
import os
import re
import time
from pathlib import Path
from typing import Any

import pytest

from benchmarks.gpu import run as stages
from benchmarks.gpu.run import Order, Stage, run

Facts = dict[str, dict[str, Any]]  # by stage and name


def stage(name: str, limit_s: float = 60.0) -> Stage:
    """One of tests/benchmarks/stages.py."""
    return Stage(name, limit_s, f"tests.benchmarks.stages:{name}")


def told(out: Path) -> Facts:
    """All facts: {stage: {name: value}}."""
    found: Facts = {}
    for line in (out / "facts.jsonl").read_text().splitlines():
        fact = json.loads(line)
        found.setdefault(fact["stage"], {})[fact["name"]] = fact["value"]
    return found


def logs(out: Path) -> dict[str, str]:
    """The log of each stage, by its name."""
    _, *parts = re.split(r"^===== (\w+): .* =====$", (out / "stages.log").read_text(), flags=re.M)
    return dict(zip(parts[::2], parts[1::2], strict=True))


@pytest.fixture
def short_grace(monkeypatch: pytest.MonkeyPatch) -> None:
    """Half a second between the request to end and the end; and stages may be short."""
    monkeypatch.setattr(stages, "GRACE_S", 0.5)
    monkeypatch.setattr(stages, "LEAST_S", 0.1)


def test_a_stage_that_fails_dies_or_hangs_costs_the_others_nothing(tmp_path: Path, short_grace: None) -> None:
    wanted = [stage("broken"), stage("dying"), stage("hanging", 3.0), stage("waiting", 3.0), stage("well")]

    assert not run(wanted, Order(out=tmp_path, minutes=1.0), lambda line: None)
    assert told(tmp_path) == {
        "broken": {
            "before": True,
            "breaks failed": "ValueError: it broke",
            "one": 1.0,
            "word": "two",
            "outcome": "failed",
        },
        "dying": {"before": True, "outcome": "died by SIGSEGV"},
        "hanging": {"before": True, "outcome": "stopped at its limit of 3 s"},
        "waiting": {"before": True, "outcome": "stopped at its limit of 3 s"},
        "well": {"one": 1.0, "word": "two", "outcome": "ended"},
    }
    assert 'raise ValueError("it broke\\nhere")' in logs(tmp_path)["broken"]
    for name, place in {"dying": "in dies", "waiting": "in waits"}.items():
        assert place in logs(tmp_path)[name]  # where it stood
    assert "tidied up" in logs(tmp_path)["waiting"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["facts.jsonl", "stages.log"]


def test_what_a_stage_has_started_ends_with_it(tmp_path: Path) -> None:
    assert run([stage("with_a_child")], Order(out=tmp_path, minutes=1.0), lambda line: None)
    child = told(tmp_path)["with_a_child"]["child"]

    until_s = time.monotonic() + 30
    while alive(child) and time.monotonic() < until_s:
        os.sched_yield()
    assert not alive(child)


def alive(process: int) -> bool:
    """Whether a process runs: one that nobody has waited for yet does not."""
    try:
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except OSError:
        return False


def test_stages_for_which_no_time_is_left_are_named(tmp_path: Path, short_grace: None) -> None:
    run([stage("hanging", 60.0), stage("well")], Order(out=tmp_path, minutes=0.04), lambda line: None)

    assert told(tmp_path)["hanging"]["outcome"].startswith("stopped at its limit")
    assert told(tmp_path)["well"] == {"outcome": "left out: no time is left"}


def test_facts_are_shown_as_they_come_and_a_table_of_them_is_the_end(tmp_path: Path) -> None:
    shown = list[str]()
    run([stage("well"), stage("broken")], Order(out=tmp_path, minutes=1.0), shown.append)

    assert shown[1].split() == "well one 1.000 (0.500 .. 1.500) apples".split()
    assert [line.split()[:2] for line in shown[-8:]] == [
        ["well", "outcome"],
        ["broken", "outcome"],
        ["well", "one"],
        ["broken", "breaks"],
        ["broken", "one"],
        ["well", "word"],
        ["broken", "before"],
        ["broken", "word"],
    ]


def test_a_second_run_adds_to_the_facts_of_the_first(tmp_path: Path) -> None:
    shown = list[str]()
    run([stage("well")], Order(out=tmp_path, minutes=1.0), lambda line: None)
    run([stage("well")], Order(out=tmp_path, minutes=1.0), shown.append)

    assert len((tmp_path / "facts.jsonl").read_text().splitlines()) == 6
    assert "3 facts, of which these 3:" in shown[-4]
