"""Which samples are seated, which wait, and which are preempted."""

from collections import Counter
from dataclasses import dataclass

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from model.engine.scheduler import HYSTERESIS, SEAT, Preemption, Scheduler


@dataclass(eq=False)
class Picture:
    """The least that the scheduler asks for."""

    name: str
    rank: float = 0.0
    owner: str = ""
    left: int = 1
    width: int = 1
    slots: tuple[int, ...] = ()
    arrival: int = -1

    def __repr__(self) -> str:
        return self.name


def seated(capacity: int, names: str) -> tuple[Scheduler[Picture], list[Picture]]:
    """A scheduler and the pictures that were added and admitted, in order of arrival."""
    scheduler: Scheduler[Picture] = Scheduler(capacity)
    pictures = [Picture(name) for name in names]
    for picture in pictures:
        scheduler.add(picture)
    scheduler.admit()
    return scheduler, pictures


def test_the_first_to_arrive_are_seated_and_the_rest_wait() -> None:
    scheduler, (a, b, c) = seated(2, "abc")

    assert scheduler.seated == [a, b]
    assert (a.slots, b.slots, c.slots) == ((0,), (1,), ())
    assert scheduler.waiting == 1


def test_admit_returns_each_newly_seated_sample_once() -> None:
    scheduler: Scheduler[Picture] = Scheduler(2)
    a, b = Picture("a"), Picture("b")
    scheduler.add(a)
    assert scheduler.admit() == [a]

    scheduler.add(b)
    assert scheduler.admit() == [b]
    assert scheduler.admit() == []


def test_a_lower_rank_is_seated_first_and_equals_keep_their_turn() -> None:
    scheduler: Scheduler[Picture] = Scheduler(4)
    late, first, second, urgent = (
        Picture("late", 5.0),
        Picture("first", 1.0),
        Picture("second", 1.0),
        Picture("urgent", -3.0),
    )
    for picture in (late, first, second, urgent):
        scheduler.add(picture)

    assert scheduler.admit() == [urgent, first, second, late]


def test_admit_preempts_nothing_for_a_lower_rank() -> None:
    scheduler, (a,) = seated(1, "a")
    scheduler.add(Picture("urgent", -9.0))

    assert scheduler.admit() == []
    assert scheduler.seated == [a]


def test_the_last_picture_moves_into_the_hole() -> None:
    scheduler, (a, b, c) = seated(3, "abc")

    assert scheduler.release(a) == [(0, 2)]
    assert scheduler.seated == [c, b]
    assert (a.slots, b.slots, c.slots) == ((), (1,), (0,))


def test_no_picture_moves_when_the_last_one_leaves() -> None:
    scheduler, (a, b) = seated(2, "ab")

    assert scheduler.release(b) == [(1, None)]
    assert scheduler.seated == [a]


def test_a_freed_slot_goes_to_the_picture_that_waits_longest() -> None:
    scheduler, (a, b, c, d) = seated(2, "abcd")
    scheduler.release(a)

    assert scheduler.admit() == [c]
    assert scheduler.seated == [b, c]
    assert d.slots == ()


def test_withdrawing_a_waiting_picture_leaves_the_others_in_turn() -> None:
    scheduler, (a, b, c, d) = seated(1, "abcd")
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
def test_whatever_happens_slots_stay_dense_and_no_picture_is_lost(capacity: int, moves: list[tuple[str, int]]) -> None:
    scheduler: Scheduler[Picture] = Scheduler(capacity)
    waiting: list[Picture] = []
    seated: set[Picture] = set()
    for number, (move, choice) in enumerate(moves):
        if move == "add":
            waiting.append(Picture(str(number), float(choice % 3)))
            scheduler.add(waiting[-1])
        elif move == "admit":
            waiting.sort(key=lambda picture: picture.rank)  # stable: equals keep their turn
            new, waiting = waiting[: capacity - len(seated)], waiting[capacity - len(seated) :]
            assert scheduler.admit() == new
            seated.update(new)
        elif move == "release" and seated:
            picture = scheduler.seated[choice % len(seated)]
            scheduler.release(picture)
            seated.remove(picture)
        elif move == "withdraw" and waiting:
            scheduler.withdraw(waiting.pop(choice % len(waiting)))

        assert [picture.slots for picture in scheduler.seated] == [(i,) for i in range(len(seated))]
        assert set(scheduler.seated) == seated
        assert scheduler.waiting == len(waiting)


