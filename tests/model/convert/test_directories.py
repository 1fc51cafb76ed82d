"""What diffusers and accelerate leave in directories: averages beside nets, variants, shards, schedules further up."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DDPMScheduler, UNet2DModel
from diffusers.training_utils import EMAModel

from model.checkpoint.card import read_card
from model.convert.directories import _named
from model.errors import ModelRefused
from model.sampling.schedule import Thresholding
from tests.model.convert.directories import write_plan
from tests.model.convert.test_convert import apart, converted, noise, refused, written
from tests.model.convert.test_layouts import output
from tests.model.worlds import generator, pipeline, shaken, small

pytestmark = pytest.mark.usefixtures("in_this_process")

WEIGHTS = "diffusion_pytorch_model.safetensors"


def other(net: UNet2DModel) -> UNet2DModel:
    """The same net with other weights."""
    again = UNet2DModel.from_config(net.config)
    for name, parameter in again.named_parameters():
        parameter.data.copy_(net.state_dict()[name] + 0.05 * torch.randn(parameter.shape, generator=generator(9)))
    return again.eval().requires_grad_(False)


def is_of(directory: Path, net: UNet2DModel) -> bool:
    """Whether this model directory computes what the net does."""
    x, timesteps = noise(8)
    return apart(output(directory, x, timesteps), net(x, timesteps).sample) < 1e-5


@pytest.fixture
def training(tmp_path: Path) -> tuple[Path, UNet2DModel, UNet2DModel]:
    """(a checkpoint as diffusers' train_unconditional.py writes it with --use_ema, its net, its average)."""
    net = shaken(small())
    average = EMAModel(other(net).parameters(), model_cls=UNet2DModel, model_config=net.config)
    pipeline(net, DDPMScheduler(beta_schedule="squaredcos_cap_v2")).save_pretrained(tmp_path / "out")
    checkpoint = tmp_path / "out" / "checkpoint-500"
    average.save_pretrained(checkpoint / "unet_ema")
    net.save_pretrained(checkpoint / "unet")
    for file in ("optimizer.bin", "scheduler.bin", "random_states_0.pkl"):
        torch.save({"state": torch.zeros(3)}, checkpoint / file)
    return checkpoint, net, other(net)


def test_of_a_training_the_average_is_taken_with_the_schedule_one_folder_up(
    training: tuple[Path, UNet2DModel, UNet2DModel], capsys: pytest.CaptureFixture[str]
) -> None:
    checkpoint, net, average = training
    directory = converted(checkpoint)
    told = capsys.readouterr().out

    assert is_of(directory, average)
    assert f"weights: took 'unet_ema/{WEIGHTS}' (an average over training); left 'unet/{WEIGHTS}'" in told
    assert "schedule: T = 1000, squaredcos_cap_v2" in told and "from scheduler/scheduler_config.json" in told
    assert all(line in (directory / "README.md").read_text() for line in told.splitlines()[:-1])
    assert "optimization_step" not in json.loads((directory / "config.json").read_text())

    directory.rename(checkpoint / "first")
    assert is_of(converted(checkpoint, "--part", "unet"), net)
    assert "took 'unet/" in capsys.readouterr().out
    directory.rename(checkpoint / "second")
    assert refused(capsys, checkpoint, "--part", "unet_swa").startswith("--part must be one of 'unet_ema/")


def test_a_folder_of_a_training_may_be_named_by_itself(training: tuple[Path, UNet2DModel, UNet2DModel]) -> None:
    checkpoint, net, average = training
    directory = converted(checkpoint / "unet")
    assert is_of(directory, net)
    assert json.loads((directory / "scheduler_config.json").read_text())["beta_schedule"] == "squaredcos_cap_v2"

    shutil.rmtree(checkpoint / "unet")
    assert is_of(converted(checkpoint), average)


def test_dynamic_thresholding_is_kept_and_told(
    training: tuple[Path, UNet2DModel, UNet2DModel], capsys: pytest.CaptureFixture[str]
) -> None:
    options: dict[str, Any] = {"thresholding": True, "dynamic_thresholding_ratio": 0.9, "sample_max_value": 1.5}
    DDPMScheduler(**options).save_pretrained(training[0].parent / "scheduler")

    assert read_card(converted(training[0])).process.thresholding == Thresholding(0.9, 1.5)
    assert "epsilon, fixed_small, thresholded; from scheduler/" in capsys.readouterr().out


def test_without_a_schedule_anywhere_the_usual_one_is_assumed_and_that_is_told(
    training: tuple[Path, UNet2DModel, UNet2DModel], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    training[0].rename(alone := tmp_path / "alone")

    assert is_of(converted(alone), training[2])
    assert "linear from 0.0001 to 0.02, epsilon, fixed_small, clipped; assumed" in capsys.readouterr().out


FILES: dict[str, tuple[list[str], str]] = {
    "what says that it is no average last": ([WEIGHTS, "diffusion_pytorch_model.non_ema.safetensors"], WEIGHTS),
    "an average in a file of its own": (
        [WEIGHTS, "diffusion_pytorch_model.ema.safetensors"],
        "diffusion_pytorch_model.ema.safetensors",
    ),
    "all digits before half of them": (["diffusion_pytorch_model.fp16.safetensors", WEIGHTS], WEIGHTS),
    "half of the digits": (
        ["diffusion_pytorch_model.fp16.safetensors", "optimizer.safetensors"],
        "diffusion_pytorch_model.fp16.safetensors",
    ),
    "the net's own folder before loose files": ([WEIGHTS, "../classifier.safetensors"], WEIGHTS),
    "what accelerate saves": (["model.safetensors", "model_ema.safetensors"], "model_ema.safetensors"),
}


@pytest.mark.parametrize(("names", "taken"), FILES.values(), ids=FILES.keys())
def test_files_of_one_folder_are_weighed(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], names: list[str], taken: str
) -> None:
    net = shaken(small())
    pipeline(net).save_pretrained(tmp_path / "ddpm")
    folder = tmp_path / "ddpm" / "unet"
    (folder / WEIGHTS).unlink()
    for name in names:
        written(folder / name, (net if name == taken else other(net)).state_dict())

    assert is_of(converted(tmp_path / "ddpm"), net)
    assert f"took 'unet/{taken}'" in capsys.readouterr().out


@pytest.mark.parametrize("suffix", ["safetensors", "bin", "fp16.safetensors"])
def test_weights_in_several_files_are_read_by_their_index(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], suffix: str
) -> None:
    net = shaken(small())
    pipeline(net).save_pretrained(tmp_path / "ddpm")
    folder, state = tmp_path / "ddpm" / "unet", net.state_dict()
    (folder / WEIGHTS).unlink()
    variant, _, kind = suffix.rpartition(".")
    names = [f"diffusion_pytorch_model{variant and f'.{variant}'}-{i:05}-of-00002.{kind}" for i in (1, 2)]
    where = {key: names[i % 2] for i, key in enumerate(state)}
    for name in names:
        part = {key: state[key] for key in state if where[key] == name}
        written(folder / name, part) if kind == "safetensors" else torch.save(part, folder / name)
    index = folder / f"diffusion_pytorch_model.{suffix}.index.json"
    if suffix.startswith("fp16"):  # as diffusers calls it
        index = folder / "diffusion_pytorch_model.safetensors.index.fp16.json"
    index.write_text(json.dumps({"metadata": {}, "weight_map": where}))
    directory = converted(tmp_path / "ddpm")

    assert is_of(directory, net)
    assert all(f"`{name}`, sha256 `" in (directory / "README.md").read_text() for name in names)
    if suffix == "bin":  # each file is read in a process of its own
        return
    directory.rename(tmp_path / "first")
    index.write_text(json.dumps({"weight_map": where | {"conv_in.weight": "../config.json"}}))
    assert "must name at most 256 files beside it" in refused(capsys, tmp_path / "ddpm")
    index.write_text(json.dumps({"weight_map": {key: where[key] for key in list(state)[1:]}}))
    assert refused(capsys, tmp_path / "ddpm").endswith("do not hold the same tensors")


