"""A TCP proxy that breaks connections on demand, and a server without an engine in a thread."""

import asyncio
import select
import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import uvicorn
from fastapi import FastAPI

from server.web.protocol import Config, Limits


class Line:
    """A TCP proxy before a port of this machine. `most_bytes`: after so many from the server a connection breaks."""

    def __init__(self, port: int, most_bytes: int | None = None) -> None:
        self.port, self.most_bytes, self.breaks = port, most_bytes, 0
        self._listening = socket.create_server(("127.0.0.1", 0))
        self.url = f"http://127.0.0.1:{self._listening.getsockname()[1]}"
        self._open, self._threads = True, [threading.Thread(target=self._accept, daemon=True)]
        self._threads[0].start()

    def close(self) -> None:
        """No more connections; those that are there break."""
        self._open = False
        for thread in self._threads:
            thread.join(10)
        self._listening.close()

    def _accept(self) -> None:
        self._listening.settimeout(0.1)
        while self._open:
            try:
                near, _ = self._listening.accept()
            except TimeoutError:
                continue
            self._threads.append(threading.Thread(target=self._carry, args=(near,), daemon=True))
            self._threads[-1].start()

    def _carry(self, near: socket.socket) -> None:
        """Both ways, until one of the ends is closed or enough has come from the server."""
        left = self.most_bytes
        with near, socket.create_connection(("127.0.0.1", self.port)) as far:
            while self._open:
                for source in select.select([near, far], [], [], 0.1)[0]:
                    try:
                        data = source.recv(1 << 12)
                        if source is far and left is not None:
                            data, left = data[:left], left - len(data)
                        (near if source is far else far).sendall(data)
                    except OSError:
                        return
                    if left is not None and left < 0:
                        self.breaks += 1
                        return
                    if not data:
                        return


@contextmanager
def line(port: int, most_bytes: int | None = None) -> Iterator[Line]:
    """A line to a server on this machine."""
    made = Line(port, most_bytes)
    try:
        yield made
    finally:
        made.close()


@dataclass(frozen=True, slots=True)
class Threaded:
    """An application that is served by a thread of this process."""

    url: str
    port: int
    loop: asyncio.AbstractEventLoop = field(repr=False)

    def do(self, work: Callable[[], None]) -> None:
        """Something on its event loop."""
        self.loop.call_soon_threadsafe(work)


@contextmanager
def threaded(app: FastAPI) -> Iterator[Threaded]:
    """This application over real connections."""
    with socket.create_server(("127.0.0.1", 0)) as listening:
        port = listening.getsockname()[1]
        limits = Limits(
            connections=64,
            body_bytes=1 << 16,
            request_s=10,
            refused=lambda code: None,
            cors=app.state.cors,
            prefix=app.state.settings.path_prefix,
        )
        config = Config(app, limits, log_config=None, timeout_graceful_shutdown=1)
        server, up, loop = uvicorn.Server(config), threading.Event(), asyncio.new_event_loop()

        def run() -> None:
            asyncio.set_event_loop(loop)
            loop.run_until_complete(serve())
            loop.close()

        async def serve() -> None:
            serving = asyncio.create_task(server.serve([listening]))
            while not server.started and not serving.done():
                await asyncio.sleep(0.005)
            up.set()
            await serving

        thread = threading.Thread(target=run, daemon=True)
        thread.start()
        assert up.wait(20)
        try:
            yield Threaded(f"http://127.0.0.1:{port}", port, loop)
        finally:
            server.should_exit = True
            thread.join(20)
