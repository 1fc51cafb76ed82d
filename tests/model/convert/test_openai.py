"""A checkpoint of OpenAI's becomes a model directory whose net computes the same as the original."""

import json
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import UNet2DModel
from safetensors.torch import save_file
from torch import Tensor

from model.checkpoint.card import WEIGHTS
from model.checkpoint.load import Model
from model.convert.formats import convert
from model.convert.protocol import Options
from model.nets.config import OPENAI
from model.sampling.levels import timesteps
from model.sampling.noise import INITIAL, gaussian
from tests.model.convert.openai_nets import Kind, UNetModel, shaken
from tests.model.convert.refusals import refusal
from tests.model.worlds import generator, labelled, opened, pictures, planned, relative_error

SIZE = 16
HEADS = Options(image_size=SIZE, heads=4)
THREE: dict[str, Any] = {"multipliers": (1, 2, 3), "layers": 2, "attended": (2, 4)}
# A net, the options for its conversion, and whether diffusers can describe it.
KINDS: dict[str, tuple[Kind, Options, bool]] = {
    "improved, as the scripts build it": (Kind(), HEADS, True),
    "a learned variance": (Kind(learn_sigma=True), HEADS, True),
    "one head, no scale and shift": (Kind(heads=1, scale_shift=False), Options(image_size=SIZE, heads=1), True),
    "three levels, heads of two widths": (Kind(**THREE), HEADS, False),
    "guided: heads of one width, resized by blocks": (
        Kind(**THREE, by_resnets=True, head_channels=16),
        Options(image_size=SIZE, head_channels=16),
        True,
    ),
    "the new order of attention": (
        Kind(new_order=True, by_resnets=True),
        Options(image_size=SIZE, heads=4, new_attention_order=True),
        True,
    ),
    "attention in the middle only": (Kind(attended=()), HEADS, True),
    "attention everywhere": (Kind(attended=(1, 2), head_channels=32), Options(image_size=SIZE, head_channels=32), True),
    "resized without weights": (Kind(conv_resample=False, layers=2), HEADS, False),
    "a wider first level": (Kind(multipliers=(2, 2)), HEADS, False),
    "one level": (Kind(multipliers=(1,), attended=(1,)), HEADS, True),
    "rescaled timesteps": (Kind(), Options(image_size=SIZE, heads=4, timesteps=4000, rescale_timesteps=True), False),
}


def written(directory: Path, net: UNetModel | dict[str, Tensor], options: Options = HEADS) -> Path:
    """The model directory that this checkpoint is converted to."""
    state = net.state_dict() if isinstance(net, UNetModel) else net
    made = convert(state, options)
    directory.mkdir(exist_ok=True)
    (directory / "config.json").write_text(json.dumps(made.config))
    (directory / "scheduler_config.json").write_text(json.dumps(made.scheduler))
    save_file(made.tensors, directory / WEIGHTS)
    return directory


def computed(model: Model, x: Tensor, k: Tensor) -> Tensor:
    """What the net in the engine makes of these. x: [B, C, H, W], k: [B]"""
    with torch.inference_mode():
        out: Tensor = model.net(x.contiguous(memory_format=torch.channels_last), model.table[k])
    return out


@pytest.mark.parametrize(("kind", "options", "in_diffusers"), KINDS.values(), ids=KINDS.keys())
def test_a_converted_net_computes_the_same_as_the_original(
    tmp_path: Path, kind: Kind, options: Options, in_diffusers: bool
) -> None:
    theirs, directory = shaken(kind), tmp_path / "model"
    model = opened(written(directory, theirs, options))
    k = torch.tensor([0, 17, 999])
    t = k * (1000 / 4000) if options.rescale_timesteps else k
    x = torch.randn(3, 3, SIZE, SIZE, generator=torch.Generator().manual_seed(1))
    expected = theirs(x, t)

    assert float((computed(model, x, k) - expected).abs().max()) < 1e-5
    named = json.loads((directory / "config.json").read_text())["_class_name"]
    assert named == ("UNet2DModel" if in_diffusers else OPENAI)
    if in_diffusers:
        again = UNet2DModel.from_pretrained(directory, low_cpu_mem_usage=False).requires_grad_(False)
        assert relative_error(again(x, k).sample, expected) < 1e-5


CONDITIONAL: dict[str, tuple[Kind, Options, bool]] = {
    "improved, a learned variance": (Kind(classes=10, learn_sigma=True), HEADS, True),
    "guided": (
        Kind(**THREE, classes=5, by_resnets=True, head_channels=16),
        Options(image_size=SIZE, head_channels=16),
        True,
    ),
    "heads of two widths": (Kind(multipliers=(2, 2), classes=5, scale_shift=False), HEADS, False),
}


