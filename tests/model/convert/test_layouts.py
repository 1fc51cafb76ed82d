"""What trainings and courses leave behind: nets of other layouts, under any prefix, beside averages and tables."""

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import DDPMPipeline, DDPMScheduler
from torch import Tensor, nn

from model.checkpoint.card import read_card
from model.checkpoint.load import load_layers
from model.convert.formats import convert
from model.convert.layouts import ports
from model.convert.protocol import Options
from model.errors import ModelRefused
from tests.model.convert.course_nets import RosinalityUNet, TqchUNet
from tests.model.convert.flat_ports import FlatUNet
from tests.model.convert.lucidrains_nets import diffusion
from tests.model.convert.lucidrains_nets import shaken as shaken_lucidrains
from tests.model.convert.openai_nets import Kind
from tests.model.convert.openai_nets import shaken as shaken_openai
from tests.model.convert.ports import PortedUNet
from tests.model.convert.test_convert import apart, converted, noise, refused, shake, written
from tests.model.worlds import pipeline, shaken, small

pytestmark = pytest.mark.usefixtures("in_this_process")


def output(directory: Path, x: Tensor, timesteps: Tensor) -> Tensor:
    """What the net in this model directory says."""
    model = load_layers(read_card(directory), torch.device("cpu"), torch.float32)
    with torch.inference_mode():
        out: Tensor = model.net(x, model.table[timesteps])
    return out


COURSE_NETS: dict[str, tuple[Callable[[], nn.Module], list[str], str, str]] = {
    "tqch": (TqchUNet, [], "large", "layout of ddpm-torch, 32 x 32"),
    "tqch, two blocks, attention elsewhere": (
        lambda: TqchUNet(mult=(1, 2), attended=(0, 1), blocks=2),
        ["--image-size", "32"],
        "large",
        "layout of ddpm-torch, 32 x 32",
    ),
    "rosinality": (RosinalityUNet, ["--image-size", "32"], "small", "rosinality's U-Net (1 heads assumed), 32 x 32"),
    "rosinality, scaled and shifted by the timestep": (
        lambda: RosinalityUNet(affine=True),
        ["--image-size", "32"],
        "small",
        "rosinality's U-Net",
    ),
    "rosinality, four heads": (
        lambda: RosinalityUNet(heads=4, affine=True, attended=(0, 2)),
        ["--image-size", "32", "--heads", "4"],
        "small",
        "rosinality's U-Net (4 heads)",
    ),
}


@pytest.mark.parametrize(("make", "flags", "variance", "origin"), COURSE_NETS.values(), ids=COURSE_NETS.keys())
def test_a_course_net_converts_to_one_that_computes_the_same(
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    make: Callable[[], nn.Module],
    flags: list[str],
    variance: str,
    origin: str,
) -> None:
    net, (x, timesteps) = shake(make()), noise()
    directory = converted(written(tmp_path / "net.safetensors", dict(net.state_dict())), *flags)

    assert apart(output(directory, x, timesteps), net(x, timesteps)) < 1e-5
    assert read_card(directory).process.variance == variance
    assert origin in capsys.readouterr().out


def test_the_number_of_heads_changes_what_rosinalitys_net_computes(tmp_path: Path) -> None:
    net, (x, timesteps) = shake(RosinalityUNet(heads=4)), noise()
    source = written(tmp_path / "net.safetensors", dict(net.state_dict()))

    assert apart(output(converted(source, "--image-size", "32"), x, timesteps), net(x, timesteps)) > 1e-3


def below(prefix: str, state: dict[str, Tensor]) -> dict[str, Tensor]:
    return {prefix + name: tensor for name, tensor in state.items()}


NETS: dict[str, tuple[Callable[[], dict[str, Tensor]], Options]] = {
    "ports": (lambda: dict(PortedUNet().state_dict()), Options()),
    "flat": (lambda: dict(FlatUNet().state_dict()), Options()),
    "openai": (lambda: dict(shaken_openai(Kind(multipliers=(1,))).state_dict()), Options(image_size=16, heads=4)),
    "lucidrains": (lambda: diffusion(shaken_lucidrains()), Options(image_size=16)),
    "tqch": (lambda: dict(TqchUNet().state_dict()), Options()),
    "rosinality": (lambda: dict(RosinalityUNet().state_dict()), Options(image_size=32)),
}
PREFIXES = ["module.", "_orig_mod.", "module._orig_mod.", "model.diffusion_model.", "never.heard.of_", "unet/"]


