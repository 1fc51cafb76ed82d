"""What is said of a start: when the server was ready, what its engine held, and when it had nothing left to do."""

import os
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest

from benchmarks import start as benchmark
from benchmarks.models import TINY, random_model
from benchmarks.start import Held, engine_of, start, until_it_rests

MIB = 1 << 20


@pytest.fixture
def play(monkeypatch: pytest.MonkeyPatch) -> Callable[[Callable[[float], Held]], tuple[Held | None, float]]:
    """Waits, in played time, for the rest of an engine that holds at each second what this function says."""
    now = 0.0

    def sleep(seconds: float) -> None:
        nonlocal now
        now += seconds

    def wait(holds: Callable[[float], Held]) -> tuple[Held | None, float]:
        monkeypatch.setattr(benchmark, "time", SimpleNamespace(monotonic=lambda: now, sleep=sleep))
        monkeypatch.setattr(benchmark, "held", lambda process: holds(now))
        return until_it_rests(0)

    return wait


Play = Callable[[Callable[[float], Held]], tuple[Held | None, float]]


def test_an_engine_rests_once_it_computes_nothing_and_its_memory_stays_as_it_is(play: Play) -> None:
    rested, since = play(lambda s: Held(int(min(s, 20.0) * 100 * MIB), 2000 * MIB, min(s, 30.0) + 0.01 * s))

    assert since == 30.0
    assert rested is not None
    assert rested.resident == 2000 * MIB


def test_an_engine_that_computes_does_not_rest(play: Play) -> None:
    assert play(lambda s: Held(MIB, MIB, s / 4))[0] is None


def test_an_engine_that_takes_memory_does_not_rest(play: Play) -> None:
    assert play(lambda s: Held(int(s * MIB), int(s * MIB), 0.0))[0] is None


def test_a_server_without_an_engine_is_named() -> None:
    with pytest.raises(RuntimeError, match=f"the server {os.getppid()} has no engine process"):
        engine_of(os.getppid())


@pytest.mark.long
def test_a_start_tells_when_it_was_ready_and_what_the_engine_held(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(benchmark, "QUIET_S", 0.5)
    found = start(random_model(tmp_path / "tiny", TINY), tmp_path / "data", steps=2)

    assert 0 < found.ready_s < found.rested_s
    assert found.rested is not None
    assert 0 < found.ready.peak <= found.pictured.peak <= found.rested.peak
    assert found.ready.used_s > 0
    assert 0 < found.counted < found.rested.resident
    assert list((tmp_path / "data").iterdir())
