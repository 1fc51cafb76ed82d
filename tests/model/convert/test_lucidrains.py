"""A checkpoint of lucidrains' becomes a model directory whose net computes the same as the original."""

import json
import math
from functools import partial
from pathlib import Path
from random import Random
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from model.checkpoint.card import read_card
from model.checkpoint.load import Model, load_model
from model.checkpoint.scheduler import noise_schedule
from model.convert.conversion import write
from model.convert.formats import convert
from model.convert.pickles import choose, parts
from model.convert.protocol import Options
from model.engine.engine import Engine
from model.engine.events import Request
from model.engine.runner import prepared
from model.engine.slots import Slots
from model.engine.step import denoise
from model.nets.build import build
from model.nets.lucidrains_config import LUCIDRAINS, lucidrains_architecture
from model.sampling.noise import INITIAL, gaussian
from tests.model.convert.lucidrains_nets import betas, diffusion, shaken
from tests.model.convert.refusals import refusal
from tests.model.engine.test_capture import META, capturing
from tests.model.tiny import pictures as pictures_of
from tests.model.tiny import run
from tests.model.worlds import opened, pictures, planned

SIZE, T = 16, 40
STATE = diffusion(shaken())
KINDS: dict[str, dict[str, Any]] = {
    "as the package builds it, in small": {},
    "a learned variance": {"learned_variance": True},
    "three levels": {
        "dim_mults": (1, 2, 3),
        "full_attn": (False, True, False),
        "heads": (1, 2, 4),
        "d": (16, 8, 4),
    },
    "another first width": {"init_dim": 12},
    "one grey channel": {"channels": 1},
    "one level": {"dim_mults": (2,), "full_attn": (True,), "heads": (2,), "d": (8,)},
}


def saved(file: Path, state: dict[str, Tensor], average: dict[str, Tensor]) -> Path:
    """A trainer's `model-N.pt`: what is trained, and its average."""
    ema = {"initted": torch.tensor(True), "step": torch.tensor(7)}
    for name, net in (("online_model", state), ("ema_model", average)):
        ema |= {f"{name}.{key}": tensor for key, tensor in net.items()}
    torch.save({"step": 7, "model": state, "opt": {}, "ema": ema, "scaler": None, "version": "2.2.5"}, file)
    return file


def converted(directory: Path, state: dict[str, Tensor]) -> Path:
    """The model directory that these tensors are converted to."""
    write(convert(state, Options(image_size=SIZE)), directory / "model", "")
    return directory / "model"


def computed(model: Model, x: Tensor, k: Tensor) -> Tensor:
    """What the net in the engine makes of these. x: [B, C, H, W], k: [B]"""
    with torch.inference_mode():
        out: Tensor = model.net(x.contiguous(memory_format=torch.channels_last), model.table[k])
    return out


def inputs(channels: int = 3) -> tuple[Tensor, Tensor]:
    """Three pictures and their timesteps."""
    return torch.randn(3, channels, SIZE, SIZE, generator=torch.Generator().manual_seed(1)), torch.tensor([0, 17, 39])


@pytest.mark.parametrize("kind", KINDS.values(), ids=KINDS.keys())
def test_a_converted_net_computes_the_same_as_the_original(tmp_path: Path, kind: dict[str, Any]) -> None:
    theirs = shaken(**kind)
    directory = converted(tmp_path, diffusion(theirs, T=T))
    model, (x, k) = opened(directory), inputs(kind.get("channels", 3))

    assert float((computed(model, x, k) - theirs(x, k)).abs().max()) < 1e-5
    assert json.loads((directory / "config.json").read_text())["_class_name"] == LUCIDRAINS


def test_of_a_trainers_file_the_average_is_taken(tmp_path: Path) -> None:
    trained, average = shaken(seed=1), shaken(seed=2)
    file = saved(tmp_path / "model-1.pt", diffusion(trained), diffusion(average))
    found = parts(torch.load(file, weights_only=True))
    made = convert(found[choose(found, None)], Options(image_size=SIZE))
    write(made, tmp_path / "model", "")
    model, (x, k) = opened(tmp_path / "model"), inputs()

    assert float((computed(model, x, k) - average(x, k)).abs().max()) < 1e-5
    assert made.origin == f"lucidrains' U-Net (averaged, v_prediction), {SIZE} x {SIZE}, T = {T}"


