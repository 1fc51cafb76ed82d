"""One engine process, from its spawn to its exit. Two threads carry its messages: the event loop waits for no pipe."""

import asyncio
import gc
import logging
import multiprocessing
import queue
import signal
import time
from collections.abc import Callable
from dataclasses import dataclass
from multiprocessing import resource_tracker
from multiprocessing.connection import Connection
from multiprocessing.context import SpawnProcess
from pathlib import Path
from threading import Thread

from server import logs
from server.troubles import LACKING, Troubles, shortage
from server.worker.messages import Cancel, Died, Lacking, Refused, Start, Submit

logger = logging.getLogger(__name__)
POLL_S = 0.25  # between two looks at the process
ENDING = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGQUIT)  # these signals end a server in order
END_POLL_S = 0.005  # between two at its end
CRASHES = (signal.SIGSEGV, signal.SIGBUS, signal.SIGFPE, signal.SIGABRT)  # of native code
UNUSABLE = {  # by the signal that ended an engine, what OpenVINO is taken to have done
    signal.SIGILL: "ended an engine by an instruction that this processor lacks",
    **dict.fromkeys(CRASHES, "ended an engine that was loading a model"),
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Patience:
    """How long an engine may be silent, in seconds or in steps, whichever is longer."""

    silence_s: float = 4.0  # then it is not ready; if a signal has stopped it, it is killed and replaced
    silence_steps: float = 20.0
    hang_s: float = 8.0  # then it is killed and replaced
    hang_steps: float = 40.0
    start_s: float = 600.0  # for all that it loads at its start
    load_s: float = 60.0  # for a model that is loaded later: the others may have to wait meanwhile


class EngineProcess:
    """An engine process that runs once. Its messages are handed over on the event loop."""

    def __init__(self) -> None:
        self.over = asyncio.Event()  # set by what has read its last message
        self.refused: Refused | None = None  # why it makes no sense to start another
        self.lacked: Exception | None = None  # why it could not begin, if another may
        self.signal = 0  # the signal that ended it, if one did; SIGKILL may have been ours
        self.cause = "died"  # the label of its end in the metrics
        self.stopped_s = 0.0  # for how long a signal has stopped it
        self.heard_at = time.monotonic()  # when it sent its last message, or was made
        self.loading: str | None = None  # the model that it is loading, once it is ready
        self.troubles = Troubles()  # of the server
        self._outbox: queue.SimpleQueue[Submit | Cancel | None] = queue.SimpleQueue()

    @property
    def killed(self) -> bool:
        """Whether somebody else ended it by SIGKILL: it had told of nothing wrong, and was not taken to hang."""
        return self.signal == signal.SIGKILL and self.cause == "died"

    def send(self, message: Submit | Cancel) -> None:
        """Queues a message, which the process gets as soon as it listens."""
        self._outbox.put(message)

    def end(self, reason: Died | Lacking | Refused) -> None:
        """Ends it: nothing more is to be expected of it, though it may never exit by itself."""
        match reason:
            case Refused():
                self.refused = reason
            case Lacking(error):
                self.lacked = error
            case Died(cause, traceback):
                self.cause = cause
                logger.error("engine failed", extra={"traceback": traceback})
        self.over.set()

    async def run(self, start: Start, receive: Callable[[object], None], hangs: Callable[[], bool]) -> None:
        """Spawns the process, as soon as the system has enough for it, and returns after it has exited; kills it when
        hangs() is true or on cancellation."""
        try:
            process, pipe, threads = await self.troubles.outlast(lambda: self._spawn(start, receive))
        except OSError:
            return logger.exception("no process could be started")
        self.heard_at = time.monotonic()
        try:
            await self._watch(process, hangs)
        finally:
            await self._clean_up(process, pipe, threads)
            self.signal = max(0, -(process.exitcode or 0))  # known only now: a process closes its pipe before it ends

    async def _spawn(
        self, start: Start, receive: Callable[[object], None]
    ) -> tuple[SpawnProcess, Connection, list[Thread]]:
        """The process, our end of its pipe, and the threads that carry messages. Raises OSError or RuntimeError if the
        system has too little of something, and then nothing of it is left."""
        context, loop = multiprocessing.get_context("spawn"), asyncio.get_running_loop()
        ours, theirs = context.Pipe()
        process = context.Process(target=_serve, args=(theirs, start), name="ddpm-engine", daemon=True)
        reader = Thread(target=self._read, args=(ours, loop, receive), name="engine reader")
        threads = [Thread(target=self._write, args=(ours,), name="engine writer"), reader]  # it tells of the end
        with theirs:
            try:
                _start(process)
                for thread in threads:
                    thread.start()
            except LACKING:
                theirs.close()
                await self._clean_up(process, ours, [thread for thread in threads if thread.ident])
                raise
        return process, ours, threads

    async def _clean_up(self, process: SpawnProcess, pipe: Connection, threads: list[Thread]) -> None:
        """Ends all that `_spawn` has started. It polls: to wait in a thread would take one."""
        if process.pid is not None:
            process.kill()  # it holds nothing that could be lost; if it has been killed, that remains its cause
        if threads:
            self._outbox.put(None)
        while any(thread.is_alive() for thread in threads):
            await asyncio.sleep(END_POLL_S)
        pipe.close()
        while process.pid is not None and process.exitcode is None:
            await asyncio.sleep(END_POLL_S)

    def _read(self, pipe: Connection, loop: asyncio.AbstractEventLoop, receive: Callable[[object], None]) -> None:
        try:
            while True:
                message = pipe.recv()
                loop.call_soon_threadsafe(
                    self.end if isinstance(message, Died | Lacking | Refused) else receive, message
                )
        except (EOFError, OSError):
            loop.call_soon_threadsafe(self.over.set)

    def _write(self, pipe: Connection) -> None:
        try:
            while (message := self._outbox.get()) is not None:
                pipe.send(message)
        except OSError:
            return  # the process has died, as the reader tells; whatever has not ended is sent to the next one

    async def _watch(self, process: SpawnProcess, hangs: Callable[[], bool]) -> None:
        while not self.over.is_set():
            looked_at = time.monotonic()
            try:
                await asyncio.wait_for(self.over.wait(), POLL_S)
            except TimeoutError:
                now = time.monotonic()  # while this server did not run, it heard nothing of an engine that may run
                self.heard_at = min(now, self.heard_at + now - looked_at - POLL_S)
                self.stopped_s = self.stopped_s + POLL_S if _is_stopped(process.pid) else 0.0
                if hangs() and self.cause != "hung":  # a process that waits for a device may not end when it is killed
                    logger.error("engine hangs and is killed", extra={"pid": process.pid})
                    self.cause = "hung"
                    process.kill()


def _start(process: SpawnProcess) -> None:
    """Starts a process that never gets the signals which end the server: they may be sent to the whole group, and the
    engine is needed until the jobs have ended."""
    resource_tracker.ensure_running()  # it would start with the first process, and unblock some of the signals
    blocked = signal.pthread_sigmask(signal.SIG_BLOCK, ENDING)
    try:
        process.start()
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, blocked)


def _is_stopped(pid: int | None) -> bool:
    """Whether a signal has stopped a process, as Linux tells it."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "T"
    except OSError:
        return False


def _serve(pipe: Connection, start: Start) -> None:
    """The main function of the engine process."""
    logs.configure(start.log_level)
    gc.disable()  # while torch is imported, where it would take a sixth of the time and find nothing
    try:
        from server.worker import main  # the API process never imports torch
    except LACKING as error:
        if shortage(error) is None:
            raise
        return pipe.send(Lacking(error))
    finally:
        gc.enable()
    main.serve(pipe, start)
