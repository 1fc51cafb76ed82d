"""What is learned of an engine's times."""

import pytest

from server.engines.step_times import StepTimes
from server.worker.messages import Step


def test_the_time_of_a_step_is_learned_and_a_batch_takes_what_its_bucket_takes() -> None:
    times = StepTimes()
    assert times.step_s("tiny", [1, 2]) == [0.0, 0.0, 0.0]

    times.learn([Step("tiny", 1, 0.1), Step("tiny", 4, 0.4)], 1)
    assert times.step_s("tiny", [1, 3, 4]) == pytest.approx([0.1, 0.1, 0.3, 0.3, 0.4])

    times.learn([Step("tiny", 4, 0.5)] * 200, 1)
    assert times.step_s("tiny", [4])[1] == pytest.approx(0.5)