@pytest.mark.parametrize(("kind", "options", "in_diffusers"), CONDITIONAL.values(), ids=CONDITIONAL.keys())
@torch.inference_mode()
def test_a_class_conditional_net_computes_the_same_as_the_original_for_each_label(
    tmp_path: Path, kind: Kind, options: Options, in_diffusers: bool
) -> None:
    theirs, directory = shaken(kind), written(tmp_path / "model", shaken(kind), options)
    x, k, y = torch.randn(3, 3, SIZE, SIZE, generator=generator(1)), torch.tensor([0, 17, 999]), torch.tensor([4, 0, 1])
    expected = theirs(x, k, y)

    assert float((labelled(directory, x, k, y) - expected).abs().max()) < 2e-5
    config = json.loads((directory / "config.json").read_text())
    assert (config["_class_name"], config["num_class_embeds"]) == (
        "UNet2DModel" if in_diffusers else OPENAI,
        kind.classes,
    )
    assert float((theirs(x, k, y.flip(0)) - expected).abs().max()) > 1e-3
    if in_diffusers:
        again = UNet2DModel.from_pretrained(directory, low_cpu_mem_usage=False)
        assert relative_error(again(x, k, class_labels=y).sample, expected) < 2e-5


def test_the_wrong_number_of_heads_is_another_net(tmp_path: Path) -> None:
    theirs, k = shaken(Kind()), torch.tensor([5])
    model, x = opened(written(tmp_path, theirs, Options(image_size=SIZE, heads=2))), torch.randn(1, 3, SIZE, SIZE)

    assert relative_error(computed(model, x, k), theirs(x, k)) > 1e-3


def test_the_origin_names_the_options_that_were_given_or_assumed() -> None:
    state = shaken(Kind()).state_dict()
    usual = convert(state, Options(image_size=SIZE, heads=4)).origin
    options = Options(
        image_size=SIZE,
        timesteps=4000,
        schedule="squaredcos_cap_v2",
        heads=4,
        rescale_timesteps=True,
        new_attention_order=True,
    )

    size = f"{SIZE} x {SIZE}"
    assert usual == (
        f"OpenAI's U-Net (legacy attention order, 4 heads, epsilon, linear schedule, timesteps not rescaled), {size}, "
        "T = 1000"
    )
    assert convert(state, options).origin == (
        "OpenAI's U-Net (new attention order, 4 heads, epsilon, squaredcos_cap_v2 schedule, timesteps rescaled), "
        f"{size}, T = 4000"
    )


def betas(name: str, T: int) -> Tensor:
    """Nichol & Dhariwal's step variances, by their formulas. [T] float64"""
    if name == "linear":
        return torch.linspace(1e-4 * 1000 / T, 0.02 * 1000 / T, T, dtype=torch.float64)
    t = torch.arange(T + 1, dtype=torch.float64) / T
    left = torch.cos((t + 0.008) / 1.008 * torch.pi / 2) ** 2
    return (1 - left[1:] / left[:-1]).clamp(max=0.999)


@pytest.mark.parametrize(("schedule", "T"), [("linear", 1000), ("linear", 4000), ("cosine", 4000)])
def test_the_schedule_is_theirs_for_any_t(tmp_path: Path, schedule: str, T: int) -> None:
    name = {"linear": "linear", "cosine": "squaredcos_cap_v2"}[schedule]
    options = Options(image_size=SIZE, heads=4, timesteps=T, schedule=name, rescale_timesteps=True)
    process = opened(written(tmp_path, shaken(Kind(multipliers=(1,))), options)).card.process

    np.testing.assert_allclose(
        process.schedule.alpha_bar[1:] ** 2, betas(schedule, T).neg().add(1).cumprod(0), rtol=1e-9
    )
    assert (process.spacing, process.clip, process.variance) == ("linspace", True, "large")


