"""Which runs an engine is given, beside which others, and what is left of them when it dies."""

from collections.abc import Iterable

import pytest

from model.engine.events import Finished, Stats
from model.sampling.plan import resolve
from server.engines import inflight
from server.engines.backend import Progress
from server.engines.inflight import InFlight, Run
from server.engines.quarantine import Quarantine
from server.errors import SampleLost
from server.worker.messages import Heartbeat, Report, Spec
from tests.model.tiny import PROCESS
from tests.server.fakes import grey

SAMPLING = resolve(PROCESS, steps=5)


def spec(job: str, *seeds: int, alone: bool = False) -> Spec:
    """A job's samples."""
    return Spec(model="tiny", seeds=seeds or (1,), sampling=SAMPLING, job=job, alone=alone)


def assign(runs: InFlight) -> list[str]:
    """Gives the engine what it is to have now: the jobs, each marked that is to be watched at every step."""
    submitted = [runs.assign(run) for run in runs.next()]
    return [f"{message.spec.job} alone" if message.spec.alone else message.spec.job for message in submitted]


def seat(runs: InFlight, *seated: Run, step: int = 0) -> None:
    """The engine reports that the samples of these runs are seated, and no others."""
    progress = [(id, step) for run in seated for id in run.samples]
    runs.take(Report(Stats(), [], [], Heartbeat([], progress, 0)))


def finish(runs: InFlight, finished: Run) -> None:
    """The engine ends what is left of a run, and its reader leaves."""
    runs.take(Report(Stats(), [Finished(id, grey(0), None) for id in finished.samples], []))
    runs.leave(finished)


def told(run: Run) -> Iterable[object]:
    """What the reader of a run has not heard yet."""
    while not run.events.empty():
        yield run.events.get_nowait()


def test_runs_share_an_engine_and_each_hears_of_its_own_samples() -> None:
    runs = InFlight(Quarantine())
    a, b = runs.enter(spec("a", 7, 8)), runs.enter(spec("b"))
    assert assign(runs) == ["a", "b"]

    runs.take(Report(Stats(), [], [(id, 0) for id in b.samples]))
    seat(runs, a, step=3)

    assert (list(told(a)), list(told(b))) == ([Progress({0: 3, 1: 3})], [Progress({0: 0})])


def test_a_suspect_gets_the_engine_to_itself_before_others_do() -> None:
    runs = InFlight(Quarantine())
    a, b = runs.enter(spec("a")), runs.enter(spec("b"))
    for _ in range(2):
        assign(runs)
        seat(runs, a)
        runs.on_death(killed=False)

    assert assign(runs) == ["a alone"]
    assert assign(runs) == []
    finish(runs, a)
    assert assign(runs) == ["b"]
    finish(runs, b)


def test_a_run_that_asks_to_be_alone_lets_others_go_first_for_some_time(monkeypatch: pytest.MonkeyPatch) -> None:
    runs = InFlight(Quarantine())
    careful, a = runs.enter(spec("careful", alone=True)), runs.enter(spec("a"))
    assert assign(runs) == ["a"]
    finish(runs, a)
    assert assign(runs) == ["careful alone"]
    b = runs.enter(spec("b"))
    assert assign(runs) == []
    finish(runs, careful)
    assert assign(runs) == ["b"]

    again = runs.enter(spec("again", alone=True))
    runs.enter(spec("c"))
    monkeypatch.setattr(inflight, "ALONE_WAIT_S", -1.0)
    assert assign(runs) == []
    finish(runs, b)
    assert assign(runs) == ["again alone"]
    finish(runs, again)
    assert assign(runs) == ["c"]


def test_only_a_job_that_died_alone_at_the_same_step_again_is_not_run_again() -> None:
    runs = InFlight(Quarantine())
    a, b = runs.enter(spec("a")), runs.enter(spec("b"))
    deaths = []
    for _ in range(2):
        assign(runs)
        seat(runs, a, b, step=3)
        deaths.append(runs.on_death(killed=False))
    for _ in range(2):
        assert assign(runs) == ["a alone"]
        seat(runs, a, step=3)
        deaths.append(runs.on_death(killed=False))

    assert [(death.replayed, death.isolated, death.explained) for death in deaths] == [
        (2, False, False),
        (2, False, False),
        (1, True, False),
        (0, True, True),
    ]
    assert [type(event) for event in told(a)][-1] is SampleLost
    assert assign(runs) == ["b alone"]


def test_a_run_that_was_killed_in_isolation_lets_others_go_first_and_is_not_blamed() -> None:
    runs = InFlight(Quarantine())
    a = runs.enter(spec("a"))
    for _ in range(2):
        assign(runs)
        seat(runs, a, step=3)
        runs.on_death(killed=True)
    b = runs.enter(spec("b"))
    assert assign(runs) == ["a alone"]
    seat(runs, a, step=3)
    assert not runs.on_death(killed=True).explained

    assert assign(runs) == ["b"]
    finish(runs, b)
    assert assign(runs) == ["a alone"]


def test_what_had_ended_before_a_crash_is_not_made_again() -> None:
    runs = InFlight(Quarantine())
    run = runs.enter(spec("a", 7, 8, 9))
    assign(runs)
    first, *others = run.samples
    runs.take(Report(Stats(), [Finished(first, grey(7), None)], []))
    runs.on_death(killed=False)

    (again,) = runs.next()
    message = runs.assign(again)
    assert (message.ids, message.spec.seeds) == (tuple(others), (8, 9))


def test_runs_that_have_waited_long_to_be_alone_take_turns_with_others() -> None:
    runs = InFlight(Quarantine())
    alone = [runs.enter(spec(f"s{i}", alone=True)) for i in range(2)]
    for run in alone:
        run.entered_at -= 2 * inflight.ALONE_WAIT_S
    order = list[str]()
    for job in ("b", "c", "d"):
        runs.enter(spec(job))
        order += assign(runs)
        for run in list(runs.assigned):
            finish(runs, run)

    assert order == ["s0 alone", "b", "c", "d"]  # s1 waits as long again, from when s0 began
