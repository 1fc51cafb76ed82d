"""Whoever copies an example gets the digit that it asks for: the judge of real digits looks at all pictures."""

import sys
from collections.abc import Iterator
from dataclasses import replace
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
from model.sampling.labels import resolve_labels
from model.sampling.plan import plan, resolve
from model.sampling.samplers import Sampling
from server.errors import Invalid
from server.jobs.request import chosen_fields
from server.jobs.schemas import GenerateRequest
from server.worker.device import choose_dtype
from tests.asked import PLACES, name_of, requests, seeds_told
from tests.test_docs import ROOT

DIGITS = read_card(ROOT / "weights" / "digits")
assert DIGITS.labels is not None and DIGITS.labels.null is not None
NULL = DIGITS.labels.null
JUDGE = ROOT / "benchmarks" / "judge.safetensors"
SURE = 0.99  # that a picture is one digit and no other
SMUDGE = GenerateRequest(seed=37, steps=100)  # without a label, not every picture is a digit
REFUSALS = {"steps must lie in 1..1000, got 5000"}  # that documents show
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
    "weights/emoji/README.md",
}

Made = tuple[int, tuple[int, ...], Sampling]  # a seed, what the net is told, and all else that decides a picture


def pictures_of(request: GenerateRequest) -> list[Made]:
    """The pictures that a request stands for; none if it is for another model, or written to be refused."""
    if request.seed is None or request.model not in (None, DIGITS.name):
        return []
    seeds = range(request.seed, request.seed + request.n)
    said = {"label": request.label, "each": request.labels, "guidance": request.guidance}
    said |= {"interval": request.guidance_interval}
    try:
        chosen = resolve(DIGITS.process, noise=request.noise, **chosen_fields(request, DIGITS))
        told = resolve_labels(DIGITS.labels, DIGITS.process.schedule.T, seeds, **said)  # type: ignore[arg-type]
    except (PlanError, Invalid) as refusal:
        if str(refusal) in REFUSALS:
            return []
        raise
    if told is None:
        return [(seed, (), chosen) for seed in seeds]
    chosen = replace(chosen, guidance=told.guidance, guidance_interval=told.interval)
    null = (NULL,) if chosen.guided else ()
    return [(seed, (label, *null), chosen) for seed, label in zip(seeds, told.labels, strict=True)]


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
    """How sure the judge is of each picture, that it is the digit asked for, or any if none was: in float32, in the
    numbers that are served here, and by torch alone."""
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
    yield {
        made: float(each[made[1][0]] if made[1] else each.max())
        for made, each in zip(wanted, probabilities, strict=True)
    }


@cache  # where float32 is what is served, two of the three are one
def make(wanted: frozenset[Made], dtype: torch.dtype, by_openvino: bool) -> dict[Made, Picture]:
    """These pictures, on the CPU."""
    loaded = load_model(DIGITS, torch.device("cpu"), dtype)
    assert isinstance(loaded.net, CpuNet) and loaded.net.runtime.startswith("openvino") == by_openvino
    engine = Engine(prepared(loaded, slots=8, exact=False))
    for made in wanted:
        seed, labels, chosen = made
        engine.submit(Request(made, seed, plan(DIGITS.process, chosen), labels=labels))
    pictures: dict[Made, Picture] = {}
    while engine.busy:
        for event in engine.step():
            assert isinstance(event, Finished)
            pictures[event.id] = event.picture  # type: ignore[index]
    return pictures


def test_every_picture_that_is_asked_for_is_a_digit(
    asked: dict[str, list[GenerateRequest]], readable: dict[Made, float]
) -> None:
    requests = [(name, one) for name, some in asked.items() for one in some]
    found = [(name, made[0], made[1], readable[made]) for name, one in requests for made in pictures_of(one)]

    assert [picture for picture in found if picture[-1] < SURE] == []


def test_the_judge_does_not_take_a_smudge_for_a_digit(readable: dict[Made, float]) -> None:
    assert all(readable[made] < 0.9 for made in pictures_of(SMUDGE))


def test_the_judge_that_is_kept_tells_real_digits() -> None:
    _, unseen = load_digits(ROOT / "benchmarks" / "digits.npz")
    probabilities: FloatArray = judge(load_or_train(JUDGE, unseen), unseen.pictures)

    assert (probabilities.argmax(1) == unseen.labels.numpy()).mean() >= 0.99
    assert 0.92 <= (probabilities.max(1) >= 0.9).mean() <= 0.97  # a judge that is sure of everything says little


def test_the_animation_in_the_readme_is_small_and_ends_on_the_ten_digits() -> None:
    file = ROOT / "docs" / "building.webp"
    with Image.open(file) as film:
        film.seek(film.n_frames - 1)  # type: ignore[attr-defined]
        pixels = np.asarray(film.convert("L").reduce(2))  # about as the server made them, before they were enlarged
    digits = pixels.reshape(4, 32, 10, 32).swapaxes(1, 2)  # rows of digits, of digits, of emoji, of emoji
    for half in (digits[:2, :5], digits[:2, 5:]):  # x_t, and x̂_0
        shown = np.ascontiguousarray(half.reshape(10, 1, 32, 32))
        probabilities = judge(load_or_train(JUDGE, load_digits(ROOT / "benchmarks" / "digits.npz")[0]), shown)

        assert probabilities[np.arange(10), np.arange(10)].min() >= SURE
    assert file.stat().st_size <= 400_000


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
