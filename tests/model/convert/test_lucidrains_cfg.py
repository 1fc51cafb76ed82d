"""A checkpoint of lucidrains' net for classifier-free guidance becomes a net that computes the same for every label."""

import json
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from model.checkpoint.scheduler import noise_schedule
from model.convert.conversion import write
from model.convert.formats import convert
from model.convert.protocol import Options
from model.engine.events import Finished, Request
from model.nets.lucidrains_config import lucidrains_architecture
from model.sampling.noise import INITIAL, gaussian
from tests.model.convert.lucidrains_cfg_nets import shaken
from tests.model.convert.lucidrains_nets import betas, tables
from tests.model.convert.refusals import refusal
from tests.model.worlds import engine, generator, labelled, opened, planned

SIZE, NULL = 16, 5
SIZED = Options(image_size=SIZE)
STATE = shaken().state_dict()
KINDS: dict[str, dict[str, Any]] = {
    "as the package builds it, in small": {},
    "three levels, another first width, grey": {"dim_mults": (1, 2, 3), "init_dim": 12, "channels": 1},
    "one level": {"dim_mults": (2,)},
}


def below_model(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """The same as a `GaussianDiffusion` holds it."""
    return {f"model.{key}": tensor for key, tensor in state.items()}


@pytest.mark.parametrize("kind", KINDS.values(), ids=KINDS.keys())
@torch.inference_mode()
def test_a_converted_net_computes_the_same_as_the_original_for_each_label(tmp_path: Path, kind: dict[str, Any]) -> None:
    theirs, x = shaken(**kind), torch.randn(3, kind.get("channels", 3), SIZE, SIZE, generator=generator(1))
    k, classes = torch.tensor([0, 17, 999]), torch.tensor([4, 0, 1])
    state = tables("cosine", 1000, "pred_noise") | below_model(theirs.state_dict())
    write(convert(state, SIZED), tmp_path / "model", "")
    made, null = (labelled(tmp_path / "model", x, k, y) for y in (classes, torch.full((3,), NULL)))

    assert float((made - theirs(x, k, classes)).abs().max()) < 2e-5
    assert float((null - theirs(x, k, None)).abs().max()) < 2e-5
    assert float((made - null).abs().max()) > 1e-2
    assert json.loads((tmp_path / "model" / "model_index.json").read_text())["null_label"] == NULL


@torch.inference_mode()
def test_a_guided_picture_is_sampled_by_their_formulas(tmp_path: Path) -> None:
    """Every step of p_sample_loop, with our noise: noise beyond that of the null label, x0, the posterior."""
    theirs, T, scale, seed = shaken(), 10, 3.0, torch.tensor([3])
    write(convert(tables("cosine", T, "pred_noise") | below_model(theirs.state_dict()), SIZED), tmp_path / "model", "")
    model = opened(tmp_path / "model")
    maker = engine(model)
    maker.submit(Request(0, 3, planned(model.card.process, guidance=scale), labels=(2, NULL), wants_floats=True))
    (made,) = [event.floats for _ in range(T) for event in maker.step() if isinstance(event, Finished)]

    variances = betas("cosine", T)
    left = (1 - variances).cumprod(0)
    before = torch.cat([torch.ones(1, dtype=torch.float64), left[:-1]])
    x, label = gaussian(seed, torch.zeros(1).long(), (3, SIZE, SIZE), INITIAL).double(), torch.tensor([2])
    for step, t in enumerate(reversed(range(T))):
        logits, null = (theirs(x.float(), torch.tensor([t]), classes).double() for classes in (label, None))
        eps = logits + (logits - null) * (scale - 1)
        x0 = ((x - (1 - left[t]).sqrt() * eps) / left[t].sqrt()).clamp(-1, 1)
        mean = variances[t] * before[t].sqrt() * x0 + (1 - before[t]) * (1 - variances[t]).sqrt() * x
        spread = (variances[t] * (1 - before[t]) / (1 - left[t])).sqrt()
        noise = gaussian(seed, torch.tensor([step]), (3, SIZE, SIZE)) if t else 0.0
        x = mean / (1 - left[t]) + spread * noise
    assert made is not None

    assert float(np.abs(made - x[0].clamp(-1, 1).numpy()).max()) < 1e-3


def test_a_net_without_its_tables_has_the_defaults_of_its_process_or_the_options() -> None:
    made, other = (
        convert(STATE, SIZED),
        convert(STATE, Options(image_size=SIZE, schedule="linear", prediction="sample")),
    )

    for scheduler, name, prediction in ((made.scheduler, "cosine", "epsilon"), (other.scheduler, "linear", "sample")):
        expected = betas(name, 1000).neg().add(1).cumprod(0)
        np.testing.assert_allclose(noise_schedule(scheduler).alpha_bar[1:] ** 2, expected, rtol=1e-6)
        assert (scheduler["prediction_type"], scheduler["timestep_spacing"]) == (prediction, "trailing")
    size = f"{SIZE} x {SIZE}"
    facts = "not averaged, 5 labels, 4 heads of 32 channels assumed, epsilon"
    assert made.origin == f"lucidrains' U-Net for classifier-free guidance ({facts}), {size}, T = 1000"


REFUSED: dict[str, tuple[dict[str, Tensor], Options, str]] = {
    "a net of version 1": (
        {key.replace("norm.g", "norm.weight"): tensor for key, tensor in STATE.items()},
        SIZED,
        "a net for classifier-free guidance of version 1 (group norms)",
    ),
    "Fourier features": (STATE | {"time_mlp.0.weights": torch.zeros(8)}, SIZED, "time_mlp.0.weights"),
    "other heads in the middle": (shaken(attn_heads=8).state_dict(), SIZED, "other attention than 4 heads of 32"),
    "a picture of unknown size": (STATE, Options(), "--image-size must be given"),
}


@pytest.mark.parametrize(("state", "options", "words"), REFUSED.values(), ids=REFUSED.keys())
def test_a_net_that_cannot_be_converted_is_refused_by_name(
    state: dict[str, Tensor], options: Options, words: str
) -> None:
    assert words in refusal(lambda: convert(state, options))


@pytest.mark.parametrize(
    "name", ["null_classes_emb", "mid_attn.fn.norm.g", "final_res_block.mlp.1.weight", "ups.0.3.1.bias"]
)
def test_a_file_that_lacks_a_tensor_or_has_it_in_another_shape_is_refused(tmp_path: Path, name: str) -> None:
    lacking, other = {k: v for k, v in STATE.items() if k != name}, STATE | {name: torch.zeros(3)}

    for state, words in ((lacking, "lacks "), (other, "must have shape")):
        assert words in refusal(partial(write, convert(state, SIZED), tmp_path / "model", ""))
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("option", "value", "words"),
    [
        ("num_classes", 0, "an integer in 1..65535"),
        ("num_mem_kv", -1, "an integer in 0..1024"),
        ("downsample_kernel", 3, "one of 2, 4"),
    ],
)
def test_an_option_out_of_bounds_is_refused_by_name(option: str, value: object, words: str) -> None:
    config = convert(STATE, SIZED).config | {option: value}

    assert f"config.json: {option} must be {words}" in refusal(lambda: lucidrains_architecture(config))
