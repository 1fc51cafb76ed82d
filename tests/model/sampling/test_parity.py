"""The engine makes the pictures diffusers makes, those it publishes, and those of our own slow sampler."""

import inspect
from collections.abc import Iterator
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import (
    DDIMPipeline,
    DDIMScheduler,
    DDPMPipeline,
    DDPMScheduler,
    DEISMultistepScheduler,
    DPMSolverMultistepScheduler,
    UNet2DModel,
    UniPCMultistepScheduler,
)
from numpy.typing import NDArray

from model.checkpoint.card import read_card
from model.engine.events import Finished
from model.sampling.plan import plan, resolve
from model.sampling.reference import sample_alone
from model.sampling.samplers import Sampling
from model.sampling.schedule import Prediction, Process, Spacing, linear
from model.sampling.table import Plan
from tests.grid import grid
from tests.model.worlds import (
    PREDICTIONS,
    THEIR_SPACINGS,
    generator,
    opened,
    pictures,
    pipeline,
    planned,
    saved,
    shaken,
    small,
)

DIGITS = Path(__file__).parents[3] / "benchmarks" / "digits"


def theirs(pipe: Any, seed: int, steps: int) -> NDArray[np.float32]:
    """The picture that a user of diffusers gets. [H, W, C] in [0, 1]"""
    made: NDArray[np.float32] = pipe(generator=generator(seed), num_inference_steps=steps, output_type="np").images[0]
    return made


def grey_levels_apart(ours: Finished, expected: NDArray[np.float32]) -> int:
    """The largest difference between our picture and one of diffusers', as it would write it to a file."""
    return int(np.abs(ours.picture.astype(np.int64) - (expected * 255).round().astype(np.int64)).max())


@pytest.mark.parametrize(("prediction", "spacing"), grid(PREDICTIONS, THEIR_SPACINGS, one_in=3))
def test_our_pictures_are_those_of_diffusers_for_the_same_seed(
    tmp_path: Path, prediction: Prediction, spacing: Spacing
) -> None:
    net = shaken(small())
    scheduler = DDPMScheduler(prediction_type=prediction, timestep_spacing=spacing)
    model = saved(tmp_path, net, prediction_type=prediction, timestep_spacing=spacing)
    process = model.card.process
    wanted = [(0, 2), (5, 7), (2**40, 20), (5, 48)]
    made = pictures(model, [(seed, planned(process, steps=steps, noise="torch")) for seed, steps in wanted])
    for finished, (seed, steps) in zip(made, wanted, strict=True):
        assert grey_levels_apart(finished, theirs(pipeline(net, scheduler), seed, steps)) <= 1


def test_the_whole_chain_with_the_large_variance_is_that_of_diffusers(tmp_path: Path) -> None:
    net = shaken(small(block_out_channels=[8], down_block_types=["DownBlock2D"], up_block_types=["UpBlock2D"]))
    options = {"variance_type": "fixed_large", "num_train_timesteps": 200, "prediction_type": "v_prediction"}
    model = saved(tmp_path, net, **options)
    (made,) = pictures(model, [(1, planned(model.card.process, noise="torch"))])
    assert grey_levels_apart(made, theirs(pipeline(net, DDPMScheduler(**options)), 1, 200)) <= 1


@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_our_ddim_pictures_are_those_of_diffusers_for_the_same_seed(tmp_path: Path, prediction: Prediction) -> None:
    net = shaken(small(in_channels=1, out_channels=1))
    model = saved(tmp_path, net, prediction_type=prediction)
    pipe = pipeline(net, DDIMScheduler(prediction_type=prediction))
    for steps in (1, 10, 30):
        (made,) = pictures(model, [(9, planned(model.card.process, "ddim", steps, noise="torch"))])
        assert grey_levels_apart(made, theirs(pipe, 9, steps)) <= 1


def test_a_batch_of_diffusers_with_a_generator_each_is_our_batch(tmp_path: Path) -> None:
    net = shaken(small())
    model = saved(tmp_path, net, prediction_type="sample")
    pipe = pipeline(net, DDPMScheduler(prediction_type="sample"))
    images = pipe(3, [generator(seed) for seed in (4, 5, 6)], num_inference_steps=10, output_type="np").images
    made = pictures(model, [(seed, planned(model.card.process, steps=10, noise="torch")) for seed in (4, 5, 6)])
    assert max(grey_levels_apart(ours, image) for ours, image in zip(made, images, strict=True)) <= 1


