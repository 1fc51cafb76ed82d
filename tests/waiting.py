"""Waiting for what another thread or process does: the one place where tests ask again and again."""

import asyncio
import time
from collections.abc import Awaitable, Callable
from typing import TypeVar

T = TypeVar("T")

PATIENCE_S = 60.0
PAUSE_S = 0.02  # between two looks


class Impatient(AssertionError):
    """The condition has not come true."""


def until(condition: Callable[[], T | None], patience_s: float = PATIENCE_S, pause_s: float = PAUSE_S) -> T:
    """The first value of `condition` that is true. Raises Impatient after `patience_s` seconds."""
    deadline = time.monotonic() + patience_s
    while not (value := condition()):
        if time.monotonic() > deadline:
            raise Impatient(f"the condition has not come true within {patience_s} s")
        time.sleep(pause_s)
    return value


async def until_async(condition: Callable[[], Awaitable[T | None]], patience_s: float = PATIENCE_S) -> T:
    """The same on an event loop, which goes on with other tasks meanwhile."""
    async with asyncio.timeout(patience_s):
        while not (value := await condition()):
            await asyncio.sleep(PAUSE_S)
    return value