# Which picture is seated before which


def settle(scheduler: Scheduler[Picture]) -> list[Picture]:
    """Seats every picture that should be, and returns those seated."""
    scheduler.admit()
    while scheduler.preempt():
        scheduler.admit()
    return scheduler.seated


def settled(capacity: int, *pictures: Picture) -> Scheduler[Picture]:
    """A scheduler with these pictures, settled."""
    scheduler: Scheduler[Picture] = Scheduler(capacity)
    for picture in pictures:
        scheduler.add(picture)
    settle(scheduler)
    return scheduler


def run(scheduler: Scheduler[Picture], steps: int) -> dict[str, int]:
    """Makes so many steps. Returns the image-steps of each owner."""
    done = Counter[str]()
    for _ in range(steps):
        for picture in settle(scheduler):
            done[picture.owner] += 1
            picture.left -= 1
        scheduler.charge()
        for picture in [picture for picture in scheduler.seated if picture.left == 0]:
            scheduler.release(picture)
    return done


def test_of_equals_the_one_with_the_least_left_is_seated_first() -> None:
    long, short, middle = Picture("long", left=1000), Picture("short", left=50), Picture("middle", left=250)

    assert settled(3, long, short, middle).seated == [short, middle, long]


def test_a_shorter_picture_preempts_the_longest() -> None:
    long, longer, short = Picture("long", left=500), Picture("longer", left=501), Picture("short", left=50)
    scheduler = settled(2, long, longer)
    scheduler.add(short)

    assert scheduler.preempt() == Preemption([(longer, 1)], [(1, None)], short)
    assert scheduler.preempt() is None
    assert (scheduler.seated, longer.slots, scheduler.waiting) == ([long, short], (), 1)


def test_a_preempted_picture_goes_on_before_those_that_arrived_after_it() -> None:
    first, short, second = Picture("first", left=900), Picture("short", left=5), Picture("second", left=900)
    scheduler = settled(1, first)
    scheduler.add(short)
    settle(scheduler)
    scheduler.add(second)
    scheduler.release(short)

    assert settle(scheduler) == [first]


def test_no_length_outweighs_a_priority_or_a_minute() -> None:
    for one_more in (-1.0, 0.0):  # priority 1 that arrived just now; a minute of waiting
        patient = Picture("patient", one_more, left=1000)
        scheduler = settled(1, patient)
        scheduler.add(Picture("short", one_more + 1.0, left=1))

        assert settle(scheduler) == [patient]


def test_the_longest_is_overtaken_for_a_minute_at_most() -> None:
    scheduler = settled(1, Picture("usual", -1.0, left=500))
    scheduler.add(Picture("long", 0.0, left=1000))
    finished: list[str] = []
    for second in range(200):  # a flood: in each second as much arrives as can be done in one
        scheduler.add(Picture(f"short {second}", second / 60, left=50))
        for _ in range(50):
            (picture,) = settle(scheduler)
            picture.left -= 1
            if picture.left == 0:
                scheduler.release(picture)
                finished.append(picture.name)

    assert 57 <= finished.index("long") - finished.index("usual") <= 80


def test_no_more_are_preempted_than_there_are_seats() -> None:
    scheduler = settled(2, *(Picture("", left=900 - i) for i in range(2)))
    for left in range(800, 700, -10):
        scheduler.add(Picture("", left=left))
        settle(scheduler)

    assert sorted(picture.left for picture in scheduler.seated) == [790, 800]


def test_a_preempted_picture_that_is_withdrawn_makes_room_for_another() -> None:
    long, short, shorter = Picture("long", left=900), Picture("short", left=800), Picture("shorter", left=700)
    scheduler = settled(1, long)
    scheduler.add(short)
    settle(scheduler)
    scheduler.withdraw(long)
    scheduler.add(shorter)

    assert settle(scheduler) == [shorter]


