"""The capacity of the queue."""

import pytest

from server.errors import TooBusy
from server.jobs.admission import Capacity


def test_a_full_queue_estimates_when_there_is_room() -> None:
    capacity = Capacity(10)
    capacity.take(6, step_s=1)
    with pytest.raises(TooBusy) as refusal:
        capacity.take(7, step_s=1.5)

    assert refusal.value.retry_after_s == 5  # three image-steps too many, of one and a half seconds each
    capacity.steps -= 3
    capacity.take(7, step_s=1)
    assert capacity.steps == 10
