"""What the server stands on and lacks at times: a disk that can be written, and what the system lends to processes.

A lack of descriptors, memory, threads or processes passes. It is waited for, and is no failure of a job or an engine.
"""

import asyncio
import errno
import logging
import math
import os
import time
from collections import Counter
from collections.abc import Awaitable, Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from threading import Barrier
from typing import TypeVar

from server.errors import NotReady

logger = logging.getLogger(__name__)
T = TypeVar("T")
RETRY_S = 0.5  # between attempts at what the system has too little for
PATIENCE_S = 4.0  # that a caller waits for the disk or the system, before it is told to come again
FILES, MEMORY, PROCESSES = "file descriptors", "memory", "threads or processes"
SYSTEM = {FILES, MEMORY, PROCESSES}
SHORTAGES = {errno.EMFILE: FILES, errno.ENFILE: FILES, errno.ENOMEM: MEMORY, errno.EAGAIN: PROCESSES}
STORE = JOURNAL, PICTURES = "journal", "pictures"  # the resources of the store
LACKING = (OSError, MemoryError, RuntimeError, ImportError)  # errors that may mean a shortage


def shortage(error: BaseException | None) -> str | None:
    """What the system had too little of, if that is what an error means."""
    match error:
        case OSError():
            return SHORTAGES.get(error.errno or 0)
        case MemoryError():
            return MEMORY
        case RuntimeError():
            return PROCESSES if str(error) == "can't start new thread" else None
        case ImportError():  # of a shared library, which has no errno
            return next((name for code, name in SHORTAGES.items() if os.strerror(code) in str(error)), None)
    return None


def too_little(resource: str) -> NotReady:
    """What is raised for a shortage that is not waited for any longer."""
    return NotReady(f"the system has too little for the server now: {resource}")


def started(threads: int, name: str) -> ThreadPoolExecutor:
    """A pool whose threads have been started: later the system may have none to lend. Raises RuntimeError."""
    pool, together = ThreadPoolExecutor(threads, name), Barrier(threads)
    try:
        for _ in range(threads):
            pool.submit(together.wait)
    except RuntimeError:
        together.abort()
        raise
    return pool


@dataclass(slots=True, eq=False)
class Troubles:
    """What is lacking now. Each trouble is logged when it begins and when it is over, whoever meets it how often."""

    now: dict[str, str] = field(default_factory=dict)  # the reason by resource
    _waiting: Counter[str] = field(default_factory=Counter)  # who waits for a resource

    def begin(self, resource: str, reason: object) -> None:
        """A resource is lacking."""
        if resource not in self.now:
            event = "the store cannot be written" if resource in STORE else "a resource is short"
            logger.error(event, extra={"resource": resource, "reason": str(reason)})
        self.now[resource] = str(reason)

    def end(self, resource: str) -> None:
        """A resource is there again."""
        if self.now.pop(resource, None) is not None:
            event = "the store can be written again" if resource in STORE else "a resource is no longer short"
            logger.info(event, extra={"resource": resource})

    async def outlast(self, work: Callable[[], Awaitable[T]], within_s: float = math.inf) -> T:
        """The result of `work`, which is tried again while the system has too little of something for it. Raises
        NotReady after so many seconds; then the shortage lasts until some work is done."""
        lacked, until, given_up = set[str](), time.monotonic() + within_s, False
        try:
            while True:
                try:
                    return await work()
                except LACKING as error:
                    if (resource := shortage(error)) is None:
                        raise
                    self._waiting.update({resource} - lacked)
                    lacked.add(resource)
                    self.begin(resource, error)
                    if given_up := time.monotonic() > until:
                        raise too_little(resource) from None
                await asyncio.sleep(RETRY_S)
        finally:
            self._waiting.subtract(lacked)
            for resource in set() if given_up else SYSTEM & self.now.keys():
                if not self._waiting[resource]:
                    self.end(resource)

    async def in_thread(self, work: Callable[[], T], within_s: float = math.inf) -> T:
        """The same for what is done in a thread."""
        return await self.outlast(lambda: asyncio.to_thread(work), within_s)
