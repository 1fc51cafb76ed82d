"""Who sits where."""

from dataclasses import dataclass

from hypothesis import given, settings
from hypothesis import strategies as st

from model.scheduler import Scheduler


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
