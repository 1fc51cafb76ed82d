"""The engine process dies, hangs, or cannot start: the server tells the truth, and every picture comes out the same."""

import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import httpx
import pytest

from tests.model.directories import write_model
from tests.server.conftest import Server


def test_a_killed_engine_is_replaced_and_its_pictures_come_out_the_same(weights: Path) -> None:
    server = Server(weights).wait_until_ready()
    request = {"seed": 5, "steps": 30, "n": 64}
    expected = server.client.post("/generate", json=request).content
    answers: list[httpx.Response] = []
    caller = threading.Thread(target=lambda: answers.append(server.client.post("/generate", json=request)))
    first = server.engine_pid

    caller.start()
    time.sleep(0.05)
    os.kill(first, signal.SIGKILL)
    caller.join()

    assert [answer.content for answer in answers] == [expected]
    assert server.engine_pid != first
    assert server.stop()[0] == 0


def test_a_stopped_engine_is_seen_within_seconds(weights: Path) -> None:
    server = Server(weights).wait_until_ready()
    engine = server.engine_pid
    os.kill(engine, signal.SIGSTOP)
    began = time.monotonic()
    while server.client.get("/readyz").status_code == 200:
        assert time.monotonic() - began < 10
        time.sleep(0.1)

    assert "not answered" in server.client.get("/readyz").json()["detail"]
    assert server.client.get("/healthz").status_code == 200

    os.kill(engine, signal.SIGCONT)
    server.wait_until_ready()
    server.stop()


def test_an_engine_does_not_outlive_its_server(weights: Path) -> None:
    server = Server(weights).wait_until_ready()
    engine = server.engine_pid
    server.process.kill()
    server.process.communicate()
    server.client.close()

    deadline = time.monotonic() + 10
    while Path(f"/proc/{engine}").exists() and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not Path(f"/proc/{engine}").exists()


def exit_of(**variables: str) -> tuple[int, str]:
    """How `ddpm serve` ends with these settings, and the last line it says."""
    environ = os.environ | {"DDPM_PORT": "0", **variables}
    command = [sys.executable, "-m", "server", "serve"]
    ended = subprocess.run(command, env=environ, capture_output=True, text=True, timeout=60)
    return ended.returncode, ended.stderr.strip().splitlines()[-1]


@pytest.mark.parametrize(
    ("broken", "said"),
    [
        ("truncated", "truncated"),
        ("pickle", "is a pickle, which is never read"),
        ("shape", "must have shape"),
        ("config", "block_out_channels"),
        ("missing", "scheduler_config.json is missing"),
        ("nan", "not finite"),
    ],
)
def test_a_bad_model_directory_ends_the_start_with_one_line_and_code_3(tmp_path: Path, broken: str, said: str) -> None:
    import torch

    from tests.model.directories import weights as tensors

    directory = write_model(tmp_path / "bad")
    file = directory / "diffusion_pytorch_model.safetensors"
    if broken == "truncated":
        file.write_bytes(file.read_bytes()[:-100])
    elif broken == "pickle":
        file.rename(directory / "diffusion_pytorch_model.bin")
    elif broken == "missing":
        (directory / "scheduler_config.json").unlink()
    elif broken == "config":
        write_model(directory, {"block_out_channels": [8, 2**31]})
    else:
        wrong = tensors()
        wrong["conv_in.bias"] = torch.zeros(9) if broken == "shape" else torch.full((8,), float("nan"))
        write_model(directory, tensors=wrong)

    code, line = exit_of(DDPM_WEIGHTS=str(tmp_path))

    assert code == 3
    assert line.startswith("ddpm: ")
    assert said in line


@pytest.mark.parametrize(
    ("variables", "code", "said"),
    [
        ({"DDPM_SLOT": "4"}, 2, "DDPM_SLOT is not a setting"),
        ({"DDPM_SLOTS": "many"}, 2, "DDPM_SLOTS"),
        ({"DDPM_PORT": "70000"}, 2, "DDPM_PORT"),
        ({"DDPM_DEFAULT_MODEL": "other"}, 2, "DDPM_DEFAULT_MODEL must be one of tiny"),
        ({"DDPM_DEVICE": "cuda:31"}, 6, "cuda:31"),
        ({"DDPM_WEIGHTS": "nowhere"}, 3, "nowhere is not a directory"),
    ],
)
def test_a_bad_setting_ends_the_start_with_one_line(
    weights: Path, variables: dict[str, str], code: int, said: str
) -> None:
    ended, line = exit_of(**{"DDPM_WEIGHTS": str(weights), **variables})

    assert (ended, said in line) == (code, True), line