def is_diffusers_picture(variance_type: str, choice: Sampling, last_level: int) -> bool:
    """What docs/numerics.md says of a plan with diffusers' draws: whether its picture is theirs."""
    T, spacing, whole = 10, choice.spacing, choice.steps == 10
    if spacing == "linspace" and choice.steps == 1:
        return False
    if choice.sampler == "ddpm":
        return f"fixed_{choice.variance}" == variance_type and (choice.variance == "small" or last_level == 1)
    if choice.sampler == "ddim":
        return spacing == "leading" or whole or (spacing == "trailing" and T % choice.steps == 0)
    return choice.sampler == "dpmpp_2m" and (spacing == "trailing" or not whole)


def their_picture(net: UNet2DModel, choice: Sampling, options: dict[str, Any]) -> NDArray[np.float32]:
    """The picture that diffusers makes of a net, with its own scheduler for this sampler. [H, W, C] in [0, 1]"""
    usual = {name: options[name] for name in options if name not in ("variance_type", "clip_sample")}
    if choice.sampler == "ddpm":
        return theirs(pipeline(net, DDPMScheduler(**options)), 3, choice.steps)
    if choice.sampler == "ddim":
        ddim: Any = DDIMPipeline(net, DDIMScheduler(**usual, clip_sample=choice.clip))
        ddim.set_progress_bar_config(disable=True)
        made = ddim(generator=generator(3), num_inference_steps=choice.steps, eta=choice.eta, output_type="np").images[
            0
        ]
        return np.asarray(made)
    return solved_by(DPMSolverMultistepScheduler(**usual), net, choice.steps)


@torch.inference_mode()
def solved_by(solver: Any, net: UNet2DModel, steps: int) -> NDArray[np.float32]:
    """The picture of seed 3 that diffusers makes with a solver, for which it has no pipeline. [H, W, C] in [0, 1]"""
    source, takes = generator(3), inspect.signature(solver.step).parameters
    noise = {"generator": source} if "generator" in takes else {}
    x = torch.randn((1, net.config.in_channels, *2 * [net.config.sample_size]), generator=source)
    solver.set_timesteps(steps)
    for t in solver.timesteps:
        x = solver.step(net(x, t).sample, t, x, **noise).prev_sample
    return np.asarray((x[0] / 2 + 0.5).clamp(0, 1).permute(1, 2, 0))


@pytest.mark.filterwarnings("ignore:__array__ implementation")  # of torch, which diffusers gives to NumPy
@pytest.mark.parametrize(("prediction", "spacing"), grid(PREDICTIONS, THEIR_SPACINGS, one_in=3))
def test_the_pictures_that_are_said_to_be_those_of_diffusers_are_and_the_others_are_not(
    tmp_path: Path, prediction: Prediction, spacing: Spacing
) -> None:
    """Samplers with their fields x step counts, for checkpoints of both variances, with and without clipping."""
    one_level = {"block_out_channels": [8], "down_block_types": ["DownBlock2D"], "up_block_types": ["UpBlock2D"]}
    net, wanted = shaken(small(**one_level)), list[tuple[dict[str, Any], Sampling, Plan]]()
    for variance_type, clip in product(("fixed_small", "fixed_large"), (True, False)):
        options: dict[str, Any] = {"num_train_timesteps": 10, "prediction_type": prediction}
        options |= {"timestep_spacing": spacing, "variance_type": variance_type, "clip_sample": clip}
        directory = tmp_path / f"{variance_type}-{clip}"
        pipeline(net, DDPMScheduler(**options)).save_pretrained(directory)
        process = read_card(directory).process
        asked: list[tuple[str, dict[str, Any]]] = [("ddpm", {"variance": v}) for v in ("small", "large")]
        if variance_type == "fixed_small":  # which is nothing to the others
            asked += [("ddim", {"eta": 0.6}), ("dpmpp_2m", {})]
        for (sampler, fields), steps in product(asked, (1, 2, 4, 10)):
            if sampler != "dpmpp_2m" or spacing == "trailing" or steps < 10:  # else their solver repeats levels
                choice = resolve(process, sampler, steps, noise="torch", **fields)
                wanted.append((options, choice, plan(process, choice)))
    made = pictures(opened(directory), [(3, table) for *_, table in wanted])
    for picture, (options, choice, table) in zip(made, wanted, strict=True):
        apart = grey_levels_apart(picture, their_picture(net, choice, options))
        if is_diffusers_picture(options["variance_type"], choice, int(table.t[-2])):
            assert apart <= 1, (choice, apart)
        elif choice.steps in (2, 4):
            assert apart > 1, (choice, apart)


