"""Several models in one server whose memory does not hold all of them."""

import os
import shutil
import signal
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch

from model.checkpoint.card import read_card
from model.engine.footprint import footprint
from tests.model.convert.directories import weights as tensors
from tests.model.convert.directories import write_model
from tests.server.conftest import Server
from tests.server.engines.test_supervisor import exit_of
from tests.server.jobs.test_metrics import read

NAMES = ("a", "b", "c")
JOBS = [{"model": name, "seed": seed, "steps": 10 + seed, "n": 2} for seed in range(8) for name in NAMES]
SLOTS = 4
THRESHOLDING = {"thresholding": True, "sample_max_value": 1.5}


def write(folder: Path) -> Path:
    """Three models of one shape, and each with weights of its own; the last has dynamic thresholding."""
    for factor, name in enumerate(NAMES, 1):
        scaled, options = {key: tensor * (1 + 0.1 * factor) for key, tensor in tensors().items()}, {"c": THRESHOLDING}
        write_model(folder / name, scheduler=options.get(name), tensors=scaled)
    return folder


@pytest.fixture(scope="module")
def expected(tmp_path_factory: pytest.TempPathFactory) -> list[bytes]:
    """The pictures of JOBS, each made alone, by a server that has room for all."""
    server = Server(write(tmp_path_factory.mktemp("three")), DDPM_DTYPE="float32").wait_until_ready()
    assert loaded(server) == {"a", "b", "c"}
    made = [server.client.post("/generate", json=job).content for job in JOBS]
    server.stop()
    return made


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The three, and one whose weights are not finite, which shows when they are read."""
    made = write(tmp_path_factory.mktemp("four"))
    write_model(made / "z", tensors=tensors() | {"conv_in.bias": torch.full((8,), float("nan"))})
    return made


@pytest.fixture(scope="module")
def budget(folder: Path) -> int:
    """Room for two of them, and a half."""
    return footprint(read_card(folder / "a"), SLOTS, torch.device("cpu"), torch.float32).size_bytes * 5 // 2


@pytest.fixture(scope="module")
def server(folder: Path, budget: int) -> Iterator[Server]:
    """A server with room for two."""
    made = Server(folder, DDPM_MODEL_MEMORY_BYTES=str(budget), DDPM_DTYPE="float32").wait_until_ready()
    yield made
    assert made.stop()[0] == 0


def models(server: Server) -> list[dict[str, Any]]:
    """What is said of each model."""
    return list(server.client.get("/models").json()["models"])


def loaded(server: Server) -> set[str]:
    """The names of those that are in memory."""
    return {model["name"] for model in models(server) if model["loaded"]}


@pytest.mark.long
def test_three_models_share_memory_for_two_and_no_request_fails(
    server: Server, budget: int, expected: list[bytes]
) -> None:
    assert loaded(server) == {"a", "b"}
    made: dict[int, httpx.Response] = {}
    callers = [
        threading.Thread(target=lambda i=i: made.update({i: server.client.post("/generate", json=JOBS[i])}))
        for i in range(len(JOBS))
    ]
    seen = list[set[str]]()
    for caller in callers:
        caller.start()
    while any(caller.is_alive() for caller in callers):
        taken = [model["runs"]["memory_bytes"] for model in models(server) if model["loaded"]]
        assert sum(taken) <= budget
        seen.append(loaded(server))
        assert server.client.get("/readyz").status_code == 200

    assert [made[i].status_code for i in range(len(JOBS))] == [200] * len(JOBS)
    assert [made[i].content for i in range(len(JOBS))] == expected
    assert max(map(len, seen)) == 2
    assert set().union(*seen, loaded(server)) == {"a", "b", "c"}


def test_the_list_tells_of_dynamic_thresholding(server: Server) -> None:
    told = {model["name"]: (model["clip"], model["thresholding"]) for model in models(server)}

    assert told == dict.fromkeys("abz", (True, None)) | {"c": (True, {"ratio": 0.995, "max": 1.5})}


def test_the_most_recently_used_model_stays_loaded(server: Server) -> None:
    for name in "ba":
        server.client.post("/generate", json={"model": name, "steps": 2})

    document = server.client.post(
        "/generate", json={"model": "c", "steps": 2}, headers={"accept": "application/json"}
    ).json()

    assert document["status"] == "succeeded"
    assert document["digest"] == next(model["digest"] for model in models(server) if model["name"] == "c")
    assert loaded(server) == {"a", "c"}


def test_a_broken_model_fails_only_its_own_jobs(server: Server) -> None:
    answers = [server.client.post("/generate", json={"model": name, "steps": 2}) for name in "zabz"]

    assert [answer.status_code for answer in answers] == [503, 200, 200, 503]
    for broken in (answers[0], answers[3]):
        assert (broken.json()["code"], "not finite" in broken.json()["detail"]) == ("model-broken", True)
    assert server.client.get("/readyz").status_code == 200


def test_a_model_larger_than_the_memory_limit_is_refused_by_name(folder: Path) -> None:
    code, line = exit_of(DDPM_WEIGHTS=str(folder), DDPM_MODEL_MEMORY_BYTES="100000", DDPM_SLOTS="4")

    assert (code, line.startswith("ddpm: a takes ")) == (3, True), line


def ask_the_deaf(server: Server, name: str) -> str:
    """A job that was accepted while the engine hears nothing, before anybody noticed."""
    while True:
        os.kill(server.engine_pid, signal.SIGSTOP)
        answer = server.client.post("/generate", json={"model": name}, headers={"prefer": "respond-async"})
        if answer.status_code == 202:
            return answer.headers["location"]
        os.kill(server.engine_pid, signal.SIGCONT)
        server.wait_until_ready()


@pytest.mark.long
def test_two_models_take_turns_in_memory_for_one_and_a_deleted_one_fails_alone(
    folder: Path, budget: int, tmp_path: Path
) -> None:
    for name in "ab":
        shutil.copytree(folder / name, tmp_path / name)
    server = Server(tmp_path, DDPM_MODEL_MEMORY_BYTES=str(budget // 2), DDPM_DTYPE="float32").wait_until_ready()
    asked = [{"model": name, "seed": seed, "steps": 5, "n": 4} for seed in range(2) for name in "ba"]
    jobs = [server.accepted(**job) for job in asked]
    server.until(lambda: all(server.client.get(job).json()["status"] == "succeeded" for job in jobs))

    [left] = {"a", "b"} - loaded(server)
    shutil.rmtree(tmp_path / left)
    lost = ask_the_deaf(server, left)
    os.kill(server.engine_pid, signal.SIGKILL)
    server.until(lambda: server.client.get("/readyz").status_code == 503)
    server.wait_until_ready()
    server.until(lambda: server.client.get(lost).json()["status"] == "failed")
    assert server.client.get(lost).json()["error"]["code"] == "model-broken"
    assert read(server.client.get("/metrics").text)["ddpm_engine_restarts_total{died}"] == 1
    answers = {name: server.client.post("/generate", json={"model": name, "steps": 2}).status_code for name in "ab"}
    assert answers == {left: 503, ({"a", "b"} - {left}).pop(): 200}
    assert server.stop()[0] == 0


@pytest.mark.long
def test_a_model_that_breaks_before_an_engine_restart_fails_alone(tmp_path: Path) -> None:
    for name in "ab":
        write_model(tmp_path / name)
    server = Server(tmp_path).wait_until_ready()
    write_model(tmp_path / "b", tensors=tensors() | {"conv_in.bias": torch.full((8,), float("nan"))})
    os.kill(server.engine_pid, signal.SIGKILL)
    server.until(lambda: server.client.get("/readyz").status_code == 503)
    server.wait_until_ready()
    answers = [server.client.post("/generate", json={"model": name, "steps": 2}) for name in "ab"]

    assert [answer.status_code for answer in answers] == [200, 503]
    assert answers[1].json()["code"] == "model-broken"
    assert server.stop()[0] == 0
