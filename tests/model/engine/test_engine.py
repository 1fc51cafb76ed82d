"""The engine: samples that join and leave, and the events. Pictures are compared with those of the slow sampler."""

from collections import Counter
from collections.abc import Callable, Hashable

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from model.engine.engine import Engine
from model.engine.events import Cancelled, Event, Failed, Finished, Preview, Request
from model.engine.readout import Snapshot
from model.sampling.reference import sample_alone
from tests.model.engine.alone import MIXED, alone_picture, poisoned
from tests.model.tiny import (
    ARCHITECTURE,
    T,
    a_plan,
    a_request,
    endings,
    halve,
    pictures,
    quick_engine,
    run,
)


def test_one_request_gives_one_picture() -> None:
    request = a_request("a", 5, seed=42)
    (event,) = run(quick_engine(), request)

    assert isinstance(event, Finished)
    assert (event.id, event.floats) == ("a", None)
    assert event.picture.shape == (8, 8, 1) and event.picture.dtype == np.uint8
    assert event.picture.tobytes() == alone_picture(request)


@pytest.mark.parametrize("slots", [1, 2, 3, 16])
def test_any_mixture_of_samplers_and_step_counts_shares_a_batch(slots: int) -> None:
    events = run(quick_engine(slots), *MIXED)

    assert pictures(events) == {request.id: alone_picture(request) for request in MIXED}


def test_samples_join_at_any_step() -> None:
    engine, events = quick_engine(4), []
    for request in MIXED:
        engine.submit(request)
        events += engine.step()
        events += engine.step()
    events += run(engine)

    assert pictures(events) == {request.id: alone_picture(request) for request in MIXED}


def test_a_sample_takes_as_many_steps_as_its_plan_has_rows() -> None:
    engine = quick_engine(2)
    engine.submit(a_request("short", 2))
    engine.submit(a_request("long", 4))

    assert [endings(engine.step()) for _ in range(4)] == [[], [("Finished", "short")], [], [("Finished", "long")]]
    assert not engine.busy


def test_a_freed_slot_is_taken_in_the_very_next_step() -> None:
    engine = quick_engine(1)
    engine.submit(a_request("first", 2))
    engine.submit(a_request("second", 1, rank=1.0))

    assert [endings(engine.step()) for _ in range(3)] == [[], [("Finished", "first")], [("Finished", "second")]]


def test_a_lower_rank_is_made_first() -> None:
    requests = [a_request(name, 2, rank=rank) for name, rank in [("slow", 2.0), ("usual", 1.0), ("urgent", -5.0)]]
    events = run(quick_engine(1), *requests)

    assert [event.id for event in events] == ["urgent", "usual", "slow"]


def test_an_id_on_its_way_is_refused_and_may_come_again_later() -> None:
    engine = quick_engine()
    engine.submit(a_request("a"))
    with pytest.raises(ValueError, match="'a' is on its way already"):
        engine.submit(a_request("a", seed=1))

    assert endings(run(engine)) == [("Finished", "a")]
    assert endings(run(engine, a_request("a"))) == [("Finished", "a")]


def test_an_idle_engine_steps_over_nothing() -> None:
    engine = quick_engine()

    assert engine.step() == []
    assert engine.stats.steps == 0


def test_floats_are_the_picture_before_it_is_rounded() -> None:
    request = a_request("a", wants_floats=True)
    (event, other) = run(quick_engine(), request, a_request("b", seed=1))
    *_, (x, _) = sample_alone(halve, request.plan, request.seed, ARCHITECTURE.shape)

    assert isinstance(event, Finished) and event.floats is not None
    assert np.array_equal(event.floats, x[0].clamp(-1, 1).numpy())
    assert isinstance(other, Finished) and other.floats is None


# Cancelling


def test_a_waiting_sample_is_cancelled_without_ever_being_seated() -> None:
    engine = quick_engine(1)
    engine.submit(a_request("seated", 3))
    engine.submit(a_request("waiting", 3))
    engine.step()
    engine.cancel("waiting")

    assert endings(run(engine)) == [("Cancelled", "waiting"), ("Finished", "seated")]
    assert engine.stats.sample_steps == 3


