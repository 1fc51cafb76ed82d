"""The model that ships: what is promised of small nets holds for it too, in the numbers it is served in."""

from pathlib import Path

import pytest
import torch

from model.checkpoint.card import read_card
from model.checkpoint.load import load_model
from model.engine.engine import Engine
from model.engine.events import Finished, Picture, Request
from model.engine.runner import prepared
from model.sampling.plan import plan, resolve

DIGITS = Path(__file__).parents[3] / "weights" / "digits"
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
