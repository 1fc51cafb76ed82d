"""The promise: a picture depends on its request, never on the other pictures in the batch.

Two hundred samples of mixed samplers and step counts arrive, are preempted and are cancelled at random; each that
finishes has the bytes that it has alone. The weights come from a model directory, as in a server.
"""

import os
from collections.abc import Iterator
from pathlib import Path
from random import Random
from typing import Any

import pytest
import torch

from model.checkpoint.card import read_card
from model.checkpoint.load import load_model
from model.engine.engine import Engine
from model.engine.events import Event, Request
from model.engine.runner import prepared
from model.engine.slots import SavedState, Seating
from model.nets.cpu import supports
from tests.model.convert.directories import write_model
from tests.model.tiny import CPU, PROCESS, a_plan, endings, pictures, run

SLOTS, SAMPLES = 6, 200
CHOICES: list[dict[str, Any]] = [
    {"sampler": "ddpm"},
    {"sampler": "ddpm", "variance": "large"},
    {"sampler": "ddpm", "spacing": "trailing", "clip": False},
    {"sampler": "ddpm", "noise": "torch"},
    {"sampler": "greedy"},
    {"sampler": "ddim"},
    {"sampler": "ddim", "eta": 0.7, "spacing": "linspace"},
    {"sampler": "dpmpp", "order": 3},
    {"sampler": "dpmpp_2m", "spacing": "trailing"},
    {"sampler": "dpmpp_sde"},
    {"sampler": "unipc"},
    {"sampler": "unipc", "order": 3, "clip": False},
    {"sampler": "deis", "order": 3, "noise": "torch"},
    {"sampler": "ipndm"},
]
THRESHOLDING = {"thresholding": True, "dynamic_thresholding_ratio": 0.9, "sample_max_value": 3.0}
MANY_THREADS = pytest.mark.skipif(
    not (os.environ.get("CI") or os.environ.get("TEST_THREADS")),
    reason="two threads are tried in CI, or with TEST_THREADS=1: on a busy machine they crawl",
)


@pytest.fixture
def threads(request: pytest.FixtureRequest) -> Iterator[int]:
    """So many threads for torch, while the test runs."""
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


def crowd(random: Random, labels: int = 0) -> list[Request]:
    """Requests of every kind, 2 to 30 steps long, mostly short; of so many labels the last stands for none."""
    requests = []
    for number in range(SAMPLES + 40):
        steps = 2 + int(29 * random.random() ** 3)
        told: tuple[int, ...] = random.choice([(), (labels - 1,), (random.randrange(labels - 1),)]) if labels else ()
        guided: dict[str, Any] = {}
        if labels and random.random() < 0.5:
            told = (random.randrange(labels - 1), labels - 1)
            guided = {"guidance": random.choice([0.0, 1.5, 3.0]), "guidance_interval": random.choice([None, (20, 5)])}
        plan = a_plan(steps, **random.choice(CHOICES), **guided)
        frames = frozenset(random.sample(range(steps + 1), random.choice([0, 0, 2])))
        rank, owner = random.choice([0.0, 1.0, 2.0]), random.choice(["", "", "another"])
        requests.append(
            Request(number, random.randrange(2**63), plan, rank=rank, frames=frames, owner=owner, labels=told)
        )
    return requests


def bustle(engine: Engine, requests: list[Request], random: Random) -> list[Event]:
    """Submits these in handfuls between steps, and cancels some: waiting ones, seated ones, ended ones."""
    events: list[Event] = []
    queue = list(requests)
    cancels = random.sample([request.id for request in requests], len(requests) - SAMPLES)
    while queue or engine.busy:
        for _ in range(random.choice([0, 0, 0, 1, 1, 4])):
            if queue:
                engine.submit(queue.pop(0))
        if cancels and random.random() < 0.2:
            engine.cancel(cancels.pop())
        events += engine.step()
    return events


def check_a_picture_is_the_same_in_any_batch(
    directory: Path,
    device: torch.device,
    dtype: torch.dtype,
    monkeypatch: pytest.MonkeyPatch,
    scheduler: dict[str, Any] | None = None,
    labels: int = 0,
) -> None:
    """Runs the crowd together, then each survivor alone, on a runner of its own."""
    write_model(directory, scheduler=scheduler, labels=labels)
    model = load_model(read_card(directory), device, dtype)
    assert model.card.process.schedule.T == PROCESS.schedule.T
    together, alone, resumed = prepared(model, SLOTS), prepared(model, SLOTS), list[int]()
    usual = together.slots.resume

    def count(seating: Seating, step: int, saved: SavedState) -> None:
        resumed.append(step)
        usual(seating, step, saved)

    monkeypatch.setattr(together.slots, "resume", count)
    assert together.exact and together.exact_buckets == alone.exact_buckets

    random = Random(20)
    requests = crowd(random, labels)
    engine = Engine(together)
    events = bustle(engine, requests, random)
    made = pictures(events)

    assert len(endings(events)) == len(requests)
    assert len(made) >= SAMPLES and len(made) < len(requests)
    assert engine.stats.sample_steps > 2 * engine.stats.steps  # they did share
    assert len(resumed) > 20 and len(set(resumed)) > 5  # and were unseated, at any step
    different = [r.id for r in requests if r.id in made and pictures(run(Engine(alone), r))[r.id] != made[r.id]]
    assert different == []
    assert len(set(made.values())) == len(made)  # and they are all different pictures


@pytest.mark.parametrize("threads", [1, pytest.param(2, marks=(MANY_THREADS, pytest.mark.alone))], indirect=True)
@pytest.mark.parametrize(
    "dtype",
    [
        pytest.param(torch.float32, id="float32"),
        pytest.param(torch.bfloat16, id="bfloat16", marks=() if supports(torch.bfloat16) else pytest.mark.long),
    ],
)
def test_a_picture_is_the_same_in_any_batch(
    dtype: torch.dtype, threads: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    check_a_picture_is_the_same_in_any_batch(tmp_path, torch.device("cpu"), dtype, monkeypatch)


def test_a_picture_of_a_conditional_net_is_the_same_in_any_batch(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    check_a_picture_is_the_same_in_any_batch(tmp_path, CPU, torch.float32, monkeypatch, labels=4)


@pytest.mark.long
def test_a_thresholded_picture_is_the_same_in_any_batch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    check_a_picture_is_the_same_in_any_batch(tmp_path, torch.device("cpu"), torch.float32, monkeypatch, THRESHOLDING)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA GPU on this machine")
@pytest.mark.parametrize("scheduler", [{}, THRESHOLDING], ids=["clamped", "thresholded"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("labels", [0, 4], ids=["unconditional", "conditional"])
def test_a_picture_is_the_same_in_any_batch_on_a_gpu(
    labels: int, dtype: torch.dtype, scheduler: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    device = torch.device("cuda")
    check_a_picture_is_the_same_in_any_batch(tmp_path, device, dtype, monkeypatch, scheduler, labels)