def test_a_seated_sample_leaves_its_slot_at_once() -> None:
    engine = quick_engine(1)
    engine.submit(a_request("a", 9))
    engine.submit(a_request("b", 2, rank=1.0))
    engine.step()
    engine.cancel("a")

    assert (engine.stats.seated, engine.stats.waiting) == (0, 1)
    assert endings(engine.step()) == [("Cancelled", "a")]
    assert endings(engine.step()) == [("Finished", "b")]


@pytest.mark.parametrize("cancelled_id", ["a", "b", "c"])
@pytest.mark.parametrize("after", [0, 1, 3])
def test_cancelling_any_sample_at_any_step_changes_no_other(cancelled_id: str, after: int) -> None:
    requests = {r.id: r for r in (a_request("a", 5, seed=1), a_request("b", 6, seed=2), a_request("c", 7, seed=3))}
    engine, events = quick_engine(3), []
    for request in requests.values():
        engine.submit(request)
    for _ in range(after):
        events += engine.step()
    engine.cancel(cancelled_id)
    events += run(engine)

    assert pictures(events) == {id: alone_picture(r) for id, r in requests.items() if id != cancelled_id}
    assert Counter(endings(events))[("Cancelled", cancelled_id)] == 1


def test_the_last_sample_moves_into_the_hole_on_the_device_too() -> None:
    engine = quick_engine(3)
    for name, seed in [("a", 1), ("b", 2), ("c", 3)]:
        engine.submit(a_request(name, 6, seed=seed))
    engine.step()
    last = engine.runner.slots.x[2].clone()
    engine.cancel("a")

    assert torch.equal(engine.runner.slots.x[0], last)
    assert not engine.runner.slots.x[2].any()
    assert engine.runner.slots.seed.tolist()[:2] == [3, 2]


def test_cancelling_twice_is_cancelling_once() -> None:
    engine = quick_engine()
    engine.submit(a_request("a"))
    engine.step()
    engine.cancel("a")
    engine.cancel("a")

    assert endings(run(engine)) == [("Cancelled", "a")]


def test_cancelling_what_ended_or_never_was_does_nothing() -> None:
    engine = quick_engine()
    run(engine, a_request("a"))
    engine.cancel("a")
    engine.cancel("nobody")

    assert not engine.busy
    assert engine.step() == []


def test_a_cancelled_id_may_come_again_at_once() -> None:
    engine, again = quick_engine(), a_request("a", 3, seed=8)
    engine.submit(a_request("a", 5, seed=1))
    engine.step()
    engine.cancel("a")
    events = run(engine, again)

    assert endings(events) == [("Cancelled", "a"), ("Finished", "a")]
    assert pictures(events) == {"a": alone_picture(again)}