def test_an_average_without_names_beside_a_net_with_old_names_is_refused() -> None:
    old = {"mid.attentions.0.query.weight": torch.zeros(1)}

    with pytest.raises(ModelRefused, match="the net beside it has names that are not today's"):
        _named({"0": torch.zeros(1)}, old, "custom_checkpoint_0.pkl")


@pytest.mark.parametrize("shapes", ["the net's", "another net's"])
def test_an_average_without_names_is_named_by_the_net_beside_it(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], shapes: str
) -> None:
    """accelerate's save_state with an EMAModel registered for checkpointing: two files and no configuration."""
    net: Any = shaken(small(block_out_channels=(8, 16)))
    net.save_pretrained(tmp_path / "out" / "unet")
    checkpoint = tmp_path / "out" / "checkpoint-7"
    checkpoint.mkdir()
    written(checkpoint / "model.safetensors", net.state_dict())
    average = other(net) if shapes == "the net's" else shaken(small(block_out_channels=(16, 8)))
    torch.save(EMAModel(average.parameters()).state_dict(), checkpoint / "custom_checkpoint_1.pkl")

    if shapes == "the net's":
        torch.save({"best": 0.5}, checkpoint / "custom_checkpoint_0.pkl")  # what else the training kept
        assert is_of(converted(checkpoint), average)
        told = capsys.readouterr().out
        assert (
            "took 'custom_checkpoint_1.pkl' (an average over training); left 'custom_checkpoint_0.pkl', 'model" in told
        )
    else:
        assert "do not have the shapes of the net's" in refused(capsys, checkpoint)