@pytest.mark.parametrize(("state", "options"), NETS.values(), ids=NETS.keys())
def test_any_prefix_of_all_names_is_stripped(state: Callable[[], dict[str, Tensor]], options: Options) -> None:
    tensors = state()
    bare = convert(tensors, options)

    for prefix in PREFIXES:
        made = convert(below(prefix, tensors), options)
        assert (made.config, made.scheduler) == (bare.config, bare.scheduler)
        assert made.tensors.keys() == bare.tensors.keys()
        assert all(torch.equal(tensor, made.tensors[name]) for name, tensor in bare.tensors.items())


def test_of_a_lightning_checkpoint_the_average_is_taken_with_the_schedule_in_it(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    net, average = shake(PortedUNet()), shake(PortedUNet(), seed=1)
    betas = torch.linspace(0.001, 0.03, 60)
    state = below("model.", net.state_dict()) | below("ema_model.module.", average.state_dict()) | {"betas": betas}
    checkpoint = {
        "epoch": 3,
        "pytorch-lightning_version": "2.4.0",
        "state_dict": state | {"val_loss.total": torch.zeros(())},
        "callbacks": {"EMA{'decay': 0.999}": {"decay": torch.tensor(0.999)}},
        "optimizer_states": [{"state": {0: {"exp_avg": torch.zeros(3, 3)}}, "param_groups": [{"lr": 1.0}]}],
        "hyper_parameters": {"lr": np.float64(2e-4), "channels": [np.int64(32), 64]},
    }
    torch.save(checkpoint, source := tmp_path / "last.ckpt")
    directory = converted(source)
    (x, timesteps), told = noise(), capsys.readouterr().out
    timesteps[1] = 59

    assert apart(output(directory, x, timesteps), average(x, timesteps)) < 1e-5
    assert json.loads((directory / "scheduler_config.json").read_text())["trained_betas"] == betas.double().tolist()
    assert "took 'state_dict'" in told
    assert "net: took the tensors below 'ema_model.module' (an average over training); left 'model'" in told
    assert "schedule: T = 60, its own betas, epsilon, fixed_large, clipped; from the betas in the file" in told

    directory.rename(tmp_path / "first")
    assert apart(output(converted(source, "--part", "state_dict.model"), x, timesteps), net(x, timesteps)) < 1e-5


def test_the_average_that_latent_diffusion_keeps_under_names_without_dots_is_taken(tmp_path: Path) -> None:
    net, average = shake(PortedUNet()), shake(PortedUNet(), seed=1)
    shadow = {name.replace(".", ""): tensor for name, tensor in below("diffusion_model.", average.state_dict()).items()}
    state = below("model.diffusion_model.", net.state_dict()) | below("model_ema.", shadow)
    state |= {"model_ema.decay": torch.tensor(0.9999), "model_ema.num_updates": torch.tensor(5)}
    x, timesteps = noise()

    directory = converted(written(tmp_path / "net.safetensors", state))
    assert apart(output(directory, x, timesteps), average(x, timesteps)) < 1e-5


@pytest.mark.parametrize("stranger", ["lpips.net.lin0.weight", "cond_net.weight"])
def test_a_net_beside_other_weights_is_refused_unless_it_is_named(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], stranger: str
) -> None:
    state = below("model.", shake(PortedUNet()).state_dict()) | {stranger: torch.zeros(4, 4)}
    source = written(tmp_path / "net.safetensors", state)

    said = refused(capsys, source)
    assert said.startswith(
        f"besides a net ('model') net.safetensors holds '{stranger.partition('.')[0]}', without which"
    )
    assert read_card(converted(source, "--part", "model")).architecture.height == 32


