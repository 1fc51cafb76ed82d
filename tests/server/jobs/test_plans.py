"""Plans of a model directory in requests: listed, asked for by name, and never taken for one that has changed."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from starlette.testclient import TestClient

from model.checkpoint.plans import FOLDER
from model.digests import file_digest
from server.store.schema import PICTURES
from tests.model.convert.directories import LEVELS, PLAN, write_model, write_plan
from tests.server.conftest import DDIM, Server
from tests.server.fakes import read_texts
from tests.server.jobs.test_durability import ended, later
from tests.server.jobs.test_remade import damage
from tests.server.store import flips
from tests.server.web.test_generate import generate, pixels

PATH = Path("tiny") / FOLDER / "fast.json"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder with one model, `tiny`, and its plan `fast`."""
    write_plan(write_model(tmp_path / "models" / "tiny"))
    return tmp_path / "models"


def change(folder: Path) -> None:
    """Another file of the same name, with the same solver and levels."""
    write_plan(folder / "tiny", PLAN | {"columns": "m", "rows": [[0.5]] * 3})


CHANGES: list[Callable[[Path], Any]] = [
    change,
    lambda folder: (folder / PATH).unlink(),
    lambda folder: write_plan(folder / "tiny", b"{"),
]


def test_a_plans_picture_is_that_of_its_rows(server: Server) -> None:
    ours = generate(server, seed=3, plan="fast").content
    theirs = generate(server, seed=3, sampler="ddim", timesteps=LEVELS).content
    texts = read_texts(ours)

    assert (pixels(ours) == pixels(theirs)).all()
    assert (texts["plan"], texts["sampler"], texts["steps"]) == ("fast", "greedy", "3")
    assert len(texts["plan_digest"]) == 16


def test_a_models_plans_are_listed_and_those_that_are_refused_too(
    folder: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    write_plan(folder / "tiny", DDIM, "other")
    write_plan(folder / "tiny", PLAN | {"timesteps": [31]}, "wrong")
    with caplog.at_level("ERROR"), flips.start(folder, tmp_path / "data") as client:
        listed = client.get("/models/tiny").json()
        asked = client.post("/generate", json={"plan": "wrong"})

    reason = "wrong.json: timesteps must be integers in 1..30, got [31]"
    digests = [file_digest(folder / "tiny" / FOLDER / f"{name}.json")[:16] for name in ("fast", "other")]
    plain = {"name": "fast", "digest": digests[0], "sampler": "ddim", "steps": 3, "source": "", "measured": {}}
    told = {"source": "those of ddim", "measured": {"pictures": 1}}
    assert listed["plans"] == [plain, plain | told | {"name": "other", "digest": digests[1], "sampler": "greedy"}]
    assert listed["refused_plans"] == [{"name": "wrong", "reason": reason}]
    assert asked.status_code == 422
    assert asked.json()["errors"] == [{"pointer": "/plan", "message": f"plan wrong is refused: {reason}"}]
    lines = [record for record in caplog.records if record.message == "plan refused"]
    assert [(line.plan, line.reason) for line in lines] == [("wrong", reason)]  # type: ignore[attr-defined]


def test_a_job_goes_on_after_a_restart_with_the_plan_that_it_was_accepted_with(folder: Path, tmp_path: Path) -> None:
    with flips.start(folder, tmp_path / "data", open_gate=False) as client:
        job = later(client, plan="fast", seed=1)
        digest = sampling_of(client).plan_digest
    with flips.start(folder, tmp_path / "data") as client:
        assert ended(client, job["id"])["status"] == "succeeded"
        (spec,) = client.app.state.jobs.backend.specs  # type: ignore[attr-defined]

    assert (spec.sampling.plan, spec.sampling.plan_digest, spec.sampling.timesteps) == ("fast", digest, tuple(LEVELS))


def sampling_of(client: TestClient) -> Any:
    (job,) = client.app.state.jobs.repository.live.values()  # type: ignore[attr-defined]
    return job.request.sampling


@pytest.mark.parametrize("changed", CHANGES, ids=["changed", "gone", "broken"])
def test_a_job_whose_plan_is_another_after_a_restart_fails_with_the_reason(
    folder: Path, tmp_path: Path, changed: Callable[[Path], Any]
) -> None:
    with flips.start(folder, tmp_path / "data", open_gate=False) as client:
        job, other = later(client, plan="fast", seed=1), later(client, seed=1)
    changed(folder)
    with flips.start(folder, tmp_path / "data") as client:
        error = ended(client, job["id"])["error"]
        assert ended(client, other["id"])["status"] == "succeeded"

    assert (error["status"], error["code"]) == (409, "model-changed")
    assert error["detail"] == "the plan fast was changed or removed after this job had been accepted"


def test_pictures_of_another_plan_of_the_same_name_are_not_taken_from_the_cache(folder: Path, tmp_path: Path) -> None:
    asked = {"plan": "fast", "seed": 1}
    with flips.start(folder, tmp_path / "data") as client:
        first, again = (client.post("/generate", json=asked) for _ in range(2))
    change(folder)
    with flips.start(folder, tmp_path / "data") as client:
        then = client.post("/generate", json=asked)

    assert ["x-cache" in answer.headers for answer in (first, again, then)] == [False, True, False]
    assert len({read_texts(answer.content)["plan_digest"] for answer in (first, again, then)}) == 2


def test_a_damaged_picture_is_made_again_by_its_own_plan_or_not_at_all(folder: Path, tmp_path: Path) -> None:
    with flips.start(folder, tmp_path / "data") as client:
        answer = client.post("/generate", json={"plan": "fast", "seed": 1})
        job = client.get(f"/jobs/{answer.headers['x-job-id']}").json()
    (image,) = job["images"]
    damage(tmp_path / "data" / PICTURES / image["sha256"])
    with flips.start(folder, tmp_path / "data") as client:
        again = client.get(image["url"])
    damage(tmp_path / "data" / PICTURES / image["sha256"])
    change(folder)
    with flips.start(folder, tmp_path / "data") as client:
        gone = client.get(image["url"])

    assert (again.status_code, again.content) == (200, answer.content)
    assert gone.status_code == 410
    assert gone.json()["detail"].endswith(", and the plan that made it is no longer served")
