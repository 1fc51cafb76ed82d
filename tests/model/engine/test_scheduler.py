"""Who sits where."""

from collections import Counter
from dataclasses import dataclass

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from model.engine.scheduler import PATIENCE, SEAT, Exchange, Scheduler


@dataclass(eq=False)
class Guest:
    """The least the scheduler asks for."""

    name: str
    order: float = 0.0
    owner: str = ""
    left: int = 1
    slot: int | None = None
    arrival: int = -1

    def __repr__(self) -> str:
        return self.name


def table(capacity: int, names: str) -> tuple[Scheduler[Guest], list[Guest]]:
    """A scheduler and the guests that were added and admitted, in order of arrival."""
    scheduler: Scheduler[Guest] = Scheduler(capacity)
    guests = [Guest(name) for name in names]
    for guest in guests:
        scheduler.add(guest)
    scheduler.admit()
    return scheduler, guests


def test_the_first_to_come_are_seated_and_the_rest_wait() -> None:
    scheduler, (a, b, c) = table(2, "abc")

    assert scheduler.seated == [a, b]
    assert (a.slot, b.slot, c.slot) == (0, 1, None)
    assert scheduler.waiting == 1


def test_admit_tells_who_has_just_sat_down_and_nobody_twice() -> None:
    scheduler: Scheduler[Guest] = Scheduler(2)
    a, b = Guest("a"), Guest("b")
    scheduler.add(a)
    assert scheduler.admit() == [a]

    scheduler.add(b)
    assert scheduler.admit() == [b]
    assert scheduler.admit() == []


def test_a_smaller_order_is_seated_first_and_equals_keep_their_turn() -> None:
    scheduler: Scheduler[Guest] = Scheduler(4)
    late, first, second, urgent = Guest("late", 5.0), Guest("first", 1.0), Guest("second", 1.0), Guest("urgent", -3.0)
    for guest in (late, first, second, urgent):
        scheduler.add(guest)

    assert scheduler.admit() == [urgent, first, second, late]


def test_a_better_order_does_not_unseat_anybody() -> None:
    scheduler, (a,) = table(1, "a")
    scheduler.add(Guest("urgent", -9.0))

    assert scheduler.admit() == []
    assert scheduler.seated == [a]


def test_the_last_guest_moves_into_the_hole() -> None:
    scheduler, (a, b, c) = table(3, "abc")

    assert scheduler.release(a) == (2, 0)
    assert scheduler.seated == [c, b]
    assert (a.slot, b.slot, c.slot) == (None, 1, 0)


def test_nobody_moves_when_the_last_guest_leaves() -> None:
    scheduler, (a, b) = table(2, "ab")

    assert scheduler.release(b) is None
    assert scheduler.seated == [a]


def test_a_freed_slot_goes_to_whoever_waits_longest() -> None:
    scheduler, (a, b, c, d) = table(2, "abcd")
    scheduler.release(a)

    assert scheduler.admit() == [c]
    assert scheduler.seated == [b, c]
    assert d.slot is None


def test_withdrawing_a_waiting_guest_leaves_the_others_in_turn() -> None:
    scheduler, (a, b, c, d) = table(1, "abcd")
    scheduler.withdraw(c)

    assert scheduler.waiting == 2
    scheduler.release(a)
    assert scheduler.admit() == [b]
    scheduler.release(b)
    assert scheduler.admit() == [d]


@settings(max_examples=100, deadline=None)
@given(
    capacity=st.integers(1, 5),
    moves=st.lists(st.tuples(st.sampled_from(["add", "admit", "release", "withdraw"]), st.integers(0, 99))),
)
def test_whatever_happens_slots_stay_dense_and_nobody_is_lost(capacity: int, moves: list[tuple[str, int]]) -> None:
    scheduler: Scheduler[Guest] = Scheduler(capacity)
    waiting: list[Guest] = []
    seated: set[Guest] = set()
    for number, (move, choice) in enumerate(moves):
        if move == "add":
            waiting.append(Guest(str(number), float(choice % 3)))
            scheduler.add(waiting[-1])
        elif move == "admit":
            waiting.sort(key=lambda guest: guest.order)  # stable: equals keep their turn
            new, waiting = waiting[: capacity - len(seated)], waiting[capacity - len(seated) :]
            assert scheduler.admit() == new
            seated.update(new)
        elif move == "release" and seated:
            guest = scheduler.seated[choice % len(seated)]
            scheduler.release(guest)
            seated.remove(guest)
        elif move == "withdraw" and waiting:
            scheduler.withdraw(waiting.pop(choice % len(waiting)))

        assert [guest.slot for guest in scheduler.seated] == list(range(len(seated)))
        assert set(scheduler.seated) == seated
        assert scheduler.waiting == len(waiting)


# Who goes before whom


def settle(scheduler: Scheduler[Guest]) -> list[Guest]:
    """Seats everybody who should sit; those who sit."""
    scheduler.admit()
    while scheduler.exchange():
        pass
    return scheduler.seated


def party(capacity: int, *guests: Guest) -> Scheduler[Guest]:
    """A scheduler with these guests, settled."""
    scheduler: Scheduler[Guest] = Scheduler(capacity)
    for guest in guests:
        scheduler.add(guest)
    settle(scheduler)
    return scheduler


def play(scheduler: Scheduler[Guest], steps: int) -> dict[str, int]:
    """So many steps; how many of each owner's were done."""
    done = Counter[str]()
    for _ in range(steps):
        for guest in settle(scheduler):
            done[guest.owner] += 1
            guest.left -= 1
        scheduler.charge()
        for guest in [guest for guest in scheduler.seated if guest.left == 0]:
            scheduler.release(guest)
    return done