def test_another_owner_has_a_seat_even_when_as_many_are_preempted() -> None:
    scheduler = settled(2, *(Picture("", left=900) for _ in range(2)))
    for left in (800, 790, 780):
        scheduler.add(Picture("", left=left))
        settle(scheduler)
    other = Picture("", owner="other", left=1000)
    scheduler.add(other)

    assert other in settle(scheduler)


# Shares


@pytest.mark.parametrize("capacity", [1, 2, 3, 8, 64])
@pytest.mark.parametrize("owners", [2, 3, 5])
def test_owners_with_full_queues_get_equal_shares(capacity: int, owners: int) -> None:
    pictures = [
        Picture("", owner=str(o), left=50 if o % 2 else 1000) for o in range(owners) for _ in range(70 * capacity)
    ]
    done = run(settled(capacity, *pictures), 1000)

    fair = 1000 * capacity / owners
    assert max(abs(done[str(o)] - fair) for o in range(owners)) <= 2 * SEAT


def test_seats_that_one_owner_does_not_use_go_to_the_others() -> None:
    modest = [Picture("", owner="modest", left=10**6)]
    greedy = [Picture("", owner="greedy", left=10) for _ in range(4000)]

    assert run(settled(8, *modest, *greedy), 1000) == {"modest": 1000, "greedy": 7000}


def test_a_small_demand_accumulates_little_credit() -> None:
    scheduler = settled(
        8, Picture("", owner="modest", left=10**6), *(Picture("", owner="greedy", left=10**6) for _ in "1" * 9)
    )
    run(scheduler, 10_000)
    for _ in range(20):
        scheduler.add(Picture("", owner="modest", left=10**6))
    done = run(scheduler, 1000)

    assert done["greedy"] >= 4000 - 2 * SEAT


def test_priority_and_length_count_among_the_pictures_of_one_owner_only() -> None:
    urgent = [Picture("urgent", -10.0, "a", left=1) for _ in range(4)]
    usual = [Picture("usual", 0.0, "b", left=1000) for _ in range(4)]

    assert Counter(picture.owner for picture in settled(4, *urgent, *usual).seated) == {"a": 2, "b": 2}


def test_a_new_owner_has_a_seat_at_once_beside_a_flood() -> None:
    scheduler = settled(8, *(Picture("", owner="flood", left=1000) for _ in range(5000)))
    run(scheduler, 500)
    new = Picture("", owner="other", left=50)
    scheduler.add(new)

    assert run(scheduler, 50)["other"] == 50


def test_a_step_changes_few_seats_however_long_owners_compete() -> None:
    scheduler = settled(8, *(Picture("", owner=owner, left=10**6) for owner in "abc" for _ in range(20)))
    preemptions = 0
    for _ in range(1000):
        while scheduler.preempt():
            preemptions += 1
        scheduler.charge()

    assert preemptions <= 1000 / HYSTERESIS


# Pictures that take two slots


@settings(max_examples=150, deadline=None)
@given(
    capacity=st.integers(2, 6),
    moves=st.lists(
        st.tuples(st.sampled_from(["add", "settle", "settle", "release", "withdraw", "step"]), st.integers(0, 99)),
        max_size=60,
    ),
)
def test_whatever_happens_both_slots_of_a_guided_picture_go_together(
    capacity: int, moves: list[tuple[str, int]]
) -> None:
    scheduler: Scheduler[Picture] = Scheduler(capacity)
    there: list[Picture] = []
    for number, (move, choice) in enumerate(moves):
        seated = scheduler.seated
        waiting = [picture for picture in there if picture not in seated]
        if move == "add":
            rank, owner, width = float(choice % 3), "ab"[choice % 2], 1 + choice // 3 % 2
            there.append(Picture(str(number), rank, owner, left=1 + choice, width=width))
            scheduler.add(there[-1])
        elif move == "settle":
            settle(scheduler)
        elif move == "release" and seated:
            scheduler.release(seated[choice % len(seated)])
            there.remove(seated[choice % len(seated)])
        elif move == "withdraw" and waiting:
            scheduler.withdraw(waiting[choice % len(waiting)])
            there.remove(waiting[choice % len(waiting)])
        elif move == "step":
            scheduler.charge()

        places = {picture: tuple(i for i, one in enumerate(scheduler.slots) if one is picture) for picture in there}
        assert {picture: tuple(sorted(picture.slots)) for picture in there} == places
        assert all(len(picture.slots) in (0, picture.width) for picture in there)
        assert len(scheduler.slots) == sum(len(picture.slots) for picture in there) <= capacity
        assert scheduler.waiting == sum(not picture.slots for picture in there)


