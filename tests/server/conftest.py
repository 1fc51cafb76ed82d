"""Servers for the tests: the whole application over a tiny model, in this process or as a process of its own."""

import os
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, ClassVar

import httpx
import pytest
from starlette.testclient import TestClient

from model.sampling.plan import plan, resolve
from model.sampling.table import E, M
from server.settings import Settings
from server.web.app import create_app
from tests.model.convert.directories import LEVELS, PLAN, write_model, write_plan
from tests.model.tiny import PROCESS
from tests.server.fakes import FakeBackend
from tests.waiting import until

_TABLE = plan(PROCESS, resolve(PROCESS, "ddim", timesteps=LEVELS)).rows
DDIM = PLAN | {  # whose rows are those of ddim, though it names another solver
    "sampler": "greedy",
    "columns": "men",
    "rows": [[*row[[M, E]], 0] for row in _TABLE],
    "source": "those of ddim",
    "measured": {"pictures": 1},
}


@pytest.fixture(scope="session")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with one model directory, `tiny`: 8 x 8, T = 30; it has a plan, `fast`, of three steps."""
    folder = tmp_path_factory.mktemp("weights")
    write_plan(write_model(folder / "tiny"), DDIM)
    return folder


@pytest.fixture(scope="session")
def long_weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with one tiny model of a thousand steps, `long`, whose jobs still run when a test does what is next."""
    scheduler = {"num_train_timesteps": 1000, "beta_start": 1e-4, "beta_end": 0.02}
    return write_model(tmp_path_factory.mktemp("weights") / "long", scheduler=scheduler).parent


@pytest.fixture
def client(weights: Path, tmp_path: Path) -> Iterator[TestClient]:
    """The application over a backend that makes flat grey pictures at once."""
    settings = Settings(
        weights=weights, data_dir=tmp_path, result_cache=False, max_n=8, max_queued_steps=200, max_body_bytes=512
    )
    with TestClient(create_app(settings, FakeBackend()), raise_server_exceptions=False) as made:
        yield made


class Server:
    """A server process over a folder of models. With `with` it is ready, and stopped at the end."""

    running: ClassVar[set["Server"]] = set()

    def __init__(self, weights: Path, **variables: str) -> None:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port: int = free.getsockname()[1]
        self._data = tempfile.TemporaryDirectory()
        knobs = {
            "DDPM_DATA_DIR": self._data.name,
            "DDPM_WEIGHTS": str(weights),
            "DDPM_THREADS": "1",
            "DDPM_SLOTS": "4",
            "DDPM_RESULT_CACHE": "no",  # or who compares two pictures would compare one with itself
            **variables,
        }
        self._environ = {name: value for name, value in os.environ.items() if not name.startswith("DDPM_")} | knobs
        self._log = tempfile.TemporaryFile("w+")  # not a pipe: nobody reads it while the server runs
        self.client = httpx.Client(base_url=f"http://127.0.0.1:{self.port}", timeout=60)
        self.start()

    def start(self) -> None:
        """The process; again, at the same address, once it has died."""
        command = [sys.executable, "-m", "server", "serve", "--port", str(self.port)]
        self.process = subprocess.Popen(command, env=self._environ, stderr=self._log)
        self.running.add(self)

    def __enter__(self) -> "Server":
        return self.wait_until_ready()

    def __exit__(self, *_: object) -> None:
        self.stop()

    def kill(self) -> None:
        """SIGKILL to the server. Its engine ends by itself."""
        self.process.kill()
        self.process.wait(60)

    def until(self, condition: Callable[[], object], patience_s: float = 60) -> None:
        """Waits for a condition."""
        until(condition, patience_s)

    def wait_until_ready(self) -> "Server":
        """Comes back once the engine takes work; fails after a minute, or when the process has ended."""
        began = time.monotonic()
        until(lambda: self.is_ready() or self.process.poll() is not None, pause_s=0.05)  # each look costs the start
        assert self.process.poll() is None, "the server did not become ready"
        self.started_s = time.monotonic() - began
        return self

    def is_ready(self) -> bool:
        """Whether it takes work now."""
        try:
            return self.client.get("/readyz").status_code == 200
        except httpx.TransportError:
            return False

    def accepted(self, **job: Any) -> str:
        """The path of a new job, asked for again, as clients do, while all engines are being replaced."""

        def location() -> str | None:
            answer = self.client.post("/generate", json=job, headers={"prefer": "respond-async"})
            assert answer.status_code == 202 or answer.json()["code"] == "not-ready", answer.text
            return str(answer.headers["location"]) if answer.status_code == 202 else None

        return until(location)

    @property
    def engine_pids(self) -> list[int]:
        """The process ids of the engines, which are the server's only children but for Python's resource tracker."""
        children = Path(f"/proc/{self.process.pid}/task/{self.process.pid}/children").read_text().split()
        return [int(pid) for pid in children if b"spawn_main" in Path(f"/proc/{pid}/cmdline").read_bytes()]

    @property
    def engine_pid(self) -> int:
        """The process id of the only engine."""
        (pid,) = self.engine_pids
        return pid

    @property
    def last_line(self) -> str:
        """The last line that was logged so far."""
        self._log.seek(0)
        return ([""] + self._log.read().splitlines())[-1]

    def stop(self) -> tuple[int, str]:
        """SIGTERM; the exit code and what was logged."""
        self.process.terminate()
        return self.ended()

    def ended(self) -> tuple[int, str]:
        """The exit code and what was logged, once it has ended."""
        self.client.close()
        code = self.process.wait(60)
        self.running.discard(self)
        self._data.cleanup()
        with self._log as log:
            log.seek(0)
            return code, log.read()


@pytest.fixture(autouse=True)
def no_server_is_left() -> Iterator[None]:
    """Kills the servers of a test that failed before it had ended them: tests after it are to fail for nothing else."""
    before = set(Server.running)
    yield
    for left in Server.running - before:
        left.kill()
        left.ended()


@pytest.fixture(scope="session")
def server(weights: Path) -> Iterator[Server]:
    """One server for all tests that only ask it for pictures."""
    with Server(weights) as running:
        yield running
