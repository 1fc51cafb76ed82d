"""Fuzzing, for a few seconds each; `make fuzz` does the same for long, with other seeds."""

from importlib.util import find_spec
from pathlib import Path

import pytest

from tests.fuzz import api, checkpoint, soak, sockets
from tests.server.conftest import Server


def test_every_mutant_of_a_model_directory_loads_or_is_refused(tmp_path: Path) -> None:
    lines, parents = checkpoint.fuzz(runs=250, seed=1, folder=tmp_path)

    assert lines > 120  # it is guided: most of the readers were reached
    assert parents > 5


def test_no_bytes_on_any_route_make_the_server_fail(server: Server) -> None:
    assert sum(sockets.fuzz(server, runs=250, seed=1).values()) > 100


@pytest.mark.skipif(find_spec("schemathesis") is None, reason="needs schemathesis: pip install -e '.[fuzz]'")
def test_the_server_answers_as_its_openapi_document_says(server: Server) -> None:
    code, cases, said = api.run(server, cases=50, seed=1)

    assert code == 0, said
    assert cases > 50


@pytest.mark.long
def test_good_slow_killed_and_hostile_clients_together_leave_nothing_behind(weights: Path) -> None:
    running = Server(weights, DDPM_LOG_LEVEL="warning").wait_until_ready()
    try:
        found = soak.soak(running, seconds=4, seed=1)
    finally:
        running.stop()

    assert found["jobs"] > 10