def test_a_directory_without_a_net_is_refused_with_what_it_holds(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "some").mkdir()
    assert refused(capsys, tmp_path / "some") == "some holds no weights of a net: it is empty"
    for name in ("checkpoint-1", "checkpoint-2"):
        (tmp_path / "some" / name / "unet").mkdir(parents=True)
    (tmp_path / "some" / "note.txt").write_text("")
    said = refused(capsys, tmp_path / "some")
    assert said == "some holds no weights of a net: 'checkpoint-1/', 'checkpoint-2/', 'note.txt'"


def test_a_net_without_a_configuration_nearby_asks_for_it(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    net = shaken(small())
    (tmp_path / "some").mkdir()
    written(tmp_path / "some" / "model.safetensors", net.state_dict())
    net.save_pretrained(tmp_path / "config")

    assert refused(capsys, tmp_path / "some").startswith(
        "model.safetensors has no config.json beside it: give --config"
    )
    assert is_of(converted(tmp_path / "some", "--config", str(tmp_path / "config" / "config.json")), net)


def test_plans_come_along_unless_they_are_for_another_process(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pipeline(shaken(small()), DDPMScheduler()).save_pretrained(tmp_path / "src")
    levels = {"sampler": "ddim", "timesteps": [900, 100]}
    plan = write_plan(tmp_path / "src", levels | {"process": {"T": 1000, "prediction": "epsilon"}})
    write_plan(tmp_path / "src", levels | {"process": {"T": 500, "prediction": "epsilon"}}, "other")
    directory = converted(tmp_path / "src")

    assert [path.name for path in (directory / "plans").iterdir()] == ["fast.json"]
    assert (directory / "plans" / "fast.json").read_bytes() == plan.read_bytes()
    assert "plan other was left: other.json: process: T must be one of 1000, got 500\n" in capsys.readouterr().out


def test_the_default_steps_of_a_pipeline_are_kept(training: tuple[Path, UNet2DModel, UNet2DModel]) -> None:
    index = training[0].parent / "model_index.json"
    index.write_text(json.dumps(json.loads(index.read_text()) | {"default_steps": 50}))

    assert read_card(converted(training[0])).process.default_steps == 50


def test_presets_are_kept_unless_they_are_for_another_process(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pipeline(shaken(small()), DDPMScheduler()).save_pretrained(tmp_path / "src")
    write_plan(tmp_path / "src", {"sampler": "ddim", "timesteps": [9], "process": {"T": 1000, "prediction": "epsilon"}})
    presets = {"fast": {"plan": "fast"}, "balanced": {"sampler": "unipc", "steps": 12}, "full": {"steps": 1001}}
    index = tmp_path / "src" / "model_index.json"
    index.write_text(json.dumps(json.loads(index.read_text()) | {"presets": presets}))
    directory = converted(tmp_path / "src")

    kept = {name: presets[name] for name in ("fast", "balanced")}
    assert json.loads((directory / "model_index.json").read_text())["presets"] == kept
    assert read_card(directory).presets == kept | {"full": {"sampler": "ddpm"}}
    said = "preset full was left: model_index.json: presets.full: steps must lie in 1..1000, got 1001\n"
    assert said in capsys.readouterr().out
