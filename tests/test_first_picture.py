"""Whoever copies an example gets a digit that can be read: the judge of real digits looks at all that is asked for."""

import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from benchmarks.classifier import FloatArray, judge, load_digits, load_or_train
from model.checkpoint.card import read_card
from model.checkpoint.load import load_model
from model.engine.engine import Engine
from model.engine.events import Finished, Picture, Request
from model.engine.runner import prepared
from model.errors import PlanError
from model.nets.cpu import CpuNet
from model.sampling.plan import plan, resolve
from model.sampling.samplers import Sampling
from server.errors import Invalid
from server.jobs.request import chosen_fields
from server.jobs.schemas import GenerateRequest
from server.worker.device import choose_dtype
from tests.asked import PLACES, name_of, requests, seeds_told
from tests.test_docs import ROOT

DIGITS = read_card(ROOT / "weights" / "digits")
JUDGE = ROOT / "benchmarks" / "judge.safetensors"
SURE = 0.99  # that a picture is one digit and no other
FEW = 6  # pictures: of a request for more, which is a sheet, three in four must be readable
SMUDGE = GenerateRequest(seed=42, steps=100)  # what the documents asked for until somebody looked at it
ASKING = {
    "README.md",
    "client/README.md",
    "client/ddpm_client/__init__.py",
    "docs/api.md",
    "docs/client.md",
    "docs/quick-start.md",
    "examples/generate.sh",
    "examples/notebook.py",
    "server/static/index.html",
    "weights/digits/README.md",
}

Made = tuple[int, Sampling]  # a seed, and all else that decides a picture


def sampling(request: GenerateRequest) -> Sampling | None:
    """What a request asks of the digits; None if it is for another model, or there is no such picture."""
    try:
        chosen = resolve(DIGITS.process, noise=request.noise, **chosen_fields(request, DIGITS))
    except (PlanError, Invalid):
        return None
    return chosen if request.model in (None, DIGITS.name) else None


def pictures_of(request: GenerateRequest) -> list[Made]:
    """The pictures that a request stands for."""
    chosen = sampling(request)
    return [(request.seed + i, chosen) for i in range(request.n)] if chosen and request.seed is not None else []


@pytest.fixture(scope="module")
def asked() -> dict[str, list[GenerateRequest]]:
    """The requests in each file that has some."""
    found = {name_of(place): requests(place.read_text()) for place in PLACES}
    return {name: some for name, some in found.items() if some}


@pytest.fixture(
    scope="module",
    params=["as served", *(pytest.param(name, marks=pytest.mark.long) for name in ("float32", "without OpenVINO"))],
)
def readable(request: pytest.FixtureRequest, asked: dict[str, list[GenerateRequest]]) -> Iterator[dict[Made, float]]:
    """How sure the judge is of each picture: in float32, in the numbers that are served here, and by torch alone."""
    dtype = choose_dtype("auto", torch.device("cpu")) if request.param == "as served" else torch.float32
    wanted = frozenset(made for some in [*asked.values(), [SMUDGE]] for one in some for made in pictures_of(one))
    with pytest.MonkeyPatch.context() as patch:
        if request.param == "without OpenVINO":
            patch.delattr("model.nets.openvino_graph", raising=False)
            patch.setitem(sys.modules, "model.nets.openvino_graph", None)  # to import it is an ImportError
        pictures = make(wanted, dtype, by_openvino=request.param != "without OpenVINO")
    assert JUDGE.is_file()
    shown = np.stack([pictures[made] for made in wanted]).transpose(0, 3, 1, 2)
    probabilities = judge(load_or_train(JUDGE, load_digits(ROOT / "benchmarks" / "digits.npz")[0]), shown)
    yield dict(zip(wanted, probabilities.max(1).tolist(), strict=True))


