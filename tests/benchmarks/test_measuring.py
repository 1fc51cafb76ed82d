"""How benchmarks measure: one that fails costs nothing but itself, and what is said of it can be found."""

import asyncio
import time
from collections import deque
from collections.abc import Iterator
from multiprocessing import Pipe
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

import model.nets.layers
from benchmarks import streams
from benchmarks.contenders import Setup
from benchmarks.full import Crowd
from benchmarks.gpu import machine, smoke
from benchmarks.gpu.facts import Fact, Setting
from benchmarks.gpu.smoke import steps_one_way_or_another
from benchmarks.gpu.stage import each_by_itself
from benchmarks.measure import commit, interleaved
from benchmarks.remote import Remote
from model.engine.engine import Engine
from model.engine.events import Event, Finished
from tests.model.tiny import CPU, quick_engine


def test_a_contender_that_fails_is_left_out_and_the_others_go_on() -> None:
    turns = iter(range(100))

    def fails() -> float:
        if next(turns) == 2:
            raise RuntimeError("no memory")
        return 1.0

    assert interleaved({"fails": fails, "well": lambda: 2.0}, 4, excused=RuntimeError) == {"well": [2.0] * 4}
    with pytest.raises(RuntimeError, match="broken"):
        interleaved({"fails": lambda: (_ for _ in ()).throw(RuntimeError("broken"))}, 1)


def test_a_contender_that_takes_no_time_itself_is_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = iter(range(100))
    monkeypatch.setattr(time, "perf_counter", lambda: float(next(clock)))

    assert interleaved({"one": lambda: None, "two": lambda: 0.5}, 2) == {"one": [1.0, 1.0], "two": [0.5, 0.5]}


def test_an_answer_is_not_waited_for_for_ever() -> None:
    ours, theirs = Pipe()
    remote = Remote("slow", ours, SimpleNamespace(kill=lambda: None, join=lambda: None), patience_s=0.0)

    with pytest.raises(RuntimeError, match="slow gave no answer in 0 s"):
        remote.answer()
    with pytest.raises(RuntimeError, match="slow has ended"):
        remote.ask("run", 1, 2)
    theirs.close()


def test_the_traceback_of_a_contender_that_cannot_be_loaded_is_told(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    remote = Remote.start("ours", Setup(tmp_path / "nothing", torch.device("cpu"), 1))
    with pytest.raises(RuntimeError, match="ours: .*ModelRefused"):
        remote.answer()
    remote.end()

    assert "Traceback (most recent call last)" in capfd.readouterr().err


def test_the_commit_comes_from_outside_where_no_git_can_tell(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("DDPM_COMMIT", raising=False)
    assert commit(tmp_path) == "unknown"
    (tmp_path / ".git").mkdir()
    assert commit(tmp_path) == "unknown"
    monkeypatch.setenv("PATH", "")
    assert commit(tmp_path) == "unknown"
    monkeypatch.setenv("DDPM_COMMIT", "abc123")
    assert commit(tmp_path) == "abc123"


def test_jobs_of_less_than_a_second_say_nothing_of_an_eta_and_break_nothing(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    async def watch(url: str, request: dict[str, Any]) -> list[tuple[float, float]]:
        return [(0.0, 0.4), (0.5, 0.0)]

    async def at_once(seconds: float) -> None:
        return None

    monkeypatch.setattr(streams, "watch", watch)
    monkeypatch.setattr(asyncio, "sleep", at_once)

    assert [*streams.how_right_an_eta_is("http://nowhere")] == []
    assert capsys.readouterr().out.splitlines() == [
        "left out: first ETA of a job, since no job took 1 s",
        "left out: every ETA, since no job took 1 s",
    ]


@pytest.mark.parametrize("late", [0, 3])
def test_a_crowd_fills_every_slot_at_every_step_however_late_an_end_is_told(
    late: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = quick_engine(slots=4)
    crowd, told, usual = Crowd(engine), deque[list[Event]]([[]] * late), engine.step

    def step() -> list[Event]:
        told.append(usual())
        return told.popleft()

    monkeypatch.setattr(Engine, "step", lambda _: step())
    crowd.come(4, 8)  # in whose first five steps two end
    walked = [crowd.walk(1)[1] for _ in range(20)]
    ended = sum(isinstance(event, Finished) for events in told for event in events)

    assert walked == [4] * 20
    assert crowd.walk(100)[1] == 400
    assert ended == (1 if late else 0)  # every second step one ends, which is told later
    monkeypatch.undo()
    crowd.leave()
    assert not engine.busy


def test_whether_triton_runs_is_asked_of_triton(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[torch.device] = []

    def works(device: torch.device) -> bool:
        asked.append(device)
        return True

    monkeypatch.setattr(model.nets.layers, "TRITON_ON", frozenset({"cpu"}))
    monkeypatch.setattr(model.nets.layers, "_triton_works", works)

    assert [fact.value for fact in machine.triton(CPU)] == [True]
    assert asked == [CPU]


def test_one_of_many_that_fails_costs_only_its_own_facts(capsys: pytest.CaptureFixture[str]) -> None:
    told = list[Fact]()
    with pytest.raises(RuntimeError, match="1 of 3 failed"):
        for fact in each_by_itself([1, 0, 2], lambda number: iter([Fact("half", 1 / number)])):
            told.append(fact)

    assert told == [Fact("half", 1.0), Fact("half", 0.5)]
    assert "ZeroDivisionError" in capsys.readouterr().err


class Scripted:
    """Passes for `Apart`: what each way gives, the last of it an error or not."""

    scripts: dict[str, list[Any]] = {}

    def __init__(self, work: object, *arguments: Any) -> None:
        self.script = self.scripts[arguments[-1]]

    def results(self, patience_s: float) -> Iterator[Any]:
        for each in self.script:
            if isinstance(each, Exception):
                raise each
            yield each


def a_setting(scratch: Path) -> Setting:
    """That of a dry stage with time enough."""
    ends_s = time.time() + 60
    where = {"out": str(scratch), "scratch": str(scratch)}
    return Setting(stage="smoke", work="", dry=True, began_s=0.0, until_s=ends_s, **where)


NUMBER = ("net, batch 1", 2.0, "ms/step")
BROKEN = RuntimeError("Traceback\nRuntimeError: it cannot be captured")


@pytest.mark.parametrize(
    ("scripts", "names"),
    [
        ({"a graph": [NUMBER, NUMBER]}, ["net, batch 1"] * 2),
        ({"a graph": [BROKEN], "eager": [NUMBER]}, ["steps by a graph failed", "net, batch 1"]),
        ({"a graph": [NUMBER, BROKEN]}, ["net, batch 1", "steps by a graph failed"]),
        (
            {"a graph": [BROKEN], "eager": [BROKEN], "plain torch": [NUMBER]},
            ["steps by a graph failed", "steps by eager failed", "net, batch 1"],
        ),
    ],
)
def test_where_a_step_cannot_be_captured_it_is_run_eagerly_and_then_in_plain_torch(
    scripts: dict[str, list[Any]], names: list[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(Scripted, "scripts", scripts)
    monkeypatch.setattr(smoke, "Apart", Scripted)

    assert [fact.name for fact in steps_one_way_or_another(a_setting(tmp_path), CPU, (1,))] == names


def test_steps_that_can_be_run_in_no_way_fail(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(Scripted, "scripts", dict.fromkeys(smoke.WAYS, [BROKEN]))
    monkeypatch.setattr(smoke, "Apart", Scripted)

    with pytest.raises(RuntimeError, match="no step could be run"):
        [*steps_one_way_or_another(a_setting(tmp_path), CPU, (1,))]