SOLVERS: list[tuple[str, dict[str, Any], Any, dict[str, Any]]] = [  # ours with its fields, and theirs with its options
    ("dpmpp", {}, DPMSolverMultistepScheduler, {}),
    ("dpmpp", {"order": 3}, DPMSolverMultistepScheduler, {"solver_order": 3}),
    ("dpmpp_sde", {}, DPMSolverMultistepScheduler, {"algorithm_type": "sde-dpmsolver++"}),
    ("unipc", {}, UniPCMultistepScheduler, {}),
    ("unipc", {"order": 3}, UniPCMultistepScheduler, {"solver_order": 3}),
    ("deis", {}, DEISMultistepScheduler, {}),
    ("deis", {"order": 3}, DEISMultistepScheduler, {"solver_order": 3}),
]
PROCESSES: list[dict[str, Any]] = [
    {"num_train_timesteps": 50, "beta_schedule": "scaled_linear", "beta_end": 0.2, "prediction_type": "epsilon"},
    {"num_train_timesteps": 100, "beta_schedule": "squaredcos_cap_v2", "prediction_type": "v_prediction"},
    {"num_train_timesteps": 1000, "prediction_type": "sample"},
]
MORE: list[dict[str, Any]] = [  # options of both schedulers
    {},
    {"thresholding": True, "dynamic_thresholding_ratio": 0.9, "sample_max_value": 3.0},
]


@pytest.mark.filterwarnings("ignore:__array_:DeprecationWarning")  # theirs, about numpy 2
@pytest.mark.parametrize(
    ("process", "spacing"),
    grid(PROCESSES, THEIR_SPACINGS, one_in=3),
    ids=lambda value: str(value["prediction_type"] if isinstance(value, dict) else value),
)
@pytest.mark.parametrize(
    "more",
    [
        pytest.param(MORE[0], marks=pytest.mark.long, id="free"),
        pytest.param(MORE[1], id="thresholded"),
    ],
)
def test_the_pictures_of_solvers_are_those_of_diffusers(
    tmp_path: Path, more: dict[str, Any], process: dict[str, Any], spacing: Spacing
) -> None:
    net = shaken(small(block_out_channels=[8], down_block_types=["DownBlock2D"], up_block_types=["UpBlock2D"]))
    options = {**process, **more, "timestep_spacing": spacing}
    model = saved(tmp_path, net, **options)
    asked = [(*solver, steps) for solver in SOLVERS for steps in ((7,) if more else (2, 7, 16))]
    made = pictures(
        model,
        [(3, planned(model.card.process, name, n, noise="torch", **fields)) for name, fields, *_, n in asked],
    )
    for picture, (name, fields, scheduler, its_own, steps) in zip(made, asked, strict=True):
        expected = solved_by(scheduler(**options, **its_own), net, steps)
        assert grey_levels_apart(picture, expected) <= 1, (name, fields, steps)


# The numbers in diffusers' own tests: tests/pipelines/ddpm and ddim, image[0, -3:, -3:, -1] after two steps.
GOLDEN = {
    "ddpm": [0.0, 0.9996672, 0.00329116, 1.0, 0.9995991, 1.0, 0.0060907, 0.00115037, 0.0],
    "ddim": [0.0, 0.997975, 0.0, 0.99998, 0.998629, 0.99916, 7.106e-4, 0.0, 0.0],
}


