"""Serves model directories over HTTP. Every flag is also an environment variable, DDPM_<FLAG>."""

import asyncio
import logging
import math
import os
import resource
import signal
import socket
import time
from argparse import SUPPRESS
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from queue import Empty, SimpleQueue
from threading import TIMEOUT_MAX, Thread
from types import FrameType
from typing import Any

import uvicorn

from model.usage import Parser
from server import logs
from server.bounds import listed
from server.engines.process import ENDING
from server.errors import EXIT_FAILED, ServerError, SettingsError, exit_code
from server.jobs.service import PARKING_S, JobService
from server.settings import Settings
from server.web.app import create_app
from server.web.protocol import Config, Limits

logger = logging.getLogger(__name__)
GOODBYE_S = 1.0  # for telling subscribers that the server shuts down
END_S = 20.0  # for all that comes after the drain, to the end of the process; then something hangs
STALLED_MS, SEND_BUFFER_BYTES = 10_000, 128 << 10
OTHER_FILES = 256  # descriptors for anything but connections: journal, pictures, pages, engines and their starts
UNUSED = (signal.SIGUSR1, signal.SIGUSR2, signal.SIGALRM, signal.SIGVTALRM, signal.SIGPROF, signal.SIGIO)


def listen(host: str, port: int) -> socket.socket:
    """A listening socket. Raises SettingsError.

    Its connections break when the peer acknowledges nothing for ten seconds, which asyncio would never notice, and
    buffer little for it.
    """
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    listening = socket.socket(family, socket.SOCK_STREAM)
    listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    listening.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, SEND_BUFFER_BYTES)
    if hasattr(socket, "TCP_USER_TIMEOUT"):
        listening.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, STALLED_MS)
    try:
        listening.bind((host, port))
    except OSError as error:
        listening.close()
        raise SettingsError(f"DDPM_HOST and DDPM_PORT: nothing can listen on {host}:{port}: {error.strerror}") from None
    return listening


