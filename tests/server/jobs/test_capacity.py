"""The capacity of the queue."""

import pytest

from server.errors import TooBusy
from server.jobs.capacity import Queue


def test_a_full_queue_estimates_when_there_is_room() -> None:
    queue = Queue(10)
    queue.take(6, step_s=1)
    with pytest.raises(TooBusy) as refusal:
        queue.take(7, step_s=1.5)

    assert refusal.value.retry_after_s == 5  # three image-steps too many, of one and a half seconds each
    queue.give_back(3)
    queue.take(7, step_s=1)
    assert queue.taken == 10
