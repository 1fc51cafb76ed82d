"""How a server process ends: by a signal, with work in hand; and how it does not begin, with a store it cannot have."""

import asyncio
import json
import os
import shutil
import signal
from pathlib import Path

import pytest
from websockets.exceptions import ConnectionClosed
from websockets.sync.client import connect

from server.store.schema import JOURNAL, PICTURES
from server.store.store import Store
from tests.server.conftest import Server
from tests.server.engines.test_supervisor import exit_of
from tests.waiting import until

LATER = {"prefer": "respond-async"}


def jobs(server: Server, count: int, n: int = 4, steps: int = 30) -> list[str]:
    """So many jobs of n pictures each that nobody waits for."""
    body = {"steps": steps, "n": n, "frames": None}
    return [server.client.post("/generate", json=body, headers=LATER).json()["id"] for _ in range(count)]


@pytest.mark.long
def test_what_does_not_fit_into_the_grace_is_done_by_the_next_server(long_weights: Path, tmp_path: Path) -> None:
    server = Server(long_weights, DDPM_DRAIN_S="0.1", DDPM_DATA_DIR=str(tmp_path)).wait_until_ready()
    asked = jobs(server, 15, steps=100)
    os.kill(server.engine_pid, signal.SIGSTOP)  # so that the last does not end by itself
    with connect(f"ws://127.0.0.1:{server.port}/jobs/{asked[-1]}/stream") as socket:
        server.process.terminate()
        with pytest.raises(ConnectionClosed) as closed:
            while True:
                socket.recv(30)
    assert server.process.wait(30) == 0
    server.start()
    server.wait_until_ready()

    def statuses() -> set[str]:
        return {server.client.get(f"/jobs/{id}").json()["status"] for id in asked}

    until(lambda: not statuses() & {"queued", "running"})
    assert statuses() == {"succeeded"}
    assert closed.value.rcvd is not None
    assert closed.value.rcvd.code == 1012
    assert server.stop()[0] == 0


def test_all_that_fits_into_the_grace_is_done_by_this_one(weights: Path, tmp_path: Path) -> None:
    server = Server(weights, DDPM_DRAIN_S="60", DDPM_DATA_DIR=str(tmp_path)).wait_until_ready()
    asked = jobs(server, 3)
    with connect(f"ws://127.0.0.1:{server.port}/jobs/{asked[-1]}/stream") as socket:
        server.process.terminate()
        heard = [message for message in socket if isinstance(message, str)]
    code = server.ended()[0]

    assert code == 0
    assert '"type": "succeeded"' in heard[-1]


def test_a_second_signal_parks_at_once(long_weights: Path) -> None:
    server = Server(long_weights, DDPM_DRAIN_S="600").wait_until_ready()
    jobs(server, 1, n=64, steps=1000)
    os.kill(server.engine_pid, signal.SIGSTOP)  # so that nothing ends by itself
    server.process.terminate()
    until(lambda: server.client.get("/readyz").json()["detail"] == "the server is shutting down")
    server.process.terminate()

    assert server.process.wait(5) == 0
    server.ended()


def test_it_says_what_it_waits_for_and_what_came_of_that(long_weights: Path, tmp_path: Path) -> None:
    server = Server(long_weights, DDPM_DRAIN_S="0.1", DDPM_DATA_DIR=str(tmp_path)).wait_until_ready()
    server.client.post("/generate", json={"steps": 1})
    jobs(server, 2, n=64, steps=1000)
    os.kill(server.engine_pid, signal.SIGSTOP)  # so that nothing ends by itself
    logged = [json.loads(line) for line in server.stop()[1].splitlines()]
    draining, stopped = (line for line in logged if line["event"] in ("draining", "stopped"))

    assert (draining["event"], draining["seconds"]) == ("draining", 0.1)
    assert draining["jobs_running"] + draining["jobs_waiting"] == 2
    assert (stopped["event"], stopped["jobs_ended"], stopped["jobs_parked"]) == ("stopped", 0, 2)


def test_a_store_in_use_or_damaged_ends_the_start_with_one_line(weights: Path, tmp_path: Path) -> None:
    server = Server(weights, DDPM_DATA_DIR=str(tmp_path)).wait_until_ready()
    in_use, said = exit_of(DDPM_WEIGHTS=str(weights), DDPM_DATA_DIR=str(tmp_path))
    holder = server.process.pid
    server.stop()
    (tmp_path / JOURNAL).write_bytes(b"\0" * 8192)
    damaged, why = exit_of(DDPM_WEIGHTS=str(weights), DDPM_DATA_DIR=str(tmp_path))

    assert (in_use, said) == (5, f"ddpm: the store {tmp_path} is in use by another server, process {holder}")
    assert (damaged, "is damaged" in why) == (4, True)


def test_a_folder_that_cannot_be_written_is_a_wrong_setting(weights: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"")
    code, said = exit_of(DDPM_WEIGHTS=str(weights), DDPM_DATA_DIR=str(tmp_path / "file" / "data"))

    assert (code, said.startswith("ddpm: DDPM_DATA_DIR")) == (2, True)


def test_a_start_that_fails_for_an_unforeseen_reason_says_which(weights: Path, tmp_path: Path) -> None:
    asyncio.run(Store(tmp_path).close())
    (tmp_path / PICTURES / ("0" * 64)).write_bytes(b"of no job")
    (tmp_path / "aside").write_bytes(b"not a folder")
    code, said = exit_of(DDPM_WEIGHTS=str(weights), DDPM_DATA_DIR=str(tmp_path))

    assert (code, said.startswith("ddpm: the start failed: FileExistsError(")) == (1, True), said


def test_a_server_whose_data_directory_is_removed_promises_nothing_and_ends(weights: Path, tmp_path: Path) -> None:
    server = Server(weights, DDPM_DATA_DIR=str(tmp_path / "data")).wait_until_ready()
    shutil.rmtree(tmp_path / "data")
    answer = server.client.post("/generate", json={"steps": 1}, headers={"prefer": "respond-async"})

    assert (answer.status_code, answer.json()["code"]) == (503, "storage-full")
    assert server.process.wait(20) == 4
    server.ended()