def affordable(connections: int) -> int:
    """The number of connections, at most `connections`, that the file descriptors of this process suffice for.

    Raises the soft limit as far as the hard limit permits, and logs a warning if that is not enough. Of few descriptors
    most are for what has been accepted: new connections can be refused, jobs cannot.
    """
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = connections + OTHER_FILES
    if soft != resource.RLIM_INFINITY and soft < wanted:
        soft = wanted if hard == resource.RLIM_INFINITY else min(wanted, hard)
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    if soft == resource.RLIM_INFINITY or soft >= wanted:
        return connections
    logger.warning("too few file descriptors for max_connections", extra={"descriptors": soft, "wanted": wanted})
    return max(1, soft - OTHER_FILES, soft * 3 // 16)  # and as many again, up to RESERVED, for health checks


def configure(app: Any, settings: Settings, connections: int) -> Config:
    """uvicorn's configuration. connections: that may be open at once"""
    limits = Limits(
        connections=connections,
        body_bytes=settings.max_body_bytes,
        request_s=settings.request_s,
        refused=app.state.jobs.admission.count_refusal,
        cors=app.state.cors,
        prefix=settings.path_prefix,
        troubles=app.state.jobs.repository.store.troubles,
    )
    return Config(
        app,
        limits,
        log_config=None,
        ws_max_size=settings.max_body_bytes,
        ws_per_message_deflate=False,  # PNGs are compressed already
        access_log=False,
        server_header=False,
        timeout_graceful_shutdown=5,
    )


class _Server(uvicorn.Server):
    """uvicorn's server, which drains on a signal and then returns; uvicorn's own would raise the signal again."""

    def __init__(self, config: uvicorn.Config, jobs: JobService, drain_s: float) -> None:
        super().__init__(config)
        self.jobs, self.drain_s, self.hurried = jobs, drain_s, False
        self.failure: ServerError | None = None  # what ended it
        self._ends_by: SimpleQueue[float] = SimpleQueue()  # times at which the process is to be gone

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """Drains on the first signal; on the second, parks the jobs that have not ended."""
        self.hurried, self.should_exit, self.jobs.admission.closing = self.should_exit, True, True
        self.end_within((0.0 if self.hurried else self.drain_s) + PARKING_S + GOODBYE_S + END_S)

    def fail(self, failure: ServerError) -> None:
        """Ends it without a drain."""
        self.failure = self.failure or failure
        self.should_exit = self.hurried = True
        self.end_within(PARKING_S + GOODBYE_S + END_S)

    def end_within(self, seconds: float) -> None:
        """Cuts the end of the process short if it takes longer. May be called by a signal's handler."""
        self._ends_by.put(time.monotonic() + seconds)

    def guard_the_end(self) -> None:
        """Ends the process at the earliest of the times given, with the code that its failure has, whatever hangs: the
        event loop, a thread that waits for a disk and that Python would join, or standard error."""
        at = math.inf
        while (left_s := at - time.monotonic()) > 0:
            with suppress(Empty):
                at = min(at, self._ends_by.get(timeout=min(left_s, TIMEOUT_MAX)))
        words = "the end takes too long, and is cut short: the next server runs what has not ended"
        telling = Thread(target=logger.critical, args=(words,), daemon=True)
        with suppress(RuntimeError):  # there may be no thread left
            telling.start()
            telling.join(1.0)
        os._exit(EXIT_FAILED if self.failure is None else exit_code(self.failure))

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """Waits up to `drain_s` seconds for jobs to end, then for subscribers to be told, then closes connections.

        uvicorn's own shutdown would start with closing every websocket.
        """
        running, waiting, ended_before = self.jobs.tally()
        unended = {"jobs_running": running, "jobs_waiting": waiting}
        logger.info("draining", extra={"seconds": 0 if self.hurried else self.drain_s, **unended})
        await self.jobs.drain(self.drain_s, lambda: self.hurried)
        until = time.monotonic() + GOODBYE_S
        while self.jobs.counts.subscribers and time.monotonic() < until:
            await asyncio.sleep(0.01)
        self.end_within(END_S)
        await super().shutdown(sockets)
        running, waiting, ended = self.jobs.tally()
        logger.info("stopped", extra={"jobs_ended": ended - ended_before, "jobs_parked": running + waiting})

    @contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Routes the signals that end a server to `handle_exit` while it runs, and ignores those that nothing of it
        has a use for, which would kill it. `nohup` keeps what it is for."""
        chosen: dict[signal.Signals, Any] = dict.fromkeys(ENDING, self.handle_exit)
        chosen |= dict.fromkeys(UNUSED, signal.SIG_IGN)
        if signal.getsignal(signal.SIGHUP) is signal.SIG_IGN:
            del chosen[signal.SIGHUP]
        before = {number: signal.signal(number, handler) for number, handler in chosen.items()}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)


def _parser() -> Parser:
    parser = Parser("ddpm serve", description=__doc__)
    for name, field in Settings.model_fields.items():
        flag = f"--{name.replace('_', '-')}"
        allowed = f"; {bounds}" if (bounds := listed(field)) else ""
        text = f"{field.description} (default: {str(field.default) or 'empty'}{allowed})".replace("%", "%%")
        parser.add_argument(flag, dest=name, default=SUPPRESS, metavar="VALUE", help=text)
    return parser


def main(arguments: Sequence[str]) -> int:
    """Serves until a signal arrives. Returns the exit code. Raises the ServerError that ended the engine.

    Within END_S seconds after that the process ends, whatever it does.
    """
    flags = vars(_parser().parse_args(arguments))
    settings = Settings.read(os.environ, flags)
    logs.configure(settings.log_level)
    app = create_app(settings, on_failed=lambda failure: server.fail(failure))
    server = _Server(configure(app, settings, affordable(settings.max_connections)), app.state.jobs, settings.drain_s)
    with listen(settings.host, settings.port) as listening:
        logger.info("listening", extra={"host": settings.host, "port": listening.getsockname()[1]})
        Thread(target=server.guard_the_end, name="guard of the end", daemon=True).start()
        with suppress(SystemExit):  # uvicorn's own, after a failed start: its code means something else here
            server.run([listening])
    server.end_within(END_S)
    if server.failure is not None:
        raise server.failure
    return 0 if server.started else EXIT_FAILED
