"""Dynamic thresholding: diffusers' pictures, in any company, and a quantile that does not depend on the batch."""

import math
from dataclasses import replace
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import model.engine.step
from model.checkpoint.load import Model
from model.engine.engine import Engine
from model.engine.events import Failed, Finished, Request
from model.engine.runner import prepared
from model.engine.step import scales
from model.sampling.plan import plan, resolve
from model.sampling.reference import sample_alone
from model.sampling.schedule import Prediction, Thresholding
from tests.model.sampling.test_parity import grey_levels_apart, their_picture
from tests.model.tiny import function_model, halve, run
from tests.model.worlds import pictures, planned, saved, shaken, small

ONE_LEVEL = {"block_out_channels": [8], "down_block_types": ["DownBlock2D"], "up_block_types": ["UpBlock2D"]}
NUMBERS = [(0.9, 1.0), (0.9, 3.0), (0.995, 1.0), (0.995, 3.0)]


def thresholded(model: Model, numbers: Thresholding) -> Model:
    """The same model with thresholding by these numbers."""
    return replace(model, card=replace(model.card, process=replace(model.card.process, thresholding=numbers)))


@pytest.mark.filterwarnings("ignore:__array__ implementation")  # of torch, which diffusers gives to NumPy
@pytest.mark.parametrize(("prediction", "levels"), [("epsilon", 10), ("epsilon", 1000), ("v_prediction", 10)])
def test_thresholded_pictures_are_those_of_diffusers_beside_others_that_are_not(
    tmp_path: Path, prediction: Prediction, levels: int
) -> None:
    net, first = shaken(small(**ONE_LEVEL)), list[bytes]()
    options: dict[str, Any] = {"num_train_timesteps": levels, "prediction_type": prediction, "thresholding": True}
    options |= {"timestep_spacing": "trailing"}
    model = saved(tmp_path, net, **options)
    samplers: list[tuple[str, dict[str, Any]]] = [("ddpm", {}), ("ddim", {"eta": 0.6}), ("dpmpp_2m", {})]
    assert model.card.process.thresholding == Thresholding(0.995, 1.0)
    for ratio, most in NUMBERS:
        options |= {"dynamic_thresholding_ratio": ratio, "sample_max_value": most}
        model = thresholded(model, Thresholding(ratio, most))
        choices = [
            resolve(model.card.process, sampler, 5, noise="torch", clip=clip, **fields)
            for (sampler, fields), clip in product(samplers, (None, False))
        ]
        made = pictures(model, [(3, plan(model.card.process, choice)) for choice in choices])
        for picture, choice in zip(made, choices, strict=True):
            theirs = options | ({} if choice.clip else {"thresholding": False, "clip_sample": False})
            assert grey_levels_apart(picture, their_picture(net, choice, theirs)) <= 1, (choice, ratio, most)
        first.append(made[0].picture.tobytes())

    assert first[0] == first[2] and len(set(first)) == 3  # with a largest s of 1 the ratio means nothing


def test_the_engine_makes_the_thresholded_pictures_of_the_reference(tmp_path: Path) -> None:
    net, numbers = shaken(small(in_channels=1, out_channels=1, sample_size=[4, 8])), Thresholding(0.95, 2.5)
    options = {"thresholding": True, "dynamic_thresholding_ratio": 0.95, "sample_max_value": 2.5}
    model = saved(tmp_path, net, prediction_type="v_prediction", num_train_timesteps=20, **options)
    asked: list[dict[str, Any]] = [{"sampler": "ddpm"}, {"sampler": "greedy"}, {"sampler": "ddim", "clip": False}]
    wanted = [(seed, planned(model.card.process, steps=9, **choices)) for seed, choices in enumerate(asked)]
    apart = list[float]()
    for finished, (seed, made) in zip(pictures(model, wanted), wanted, strict=True):
        for thresholding in (numbers, None):
            with torch.inference_mode():
                states = sample_alone(lambda x, k: model.net(x, model.table[k]), made, seed, (1, 4, 8), thresholding)
                *_, (x, _) = states
            assert finished.floats is not None
            apart.append(float(np.abs(finished.floats - x[0].clamp(-1, 1).numpy()).max()))

    assert max(apart[::2]) < 1e-5
    assert apart[1] > 1e-2 and max(apart[3::2]) < 1e-5  # of the three, `ddpm` alone clamps and reads x0


