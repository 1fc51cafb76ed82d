"""`ddpm convert`: what others saved gives, as a model directory, the output of the net that they saved."""

import hashlib
import json
import pickle
import shutil
from argparse import Namespace
from collections import OrderedDict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import DDPMPipeline, DDPMScheduler, UNet2DModel
from safetensors.torch import save_file
from torch import Tensor, nn

from model.checkpoint.card import WEIGHTS, read_card
from model.convert.__main__ import main
from model.convert.pickles import SPARE_BYTES, choose, extract, parts, unpickle
from model.errors import ModelRefused
from model.sampling.schedule import cosine
from tests.model.checkpoint.test_load import Bomb
from tests.model.convert.flat_ports import FlatUNet
from tests.model.convert.ports import PortedUNet
from tests.model.worlds import generator, opened, pictures, pipeline, planned, shaken, small


def shake(net: nn.Module, seed: int = 0) -> nn.Module:
    """The net with weights of which none is left where it starts."""
    random = generator(seed)
    for parameter in (p for p in net.parameters() if p.requires_grad):  # not a table of sines
        parameter.requires_grad_(False)
        parameter.add_(0.05 * torch.randn(parameter.shape, generator=random))
    return net.eval()


def noise(size: int = 32, channels: int = 3) -> tuple[Tensor, Tensor]:
    """Two noisy pictures, and their timesteps as nets count them."""
    return torch.randn(2, channels, size, size, generator=generator(3)), torch.tensor([3, 700])


def output(directory: Path, x: Tensor, timesteps: Tensor) -> Tensor:
    """What the net in this model directory says."""
    model = opened(directory)
    with torch.inference_mode():
        out: Tensor = model.net(x.to(memory_format=torch.channels_last), model.table[timesteps])
    return out


def apart(given: Tensor, expected: Tensor) -> float:
    return float((given - expected).abs().max())


def converted(source: Path, *flags: str) -> Path:
    """The model directory that `ddpm convert` makes of this, beside it."""
    assert main([str(source), str(source.parent / "converted"), *flags]) == 0
    return source.parent / "converted"


def refused(capsys: pytest.CaptureFixture[str], source: Path, *flags: str) -> str:
    """The line with which it is refused, having left nothing behind."""
    target = source.parent / "converted"
    before = sorted(source.parent.iterdir())

    assert main([str(source), str(target), *flags]) == 3
    line = capsys.readouterr().err
    assert line.startswith("ddpm: ") and line.count("\n") == 1
    assert sorted(source.parent.iterdir()) == before
    return line.removeprefix("ddpm: ").strip()


def written(path: Path, state: dict[str, Tensor]) -> Path:
    save_file({name: tensor.contiguous() for name, tensor in state.items()}, path)
    return path


# Ports of Ho's U-Net


GREY: dict[str, Any] = {"size": 64, "mult": (1, 1, 2), "blocks": 2, "channels": 1}


@pytest.mark.parametrize("shape", [{}, GREY], ids=["32 x 32", "64 x 64, grey"])
def test_a_port_of_hos_net_converts_to_the_same_configuration(tmp_path: Path, shape: dict[str, Any]) -> None:
    net = PortedUNet(**shape)
    shake(net)
    directory = converted(written(tmp_path / "model.safetensors", net.state_dict()))
    size = read_card(directory).architecture.height
    x, timesteps = noise(size, net.conv_in.in_channels)

    assert apart(output(directory, x, timesteps), net(x, timesteps)) < 1e-5
    assert read_card(directory).process.variance == ("large" if size == 32 else "small")
    assert (directory / WEIGHTS).stat().st_mode & 0o777 == 0o644


def test_a_checkpoint_in_the_format_of_2020_generates_the_pictures_that_diffusers_generates_from_the_result(
    tmp_path: Path,
) -> None:
    net = shake(PortedUNet())
    source = tmp_path / "model-790000.ckpt"
    torch.save(net.state_dict(), source, _use_new_zipfile_serialization=False)
    directory = converted(source)
    model = opened(directory)
    (ours,) = pictures(model, [(5, planned(model.card.process, steps=3, noise="torch", variance="large"))])
    pipe: Any = DDPMPipeline.from_pretrained(directory)
    pipe.set_progress_bar_config(disable=True)
    theirs = pipe(generator=generator(5), num_inference_steps=3, output_type="np").images[0]

    assert isinstance(pipe.unet, UNet2DModel)
    assert abs(ours.picture.astype(int) - (theirs * 255).round().astype(int)).max() <= 1


