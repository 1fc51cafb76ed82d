"""docs/api.md leaves nothing out, and its examples run."""

import re
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import get_args

import pytest
from starlette.testclient import TestClient

from model.sampling.levels import SPACINGS
from model.sampling.plan import SAMPLERS
from model.sampling.schedule import Variance
from model.sampling.table import NOISES
from server.errors import ANSWERS, UNFORESEEN
from server.jobs.schemas import STATUSES, GenerateRequest
from server.web import watch
from server.web.generate import ANSWERS as MEDIA
from tests.model.convert.directories import write_model
from tests.server.conftest import Server

PAGE = Path(__file__).parents[3] / "docs" / "api.md"
TEXT = PAGE.read_text()
EXAMPLES = re.findall(r"```sh\n(.*?)```", TEXT, re.DOTALL)


def test_every_route_is_there(client: TestClient) -> None:
    operations = client.get("/openapi.json").json()["paths"]
    routes = [f"{method.upper()} {path}" for path, methods in operations.items() for method in methods]
    routes += [f"WS {route.path}" for route in watch.router.routes]  # type: ignore[attr-defined]

    assert len(routes) > 14
    assert [route for route in routes if f"`{route}`" not in TEXT] == []


def test_every_word_that_a_field_may_be_is_there() -> None:
    choices = {"sampler": SAMPLERS, "variance": get_args(Variance), "spacing": SPACINGS, "noise": NOISES}
    rows = {name: re.findall(rf"^\| `{name}` \|.*$", TEXT, re.MULTILINE)[0] for name in choices}

    assert [word for name, words in choices.items() for word in words if f"`{word}`" not in rows[name]] == []


def test_every_field_status_code_and_kind_of_answer_is_there(client: TestClient) -> None:
    codes = [f"| {status} | `{code}` |" for status, code in {*ANSWERS.values(), UNFORESEEN}]
    listed = client.get("/models").json()
    (model,) = listed["models"]
    job = client.post("/generate", headers={"accept": "application/json"}).json()
    words = [*GenerateRequest.model_fields, *MEDIA, *STATUSES, *listed, *model, *model["runs"], *job["progress"]]
    closing = re.findall(r"\b[14]\d{3}\b", (Path(watch.__file__)).read_text())

    assert [row for row in codes if row not in TEXT] == []
    assert [word for word in words if not re.search(rf"[`\"]{re.escape(word)}[`\"]", TEXT)] == []
    assert [code for code in closing if code != str(watch.ABNORMAL_CLOSURE) and code not in TEXT] == []


@pytest.fixture
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """A server of a tiny model that knows the labels of the digits."""
    index = {"null_label": 10, "guidance": 2.0}
    with Server(write_model(tmp_path_factory.mktemp("weights") / "tiny", labels=11, index=index)) as running:
        yield running


@pytest.mark.skipif(shutil.which("curl") is None, reason="needs curl")
def test_the_examples_run_as_they_stand(server: Server, tmp_path: Path) -> None:
    script = "\n".join(EXAMPLES)
    for shown, here in {"localhost:8000": f"127.0.0.1:{server.port}", "digits\n": "tiny\n", " 100": " 20"}.items():
        assert shown in script
        script = script.replace(shown, here)
    done = subprocess.run(["bash", "-eu"], input=script, cwd=tmp_path, capture_output=True, text=True, timeout=60)

    assert done.returncode == 0, done.stderr
    assert {path.name for path in tmp_path.iterdir()} == {"out.png", "out.gif", "digits.zip"}
    assert '"steps must lie in 1..30, got 5000"' in done.stdout