# The quantile


def alone(x0: Tensor, c: Tensor, thresholding: Thresholding) -> Tensor:
    """The scales of these pictures, each by itself."""
    return torch.cat([scales(x0[i : i + 1], c[i : i + 1], thresholding) for i in range(len(x0))])


@pytest.mark.parametrize("shape", [(1, 1, 1), (1, 1, 2), (3, 5, 7), (1, 28, 28), (3, 64, 64)])
@pytest.mark.parametrize("ratio", [1e-6, 0.31, 0.5, 0.9, 0.995, 1.0])
def test_the_scale_is_torchs_quantile_and_has_the_same_bits_in_any_batch(
    shape: tuple[int, int, int], ratio: float
) -> None:
    generator = torch.Generator().manual_seed(0)
    x0, c = 2 * torch.randn(19, *shape, generator=generator), torch.ones(19, 1, 1, 1)
    c[4::5] = math.inf
    numbers = Thresholding(ratio, 2.0)
    expected = x0.double().abs().flatten(1).quantile(ratio, dim=1).clamp(1, 2)
    expected[4::5] = 1
    given = scales(x0, c, numbers)

    assert given.shape == (19, 1, 1, 1) and torch.allclose(given.flatten().double(), expected, rtol=1e-6, atol=0)
    assert torch.equal(given, alone(x0, c, numbers))
    order = torch.randperm(19, generator=generator)
    assert torch.equal(scales(x0[order], c[order], numbers), given[order])
    last = x0.contiguous(memory_format=torch.channels_last)
    assert torch.equal(scales(last, c, numbers), given)


def test_what_is_not_finite_stays_in_its_own_picture() -> None:
    x0, c, numbers = torch.randn(6, 1, 8, 8), torch.ones(6, 1, 1, 1), Thresholding(0.9, 2.0)
    usual = scales(x0, c, numbers)
    x0[1, 0, 2, 3], x0[2], x0[3], x0[4], c[4] = math.inf, math.nan, math.inf, math.nan, math.inf
    given = scales(x0, c, numbers)

    assert torch.equal(given[[0, 5]], usual[[0, 5]])
    assert given[1].isfinite() and given[2].isnan() and given[4] == 1


def test_a_picture_that_is_not_finite_fails_and_its_neighbours_have_their_bytes() -> None:
    def broken(x: Tensor, k: Tensor) -> Tensor:
        """Pictures whose first pixel is above 0 come to nothing."""
        return torch.where(x[:, :, :1, :1] > 0, math.nan, halve(x, k))

    made, wanted = thresholded(function_model(broken), Thresholding(0.9, 2.0)), range(12)
    plans = [planned(made.card.process, steps=1, clip=None if seed % 3 else False) for seed in wanted]
    events = run(Engine(prepared(made, 5)), *[Request(seed, seed, plans[seed]) for seed in wanted])
    sound = {event.id: event.picture for event in events if isinstance(event, Finished)}
    usual = Engine(prepared(thresholded(function_model(), Thresholding(0.9, 2.0)), 1))

    assert len(sound) > 2 and sum(isinstance(event, Failed) for event in events) == 12 - len(sound) > 2
    for seed, picture in sound.items():
        (alone,) = [
            e for e in run(usual, Request(seed, int(str(seed)), plans[int(str(seed))])) if isinstance(e, Finished)
        ]
        assert np.array_equal(picture, alone.picture)


def test_a_quantile_over_the_batch_would_be_noticed_at_the_start(monkeypatch: pytest.MonkeyPatch) -> None:
    made, usual = thresholded(function_model(), Thresholding(0.9, 3.0)), scales
    assert prepared(made, 4).exact

    def shared(x0: Tensor, c: Tensor, thresholding: Thresholding) -> Tensor:
        return usual(x0.reshape(1, -1, 1, 1), c[:1], thresholding).expand_as(c)

    monkeypatch.setattr(model.engine.step, "scales", shared)
    assert not prepared(made, 4).exact
