"""An event loop for tests of how long something takes, which take no time and don't depend on the machine's speed."""

import asyncio
import selectors
from collections.abc import Coroutine
from typing import Any, NoReturn, TypeVar

T = TypeVar("T")


class _Clock(selectors.DefaultSelector):
    """Where the loop would wait for its next timer, lets that time pass at once."""

    now_s = 0.0

    def select(self, timeout: float | None = None) -> list[tuple[selectors.SelectorKey, int]]:
        """What is ready; waits only if no timer is set."""
        ready = super().select(timeout and 0)
        if timeout and not ready:
            self.now_s += timeout
        return ready


class _Loop(asyncio.SelectorEventLoop):
    def __init__(self) -> None:
        self._clock = _Clock()
        super().__init__(self._clock)

    def time(self) -> float:
        """Seconds of timers that have passed."""
        return self._clock.now_s

    def run_in_executor(self, *_: object) -> NoReturn:
        """Refuses threads: this clock would not wait for them."""
        raise AssertionError("a thread was started on the virtual clock")


def run(main: Coroutine[Any, Any, T]) -> T:
    """As asyncio.run, but `asyncio.sleep`, `asyncio.timeout` and `loop.time` go by the virtual clock."""
    with asyncio.Runner(loop_factory=_Loop) as runner:
        return runner.run(main)