@pytest.mark.parametrize("sampler", GOLDEN)
def test_the_engine_makes_the_picture_that_diffusers_publishes(tmp_path: Path, sampler: str) -> None:
    torch.manual_seed(0)
    net = UNet2DModel(
        block_out_channels=(4, 8),
        layers_per_block=1,
        norm_num_groups=4,
        sample_size=8,
        in_channels=3,
        out_channels=3,
        down_block_types=("DownBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "UpBlock2D"),
    )
    (made,) = pictures(saved(tmp_path, net), [(0, planned(Process(linear()), sampler, 2, noise="torch"))])
    assert made.floats is not None
    corner = made.floats[-1, -3:, -3:] / 2 + 0.5
    np.testing.assert_allclose(corner.flatten(), GOLDEN[sampler], rtol=0, atol=1e-5)


def every_plan(process: Process) -> Iterator[Plan]:
    """Plans of all kinds and lengths."""
    for noise in ("philox", "torch"):
        for choices in (
            {"variance": "small"},
            {"variance": "large", "spacing": "linspace"},
            {"sampler": "greedy", "clip": False},
            {"sampler": "ddim"},
            {"sampler": "ddim", "eta": 0.7, "spacing": "trailing"},
            {"sampler": "dpmpp_2m", "spacing": "trailing"},
        ):
            for steps in (1, 4, 20):
                yield planned(process, steps=steps, noise=noise, **choices)
    if process.learned_variance:
        yield planned(process, steps=9)


@pytest.mark.parametrize(
    ("prediction", "variance_type", "tolerance"),
    [
        ("v_prediction", "fixed_small", 1e-5),
        ("v_prediction", "learned_range", 1e-5),
        ("sample", "fixed_small", 1e-5),
        ("epsilon", "fixed_small", 2e-3),
    ],
)
def test_the_engine_makes_the_pictures_of_the_reference(
    tmp_path: Path, prediction: Prediction, variance_type: str, tolerance: float
) -> None:
    """All kinds of plans, all at once in three slots, so that samples come and go beside each other.

    A net with random weights that predicts eps multiplies a rounding error, which may differ between a batch and a
    single picture, by a few thousand; one that predicts v or x0 does not.
    """
    net = shaken(small(in_channels=1, out_channels=2 if variance_type == "learned_range" else 1, sample_size=[4, 8]))
    model = saved(tmp_path, net, prediction_type=prediction, variance_type=variance_type)
    wanted = [(7 + i, made) for i, made in enumerate(every_plan(model.card.process))]
    for finished, (seed, made) in zip(pictures(model, wanted), wanted, strict=True):
        with torch.inference_mode():
            *_, (x, _) = sample_alone(lambda x, k: model.net(x, model.table[k]), made, seed, (1, 4, 8))
        assert finished.floats is not None
        np.testing.assert_allclose(finished.floats, x[0].clamp(-1, 1).numpy(), rtol=0, atol=tolerance)


def test_sharded_and_half_precision_weights_make_diffusers_pictures(tmp_path: Path) -> None:
    pipe = pipeline(shaken(small()).half().float(), DDPMScheduler(num_train_timesteps=60))
    pipe.unet.save_pretrained(tmp_path / "pieces" / "unet", max_shard_size="30KB")
    pipe.unet.half().save_pretrained(tmp_path / "halves" / "unet", variant="fp16")
    pipe.unet.float()
    assert not any(tmp_path.rglob("diffusion_pytorch_model.safetensors"))
    for directory in (tmp_path / "pieces", tmp_path / "halves"):
        pipe.scheduler.save_pretrained(directory / "scheduler")
        model = opened(directory)
        (made,) = pictures(model, [(3, planned(model.card.process, steps=4, noise="torch"))])
        assert grey_levels_apart(made, theirs(pipe, 3, 4)) <= 1


def test_a_ddim_scheduler_beside_a_ddpm_pipeline_makes_the_pictures_of_its_numbers(tmp_path: Path) -> None:
    net, options = shaken(small()), {"num_train_timesteps": 60, "beta_schedule": "squaredcos_cap_v2"}
    pipeline(net, DDIMScheduler(**options)).save_pretrained(tmp_path)
    model = opened(tmp_path)
    for sampler, scheduler in (("ddpm", DDPMScheduler(**options)), ("ddim", DDIMScheduler(**options))):
        (made,) = pictures(model, [(3, planned(model.card.process, sampler, 4, noise="torch"))])
        pipe = pipeline(net, scheduler)
        assert grey_levels_apart(made, theirs(pipe, 3, 4)) <= 1


@pytest.mark.skipif(
    not (DIGITS / "diffusion_pytorch_model.safetensors").is_file(),
    reason="the weights of benchmarks/digits are not there",
)
@pytest.mark.parametrize("sampler", ["ddpm", "ddim"])
def test_the_digits_are_those_diffusers_makes_of_the_same_directory(sampler: str) -> None:
    pipe: Any = DDPMPipeline.from_pretrained(DIGITS)
    pipe.set_progress_bar_config(disable=True)
    if sampler == "ddim":
        pipe.scheduler = DDIMScheduler.from_config(pipe.scheduler.config, timestep_spacing="leading")
    model, spacing = opened(DIGITS), None if sampler == "ddpm" else "leading"
    (made,) = pictures(model, [(42, planned(model.card.process, sampler, 10, noise="torch", spacing=spacing))])
    assert grey_levels_apart(made, theirs(pipe, 42, 10)) <= 1


@pytest.mark.skipif(
    not (DIGITS / "diffusion_pytorch_model.safetensors").is_file(),
    reason="the weights of benchmarks/digits are not there",
)
@pytest.mark.filterwarnings("ignore:__array_:DeprecationWarning")  # theirs, about numpy 2
def test_the_digits_of_solvers_are_those_diffusers_makes_with_the_scheduler_of_that_name() -> None:
    pipe: Any = DDPMPipeline.from_pretrained(DIGITS)
    model = opened(DIGITS)
    wanted = [(3, planned(model.card.process, name, 8, noise="torch", **fields)) for name, fields, *_ in SOLVERS]
    for made, (name, fields, scheduler, its_own) in zip(pictures(model, wanted), SOLVERS, strict=True):
        solver = scheduler.from_config(pipe.scheduler.config, **its_own)
        assert grey_levels_apart(made, solved_by(solver, pipe.unet, 8)) <= 1, (name, fields)