@pytest.mark.parametrize(
    ("stranger", "words"),
    [
        ("first_stage_model.encoder.conv_in.weight", "a latent diffusion model: what its net makes, an autoencoder"),
        ("class_emb.weight", "a net that reads the embedding of a label as channels beside the picture's, such as the"),
    ],
)
def test_a_net_whose_wrapper_says_what_it_is_for_is_refused_with_that(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], stranger: str, words: str
) -> None:
    state = below("model.", shake(PortedUNet()).state_dict()) | {stranger: torch.zeros(4, 4)}

    assert refused(capsys, written(tmp_path / "net.safetensors", state)).startswith(words)


def test_of_two_nets_that_do_not_say_which_is_an_average_the_given_one_is_taken(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    state = {"teacher": shake(PortedUNet()), "student": shake(PortedUNet(), seed=1)}
    tensors = {f"{name}.{key}": tensor for name, net in state.items() for key, tensor in net.state_dict().items()}
    source = written(tmp_path / "net.safetensors", tensors)
    x, timesteps = noise()

    assert refused(capsys, source, "--part", "teacher.conv_in") == "--part must be one of 'student', 'teacher'"
    directory = converted(source, "--part", "student")
    assert apart(output(directory, x, timesteps), state["student"](x, timesteps)) < 1e-5
    assert "took the tensors below 'student'; left 'teacher'" in capsys.readouterr().out


# A bare state dict of diffusers


def test_a_model_directory_whose_weights_have_a_prefix_is_not_served_but_converted(tmp_path: Path) -> None:
    net, (x, timesteps) = shaken(small()), noise(8)
    pipeline(net).save_pretrained(tmp_path / "ddpm")
    weights = tmp_path / "ddpm" / "unet" / "diffusion_pytorch_model.safetensors"
    written(weights, below("_orig_mod.module.", net.state_dict()))

    with pytest.raises(ModelRefused, match=r"names begin with '_orig_mod\.module\.', which `ddpm convert` strips"):
        read_card(tmp_path / "ddpm")
    assert apart(output(converted(tmp_path / "ddpm"), x, timesteps), net(x, timesteps).sample) < 1e-5


def test_a_bare_state_dict_of_diffusers_is_converted_with_its_configuration(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    net, (x, timesteps) = shaken(small()), noise(8)
    pipeline(net, DDPMScheduler(beta_schedule="squaredcos_cap_v2")).save_pretrained(tmp_path / "pipeline")
    config, scheduler = (
        tmp_path / "pipeline" / name for name in ("unet/config.json", "scheduler/scheduler_config.json")
    )
    source = written(tmp_path / "net.safetensors", below("_orig_mod.", net.state_dict()))

    assert refused(capsys, source).startswith("a net of diffusers without its config.json: give --config CONFIG.json")
    directory = converted(source, "--config", str(config))
    assert apart(output(directory, x, timesteps), net(x, timesteps).sample) < 1e-5
    assert "linear from 0.0001 to 0.02, epsilon, fixed_small, clipped; assumed, as is usual" in capsys.readouterr().out
    assert str(tmp_path) not in (directory / "README.md").read_text()

    directory.rename(tmp_path / "first")
    flags = ["--config", str(config), "--scheduler", str(scheduler), "--timesteps", "800"]
    process = read_card(converted(source, *flags)).process
    assert (process.schedule.T, json.loads((tmp_path / "converted" / "scheduler_config.json").read_text())) == (
        800,
        json.loads(scheduler.read_text()) | {"num_train_timesteps": 800},
    )
    assert "from scheduler/scheduler_config.json, but for --timesteps" in capsys.readouterr().out


def test_a_net_of_latents_is_refused_wherever_its_files_are_named(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pipeline(shaken(small())).save_pretrained(tmp_path / "ldm")
    index = tmp_path / "ldm" / "model_index.json"
    index.write_text(json.dumps(json.loads(index.read_text()) | {"vqvae": ["diffusers", "VQModel"]}))
    source = written(tmp_path / "net.safetensors", shaken(small()).state_dict())
    wanted = "vqvae (VQModel) besides unet and scheduler"

    shutil.copytree(tmp_path / "ldm" / "unet", tmp_path / "ldm" / "checkpoint-5" / "unet")

    assert wanted in refused(capsys, tmp_path / "ldm")
    assert wanted in refused(capsys, tmp_path / "ldm" / "checkpoint-5")
    assert wanted in refused(capsys, tmp_path / "ldm" / "checkpoint-5" / "unet")
    assert wanted in refused(capsys, tmp_path / "ldm" / "unet")
    assert wanted in refused(capsys, source, "--config", str(tmp_path / "ldm" / "unet" / "config.json"))


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"_class_name": "UNet2DConditionModel"}, "UNet2DConditionModel is a net that needs a text"),
        ({"class_embeddings_concat": True}, "class_embeddings_concat must be null, got true"),
    ],
)
def test_a_configuration_of_another_net_is_refused_as_it_is_when_it_is_served(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], changes: dict[str, Any], words: str
) -> None:
    pipeline(shaken(small())).save_pretrained(tmp_path / "ddpm")
    file = tmp_path / "ddpm" / "unet" / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))
    source = written(tmp_path / "net.safetensors", shaken(small()).state_dict())

    assert words in refused(capsys, tmp_path / "ddpm")
    assert words in refused(capsys, source, "--config", str(file))