@pytest.mark.usefixtures("in_this_process")
def test_of_a_training_file_the_average_is_taken_and_the_card_says_so(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    net, average = shake(PortedUNet()), shake(PortedUNet(), seed=1)
    optimizer = torch.optim.Adam(net.parameters())
    for parameter in net.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()  # so that it holds tensors, more than the net does
    wrapped = {f"module.{name}": tensor for name, tensor in net.state_dict().items()}
    source = tmp_path / "ckpt.pth"
    torch.save([wrapped, optimizer.state_dict(), 7, 1000, OrderedDict(average.state_dict())], source)
    directory = converted(source)
    x, timesteps = noise()

    assert apart(output(directory, x, timesteps), average(x, timesteps)) < 1e-5
    assert "took '4'" in capsys.readouterr().out
    readme = (directory / "README.md").read_text()
    assert f"`ckpt.pth`, part `4`, sha256 `{hashlib.sha256(source.read_bytes()).hexdigest()}`" in readme
    assert str(tmp_path) not in readme


def test_facts_that_a_state_dict_lacks_are_required_as_flags(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = written(tmp_path / "net.safetensors", shake(PortedUNet(attended=8)).state_dict())
    assert refused(capsys, source).startswith("--image-size must be given: ")

    flags = ["--image-size", "48", "--timesteps", "200", "--schedule", "squaredcos_cap_v2", "--prediction", "sample"]
    process = read_card(converted(source, *flags, "--variance", "fixed_large", "--no-clip")).process
    assert (process.schedule.T, process.prediction, process.variance, process.clip) == (200, "sample", "large", False)


def test_a_variant_that_cannot_be_converted_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    state = shake(PortedUNet()).state_dict()
    shortcut = {"down.1.block.0.conv_shortcut.weight": state.pop("down.1.block.0.nin_shortcut.weight")}
    source = written(tmp_path / "net.safetensors", state | shortcut)

    assert refused(capsys, source).startswith("'down.1.block.0.conv_shortcut.weight' is not a tensor of Ho's U-Net")


def test_tensors_of_no_known_layout_are_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = written(tmp_path / "net.safetensors", {"all_modules.0.weight": torch.zeros(3), "b\n": torch.zeros(1)})

    assert "no known layout of a DDPM has tensors named 'all_modules.0.weight', 'b\\n'" in refused(capsys, source)


def test_the_flat_port_converts_to_the_same_configuration_with_its_T(tmp_path: Path) -> None:
    net = shake(FlatUNet(T=50, blocks=2))
    directory = converted(written(tmp_path / "net.safetensors", net.state_dict()))
    x, timesteps = noise()
    timesteps[1] = 49
    process = read_card(directory).process

    assert apart(output(directory, x, timesteps), net(x, timesteps)) < 1e-5
    assert (process.schedule.T, process.variance, process.clip) == (50, "large", False)


def test_a_flag_is_never_passed_over_in_silence(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    port, flat = (
        written(tmp_path / f"{name}.safetensors", net.state_dict())
        for name, net in (("port", PortedUNet()), ("flat", FlatUNet(T=10, blocks=1)))
    )
    pipeline(shaken(small())).save_pretrained(directory := tmp_path / "directory")

    for source, what in ((port, "the layout ports"), (flat, "the layout flat-ports"), (directory, "a directory of")):
        for flags in (
            ["--heads", "4"],
            ["--head-channels", "8"],
            ["--new-attention-order"],
            ["--no-rescale-timesteps"],
        ):
            expected = f"{flags[0].replace('--no-', '--')} must not be given: {what}"
            assert refused(capsys, source, *flags).startswith(expected)
    assert refused(capsys, port, "--part", "ema") == "--part must not be given: port.safetensors holds one state dict"
    for flags in (["--format", "openai"], ["--part", "ema"]):
        assert refused(capsys, directory, *flags).startswith("--format and --part must not be given: ")


# Directories of diffusers


def old_directory(directory: Path, net: UNet2DModel, folders: bool, **scheduler: Any) -> Path:
    """As diffusers wrote it in June 2022: other class names, other options, pickled weights under other names."""
    pipeline(net).save_pretrained(directory)
    today = json.loads((directory / "unet" / "config.json").read_text())
    names = {
        "image_size": "sample_size",
        "block_channels": "block_out_channels",
        "num_res_blocks": "layers_per_block",
        "downscale_freq_shift": "freq_shift",
        "resnet_num_groups": "norm_num_groups",
        "resnet_eps": "norm_eps",
        "num_head_channels": "attention_head_dim",
    }
    config = {"_class_name": "UNetUnconditionalModel", "_module": "unet.py", "in_channels": 3, "out_channels": 3}
    config |= {then: today[now] for then, now in names.items()}
    config |= {"flip_sin_to_cos": today["flip_sin_to_cos"], "downsample_padding": today["downsample_padding"]}
    config["down_blocks"] = [f"UNetRes{kind}" for kind in today["down_block_types"]]
    config["up_blocks"] = [f"UNetRes{kind}" for kind in today["up_block_types"]]
    shutil.rmtree(directory)
    (directory / "unet").mkdir(parents=True)
    net_folder = directory / "unet" if folders else directory
    (net_folder / "config.json").write_text(json.dumps(config))
    schedule = {"_class_name": "GaussianDDPMScheduler", "timesteps": 40, "timestep_values": None} | scheduler
    schedule_folder = directory / "scheduler" if folders else directory
    schedule_folder.mkdir(exist_ok=True)
    (schedule_folder / "scheduler_config.json").write_text(json.dumps(schedule))
    if not folders:
        (directory / "unet").rmdir()
    if folders:  # converted to safetensors by hand
        once = {name: tensor for name, tensor in old_names(net.state_dict()).items() if ".op." not in name}
        written(net_folder / WEIGHTS, once)
    else:
        torch.save(old_names(net.state_dict()), net_folder / "diffusion_pytorch_model.bin")
    return directory


def old_names(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """A net's tensors as they were called in June 2022, the convolutions of resampling twice."""
    then = {"down_blocks.": "downsample_blocks.", "up_blocks.": "upsample_blocks.", "mid_block.": "mid."}
    then |= {".to_q.": ".query.", ".to_k.": ".key.", ".to_v.": ".value.", ".to_out.0.": ".proj_attn."}
    named = {}
    for name, tensor in state.items():
        for now, old in then.items():
            name = name.replace(now, old)
        named[name] = tensor
        if ".downsamplers." in name:
            named[name.replace(".conv.", ".op.")] = tensor
    return named


@pytest.mark.usefixtures("in_this_process")
@pytest.mark.parametrize("folders", [False, True], ids=["flat", "folders"])
def test_a_directory_of_2022_converts_to_the_same_configuration(tmp_path: Path, folders: bool) -> None:
    net = shaken(small(freq_shift=1, downsample_padding=0, flip_sin_to_cos=False, attention_head_dim=None))
    source = old_directory(tmp_path / "ddpm", net, folders, beta_schedule="squaredcos_cap_v2")
    directory = converted(source)
    x, timesteps = noise(8)
    timesteps[1] = 39

    assert apart(output(directory, x, timesteps), net(x, timesteps).sample) < 1e-5
    assert read_card(directory).process.schedule.T == 40
    again: Any = DDPMPipeline.from_pretrained(directory)
    with torch.inference_mode():
        assert apart(again.unet(x, timesteps).sample, net(x, timesteps).sample) < 1e-5
    assert (again.scheduler.config.num_train_timesteps, again.scheduler.config.beta_schedule) == (
        40,
        "squaredcos_cap_v2",
    )


def test_a_given_schedule_takes_precedence_over_the_betas_of_a_directory(tmp_path: Path) -> None:
    betas = DDPMScheduler(trained_betas=[0.01] * 100, num_train_timesteps=100)
    pipeline(shaken(small()), betas).save_pretrained(tmp_path / "ddpm")
    directory = converted(tmp_path / "ddpm", "--schedule", "squaredcos_cap_v2", "--timesteps", "50")

    assert np.array_equal(read_card(directory).process.schedule.alpha_bar, cosine(50).alpha_bar)


def test_the_very_first_directories_held_hos_net_as_its_ports_spell_it(tmp_path: Path) -> None:
    net = shake(PortedUNet(attended=8))
    config = {"_class_name": "UNetModel", "ch": 32, "ch_mult": [1, 2], "resolution": 32, "attn_resolutions": [8]}
    source = tmp_path / "ddpm"
    source.mkdir()
    (source / "config.json").write_text(json.dumps(config | {"num_res_blocks": 1, "resamp_with_conv": True}))
    (source / "scheduler_config.json").write_text('{"_class_name": "GaussianDDPMScheduler", "timesteps": 1000}')
    written(source / WEIGHTS, net.state_dict())
    with pytest.raises(ModelRefused, match="ddpm convert"):
        read_card(source)
    x, timesteps = noise()

    assert apart(output(converted(source), x, timesteps), net(x, timesteps)) < 1e-5


# What is in a file


def test_every_state_dict_in_a_file_is_found_by_where_it_is() -> None:
    a, b = torch.zeros(2), torch.ones(3)
    nested = {"step": 3, "model": {"a": a, "b": b}, "opt": {"state": {0: {"exp_avg": a}}, "param_groups": [{"lr": 1}]}}

    assert list(parts(nested)) == ["model"]
    assert list(parts({"a": a})) == [""]
    assert parts([1, "x", None]) == {}


def test_shadow_parameters_are_named_by_the_net_beside_them() -> None:
    net = {"a": torch.zeros(2), "b": torch.zeros(3)}
    shadow = [torch.ones(2), torch.ones(3)]
    found = parts({"ema": {"decay": 0.999, "shadow_params": shadow}, "net": net})

    assert list(found) == ["net", "ema.shadow_params"]
    assert [name for name, tensor in found["ema.shadow_params"].items() if tensor.all()] == ["a", "b"]
    assert choose(found, None) == "ema.shadow_params"
    assert parts({"net": net, "ema": {"shadow_params": shadow[::-1]}}).keys() == {"net"}


def test_the_average_takes_precedence_over_the_net_and_the_given_part_over_both() -> None:
    some = {"a": torch.zeros(1)}

    assert choose({"model": some, "ema": some}, None) == "ema"
    assert choose({"model": some, "ema": some}, "model") == "model"
    assert choose({"0": some, "4": some}, None) == "4"
    assert choose({"": some, "net": some | {"b": torch.zeros(1)}}, None) == "net"
    with pytest.raises(ModelRefused, match="--part must be one of 'model', 'ema'"):
        choose({"model": some, "ema": some}, "optimizer")


def test_a_process_of_its_own_takes_the_same_part_and_refuses_in_the_same_words(tmp_path: Path) -> None:
    """So that the fixture `in_this_process` may stand for it."""
    source = tmp_path / "last.ckpt"
    states = {name: {"w": torch.full((2, 3), float(i))} for i, name in enumerate(("model", "ema", "other"))}
    torch.save({**states, "loss": np.float64(0.5)}, source)
    taken = [read(source, tmp_path / read.__name__, "other") for read in (extract, unpickle)]

    assert taken == [("other", ["model", "ema", "other"])] * 2
    assert (tmp_path / "extract").read_bytes() == (tmp_path / "unpickle").read_bytes()
    refusals = []
    for read in (extract, unpickle):
        with pytest.raises(ModelRefused) as refusal:
            read(source, tmp_path / "none", "teacher")
        refusals.append(str(refusal.value))
    assert refusals == ["--part must be one of 'model', 'ema', 'other'"] * 2


# Hostile files


def test_an_object_that_is_not_a_tensor_is_named_and_not_run(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    canary = tmp_path / "canary"
    source = tmp_path / "net.pt"
    torch.save({"net": {"a": torch.zeros(1)}, "hooks": Bomb(canary)}, source)

    assert "net.pt holds posix.system, which is not a tensor" in refused(capsys, source)
    assert not canary.exists()


class Allocation:
    """What a pickle asks for: so many bytes."""

    def __init__(self, size_bytes: int) -> None:
        self.size_bytes = size_bytes

    def __reduce__(self) -> tuple[type[bytearray], tuple[int]]:
        return bytearray, (self.size_bytes,)


@pytest.mark.parametrize(
    ("size_bytes", "refusal"),
    [
        (SPARE_BYTES + (1 << 30), "net.bin is not a sound checkpoint of torch: MemoryError"),  # any machine has them
        (1 << 20, "net.bin holds no tensors by name"),
    ],
    ids=["too much", "little"],
)
def test_a_pickle_that_takes_too_much_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], size_bytes: int, refusal: str
) -> None:
    source = tmp_path / "net.bin"
    torch.save({"a": Allocation(size_bytes)}, source)

    assert refused(capsys, source) == refusal


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
@pytest.mark.parametrize("kind", ["options", "no tensors", "a mere pickle", "cut", "empty"])
def test_a_file_that_is_no_checkpoint_is_refused_in_a_line_with_its_name(tmp_path: Path, kind: str) -> None:
    source = tmp_path / "net.bin"
    torch.save({"options": {"args": Namespace(lr=1)}, "no tensors": {"lr": 1}}.get(kind, torch.zeros(1000)), source)
    if kind == "a mere pickle":
        source.write_bytes(pickle.dumps([1, 2]))
    elif kind in ("cut", "empty"):
        source.write_bytes(source.read_bytes()[: -500 if kind == "cut" else 0])
    expected = {
        "options": "net.bin holds argparse.Namespace, which is not a tensor, and is not read",
        "no tensors": "net.bin holds no tensors by name",
    }
    with pytest.raises(ModelRefused) as refused:
        extract(source, tmp_path / "out")

    assert str(refused.value).startswith(expected.get(kind, "net.bin "))
    assert not (tmp_path / "out").exists()


def test_nothing_is_written_over(tmp_path: Path) -> None:
    source = written(tmp_path / "net.safetensors", PortedUNet().state_dict())
    (tmp_path / "there").mkdir()

    with pytest.raises(SystemExit) as usage:
        main([str(source), str(tmp_path / "there")])
    assert usage.value.code == 2
