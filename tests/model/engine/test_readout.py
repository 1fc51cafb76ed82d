"""Previews: which states are copied out, and what they show."""

import numpy as np
import pytest

from model.engine.events import Finished, Preview
from tests.model.engine.alone import alone
from tests.model.tiny import (
    a_plan,
    a_request,
    quick_engine,
    run,
)


@pytest.mark.parametrize("frames", [{0}, {2}, {5}, {0, 1, 2, 3, 4, 5}, set()])
def test_previews_come_at_exactly_the_frames_asked_for(frames: set[int]) -> None:
    request = a_request("a", 5, seed=3, frames=frozenset(frames))
    events = run(quick_engine(), a_request("other", 2), request)
    previews = [event for event in events if isinstance(event, Preview)]
    states = alone(request)

    assert isinstance(events[-1], Finished)
    assert [preview.step for preview in previews] == sorted(frames)
    for preview in previews:
        assert preview.x is not None and np.array_equal(preview.x, states[preview.step][0])


def test_a_preview_holds_the_requested_pictures() -> None:
    def first_two(x: bool, x0: bool) -> list[tuple[bool, bool]]:
        request = a_request("a", 3, frames=frozenset({0, 2}), shows_x=x, shows_x0=x0)
        previews = [event for event in run(quick_engine(), request) if isinstance(event, Preview)]
        return [(preview.x is not None, preview.x0 is not None) for preview in previews]

    assert first_two(x=True, x0=False) == [(True, False), (True, False)]
    assert first_two(x=True, x0=True) == [(True, False), (True, True)]  # nothing is predicted before the first step
    assert first_two(x=False, x0=True) == [(False, False), (False, True)]


def test_the_prediction_shown_is_that_of_the_step_before() -> None:
    request = a_request("a", plan=a_plan(4, "ddim"), frames=frozenset({1, 2, 3, 4}), shows_x0=True)
    previews = [event for event in run(quick_engine(), request) if isinstance(event, Preview)]

    for preview in previews:
        assert preview.x0 is not None and np.array_equal(preview.x0, alone(request)[preview.step][1])


def test_the_last_preview_precedes_the_picture_and_equals_it() -> None:
    preview, finished = run(quick_engine(), a_request("a", 2, frames=frozenset({2})))

    assert isinstance(preview, Preview) and isinstance(finished, Finished)
    assert preview.x is not None and np.array_equal(preview.x, finished.picture)


def test_frames_behind_the_end_of_the_plan_are_never_reached() -> None:
    assert len(run(quick_engine(), a_request("a", 2, frames=frozenset({3, 100})))) == 1


def test_a_preview_kept_for_later_does_not_change_under_its_holder() -> None:
    engine = quick_engine()
    engine.submit(a_request("a", frames=frozenset({1})))
    (preview,) = engine.step()
    assert isinstance(preview, Preview) and preview.x is not None
    before = preview.x.tobytes()
    run(engine, a_request("b", seed=1))

    assert preview.x.tobytes() == before
