"""Which jobs are blamed for the death of an engine."""

import pytest

from model.sampling.plan import resolve
from server.engines.quarantine import DEATHS_LOADING, Place, Quarantine, Record
from server.worker.messages import Spec
from tests.model.tiny import PROCESS

SAMPLING = resolve(PROCESS, steps=5)


def at(step: int) -> Place:
    """A job of one sample that is so far."""
    return frozenset({(0, step)})


def records(quarantine: Quarantine, *jobs: str) -> list[Record]:
    """The records of these jobs."""
    return [quarantine.record(Spec(model="tiny", seeds=(1,), sampling=SAMPLING, job=job)) for job in jobs]


def test_one_death_in_company_changes_nothing() -> None:
    quarantine = Quarantine()
    a, b = records(quarantine, "a", "b")

    assert quarantine.died({a: at(3), b: at(5)}, killed=False) == []
    assert (a.isolated, b.isolated) == (False, False)


def test_a_job_that_was_seated_at_two_deaths_is_run_alone() -> None:
    quarantine = Quarantine()
    a, b, c, d = records(quarantine, "a", "b", "c", "d")
    quarantine.died({a: at(3), b: at(5), c: at(7)}, killed=False)
    quarantine.died({a: at(0), c: at(1), d: at(2)}, killed=False)

    assert [record.isolated for record in (a, b, c, d)] == [True, False, True, False]


def test_a_job_that_dies_alone_at_the_same_step_twice_has_killed_the_engine() -> None:
    quarantine = Quarantine()
    a, b = records(quarantine, "a", "b")
    for _ in range(2):
        quarantine.died({a: at(9), b: at(9)}, killed=False)

    assert quarantine.died({a: at(7)}, killed=False) == []
    assert quarantine.died({a: at(7)}, killed=False) == [a]


def test_a_job_that_dies_at_another_step_each_time_is_spared_for_long() -> None:
    quarantine = Quarantine()
    (a,) = records(quarantine, "a")
    for _ in range(2):
        quarantine.died({a: at(9)}, killed=False)

    assert [quarantine.died({a: at(step)}, killed=False) for step in (1, 2, 3, 4)] == [[], [], [], []]
    assert quarantine.died({a: at(5)}, killed=False) == [a]


def isolated(quarantine: Quarantine, job: str) -> Record:
    """The record of a job that was seated at two deaths."""
    (record,) = records(quarantine, job)
    for _ in range(2):
        quarantine.died({record: at(9)}, killed=True)
    return record


def test_a_job_is_spared_however_often_its_engine_is_killed_at_other_steps() -> None:
    quarantine = Quarantine()
    a = isolated(quarantine, "a")

    assert [quarantine.died({a: at(step)}, killed=True) for step in 25 * [3, 3, 3, 3, 4]] == [[]] * 125
    assert (a.isolated, a.yields) == (True, True)


def test_a_job_that_is_killed_alone_at_one_step_five_times_in_a_row_is_the_reason() -> None:
    quarantine = Quarantine()
    a = isolated(quarantine, "a")

    assert [quarantine.died({a: at(3)}, killed=True) for _ in range(5)] == [[], [], [], [], [a]]


@pytest.mark.parametrize("killed", [True, False])
def test_an_engine_without_a_sample_that_is_killed_clears_all_jobs_and_one_that_crashes_none(killed: bool) -> None:
    quarantine = Quarantine()
    a = isolated(quarantine, "a")
    for _ in range(4):
        quarantine.died({a: at(3)}, killed=True)
    quarantine.died({}, killed=killed)

    assert quarantine.died({a: at(3)}, killed=True) == ([] if killed else [a])


def test_kills_and_crashes_are_counted_apart() -> None:
    quarantine = Quarantine()
    a = isolated(quarantine, "a")

    assert quarantine.died({a: at(3)}, killed=True) == []
    assert quarantine.died({a: at(3)}, killed=False) == []
    assert quarantine.died({a: at(3)}, killed=False) == [a]


def test_a_death_in_company_is_no_evidence_against_an_isolated_job() -> None:
    quarantine = Quarantine()
    a, b = records(quarantine, "a", "b")
    for _ in range(2):
        quarantine.died({a: at(9)}, killed=False)

    assert [quarantine.died({a: at(7), b: at(step)}, killed=False) for step in range(9)] == [[]] * 9


def test_deaths_count_on_whichever_engine_a_job_was_seated_until_its_last_run_ends() -> None:
    quarantine = Quarantine()
    on_one, on_another = records(quarantine, "a", "a")
    quarantine.died({on_one: at(3)}, killed=False)
    del on_one
    quarantine.died({on_another: at(3)}, killed=False)

    assert on_another.isolated
    del on_another
    assert [record.isolated for record in records(quarantine, "a")] == [False]


def test_runs_without_a_job_are_known_apart() -> None:
    a, b = records(Quarantine(), "", "")

    assert a is not b


def test_a_job_that_asks_to_be_alone_is_isolated_and_nothing_is_held_against_it() -> None:
    quarantine = Quarantine()
    record = quarantine.record(Spec(model="tiny", seeds=(1,), sampling=SAMPLING, job="a", alone=True))

    assert (record.isolated, record.deaths, record.crashes, record.kills) == (True, 0, [], [])
    assert quarantine.died({record: at(7)}, killed=False) == []
    assert quarantine.died({record: at(7)}, killed=False) == [record]


def test_a_model_is_given_up_after_some_deaths_in_a_row_during_its_load() -> None:
    quarantine = Quarantine()

    assert [quarantine.died_loading("a", killed=False) for _ in range(DEATHS_LOADING)] == [False] * (
        DEATHS_LOADING - 1
    ) + [True]
    quarantine.loaded("a")
    assert [quarantine.died_loading("a", killed=False) for _ in range(DEATHS_LOADING)] == [False] * (
        DEATHS_LOADING - 1
    ) + [True]
    assert not quarantine.died_loading("b", killed=False)


def test_five_kills_count_as_one_death_while_a_model_loads() -> None:
    quarantine = Quarantine()

    given_up = [quarantine.died_loading("a", killed=True) for _ in range(5 * DEATHS_LOADING)]
    assert given_up == [False] * (5 * DEATHS_LOADING - 1) + [True]
