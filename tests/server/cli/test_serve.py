"""ddpm serve: its help, and the number of connections that it accepts."""

import json
import os
import re
import resource
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from ddpm_client import Client

from server.cli import main, serve
from server.engines.process import ENDING
from server.settings import Settings


def test_the_help_of_serve_lists_what_each_setting_allows(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main.main(["serve", "--help"])

    said = " ".join(capsys.readouterr().out.split())
    for setting in (
        "port to listen on; 0: any free port (default: 8000; 0 … 65535)",
        "(default: auto; auto, float32, bfloat16, float16)",
        "lowest level that is logged (default: info; debug, info, warning, error)",
        "(default: True; yes or no)",
    ):
        assert setting in said


class Limits:
    """The limits of a process on its open files, instead of those of the process that runs the tests."""

    def __init__(self, soft: int, hard: int) -> None:
        self.soft, self.hard = soft, hard

    def getrlimit(self, which: int) -> tuple[int, int]:
        assert which == resource.RLIMIT_NOFILE
        return self.soft, self.hard

    def setrlimit(self, which: int, limits: tuple[int, int]) -> None:
        assert which == resource.RLIMIT_NOFILE and limits[1] == self.hard
        assert self.hard == resource.RLIM_INFINITY or limits[0] <= self.hard
        self.soft, self.hard = limits


@pytest.mark.parametrize(
    ("soft", "hard", "connections", "raised_to"),
    [
        (2000, 3000, 1000, 2000),
        (1024, 3000, 1000, 1256),
        (1024, resource.RLIM_INFINITY, 1000, 1256),
        (resource.RLIM_INFINITY, resource.RLIM_INFINITY, 1000, resource.RLIM_INFINITY),
        (300, 500, 244, 500),
        (300, 310, 58, 310),
        (64, 64, 12, 64),
    ],
)
def test_connections_never_exceed_what_descriptors_allow(
    soft: int, hard: int, connections: int, raised_to: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    limits = Limits(soft, hard)
    monkeypatch.setattr(resource, "getrlimit", limits.getrlimit)
    monkeypatch.setattr(resource, "setrlimit", limits.setrlimit)

    assert serve.affordable(1000) == connections
    assert (limits.soft, limits.hard) == (raised_to, hard)


@pytest.mark.long
def test_a_server_with_too_few_descriptors_says_so_and_serves(weights: Path, tmp_path: Path) -> None:
    code = (
        "import resource as r; r.setrlimit(r.RLIMIT_NOFILE, (200, 300)); from server.cli.main import main; exit(main())"
    )
    command = [sys.executable, "-c", code, "serve", "--port", "0", "--weights", str(weights)]
    environ = os.environ | {"DDPM_THREADS": "1", "DDPM_DATA_DIR": str(tmp_path / "data")}
    with subprocess.Popen(command, env=environ, stderr=subprocess.PIPE, text=True) as serving:
        assert serving.stderr is not None
        logged = [json.loads(serving.stderr.readline()) for _ in range(2)]
        with Client(f"http://127.0.0.1:{logged[1]['port']}") as client:
            made = client.generate(steps=1)
        limits = Path(f"/proc/{serving.pid}/limits").read_text()
        serving.terminate()
        serving.communicate(timeout=60)

    warning = {key: logged[0][key] for key in ("level", "event", "descriptors", "wanted")}
    assert warning == {
        "level": "warning",
        "event": "too few file descriptors for max_connections",
        "descriptors": 300,
        "wanted": Settings.model_fields["max_connections"].default + serve.OTHER_FILES,
    }
    assert re.search(r"Max open files +300 +300 ", limits)
    assert (made[0].image.size, serving.returncode) == ((8, 8), 0)


@pytest.mark.parametrize("nohup", [False, True])
def test_every_signal_that_would_end_the_server_is_drained_or_ignored(nohup: bool) -> None:
    server = object.__new__(serve._Server)
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN if nohup else signal.SIG_DFL)
    try:
        with server.capture_signals():
            found = {number: signal.getsignal(number) for number in (*ENDING, *serve.UNUSED)}
        assert signal.getsignal(signal.SIGHUP) == (signal.SIG_IGN if nohup else signal.SIG_DFL)
    finally:
        signal.signal(signal.SIGHUP, before)

    drained = {number for number, handler in found.items() if handler == server.handle_exit}
    assert drained == set(ENDING) - ({signal.SIGHUP} if nohup else set())
    assert {number for number, handler in found.items() if handler is signal.SIG_IGN} == set(found) - drained


HANGS = """
import asyncio, os, signal, sys, threading, time
from contextlib import asynccontextmanager
from unittest import mock
from fastapi import FastAPI
from server.cli import main, serve
from server.errors import EngineFailed, StoreRefused

failures = {"70": EngineFailed("none", 70), "4": StoreRefused("none"), "1": None}
serve.END_S, serve.PARKING_S, serve.GOODBYE_S = 1.0, 0.1, 0.1
forever = threading.Event()

async def end():
    if failure is not None:
        told(failure)
    else:
        os.kill(os.getpid(), signal.SIGTERM)

@asynccontextmanager
async def lifespan(app):
    ending = asyncio.create_task(end())
    if where == "start":
        await asyncio.Event().wait()
    yield
    match where:
        case "task":
            await asyncio.Event().wait()
        case "loop":
            time.sleep(1e6)
        case "executor":
            asyncio.get_running_loop().run_in_executor(None, forever.wait)
        case "thread":
            threading.Thread(target=forever.wait).start()
        case "log":
            serve.logging.getLogger().handlers[0].acquire()
            time.sleep(1e6)

def create_app(settings, on_failed):
    global told
    told, app = on_failed, FastAPI(lifespan=lifespan)
    app.state.cors = app.state.jobs = mock.MagicMock(drain=mock.AsyncMock(), tally=lambda: (0, 0, 0))
    app.state.jobs.counts.subscribers = 0
    return app

serve.create_app = create_app
children = []
for case in sys.argv[1:]:
    where, code = case.split()
    failure = failures[code]
    children.append(os.fork())
    if not children[-1]:
        sys.exit(main.main(["serve", "--port", "0", "--drain-s", "0.1"]))
for case, child in zip(sys.argv[1:], children):
    print(case.split()[0], os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
"""


def test_an_end_is_cut_short_whatever_hangs_and_has_the_code_of_what_ended_the_server() -> None:
    cases = ["start 1", "start 4", "task 1", "task 70", "loop 70", "executor 4", "thread 70", "log 4"]
    ended = subprocess.run([sys.executable, "-c", HANGS, *cases], capture_output=True, text=True, timeout=60)

    assert ended.stdout.splitlines() == cases, ended.stderr
    assert ended.stderr.count("the end takes too long, and is cut short") == len(cases) - 1  # one cannot log