@pytest.mark.parametrize("gamma", [math.inf, 5.0], ids=["plain", "min-SNR"])
@pytest.mark.parametrize(
    ("objective", "prediction"), [("pred_noise", "epsilon"), ("pred_x0", "sample"), ("pred_v", "v_prediction")]
)
@pytest.mark.parametrize("schedule", ["sigmoid", "cosine", "linear"])
def test_the_schedule_and_the_prediction_are_read_from_the_tables(
    schedule: str, objective: str, prediction: str, gamma: float
) -> None:
    state = diffusion(shaken(), schedule, 100, objective, gamma=gamma)
    scheduler = convert(state, Options(image_size=SIZE)).scheduler

    assert (scheduler["prediction_type"], scheduler["num_train_timesteps"]) == (prediction, 100)
    np.testing.assert_allclose(scheduler["trained_betas"], betas(schedule, 100), rtol=1e-6)


@pytest.mark.parametrize("schedule", [None, "linear", "squaredcos_cap_v2"])
def test_a_net_without_its_tables_has_the_packages_defaults_or_the_options(schedule: str | None) -> None:
    made = convert(shaken().state_dict(), Options(image_size=SIZE, timesteps=50, schedule=schedule))
    name = {None: "sigmoid", "squaredcos_cap_v2": "cosine"}.get(schedule, "linear")

    expected = betas(name, 50).neg().add(1).cumprod(0)
    np.testing.assert_allclose(noise_schedule(made.scheduler).alpha_bar[1:] ** 2, expected, rtol=1e-6)
    assert made.scheduler["prediction_type"] == "v_prediction"


def test_a_picture_is_sampled_by_their_formulas(tmp_path: Path) -> None:
    """Every step of p_sample_loop, with our noise: x0 from v, clamped, the posterior's mean and variance."""
    theirs = shaken()
    model = opened(converted(tmp_path, diffusion(theirs, T=20)))
    (made,) = pictures(model, [(3, planned(model.card.process))])

    variances = betas("sigmoid", 20)
    left = (1 - variances).cumprod(0)
    before = torch.cat([torch.ones(1, dtype=torch.float64), left[:-1]])
    seed, shape = torch.tensor([3]), (3, SIZE, SIZE)
    x = gaussian(seed, torch.zeros(1).long(), shape, INITIAL).double()
    for step, t in enumerate(reversed(range(20))):
        v = theirs(x.float(), torch.tensor([t])).double()
        x0 = (left[t].sqrt() * x - (1 - left[t]).sqrt() * v).clamp(-1, 1)
        mean = variances[t] * before[t].sqrt() * x0 + (1 - before[t]) * (1 - variances[t]).sqrt() * x
        spread = (variances[t] * (1 - before[t]) / (1 - left[t])).sqrt()
        x = mean / (1 - left[t]) + spread * (gaussian(seed, torch.tensor([step]), shape) if t else 0.0)
    assert made.floats is not None

    assert float(np.abs(made.floats - x[0].clamp(-1, 1).numpy()).max()) < 1e-4


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def test_a_picture_is_the_same_in_any_batch(tmp_path: Path, dtype: torch.dtype) -> None:
    """Samples of all lengths that come and go have the bytes that each has alone."""
    directory = converted(tmp_path, diffusion(shaken(learned_variance=True), T=T))
    model = load_model(read_card(directory), torch.device("cpu"), dtype)
    random, together = Random(3), prepared(model, 3)
    wanted = [Request(i, random.randrange(2**63), planned(model.card.process, steps=2 + i % 5)) for i in range(10)]
    made = pictures_of(run(Engine(together), *wanted))
    alone = prepared(model, 3)

    assert together.exact and len(set(made.values())) == len(made) == 10
    assert [r.id for r in wanted if pictures_of(run(Engine(alone), r))[r.id] != made[r.id]] == []


@pytest.mark.parametrize("batch", [1, 3])
def test_a_step_of_it_can_be_captured(batch: int) -> None:
    arch = lucidrains_architecture(convert(diffusion(shaken(learned_variance=True)), Options(image_size=SIZE)).config)
    with META:
        net = build(arch).eval().requires_grad_(False)
        table, slots = torch.zeros(T, net.embedding_width), Slots(3, arch.shape, T, META)
    with capturing():
        denoise(net, table, slots, batch)


