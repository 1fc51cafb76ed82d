"""One engine process, from its spawn to its death. Two threads carry its letters: the event loop waits for no pipe."""

import asyncio
import logging
import multiprocessing
import queue
import signal
import threading
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path
from typing import TypeAlias

from server import logs
from server.worker.messages import Cancel, Refused, Start, Submit

logger = logging.getLogger(__name__)
Letter: TypeAlias = Submit | Cancel
LOOK_S = 0.25  # how often it is looked at


def _is_stopped(pid: int | None) -> bool:
    """Whether a process has been stopped by a signal, as Linux tells it."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "T"
    except OSError:
        return False


def _run(pipe: Connection, start: Start) -> None:
    """The main function of the engine process."""
    for number in (signal.SIGINT, signal.SIGTERM):  # sent to the whole group; they are for the API process to handle
        signal.signal(number, signal.SIG_IGN)
    logs.configure(start.log_level)
    from server.worker import main  # the API process never imports torch

    main.serve(pipe, start)


class Life:
    """An engine process. What it says is handed over on the event loop."""

    def __init__(self) -> None:
        self.over = asyncio.Event()
        self.refused: Refused | None = None  # why there is no sense in another one
        self.signal = 0  # the number of the signal that ended it, if one did; SIGKILL may have been ours
        self.cause = "died"  # of its end, unless something else is seen
        self.stopped_s = 0.0  # for how long it has been stopped by a signal
        self._outbox: queue.SimpleQueue[Letter | None] = queue.SimpleQueue()

    def send(self, letter: Letter) -> None:
        """Says something to it, as soon as it listens."""
        self._outbox.put(letter)

    async def last(self, start: Start, receive: Callable[[object], None], hangs: Callable[[], bool]) -> None:
        """Lives. Returns once the process is gone; it is killed when it hangs, and when this is cancelled."""
        loop = asyncio.get_running_loop()
        context = multiprocessing.get_context("spawn")
        ours, theirs = context.Pipe()
        process = context.Process(target=_run, args=(theirs, start), name="ddpm-engine", daemon=True)

        def read() -> None:
            try:
                while True:
                    loop.call_soon_threadsafe(receive, ours.recv())
            except (EOFError, OSError):
                loop.call_soon_threadsafe(self.over.set)

        def write() -> None:
            try:
                while (letter := self._outbox.get()) is not None:
                    ours.send(letter)
            except OSError:
                return  # it has died, which the reader tells; all that was not finished is sent again

        threads = [threading.Thread(target=work, name=f"engine {work.__name__}") for work in (read, write)]
        try:
            process.start()
        except OSError:
            return logger.exception("no process could be started")
        theirs.close()
        for thread in threads:
            thread.start()
        try:
            while not self.over.is_set():
                try:
                    await asyncio.wait_for(self.over.wait(), LOOK_S)
                except TimeoutError:
                    self.stopped_s = self.stopped_s + LOOK_S if _is_stopped(process.pid) else 0.0
                    if hangs():
                        logger.error("engine hangs and is killed", extra={"pid": process.pid})
                        self.cause = "hung"
                        process.kill()
        finally:
            process.kill()  # it holds nothing that could be lost; what has killed it already remains the reason
            self._outbox.put(None)
            for thread in threads:
                await asyncio.to_thread(thread.join)
            ours.close()
            await asyncio.to_thread(process.join)
            self.signal = max(0, -(process.exitcode or 0))  # not before: the pipe is closed earlier than a process ends
