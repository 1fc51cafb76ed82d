"""A server whose system has too little for it, or that is told to end: no accepted job fails for it."""

import json
import os
import resource
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest

from server.cli.serve import UNUSED
from server.engines.process import ENDING
from server.web.generate import ANIMATIONS
from server.web.info import STATIC
from tests.server.conftest import Server
from tests.server.web.raw import ask, connected, request, statuses

pytestmark = pytest.mark.alone
FILES = int(os.environ.get("FILES", "64"))  # descriptors; 1024 in `make soak`
LIMIT = """
import os, resource, sys
resource.setrlimit(resource.RLIMIT_NOFILE, ({files}, {files}))
os.execv(sys.executable, [sys.executable, "-m", "server", "serve", "--port", "{port}"])
"""


class Pressed(Server):
    """A server in a process group of its own, with FILES file descriptors."""

    def start(self) -> None:
        command = [sys.executable, "-c", LIMIT.format(files=FILES, port=self.port)]
        self.process = subprocess.Popen(command, env=self._environ, stderr=self._log, start_new_session=True)
        self.running.add(self)

    def submit(self, count: int, **fields: object) -> list[str]:
        """The ids of so many accepted jobs."""
        answers = [
            self.client.post("/generate", json={"seed": seed, **fields}, headers={"Prefer": "respond-async"})
            for seed in range(count)
        ]
        assert {answer.status_code for answer in answers} == {202}
        return [answer.json()["id"] for answer in answers]

    def outcomes(self, ids: list[str]) -> Counter[str]:
        """How many of these jobs have which status."""
        return Counter(self.client.get(f"/jobs/{id}").json()["status"] for id in ids)

    def logged(self) -> list[dict[str, Any]]:
        """The log so far, without what a start or a job says of itself."""
        lines = os.pread(self._log.fileno(), 1 << 20, 0).decode().splitlines()
        usual = {"listening", "engine ready", "job accepted", "job ended", "draining", "stopped"}
        return [line for line in map(json.loads, lines) if line["event"] not in usual]


def events(logged: list[dict[str, Any]]) -> list[tuple[str, str]]:
    """What happened to which resource."""
    return [(line["event"], line.get("resource", "")) for line in logged]


@pytest.fixture(scope="module")
def pressed(long_weights: Path) -> Iterator[Pressed]:
    """A server of few descriptors, whose engine got every signal that a process group may get, as soon as it was."""
    server = Pressed(long_weights)
    server.until(lambda: server.process.poll() is not None or server.engine_pids, 20)
    for number in ENDING:
        os.kill(server.engine_pid, number)
    server.wait_until_ready()
    yield server


def test_what_a_server_knows_is_answered_for_the_first_time_without_a_descriptor(pressed: Pressed) -> None:
    """Pages, documents, and what is drawn of pictures in memory: nothing opens or imports a file while it serves."""
    frames = {"every": 1, "kind": "both"}
    (id,) = pressed.submit(1, steps=2, n=2, frames=frames)
    pressed.until(lambda: pressed.outcomes([id]) == {"succeeded": 1})
    paths = ["/", "/docs", *(f"/static/{path.name}" for path in STATIC.iterdir()), "/openapi.json", "/metrics"]
    paths += ["/healthz", "/readyz", "/status", "/models", "/models/long", "/v1/models", "/v1/models/long", "/jobs"]
    paths += [f"/jobs/{id}", f"/jobs/{id}/events", f"/jobs/{id}/images/1"]
    wrong = {"/nothing": 404, "/jobs/x": 404, "/jobs?limit=x": 422, "/static/nothing": 404, "/generate": 405}
    usual = resource.prlimit(pressed.process.pid, resource.RLIMIT_NOFILE, (1, FILES))  # nothing more can be opened
    try:
        found = {path: pressed.client.get(path).status_code for path in [*paths, *wrong]}
        drawn = [pressed.client.get(f"/jobs/{id}/trajectory", headers={"accept": media}) for media in ANIMATIONS]
    finally:
        resource.prlimit(pressed.process.pid, resource.RLIMIT_NOFILE, usual)

    assert found == dict.fromkeys(paths, 200) | wrong
    assert [answer.status_code for answer in drawn] == [200] * len(ANIMATIONS)


def test_idle_connections_take_no_descriptor_from_health_and_from_jobs(pressed: Pressed) -> None:
    ids, seconds = pressed.submit(31, steps=100), list[float]()
    with ExitStack() as held:
        for _ in range(1100):
            held.enter_context(connected(pressed.port))
        for _ in range(5):
            began = time.monotonic()
            assert statuses(ask(pressed.port, request("/healthz", method="GET"))) == [200]
            seconds.append(time.monotonic() - began)
    pressed.until(lambda: pressed.outcomes(ids) == {"succeeded": 31})
    pressed.until(lambda: len(pressed.logged()) == 3)

    assert max(seconds) < 1
    assert events(pressed.logged()) == [
        ("too few file descriptors for max_connections", ""),
        ("a resource is short", "connections"),
        ("a resource is no longer short", "connections"),
    ]


def test_a_lack_of_descriptors_is_waited_for_and_logged_once(pressed: Pressed) -> None:
    before, ids = len(pressed.logged()), pressed.submit(12, steps=200, n=2)
    usual = resource.prlimit(pressed.process.pid, resource.RLIMIT_NOFILE, (1, FILES))  # nothing more can be opened
    os.kill(pressed.engine_pid, signal.SIGKILL)
    pressed.until(lambda: ("a resource is short", "file descriptors") in events(pressed.logged()))
    assert pressed.outcomes(ids)["failed"] == 0
    resource.prlimit(pressed.process.pid, resource.RLIMIT_NOFILE, usual)
    pressed.until(lambda: pressed.outcomes(ids) == {"succeeded": 12})

    assert [pressed.client.get(f"/jobs/{id}/images/1").status_code for id in ids] == [200] * 12
    assert events(pressed.logged())[before:] == [
        ("engine died", ""),
        ("a resource is short", "file descriptors"),
        ("a resource is no longer short", "file descriptors"),
    ]


def test_no_signal_to_the_group_ends_an_engine_before_its_jobs(pressed: Pressed) -> None:
    deaths, (id,) = Counter(events(pressed.logged()))["engine died", ""], pressed.submit(1, steps=1000)
    for number in UNUSED:
        pressed.process.send_signal(number)
    os.killpg(pressed.process.pid, signal.SIGHUP)
    pressed.until(lambda: pressed.client.get("/readyz").json().get("detail") == "the server is shutting down")
    code, log = pressed.ended()

    assert (code, log.count("engine died")) == (0, deaths)
    assert log.splitlines()[-2:][0].count(f'"job": "{id}", "outcome": "succeeded"') == 1
