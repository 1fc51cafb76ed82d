"""The model that ships: what is promised of small nets holds for it too, in the numbers it is served in."""

from pathlib import Path
from typing import Any

import pytest
import torch

from model.checkpoint.card import read_card
from model.checkpoint.load import load_model
from model.engine.engine import Engine
from model.engine.events import Finished, Picture, Request
from model.engine.runner import prepared
from model.nets.cpu import CpuNet, grow_up
from model.sampling.plan import plan, resolve
from model.tune.walk import begin, end, noise, predictor

DIGITS = Path(__file__).parents[3] / "benchmarks" / "digits"
SAMPLERS = ("ddpm", "ddim", "greedy", "dpmpp_2m")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=["bfloat16", "float32"])
def test_digits_have_the_same_bytes_alone_and_in_a_batch(dtype: torch.dtype) -> None:
    model = load_model(read_card(DIGITS), torch.device("cpu"), dtype)
    process = model.card.process
    runner = prepared(model, 5)
    tables = [plan(process, resolve(process, SAMPLERS[i % 4], 2 + i % 5)) for i in range(12)]

    def pictures(chosen: range) -> dict[object, Picture]:
        engine = Engine(runner)
        made: dict[object, Picture] = {}
        for i in chosen:
            engine.submit(Request(i, 40 + i, tables[i]))
        while engine.busy:
            made |= {event.id: event.picture for event in engine.step() if isinstance(event, Finished)}
        return made

    together = pictures(range(12))
    for i in range(12):
        assert pictures(range(i, i + 1))[i].tobytes() == together[i].tobytes()
    assert runner.exact


@torch.inference_mode()
def test_the_plans_of_digits_come_nearer_the_converged_pictures_than_the_solver_they_were_measured_beside() -> None:
    model = load_model(read_card(DIGITS), torch.device("cpu"), torch.float32)
    if isinstance(model.net, CpuNet):
        grow_up(model.net, 8)
    process, x = model.card.process, begin(noise(range(8), model.card.shape, torch.device("cpu")))
    assert not process.refused_plans
    converged = end(predictor(model), plan(process, resolve(process, "dpmpp", 24, spacing="trailing")).rows, x)

    def distance(**choices: Any) -> float:
        made = end(predictor(model), plan(process, resolve(process, **choices)).rows, x)
        return float((made - converged).square().mean())

    tuned = {name: saved for name, saved in process.plans.items() if "by_hand" in saved.measured}
    assert tuned
    for name, saved in tuned.items():
        assert distance(plan=name) < 0.85 * distance(steps=len(saved.timesteps), **saved.measured["by_hand"])
