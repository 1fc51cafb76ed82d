"""How a model directory must be refused: in one line, at once, and before memory is spent on it."""

import resource
import time
import tracemalloc
from collections.abc import Callable

import pytest

from model.errors import ModelRefused

MAX_SECONDS = 1.0
MAX_PYTHON_BYTES = 32 << 20
MAX_RESIDENT_BYTES = 128 << 20


def refusal(attempt: Callable[[], object]) -> str:
    """The line with which this attempt is refused, having seen that refusing it cost next to nothing."""
    resident, start = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.process_time()
    with pytest.raises(ModelRefused) as caught:
        attempt()
    seconds = time.process_time() - start
    tracemalloc.start()  # makes it slower, hence a second time
    try:
        with pytest.raises(ModelRefused):
            attempt()
        allocated = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - resident) * 1024
    message = str(caught.value)

    assert message and "\n" not in message
    assert seconds < MAX_SECONDS
    assert allocated < MAX_PYTHON_BYTES
    assert grown < MAX_RESIDENT_BYTES
    return message
