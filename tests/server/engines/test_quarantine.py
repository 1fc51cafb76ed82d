"""Who is to blame for the death of an engine."""

from server.engines.quarantine import Place, Quarantine


def at(step: int) -> Place:
    """A job of one picture that is so far."""
    return frozenset({(0, step)})


def test_one_death_in_company_changes_nothing() -> None:
    court: Quarantine[str] = Quarantine()

    assert court.died({"a": at(3), "b": at(5)}) == []
    assert court.all == []


def test_who_was_there_twice_is_to_be_run_alone() -> None:
    court: Quarantine[str] = Quarantine()
    court.died({"a": at(3), "b": at(5), "c": at(7)})
    court.died({"a": at(0), "c": at(1), "d": at(2)})

    assert court.all == ["a", "c"]
    assert [court.forget(job) for job in "abcd"] == [True, False, True, False]
    assert court.all == []


def test_who_dies_alone_at_the_same_step_twice_is_guilty() -> None:
    court: Quarantine[str] = Quarantine()
    for _ in range(2):
        court.died({"a": at(9), "b": at(9)})

    assert court.died({"a": at(7)}) == []
    assert court.died({"a": at(7)}) == ["a"]


def test_who_is_killed_at_another_step_each_time_is_spared_for_long() -> None:
    court: Quarantine[str] = Quarantine()
    for _ in range(2):
        court.died({"a": at(9)})

    assert [court.died({"a": at(step)}) for step in (1, 2, 3, 4)] == [[], [], [], []]
    assert court.died({"a": at(5)}) == ["a"]
