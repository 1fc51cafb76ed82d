"""The clock of order and retention."""

import itertools
import time
from functools import partial

import pytest

from server.clock import DAY_S, Clock


def test_order_and_retention_do_not_depend_on_the_clock_on_the_wall(monkeypatch: pytest.MonkeyPatch) -> None:
    clock, year = Clock(), 365 * 86400.0
    times = [clock.now()]
    for jump in (10 * year, -10 * year):
        monkeypatch.setattr(time, "time", partial(float, time.time() + jump))
        times.append(clock.now())

    assert all(0 <= b - a < 1 for a, b in itertools.pairwise(times))
    assert Clock(times[-1]).now() >= times[-1]  # of a server that starts while the clock is far behind


@pytest.mark.parametrize(("days", "counted"), [(0.5, 0.5), (30, 1), (40_000, 1), (-3, 0)])
def test_the_time_without_a_server_counts_for_a_day_at_most(days: float, counted: float) -> None:
    last = time.time() - days * DAY_S

    assert Clock(last).now() == pytest.approx(last + counted * DAY_S, abs=1)