def test_a_net_that_predicts_x0_by_an_option_of_2022_does_so_in_todays_diffusers_too(tmp_path: Path) -> None:
    pipeline(shaken(small())).save_pretrained(tmp_path / "ddpm")
    file = tmp_path / "ddpm" / "scheduler" / "scheduler_config.json"
    given = {name: value for name, value in json.loads(file.read_text()).items() if name != "prediction_type"}
    file.write_text(json.dumps(given | {"predict_epsilon": False}))
    directory = converted(tmp_path / "ddpm")
    theirs: Any = DDPMPipeline.from_pretrained(directory)

    assert read_card(directory).process.prediction == theirs.scheduler.config.prediction_type == "sample"


def test_what_a_net_predicts_is_not_in_doubt(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pipeline(shaken(small())).save_pretrained(tmp_path / "ddpm")
    file = tmp_path / "ddpm" / "scheduler" / "scheduler_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"prediction_type": "epsilon", "predict_epsilon": False}))

    assert "predict_epsilon must be absent beside a prediction_type" in refused(capsys, tmp_path / "ddpm")


# What cannot be converted


HOSTILE: dict[str, tuple[Callable[[], dict[str, Tensor]], str]] = {
    "many nets": (
        lambda: {f"{i}.{name}": torch.zeros(1) for i in range(40) for name in ports.NAMES},
        "a checkpoint may hold at most 32 nets, got 40",
    ),
    "many tensors": (lambda: {f"{i}": torch.zeros(1) for i in range(20_001)}, "at most 20000 tensors"),
    "a long name": (lambda: {"a." * 501: torch.zeros(1)}, "with names of at most 1000 characters"),
}


@pytest.mark.parametrize(("state", "words"), HOSTILE.values(), ids=HOSTILE.keys())
def test_a_file_that_would_take_long_to_search_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], state: Callable[[], dict[str, Tensor]], words: str
) -> None:
    assert words in refused(capsys, written(tmp_path / "net.safetensors", state()))


FOREIGN = {
    "downs.0.0.ds_conv.weight": "The Annotated Diffusion Model's U-Net with ConvNeXt blocks",
    "downs.0.2.fn.fn.to_qkv.weight": "the U-Net of The Annotated Diffusion Model, or of version 1 of",
    "image_proj.weight": "labml.ai's DDPM U-Net",
    "model.class_emb.weight": "a net that reads the embedding of a label as channels",
    "sa1.mha.in_proj_weight": "dome272's U-Net",
    "down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q.weight": "a net that attends to a text",
    "all_modules.2.Conv_0.weight": "a net of score_sde_pytorch",
    "x_embedder.proj.weight": "a diffusion transformer",
}


@pytest.mark.parametrize(("name", "words"), FOREIGN.items())
def test_a_layout_that_cannot_be_converted_is_refused_with_what_it_is(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str, words: str
) -> None:
    said = refused(capsys, written(tmp_path / "net.safetensors", {name: torch.zeros(4, 4), "b": torch.zeros(1)}))

    assert said.startswith(words) and "cannot be converted" in said and re.search(r"tensors are named 'b'|, '", said)