def test_a_guided_picture_waits_for_two_slots_and_nobody_behind_it_takes_the_free_one() -> None:
    plain, guided, late = Picture("plain", left=9), Picture("guided", width=2, left=9), Picture("late", 1.0, left=1)
    scheduler = settled(2, plain, guided, late)

    assert scheduler.seated == [plain]
    scheduler.release(plain)
    assert settle(scheduler) == [guided]


def test_the_moves_of_a_released_guided_picture_can_be_done_one_after_the_other() -> None:
    a, b, c = Picture("a", width=2), Picture("b"), Picture("c", width=2)
    scheduler = settled(5, a, b, c)

    assert scheduler.release(a) == [(1, 4), (0, 3)]
    assert (b.slots, c.slots) == ((2,), (0, 1))


@pytest.mark.parametrize("capacity", [2, 3, 8])
def test_an_owner_of_guided_pictures_has_no_more_than_its_share(capacity: int) -> None:
    guided = [Picture("", owner="guided", left=50, width=2) for _ in range(200 * capacity)]
    plain = [Picture("", owner="plain", left=50) for _ in range(200 * capacity)]
    scheduler, used = settled(capacity, *guided, *plain), Counter[str]()
    for _ in range(2000):
        for picture in settle(scheduler):
            used[picture.owner] += picture.width
            picture.left -= 1
        scheduler.charge()
        for picture in [picture for picture in scheduler.seated if picture.left == 0]:
            scheduler.release(picture)

    assert abs(used["guided"] - used["plain"]) <= 5 * SEAT
    assert used.total() >= 2000 * (capacity - 1)


def test_guided_and_plain_pictures_of_two_owners_change_few_seats() -> None:
    pictures = [
        Picture("", owner=owner, left=10**6, width=width) for owner, width in (("a", 2), ("b", 1)) for _ in "1" * 20
    ]
    scheduler, preemptions = settled(8, *pictures), 0
    for _ in range(1000):
        while scheduler.preempt():
            preemptions += 1
        scheduler.charge()

    assert preemptions <= 1000 / HYSTERESIS


def test_an_owner_whose_pictures_are_swapped_takes_no_slot_that_another_waits_for() -> None:
    running, head = Picture("running", owner="b", left=100), Picture("head", owner="a", width=2, left=100)
    scheduler = settled(2, running, head)
    scheduler.add(Picture("urgent", -5.0, owner="b", width=2, left=100))

    assert settle(scheduler) == [running]


def test_a_slot_that_a_swap_has_left_over_is_taken_at_once() -> None:
    last, guided = Picture("last", 10.0, width=2, left=300), Picture("guided", 9.0, width=2, left=300)
    scheduler = settled(4, last, guided)
    plain = [Picture(f"plain {i}", left=300) for i in range(4)]
    for picture in plain:
        scheduler.add(picture)

    assert set(settle(scheduler)) == {*plain}


def test_a_guided_picture_takes_a_seat_each_from_two_owners() -> None:
    scheduler = settled(4, *(Picture("", owner=owner, left=10**6) for owner in "abcd" for _ in range(3)))
    run(scheduler, 100)
    guided = Picture("guided", owner="e", width=2, left=10)
    scheduler.add(guided)
    run(scheduler, 3 * SEAT)

    assert guided.left == 0
