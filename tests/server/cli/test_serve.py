"""ddpm serve: its help, and the number of connections that it accepts."""

import asyncio
import json
import os
import re
import resource
import signal
import subprocess
import sys
from pathlib import Path
from unittest import mock

import pytest
import uvicorn
from ddpm_client import Client

from server.cli import main, serve
from server.engines.process import ENDING
from server.errors import EXIT_FAILED
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


def test_an_end_that_waits_for_the_disk_is_cut_short(monkeypatch: pytest.MonkeyPatch) -> None:
    async def never(*arguments: object) -> None:
        await asyncio.Event().wait()

    monkeypatch.setattr(serve, "END_S", 0.01)
    monkeypatch.setattr(uvicorn.Server, "shutdown", never)
    monkeypatch.setattr(os, "_exit", mock.Mock(side_effect=SystemExit))
    jobs = mock.Mock(tally=lambda: (0, 0, 0), drain=mock.AsyncMock(), counts=mock.Mock(subscribers=0))
    with pytest.raises(SystemExit):
        asyncio.run(serve._Server(uvicorn.Config("app"), jobs, drain_s=0.0).shutdown())

    assert os._exit.call_args == mock.call(EXIT_FAILED)  # type: ignore[attr-defined]