@pytest.mark.parametrize("steps", [5, 12])
def test_a_learned_variance_is_sampled_by_their_formula(tmp_path: Path, steps: int) -> None:
    """Respaced as they do: the visited alpha_bar make a process of their own (Nichol & Dhariwal 2021, section 4)."""
    options = Options(image_size=SIZE, heads=4, schedule="squaredcos_cap_v2", timesteps=40, rescale_timesteps=True)
    theirs = shaken(Kind(learn_sigma=True))
    model = opened(written(tmp_path, theirs, options))
    (made,) = pictures(model, [(7, planned(model.card.process, steps=steps))])

    visited = torch.from_numpy(timesteps(40, steps, "linspace") - 1)  # descending
    left = (1 - betas("cosine", 40)).cumprod(0)[visited.flip(0)]  # [steps] alpha_bar, ascending in t
    before = torch.cat([torch.ones(1, dtype=torch.float64), left[:-1]])
    beta = 1 - left / before
    posterior = beta * (1 - before) / (1 - left)
    seed, shape = torch.tensor([7]), (3, SIZE, SIZE)
    x = gaussian(seed, torch.zeros(1).long(), shape, INITIAL).double()
    for step in range(steps):
        i = steps - 1 - step
        eps, v = theirs(x.float(), visited[step : step + 1] * (1000 / 40)).double().chunk(2, dim=1)
        x0 = ((x - (1 - left[i]).sqrt() * eps) / left[i].sqrt()).clamp(-1, 1)
        mean = before[i].sqrt() * beta[i] * x0 + (beta[i].neg() + 1).sqrt() * (1 - before[i]) * x
        fraction = (v + 1) / 2
        variance = torch.exp(fraction * beta[i].log() + (1 - fraction) * posterior[i].clamp_min(1e-20).log())
        z = gaussian(seed, torch.tensor([step]), shape) if i else 0.0
        x = mean / (1 - left[i]) + variance.sqrt() * z
    assert made.floats is not None

    assert float(np.abs(made.floats - x[0].clamp(-1, 1).numpy()).max()) < 5e-4


REFUSED: dict[str, tuple[dict[str, Any], Options, str]] = {
    "labels by a dense layer": ({"label_emb.0.weight": torch.zeros(10, 128)}, HEADS, "'label_emb.0.weight' is not"),
    "an upsampler": ({"input_blocks.0.0.weight": torch.zeros(32, 6, 3, 3)}, HEADS, "reads 6 channels"),
    "a stranger's layer": ({"input_blocks.1.2.weight": torch.zeros(1)}, HEADS, "'input_blocks.1.2.weight' is not"),
    "a classifier": ({"output_blocks.0.0.in_layers.2.weight": None}, HEADS, "is a classifier"),
    "a picture of unknown size": ({}, Options(heads=4), "--image-size must be given"),
    "attention of unknown heads": ({}, Options(image_size=SIZE), "--heads or --head-channels must be given"),
    "heads that do not divide": ({}, Options(image_size=SIZE, heads=5), "must divide the 64 channels"),
    "an unknown scale of time": (
        {},
        Options(image_size=SIZE, heads=4, timesteps=4000),
        "--rescale-timesteps must be given",
    ),
}


@pytest.mark.parametrize(("changes", "options", "words"), REFUSED.values(), ids=REFUSED.keys())
def test_a_net_that_cannot_be_converted_is_refused_by_name(
    changes: dict[str, Tensor | None], options: Options, words: str
) -> None:
    state = {k: v for k, v in (shaken(Kind()).state_dict() | changes).items() if v is not None}

    assert words in refusal(lambda: convert(state, options))


STATE = shaken(Kind(multipliers=(1, 1))).state_dict()


@pytest.mark.parametrize("name", list(STATE)[::7])
def test_a_file_that_lacks_a_tensor_or_has_it_in_another_shape_is_refused(tmp_path: Path, name: str) -> None:
    lacking, other = {k: v for k, v in STATE.items() if k != name}, STATE | {name: torch.zeros(3)}

    for number, state in enumerate((lacking, other)):
        assert refusal(partial(lambda place, state: opened(written(tmp_path / place, state)), str(number), state))


def test_a_block_with_an_enormous_number_is_refused() -> None:
    state = {k: v for k, v in STATE.items() if ".op." not in k} | {f"input_blocks.{10**18}.0.op.weight": torch.zeros(1)}

    assert "at most 8 levels of 1 to 16 residual blocks" in refusal(lambda: convert(state, HEADS))


def test_the_class_of_our_own_knows_no_other_options(tmp_path: Path) -> None:
    directory = written(tmp_path, shaken(Kind(multipliers=(2, 2))))
    config = json.loads((directory / "config.json").read_text())
    (directory / "config.json").write_text(json.dumps(config | {"class_embed": 10}))

    assert (
        refusal(lambda: opened(directory))
        == "config.json: class_embed must be absent: OpenAIUNet has no such option, got 10"
    )


def test_an_option_of_our_own_is_refused_in_a_net_that_claims_to_be_of_diffusers(tmp_path: Path) -> None:
    directory = written(tmp_path, shaken(Kind(multipliers=(2, 2))))
    config = json.loads((directory / "config.json").read_text())
    (directory / "config.json").write_text(json.dumps(config | {"_class_name": "UNet2DModel"}))

    assert "config.json: sinusoid_dim must be one of null, got 32" in refusal(lambda: opened(directory))
