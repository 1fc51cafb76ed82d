"""Which models are in memory when there is not room for all."""

import pytest

from server.worker.eviction import TURN_PER_LOAD, TURN_S, Eviction


def eviction(here: str = "", budget: int = 20, size: int = 10) -> Eviction:
    """Models of one letter; those that are `here` were loaded at 0, 1, 2, ..."""
    made = Eviction(budget, dict.fromkeys("abcd", size))
    for now, name in enumerate(here):
        made.came(name, size, now, 0.1)
    return made


def test_where_no_budget_is_set_there_is_room_for_all() -> None:
    made = eviction("abc", budget=0, size=1 << 60)
    made.ask("d", 5)

    assert made.fits("d")
    assert made.leaving(busy=["a"]) == []


def test_the_least_recently_used_model_makes_room() -> None:
    made = eviction("ab")
    made.ask("a", 5)
    made.ask("c", 6)

    assert made.leaving(busy=[]) == ["b"]


def test_the_model_that_was_asked_for_first_is_loaded_first() -> None:
    made = eviction("ab")
    made.ask("d", 5)
    made.ask("c", 6)
    made.ask("d", 7)

    assert made.next == "d"


def test_idle_models_make_room_before_busy_ones() -> None:
    made = eviction("ab")
    made.ask("b", 5)
    made.ask("c", 6)

    assert made.leaving(busy=["a"]) == ["b"]


def test_of_busy_models_the_one_loaded_first_makes_room() -> None:
    made = eviction("ba")
    made.ask("b", 5)  # used last, and here first
    made.ask("c", 6)

    assert made.leaving(busy=["a", "b"]) == ["b"]


def test_a_large_model_evicts_several() -> None:
    made = eviction("ab")
    made.sizes["c"] = 15
    made.ask("c", 6)

    assert made.leaving(busy=["b"]) == ["a", "b"]


def test_a_turn_ends_some_time_after_another_was_asked_for() -> None:
    made = eviction("ab")
    made.ask("c", 100)

    assert not made.turn_is_over("a", 100 + TURN_S - 0.1)
    assert made.turn_is_over("a", 100 + TURN_S)


def test_a_request_that_waited_for_a_load_waits_for_a_turn_of_that_model() -> None:
    made = eviction("a")
    made.ask("c", 100)
    made.came("b", 10, 150, load_s=TURN_S)

    assert not made.turn_is_over("b", 150 + TURN_PER_LOAD * TURN_S - 0.1)
    assert made.turn_is_over("b", 150 + TURN_PER_LOAD * TURN_S)


def test_a_model_that_turns_out_larger_than_its_bound_evicts_others() -> None:
    made = eviction("a")
    made.came("b", 15, 1, 0.1)

    assert made.leaving(busy=["b"]) == ["a"]


def test_two_models_that_do_not_fit_together_and_are_always_asked_for_get_equal_time() -> None:
    """Played over a clock, with room for one and endless work for both."""
    made, turns = eviction("a", budget=10), {"a": 0, "b": 0}
    for now in range(1000):
        made.ask("a", now)
        made.ask("b", now)
        (here,) = made.here
        turns[here] += 1
        if made.leaving(busy=[here]) == [here] and made.turn_is_over(here, now):
            made.drop(here)
            assert made.next is not None
            made.came(made.next, 10, now, 0.1)

    assert turns["a"] == pytest.approx(turns["b"], abs=2 * TURN_S)
    assert min(turns.values()) > 400