def test_of_equals_the_one_with_the_least_left_is_seated_first() -> None:
    long, short, middle = Guest("long", left=1000), Guest("short", left=50), Guest("middle", left=250)

    assert party(3, long, short, middle).seated == [short, middle, long]


def test_a_shorter_guest_takes_the_seat_of_the_longest() -> None:
    long, longer, short = Guest("long", left=500), Guest("longer", left=501), Guest("short", left=50)
    scheduler = party(2, long, longer)
    scheduler.add(short)

    assert scheduler.exchange() == Exchange(1, longer, short)
    assert scheduler.exchange() is None
    assert (scheduler.seated, longer.slot, scheduler.waiting) == ([long, short], None, 1)


def test_who_was_unseated_goes_on_before_those_who_came_after_it() -> None:
    first, short, second = Guest("first", left=900), Guest("short", left=5), Guest("second", left=900)
    scheduler = party(1, first)
    scheduler.add(short)
    settle(scheduler)
    scheduler.add(second)
    scheduler.release(short)

    assert settle(scheduler) == [first]


def test_no_length_outweighs_a_priority_or_a_minute() -> None:
    for one_more in (-1.0, 0.0):  # priority 1 that came just now; a minute of waiting
        patient = Guest("patient", one_more, left=1000)
        scheduler = party(1, patient)
        scheduler.add(Guest("short", one_more + 1.0, left=1))

        assert settle(scheduler) == [patient]


def test_the_longest_is_overtaken_for_a_minute_at_most() -> None:
    scheduler = party(1, Guest("usual", -1.0, left=500))
    scheduler.add(Guest("long", 0.0, left=1000))
    finished: list[str] = []
    for second in range(200):  # a flood: each second comes as much as can be done in one
        scheduler.add(Guest(f"short {second}", second / 60, left=50))
        for _ in range(50):
            (guest,) = settle(scheduler)
            guest.left -= 1
            if guest.left == 0:
                scheduler.release(guest)
                finished.append(guest.name)

    assert 57 <= finished.index("long") - finished.index("usual") <= 80


def test_no_more_are_unseated_than_there_are_seats() -> None:
    scheduler = party(2, *(Guest("", left=900 - i) for i in range(2)))
    for left in range(800, 700, -10):
        scheduler.add(Guest("", left=left))
        settle(scheduler)

    assert sorted(guest.left for guest in scheduler.seated) == [790, 800]


def test_who_was_unseated_and_then_withdrew_makes_room_for_another() -> None:
    long, short, shorter = Guest("long", left=900), Guest("short", left=800), Guest("shorter", left=700)
    scheduler = party(1, long)
    scheduler.add(short)
    settle(scheduler)
    scheduler.withdraw(long)
    scheduler.add(shorter)

    assert settle(scheduler) == [shorter]


def test_another_owner_finds_a_seat_even_when_as_many_are_unseated() -> None:
    scheduler = party(2, *(Guest("", left=900) for _ in range(2)))
    for left in (800, 790, 780):
        scheduler.add(Guest("", left=left))
        settle(scheduler)
    other = Guest("", owner="other", left=1000)
    scheduler.add(other)

    assert other in settle(scheduler)


# Shares


@pytest.mark.parametrize("capacity", [1, 2, 3, 8, 64])
@pytest.mark.parametrize("owners", [2, 3, 5])
def test_owners_who_want_everything_get_equal_shares(capacity: int, owners: int) -> None:
    guests = [Guest("", owner=str(o), left=50 if o % 2 else 1000) for o in range(owners) for _ in range(70 * capacity)]
    done = play(party(capacity, *guests), 1000)

    fair = 1000 * capacity / owners
    assert max(abs(done[str(o)] - fair) for o in range(owners)) <= 2 * SEAT


def test_what_one_owner_does_not_want_the_others_get() -> None:
    modest = [Guest("", owner="modest", left=10**6)]
    greedy = [Guest("", owner="greedy", left=10) for _ in range(4000)]

    assert play(party(8, *modest, *greedy), 1000) == {"modest": 1000, "greedy": 7000}


def test_who_wanted_little_for_long_has_saved_up_little() -> None:
    scheduler = party(
        8, Guest("", owner="modest", left=10**6), *(Guest("", owner="greedy", left=10**6) for _ in "1" * 9)
    )
    play(scheduler, 10_000)
    for _ in range(20):
        scheduler.add(Guest("", owner="modest", left=10**6))
    done = play(scheduler, 1000)

    assert done["greedy"] >= 4000 - 2 * SEAT


def test_priority_and_length_count_among_the_guests_of_one_owner_only() -> None:
    urgent = [Guest("urgent", -10.0, "a", left=1) for _ in range(4)]
    usual = [Guest("usual", 0.0, "b", left=1000) for _ in range(4)]

    assert Counter(guest.owner for guest in party(4, *urgent, *usual).seated) == {"a": 2, "b": 2}


def test_a_newcomer_has_a_seat_at_once_beside_a_flood() -> None:
    scheduler = party(8, *(Guest("", owner="flood", left=1000) for _ in range(5000)))
    play(scheduler, 500)
    newcomer = Guest("", owner="other", left=50)
    scheduler.add(newcomer)

    assert play(scheduler, 50)["other"] == 50


def test_a_step_changes_few_seats_however_long_owners_compete() -> None:
    scheduler = party(8, *(Guest("", owner=owner, left=10**6) for owner in "abc" for _ in range(20)))
    exchanges = 0
    for _ in range(1000):
        while scheduler.exchange():
            exchanges += 1
        scheduler.charge()

    assert exchanges <= 1000 / PATIENCE