def test_pictures_stay_in_the_layout_that_convolutions_are_fast_in(tmp_path: Path) -> None:
    model, (x, k) = opened(converted(tmp_path, STATE)), inputs()
    net = build(model.card.architecture).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    strayed: list[str] = []

    def look(name: str, given: Tensor) -> None:
        strayed.extend([name] * (not given.is_contiguous(memory_format=torch.channels_last)))

    for name, module in net.named_modules():
        if isinstance(module, torch.nn.Conv2d):
            module.register_forward_pre_hook(lambda _, given, name=name: look(name, given[0]))
    with torch.inference_mode():
        net(x.contiguous(memory_format=torch.channels_last), model.table[k])

    assert strayed == []


def without(state: dict[str, Tensor], *endings: str) -> dict[str, Tensor]:
    """The same without the tensors whose names end like this."""
    return {name: tensor for name, tensor in state.items() if not name.endswith(endings)}


REFUSED: dict[str, tuple[dict[str, Tensor], Options, str]] = {
    "a self-conditioned net": (
        STATE | {"model.init_conv.weight": torch.zeros(16, 6, 7, 7)},
        Options(image_size=SIZE),
        "self-conditioned net, which reads 6 channels",
    ),
    "Fourier features": (
        STATE | {"model.time_mlp.0.weights": torch.zeros(8)},
        Options(image_size=SIZE),
        "time_mlp.0.weights",
    ),
    "a net of version 1": (without(STATE, "norm.g"), Options(image_size=SIZE), "a net of version 1"),
    "a picture of unknown size": (STATE, Options(), "--image-size must be given"),
    "two schedules": (STATE, Options(image_size=SIZE, timesteps=10), "the file holds its own schedule"),
    "betas that are one number": (
        STATE | {"betas": torch.tensor(0.1)},
        Options(image_size=SIZE),
        "betas must be one list of numbers, got 0 dimensions",
    ),
    "a loss of no known weight": (
        STATE | {"loss_weight": torch.full((T,), 3.0)},
        Options(image_size=SIZE),
        "--prediction must be given",
    ),
}


@pytest.mark.parametrize(("state", "options", "words"), REFUSED.values(), ids=REFUSED.keys())
def test_a_net_that_cannot_be_converted_is_refused_by_name(
    state: dict[str, Tensor], options: Options, words: str
) -> None:
    assert words in refusal(lambda: convert(state, options))


def test_a_net_with_a_layer_more_is_refused_and_nothing_is_left(tmp_path: Path) -> None:
    state = STATE | {"model.downs.0.4.weight": torch.zeros(1)}

    assert "holds 1 tensors that config.json does not call for" in refusal(lambda: converted(tmp_path, state))
    assert list(tmp_path.iterdir()) == []


NEEDED = [name for name in STATE if name != "sqrt_alphas_cumprod"]  # which follows from the betas


@pytest.mark.parametrize("name", NEEDED[::12])
def test_a_file_that_lacks_a_tensor_or_has_it_in_another_shape_is_refused(tmp_path: Path, name: str) -> None:
    lacking, other = {k: v for k, v in STATE.items() if k != name}, STATE | {name: torch.zeros(3, 3)}

    for state in (lacking, other):
        assert refusal(partial(converted, tmp_path, state))


BAD: list[tuple[str, object, str]] = [
    ("sample_size", 15, "a multiple of 2"),
    ("in_channels", 2, "1 or 3"),
    ("out_channels", 5, "in_channels or twice that"),
    ("dim", 3, "an integer in 4..2048"),
    ("dim_mults", [1, 65], "integers in 1..64"),
    ("dim_mults", [1, 2, 2], "as long as dim_mults"),
    ("full_attn", [0, 1], "a list of true and false"),
    ("attn_heads", [2], "as long as dim_mults (2)"),
    ("attn_dim_head", "8", "a list of 1..8 items"),
    ("num_mem_kv", 1025, "an integer in 0..1024"),
    ("self_condition", True, "absent: LucidUNet has no such option"),
]


@pytest.mark.parametrize(("option", "value", "words"), BAD)
def test_an_option_out_of_bounds_is_refused_by_name(option: str, value: object, words: str) -> None:
    config = convert(STATE, Options(image_size=SIZE)).config | {option: value}
    reason = refusal(lambda: lucidrains_architecture(config))

    assert reason.startswith("config.json: ") and words in reason
