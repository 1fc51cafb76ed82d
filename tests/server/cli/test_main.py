"""The `ddpm` command itself: its version, its help and its usage errors."""

import errno
import os
import subprocess
import sys
from unittest import mock

import pytest

from server import __version__
from server.cli import main
from server.errors import EXIT_FAILED
from server.store.schema import is_full
from tests.server.cli.conftest import ddpm
from tests.server.conftest import Server


def test_command_and_server_report_the_same_version(server: Server) -> None:
    assert ddpm("--version").stdout == f"ddpm-server {__version__}\n"
    assert server.client.get("/openapi.json").json()["info"]["version"] == __version__
    assert f'ddpm_build_info{{version="{__version__}"}} 1.0' in server.client.get("/metrics").text


def test_help_names_every_command_and_imports_none() -> None:
    helped = ddpm("--help")

    assert [name for name in main.COMMANDS if f"    {name} " not in helped.stdout] == []
    slow = {"PIL", "fastapi", "httpx", "numpy", "pydantic", "torch", "tqdm", "uvicorn", "websockets"}
    code = f"import sys, server.cli.main; print(*{slow} & sys.modules.keys())"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout == "\n"


@pytest.mark.parametrize("command", [name for name in main.COMMANDS if name != "train"])
def test_every_command_has_a_help_text(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    if command == "convert":
        pytest.importorskip("model.convert.__main__")
    with pytest.raises(SystemExit) as ended:
        main.main([command, "--help"])

    assert ended.value.code == 0
    assert "usage: " in capsys.readouterr().out


WRONG = {
    "serve": ["--prot", "1"],
    "generate": ["--steps", "many"],
    "models": ["weights"],
    "train": [],
    "tune": ["weights/digits"],
    "convert": ["net.pt"],
    "bench": ["--times"],
    "key": ["alice", "--quota", "1\n2"],
    "check": [],
}


@pytest.mark.parametrize("command", main.COMMANDS)
def test_a_usage_error_is_one_line_that_names_what_is_wrong(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main.main([command, *WRONG[command]])
    said = capsys.readouterr().err

    assert (ended.value.code, said.count("\n")) == (2, 1)
    assert said.startswith(f"ddpm {command}: ") and said.endswith(f" (usage: ddpm {command} --help)\n")


def test_an_unknown_command_or_flag_is_a_usage_error(capsys: pytest.CaptureFixture[str]) -> None:
    for words in ([], ["dance"], ["generate", "--sed", "1"]):
        with pytest.raises(SystemExit) as ended:
            main.main(words)
        assert ended.value.code == 2
        assert "usage: ddpm" in capsys.readouterr().err


def test_a_start_that_lacks_a_resource_says_which_in_one_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    lack = OSError(errno.EMFILE, "Too many open files")
    monkeypatch.setattr("server.cli.serve.main", mock.Mock(side_effect=lack))

    assert main.main(["serve"]) == EXIT_FAILED
    assert capsys.readouterr().err == "ddpm: [Errno 24] Too many open files\n"
    assert not is_full(lack)


@pytest.mark.parametrize("buffered", ["", "1"])
@pytest.mark.parametrize(("output", "said"), [("/dev/full", "ddpm: [Errno 28] No space left on device\n"), (None, "")])
def test_output_that_cannot_be_written_ends_a_command_without_a_traceback(
    output: str | None, said: str, buffered: str
) -> None:
    reader, writer = os.pipe()
    os.close(reader)
    environ = {**os.environ, "PYTHONUNBUFFERED": buffered}
    with open(output or writer, "wb") as closed:
        ended = subprocess.run(
            [sys.executable, "-m", "server", "key", "alice"], stdout=closed, stderr=subprocess.PIPE, env=environ
        )

    assert ended.returncode == EXIT_FAILED
    assert ended.stderr.decode().removeprefix("ddpm_").endswith(said)
    assert b"Traceback" not in ended.stderr and b"Exception" not in ended.stderr