@cache  # where float32 is what is served, two of the three are one
def make(wanted: frozenset[Made], dtype: torch.dtype, by_openvino: bool) -> dict[Made, Picture]:
    """These pictures, on the CPU."""
    loaded = load_model(DIGITS, torch.device("cpu"), dtype)
    assert isinstance(loaded.net, CpuNet) and loaded.net.runtime.startswith("openvino") == by_openvino
    engine = Engine(prepared(loaded, slots=8, exact=False))
    for made in wanted:
        engine.submit(Request(made, made[0], plan(DIGITS.process, made[1])))
    pictures: dict[Made, Picture] = {}
    while engine.busy:
        for event in engine.step():
            assert isinstance(event, Finished)
            pictures[event.id] = event.picture  # type: ignore[index]
    return pictures


def test_every_picture_that_is_asked_for_is_a_digit(
    asked: dict[str, list[GenerateRequest]], readable: dict[Made, float]
) -> None:
    requests = [(name, one) for name, some in asked.items() for one in some if one.n <= FEW]
    unclear = [(name, seed, readable[seed, chosen]) for name, one in requests for seed, chosen in pictures_of(one)]

    assert [picture for picture in unclear if picture[2] < SURE] == []


def test_of_a_sheet_three_in_four_are_digits(
    asked: dict[str, list[GenerateRequest]], readable: dict[Made, float]
) -> None:
    sheets = [pictures_of(one) for some in asked.values() for one in some if one.n > FEW]
    shares = [np.mean([readable[made] >= SURE for made in sheet]) for sheet in sheets]

    assert shares and min(shares) >= 0.75


def test_the_judge_does_not_take_a_smudge_for_a_digit(readable: dict[Made, float]) -> None:
    assert all(readable[made] < 0.9 for made in pictures_of(SMUDGE))


def test_the_judge_that_is_kept_tells_real_digits() -> None:
    _, unseen = load_digits(ROOT / "benchmarks" / "digits.npz")
    probabilities: FloatArray = judge(load_or_train(JUDGE, unseen), unseen.pictures)

    assert (probabilities.argmax(1) == unseen.labels.numpy()).mean() >= 0.99
    assert 0.92 <= (probabilities.max(1) >= 0.9).mean() <= 0.97  # a judge that is sure of everything says little


def test_the_picture_in_the_readme_ends_on_digits() -> None:
    with Image.open(ROOT / "docs" / "denoising.png") as strip:
        pixels = np.asarray(strip)[::3, ::3]  # as the engine made them, before they were enlarged
    ends = pixels.reshape(6, 1, 32, -1)[..., -32:]  # [6, 1, 32, 32] the last of each row
    probabilities = judge(load_or_train(JUDGE, load_digits(ROOT / "benchmarks" / "digits.npz")[0]), ends.copy())

    assert probabilities.max(1).min() >= SURE


def test_these_files_ask_for_pictures(asked: dict[str, list[GenerateRequest]]) -> None:
    assert set(asked) == ASKING


def test_a_request_is_found_however_it_is_written() -> None:
    written = """
        curl -d '{"seed": 1, "n": 2, "frames": {"every": 2}}' and {"index": 0, "seed": 2}
        client.stream(seed=3, steps=9, frames={"count": 5}); client.generate(seed=seed, steps=20)
        ddpm generate --seed 2 -o out.png
        ddpm generate --seed 4 --steps 8 -o out.png   # `ddpm generate --like out.png --seed 5`.
        python examples/watch.py 6 frames
        <select name="preset"><option>full</option></select>
        <input name="seed" type="number" value="7" required> <input name="n" value="3">
    """
    found = {one.seed: (one.n, one.steps, one.preset) for one in requests(written)}

    assert found == {
        1: (2, None, None),
        2: (1, None, "fast"),
        3: (1, 9, None),
        4: (1, 8, None),
        5: (1, None, None),
        6: (1, None, None),
        7: (3, None, "full"),
    }


@pytest.mark.parametrize("place", PLACES, ids=name_of)
def test_every_seed_that_is_told_is_one_that_is_asked_for(place: Path, asked: dict[str, list[GenerateRequest]]) -> None:
    known = {one.seed + i for some in asked.values() for one in some for i in range(one.n) if one.seed is not None}

    assert seeds_told(place.read_text()) - known == set()
