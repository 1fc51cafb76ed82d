"""An engine process that dies, hangs or cannot start: the server says so, and every picture has the same bytes."""

import asyncio
import json
import multiprocessing
import os
import signal
import socket
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator
from contextlib import aclosing
from pathlib import Path
from typing import Any

import httpx
import pytest

from model.engine.events import Finished
from model.sampling.plan import resolve
from server.engines.process import Patience
from server.engines.supervisor import EngineSupervisor
from server.worker.messages import Spec, Start
from tests.model.convert.directories import write_model
from tests.model.tiny import PROCESS
from tests.server.conftest import Server
from tests.server.jobs.test_metrics import read
from tests.waiting import until_async


@pytest.fixture(scope="module")
def patient(long_weights: Path) -> Iterator[Server]:
    """A server for tests that stop or kill its engine and leave it when it is ready again."""
    server = Server(long_weights, DDPM_ENGINE_PATIENCE_S="60")
    try:
        yield server.wait_until_ready()
    finally:
        code = server.stop()[0]
    assert code == 0


@pytest.mark.long
def test_a_killed_engine_is_replaced_and_its_pictures_come_out_the_same(patient: Server) -> None:
    request = {"seed": 5, "steps": 1000, "n": 8}
    expected = patient.client.post("/generate", json=request).content
    answers: list[httpx.Response] = []
    caller = threading.Thread(target=lambda: answers.append(patient.client.post("/generate", json=request)))
    first = patient.engine_pid

    caller.start()
    patient.until(lambda: read(patient.client.get("/metrics").text)["ddpm_slots_used"] > 0)
    os.kill(first, signal.SIGKILL)
    caller.join()

    assert [answer.content for answer in answers] == [expected]
    assert patient.engine_pid != first


def test_a_stopped_engine_is_seen_within_seconds(patient: Server) -> None:
    engine = patient.engine_pid
    os.kill(engine, signal.SIGSTOP)
    patient.until(lambda: patient.client.get("/readyz").status_code != 200, 10)

    assert "has been stopped" in patient.client.get("/readyz").json()["detail"]
    assert patient.client.get("/healthz").status_code == 200

    os.kill(engine, signal.SIGCONT)
    patient.wait_until_ready()


def test_a_stopped_engine_never_stops_the_api(patient: Server) -> None:
    """Three hundred callers connect and leave while the engine does not read its pipe, which cannot hold their jobs."""
    body = json.dumps({"steps": 30, "n": 64}).encode()
    head = (
        f"POST /generate HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\ncontent-length: {len(body)}\r\n\r\n"
    )
    os.kill(patient.engine_pid, signal.SIGSTOP)
    for _ in range(300):
        with socket.create_connection(("127.0.0.1", patient.port)) as caller:
            caller.sendall(head.encode() + body)

    assert patient.client.get("/healthz", timeout=2).status_code == 200

    os.kill(patient.engine_pid, signal.SIGCONT)
    patient.wait_until_ready()
    assert patient.client.post("/generate", json={"seed": 1, "steps": 2}).status_code == 200


@pytest.mark.long
def test_an_engine_that_hangs_is_killed_and_its_pictures_come_out_the_same(weights: Path) -> None:
    start = Start(
        models=(("tiny", weights / "tiny"),),
        device="cpu",
        dtype="auto",
        slots=4,
        threads=1,
        exact=True,
        log_level="info",
    )
    spec = Spec(model="tiny", seeds=(1, 2, 3), sampling=resolve(PROCESS, steps=30))

    async def pictures(backend: EngineSupervisor) -> list[Finished]:
        async with aclosing(backend.run(spec)) as events:
            made = [event async for event in events if isinstance(event, Finished)]
        return sorted(made, key=lambda event: str(event.id))

    async def scene() -> tuple[list[Finished], list[Finished]]:
        backend = EngineSupervisor(start, 3, print, patience=Patience(silence_s=60, hang_s=1, hang_steps=1))

        async def ready() -> bool:
            return backend.trouble is None

        await backend.start()
        await until_async(ready)
        expected = await pictures(backend)
        (engine,) = multiprocessing.active_children()
        assert engine.pid is not None
        os.kill(engine.pid, signal.SIGSTOP)
        made = await pictures(backend)
        await backend.close()
        return expected, made

    expected, made = asyncio.run(scene())

    assert [event.picture.tolist() for event in made] == [event.picture.tolist() for event in expected]
    assert len(made) == 3


def test_weights_that_change_under_a_server_are_not_served_by_it(tmp_path: Path) -> None:
    write_model(tmp_path / "tiny")
    server = Server(tmp_path).wait_until_ready()
    write_model(tmp_path / "tiny", {"norm_eps": 1e-3})
    os.kill(server.engine_pid, signal.SIGKILL)

    code, log = server.ended()

    assert code == 3
    assert log.strip().splitlines()[-1] == "ddpm: the weights were changed while they were served"


def test_a_drain_that_runs_out_says_so_to_waiting_callers(long_weights: Path) -> None:
    server = Server(long_weights, DDPM_DRAIN_S="0.5", DDPM_THREADS="1").wait_until_ready()
    answers: list[httpx.Response] = []
    request = {"steps": 1000, "n": 64}
    caller = threading.Thread(target=lambda: answers.append(server.client.post("/generate", json=request)))
    caller.start()
    server.until(lambda: read(server.client.get("/metrics").text)["ddpm_jobs_accepted_total"] == 1)
    os.kill(server.engine_pid, signal.SIGSTOP)  # so that nothing ends by itself
    server.process.terminate()
    server.process.wait(5)
    caller.join()
    code = server.stop()[0]

    assert [(a.status_code, a.json()["code"]) for a in answers] == [(503, "not-ready")]
    assert code == 0


def test_an_engine_does_not_outlive_its_server(weights: Path) -> None:
    server = Server(weights).wait_until_ready()
    engine = server.engine_pid
    server.kill()
    server.ended()

    server.until(lambda: not Path(f"/proc/{engine}").exists(), 10)


def exit_of(**variables: str) -> tuple[int, str]:
    """How `ddpm serve` ends with these settings, and the last line it says."""
    environ = {name: value for name, value in os.environ.items() if not name.startswith("DDPM_")}
    command = [sys.executable, "-m", "server", "serve"]
    with tempfile.TemporaryDirectory() as data:
        environ |= {"DDPM_PORT": "0", "DDPM_DATA_DIR": data, **variables}
        ended = subprocess.run(command, env=environ, capture_output=True, text=True, timeout=60)
    return ended.returncode, ended.stderr.strip().splitlines()[-1]


def long(*values: Any) -> Any:
    """Values of a test that CI does not run."""
    return pytest.param(*values, marks=pytest.mark.long)


@pytest.mark.parametrize(
    ("broken", "said"),
    [
        ("truncated", "truncated"),
        long("pickle", "is a pickle, which is never read"),
        long("shape", "must have shape"),
        long("config", "block_out_channels"),
        ("missing", "scheduler_config.json is missing"),
        ("nan", "not finite"),
    ],
)
def test_a_bad_model_directory_ends_the_start_with_one_line_and_code_3(tmp_path: Path, broken: str, said: str) -> None:
    import torch

    from tests.model.convert.directories import weights as tensors

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
        long({"DDPM_SLOTS": "many"}, 2, "DDPM_SLOTS"),
        long({"DDPM_PORT": "70000"}, 2, "DDPM_PORT"),
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