class Flight:
    """Controls when pictures arrive from the device, which on a CPU is at once."""

    landed = False

    def ground(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """From now on they arrive when `landed` is true, or when the engine waits for them."""
        monkeypatch.setattr(Snapshot, "ready", property(lambda snapshot: self.landed))


def test_a_finished_picture_on_its_way_cannot_be_cancelled_any_more(monkeypatch: pytest.MonkeyPatch) -> None:
    flight, engine = Flight(), quick_engine(2)
    flight.ground(monkeypatch)
    engine.submit(a_request("a", 1))
    engine.submit(a_request("b", 3))
    assert engine.step() == []
    engine.cancel("a")
    flight.landed = True

    assert endings(run(engine)) == [("Finished", "a"), ("Finished", "b")]


def test_a_preview_of_a_cancelled_sample_is_not_reported_for_its_successor(monkeypatch: pytest.MonkeyPatch) -> None:
    flight, engine = Flight(), quick_engine(2)
    flight.ground(monkeypatch)
    engine.submit(a_request("a", 9, seed=1, frames=frozenset({1})))
    assert engine.step() == []
    engine.cancel("a")
    flight.landed = True

    assert endings(events := run(engine, a_request("a", 2, seed=2))) == [("Cancelled", "a"), ("Finished", "a")]
    assert not any(isinstance(event, Preview) for event in events)


def test_an_id_is_taken_until_its_picture_has_arrived(monkeypatch: pytest.MonkeyPatch) -> None:
    engine = quick_engine(2)
    Flight().ground(monkeypatch)
    engine.submit(a_request("a", 1))
    engine.submit(a_request("b", 9))
    engine.step()
    with pytest.raises(ValueError):
        engine.submit(a_request("a"))

    assert sorted(endings(run(engine))) == [("Finished", "a"), ("Finished", "b")]


@settings(max_examples=60, deadline=None)
@given(
    slots=st.integers(1, 4),
    lively=st.booleans(),
    moves=st.lists(
        st.one_of(
            st.tuples(st.just("submit"), st.integers(1, 6)),
            st.tuples(st.just("cancel"), st.integers(0, 9)),
            st.tuples(st.just("step"), st.integers(1, 2)),
        ),
        max_size=40,
    ),
)
def test_every_sample_ends_exactly_once_whatever_happens(
    slots: int, lively: bool, moves: list[tuple[str, int]]
) -> None:
    engine, requests, cancelled = quick_engine(slots), dict[Hashable, Request](), set[Hashable]()
    events: list[Event] = []
    for move, number in moves:
        if move == "submit":
            bad = lively and number == 6
            plan = poisoned() if bad else a_plan(number, "ddim", eta=1.0)
            id = len(requests)
            requests[id] = a_request(id, plan=plan, seed=number, rank=-number, frames=frozenset({0, 2}))
            engine.submit(requests[id])
        elif move == "cancel":
            cancelled.add(number)
            engine.cancel(number)
        else:
            for _ in range(number):
                events += engine.step()
    events += run(engine)

    count = Counter(id for _, id in endings(events))
    assert count == Counter(requests.keys())
    assert {id for kind, id in endings(events) if kind == "Cancelled"} <= cancelled
    ended: set[Hashable] = set()
    for event in events:  # a sample has no event after its end
        assert event.id not in ended
        if not isinstance(event, Preview):
            ended.add(event.id)
    assert pictures(events) == {id: alone_picture(requests[id]) for kind, id in endings(events) if kind == "Finished"}


# Pictures that are not finite


def test_a_picture_that_is_not_finite_fails_alone() -> None:
    before, behind = a_request("before", 5, seed=1), a_request("behind", 6, seed=2)
    events = run(quick_engine(3), before, a_request("sick", plan=poisoned()), behind)
    (failed,) = [event for event in events if isinstance(event, Failed)]

    assert failed == Failed("sick", "the picture was not finite after 4 steps")
    assert pictures(events) == {"before": alone_picture(before), "behind": alone_picture(behind)}


@pytest.mark.parametrize("cancelled", [True, False])
def test_a_slot_keeps_nothing_of_a_picture_that_was_not_finite(cancelled: bool) -> None:
    engine, successor = quick_engine(1), a_request("successor", plan=a_plan(5, "dpmpp_2m"), seed=3)
    engine.submit(a_request("sick", plan=poisoned()))
    engine.step()
    engine.step()
    assert engine.runner.slots.x.isnan().any()
    if cancelled:
        engine.cancel("sick")

    assert pictures(run(engine, successor)) == {"successor": alone_picture(successor)}


@pytest.mark.parametrize("cancelled_id", ["sick", "healthy"])
def test_a_sample_that_is_not_finite_may_move_or_leave_a_hole(cancelled_id: str) -> None:
    engine, other = quick_engine(3), a_request("other", 6, seed=5)
    names = ["sick", "other", "healthy"] if cancelled_id == "sick" else ["healthy", "other", "sick"]
    for name in names:
        engine.submit(other if name == "other" else a_request(name, plan=poisoned() if name == "sick" else None))
    engine.step()
    engine.step()
    engine.cancel(cancelled_id)

    assert pictures(run(engine))["other"] == alone_picture(other)


def test_a_net_that_explodes_at_one_level_of_noise_fails_the_samples_that_pass_it() -> None:
    def explode(x: Tensor, k: Tensor) -> Tensor:
        return torch.where((k == T - 1)[:, None, None, None], torch.inf, halve(x, k))

    passes, avoids = a_request("passes", plan=a_plan(4, spacing="linspace")), a_request("avoids", 4)
    events = run(quick_engine(2, explode), passes, avoids)

    assert sorted(endings(events)) == [("Failed", "passes"), ("Finished", "avoids")]
    assert pictures(events) == {"avoids": alone_picture(avoids)}


# Counters


def test_the_counters_add_up() -> None:
    engine = quick_engine(4)
    engine.runner.admitted = [2, 4]
    steps = [3, 5, 5, 1, 2]
    run(engine, *[a_request(i, n, seed=i) for i, n in enumerate(steps)])

    # Seated in each step: 4 (3 4 0 1), 4 (4 0 1 2), 3 (0 1 2), 2 (1 2), 2 (1 2), 1 (2).
    assert (engine.stats.steps, engine.stats.sample_steps, engine.stats.padded) == (6, sum(steps), 2)
    assert (engine.stats.seated, engine.stats.waiting) == (0, 0)

    run(engine, a_request("one more", 3))
    assert (engine.stats.steps, engine.stats.sample_steps, engine.stats.padded) == (9, sum(steps) + 3, 5)


def test_the_gauges_say_how_many_are_seated_and_how_many_wait() -> None:
    engine = quick_engine(2)
    for i in range(5):
        engine.submit(a_request(i, 4))
    assert (engine.stats.seated, engine.stats.waiting) == (0, 5)
    engine.step()
    assert (engine.stats.seated, engine.stats.waiting) == (2, 3)
    engine.cancel(0)
    engine.cancel(4)
    assert (engine.stats.seated, engine.stats.waiting) == (1, 2)


# What the net is asked


def watched() -> tuple[Callable[[Tensor, Tensor], Tensor], list[list[int]]]:
    """A net, and the levels of noise it was asked about in each step."""
    asked: list[list[int]] = []

    def net(x: Tensor, k: Tensor) -> Tensor:
        asked.append([int(value) for value in k])
        return halve(x, k)

    return net, asked


def test_every_sample_is_asked_at_its_own_level_of_noise() -> None:
    net, asked = watched()
    engine: Engine = quick_engine(2, net)
    asked.clear()
    first, second = a_request("first", plan=a_plan(3, "ddim")), a_request("second", plan=a_plan(2, "greedy"))
    engine.submit(first)
    engine.step()
    run(engine, second)

    assert asked == [[20], [10, 15], [0, 0]]
    assert (first.plan.t.tolist(), second.plan.t.tolist()) == ([21, 11, 1, 0], [16, 1, 0])


def test_nothing_is_computed_for_a_cancelled_sample() -> None:
    net, asked = watched()
    engine = quick_engine(2, net)
    asked.clear()
    engine.submit(a_request("a", 4))
    engine.submit(a_request("b", 4))
    engine.step()
    engine.cancel("a")
    run(engine)

    assert [len(step) for step in asked] == [2, 1, 1, 1]
    assert isinstance(engine.step(), list)


def test_a_cancellation_is_reported_even_if_no_other_sample_is_there() -> None:
    engine = quick_engine()
    engine.submit(a_request("a"))
    engine.cancel("a")

    assert engine.busy
    assert engine.step() == [Cancelled("a")]
    assert not engine.busy


# Preemption


def test_a_preempted_sample_goes_on_from_its_step() -> None:
    engine, long, short = quick_engine(1), a_request("long", 9, seed=1), a_request("short", 2, seed=2)
    engine.submit(long)
    for _ in range(4):
        engine.step()
    events = run(engine, short)

    assert endings(events) == [("Finished", "short"), ("Finished", "long")]
    assert pictures(events) == {"long": alone_picture(long), "short": alone_picture(short)}
    assert engine.stats.sample_steps == 9 + 2  # no step is done twice


def test_a_preempted_sample_can_be_cancelled() -> None:
    engine, short = quick_engine(1), a_request("short", 2, seed=2)
    engine.submit(a_request("long", 9))
    engine.step()
    engine.submit(short)
    engine.step()
    engine.cancel("long")

    assert sorted(endings(run(engine))) == [("Cancelled", "long"), ("Finished", "short")]


def test_seat_returns_the_newly_seated_samples_and_their_steps() -> None:
    engine = quick_engine(1)
    engine.submit(a_request("long", 9))
    assert engine.seat() == [("long", 0)]
    engine.step()
    engine.submit(a_request("short", 1))
    assert engine.seat() == [("short", 0)]
    engine.step()
    assert engine.seat() == [("long", 1)]
    assert engine.seat() == []


def test_a_long_sample_that_is_not_finite_fails_before_its_end() -> None:
    def explode(x: Tensor, k: Tensor) -> Tensor:
        return torch.where((k == T - 1)[:, None, None, None], torch.inf, halve(x, k))

    engine = quick_engine(1, explode)
    for number in range(5):
        run(engine, a_request(number, 12))
    events = run(engine, a_request("sick", T))

    assert events == [Failed("sick", "the picture was not finite after 4 steps")]  # the 64th of this engine
    assert engine.stats.sample_steps == 64
