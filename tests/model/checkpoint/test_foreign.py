"""Checkpoints of other kinds, and hostile ones: each is refused by what it is, at once, without memory or torch."""

import json
import os
import pickle
import struct
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from model.checkpoint.card import INDEX, WEIGHTS, read_card
from tests.model.convert.directories import CONFIG, SCHEDULER, entry, safetensors, write_model
from tests.model.convert.directories import weights as state
from tests.model.convert.refusals import refusal

MAX_SECONDS, MAX_BYTES = 2.0, 64 << 20
# Reads each directory's card in one process, in which no more than so many bytes can be taken.
READ = f"""
import json, resource, sys, time
from pathlib import Path
from model.checkpoint.card import read_card
from model.errors import ModelRefused

def peak():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss << 10

before, size = peak(), int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (size + {MAX_BYTES}, size + {MAX_BYTES}))
for line in sys.stdin:
    began = time.process_time()
    try:
        said = f"served as {{read_card(Path(line.strip())).name}}"
    except ModelRefused as error:
        said = str(error)
    seconds = time.process_time() - began
    print(json.dumps([said, seconds, peak() - before, "torch" in sys.modules]))
"""


def index(**components: Any) -> dict[str, Any]:
    """The `model_index.json` of a pipeline."""
    served = {"scheduler": ["diffusers", "DDPMScheduler"], "unet": ["diffusers", "UNet2DModel"]}
    return {"_class_name": "DDPMPipeline"} | served | components


def pipeline(**components: Any) -> Callable[[Path], object]:
    """A sound net in folders, in a pipeline of these components."""

    def write(directory: Path) -> None:
        write_model(directory, folders=True)
        (directory / "model_index.json").write_text(json.dumps(index(**components)))

    return write


def config(**options: Any) -> Callable[[Path], object]:
    """A sound directory but for these options of its net; `replaced`: all there are."""
    return lambda directory: write_model(directory, options)


def only(name: str, values: dict[str, Any]) -> Callable[[Path], object]:
    """A sound directory but for one configuration, which is this."""
    return lambda directory: (write_model(directory) / name).write_text(json.dumps(values))


def scheduler(**options: Any) -> Callable[[Path], object]:
    """A sound directory but for these options of its scheduler."""
    return lambda directory: write_model(directory, scheduler=options)


def weights(data: bytes) -> Callable[[Path], object]:
    """A sound directory but for its weights file, which is this."""
    return lambda directory: (write_model(directory) / WEIGHTS).write_bytes(data)


def instead(name: str, data: bytes = b"", *, config: bool = True) -> Callable[[Path], object]:
    """A directory with this file in place of its weights, and perhaps without its configurations."""

    def write(directory: Path) -> None:
        (write_model(directory) / WEIGHTS).unlink()
        (directory / name).write_bytes(data)
        if not config:
            (directory / "config.json").unlink()

    return write


def changed(change: Callable[[Path], object], name: str = WEIGHTS) -> Callable[[Path], object]:
    """A sound directory but for what `change` does to a file that is gone."""

    def write(directory: Path) -> None:
        (write_model(directory) / name).unlink()
        change(directory / name)

    return write


def cut(directory: Path) -> None:
    """A download that broke off."""
    path = write_model(directory) / WEIGHTS
    path.write_bytes(path.read_bytes()[:-777])


def sparse(directory: Path) -> None:
    """A terabyte of nothing behind the tensors."""
    with (write_model(directory) / WEIGHTS).open("r+b") as file:
        file.truncate(1 << 40)


def doubled(directory: Path) -> None:
    """A key that occurs twice."""
    (write_model(directory) / "config.json").write_text(json.dumps(CONFIG)[:-1] + ', "sample_size": 16}')


def second(directory: Path) -> None:
    """A net and its average in one file."""
    net, average = state(), state()
    write_model(directory, tensors=net | {f"ema.{name}": tensor for name, tensor in average.items()})


def typed(dtype: str, width: int) -> bytes:
    """A file with one tensor of another type."""
    return safetensors({"conv_in.weight": entry([8, 1, 3, 3], 0, 72 * width, dtype)}, bytes(72 * width))


def with_folder(name: str) -> Callable[[Path], object]:
    """A net in folders without an index, with this one beside it."""
    return lambda directory: (write_model(directory, folders=True) / name).mkdir()


def crowded(directory: Path) -> None:
    """Folders whose configurations take a second each to read, and a net that is served by none of them."""
    config(use_magic=True)(directory)
    for i in range(20):
        (directory / f"run-{i}").mkdir()
        (directory / f"run-{i}" / "config.json").write_text(f'{{"a": [{"[], " * 250_000}0]}}')
    for i in range(9_000):
        (directory / f"model-{i}.pt").touch()


HEADER = '{"a":{"dtype":"F32","shape":[0],"data_offsets":[0,0]}}'
GIANT = {"block_out_channels": [8192] * 8, "down_block_types": ["DownBlock2D"] * 8, "sample_size": 128}
CROSS = {"down_block_types": ["CrossAttnDownBlock2D", "DownBlock2D"], "cross_attention_dim": 768}
CLIP = {"architectures": ["CLIPTextModel"], "model_type": "clip_text_model"}
FLOW = {"_class_name": "FlowMatchEulerDiscreteScheduler", "shift": 3.0}

# name: (what writes it, what the refusal says). A name with a slash points at a part of what was written.
CHECKPOINTS: dict[str, tuple[Callable[[Path], object], str]] = {
    # pipelines
    "LDM": (pipeline(_class_name="LDMPipeline", vqvae=["diffusers", "VQModel"]), "LDMPipeline has vqvae (VQModel)"),
    "LDM/unet": (pipeline(_class_name="LDMPipeline", vqvae=["diffusers", "VQModel"]), "LDMPipeline has vqvae"),
    "StableDiffusion/unet": (
        pipeline(
            _class_name="StableDiffusionPipeline",
            vae=["diffusers", "AutoencoderKL"],
            text_encoder=["transformers", "CLIPTextModel"],
        ),
        "StableDiffusionPipeline has vae (AutoencoderKL), text_encoder (CLIPTextModel) besides",
    ),
    "no index, vae": (with_folder("vae"), "the pipeline has vae besides"),
    "score SDE": (pipeline(_class_name="ScoreSdeVePipeline"), "a variance-exploding SDE"),
    "consistency": (pipeline(_class_name="ConsistencyModelPipeline"), "its net is a consistency model"),
    # nets
    "labels without embeddings": (config(num_class_embeds=10), f"{WEIGHTS} lacks class_embedding.weight"),
    "no labels": (config(num_class_embeds=0), "num_class_embeds must be an integer in 1..65536, got 0"),
    "labels without end": (
        config(class_embed_type="timestep"),
        "got null: class_embed_type timestep does not tell how many labels the net knows",
    ),
    "labels beside the timestep": (
        config(class_embeddings_concat=True),
        "got true: the embedding of a label is added to that of the timestep in the nets that are served",
    ),
    "text-conditional": (config(_class_name="UNet2DConditionModel"), "UNet2DConditionModel is a net that needs a text"),
    "cross attention": (config(**CROSS), "it is a net that needs a text"),
    "added embeddings": (config(addition_embed_type="text_time"), "it is a net that needs a text"),
    "latents": (config(in_channels=4, out_channels=4), "it is a net of latents"),
    "upsampler": (config(in_channels=6, out_channels=3), "it reads a picture or a mask beside the noise"),
    "NCSN++": (config(time_embedding_type="fourier"), "it is a net for another process"),
    "ControlNet": (only("config.json", {"_class_name": "ControlNetModel"}), "ControlNetModel is a part that steers"),
    "DiT": (only("config.json", {"_class_name": "DiTTransformer2DModel"}), "DiTTransformer2DModel is a transformer"),
    "VAE": (only("config.json", {"_class_name": "AutoencoderKL", "in_channels": 3}), "AutoencoderKL is an autoencoder"),
    "CLIP": (only("config.json", CLIP), "it is a model of the transformers library"),
    "unknown net": (config(_class_name="MyNet"), "MyNet is no U-Net that this server knows"),
    "unknown option": (config(use_magic=True), "use_magic must be absent, got true"),
    "quantized": (config(quantization_config={"bits": 4}), "its weights are quantized"),
    "absurd": (config(block_out_channels=[8, 2**31]), "block_out_channels must be integers in 1..8192"),
    "giant": (config(**GIANT, up_block_types=["UpBlock2D"] * 8), "parameters are allowed, it calls for over"),
    "key twice": (doubled, "config.json is not valid JSON"),
    "nested config": (
        lambda directory: (write_model(directory) / "config.json").write_text('{"a":' * 100_000),
        "config.json is not valid JSON: it is nested too deeply",
    ),
    # schedulers
    "flow matching": (
        only("scheduler_config.json", FLOW),
        "flow matching, EDM and score SDEs are other processes",
    ),
    "zero SNR": (scheduler(rescale_betas_zero_snr=True), "rescale_betas_zero_snr must be one of false, null, got true"),
    "unknown scheduler option": (scheduler(snr_shift_scale=3.0), "snr_shift_scale must be absent"),
    # weights
    "zero bytes": (weights(b""), "it is empty"),
    "LFS pointer": (weights(b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n"), "a pointer of Git LFS"),
    "error page": (weights(b"\n<!DOCTYPE html><title>404</title>"), "it is a web page, such as a login"),
    "pickle renamed": (
        weights(pickle.dumps(dict.fromkeys(range(99)))),
        "it is a pickle, as torch.save writes, which is never read",
    ),
    "torch.save renamed": (weights(b"PK\x03\x04" + bytes(99)), "it is a pickle, as torch.save writes"),
    "GGUF renamed": (weights(b"GGUF\x03\0\0\0" + bytes(99)), "it is a GGUF file"),
    "ONNX renamed": (weights(b"\x08\x07\x12\x07pytorch\x1a\x052.0.0" + bytes(99)), "it is an ONNX model"),
    "Flax renamed": (weights(b"\x84\xa7conv_in\x82" + bytes(99)), "it is a msgpack file, as Flax saves weights"),
    "Keras renamed": (weights(b"\x89HDF\r\n\x1a\n" + bytes(99)), "it is an HDF5 file"),
    "picture renamed": (weights(b"\x89PNG\r\n\x1a\n" + bytes(99)), "it is a PNG picture"),
    "zeros": (weights(bytes(4096)), "it is nothing but zeros at its start"),
    "cut": (cut, "is truncated"),
    "sparse terabyte": (sparse, "is truncated or has data behind its tensors"),
    "header bomb": (weights(struct.pack("<Q", 2**62) + b"{" * 99), "its header claims 4611686018427387904 of 107"),
    "nested header": (weights(safetensors('{"a":' * 100_000)), "malformed header: it is nested too deeply"),
    "overlap": (weights(safetensors({"a": entry([2], 0, 8), "b": entry([1], 4, 8)}, bytes(8))), "overlap"),
    "other names": (weights(safetensors(HEADER)), "lacks conv_in.weight"),
    "wrong shapes": (config(block_out_channels=[16, 32]), "conv_in.weight must have shape [16, 1, 3, 3], got [8, "),
    "net and average": (second, "such as 'ema.conv_in.bias' (a second net: `ddpm convert` takes one of them"),
    "fp8": (weights(typed("F8_E4M3", 1)), "holds 'conv_in.weight' as 'F8_E4M3'"),
    "integers": (weights(typed("I64", 8)), "holds 'conv_in.weight' as 'I64'"),
    "index elsewhere": (
        lambda directory: instead(INDEX, b'{"weight_map": {"conv_in.weight": "../../etc/passwd"}}')(directory),
        "weight_map must name at most 256 files beside it, each .safetensors",
    ),
    "only a pickle": (instead("diffusion_pytorch_model.bin"), "is a pickle, which is never read; `ddpm convert`"),
    "only Flax": (instead("diffusion_flax_model.msgpack"), "is a file of Flax"),
    "only ONNX": (instead("model.onnx", config=False), "config.json is missing ('model.onnx' is an ONNX graph"),
    "only GGUF": (instead("model.gguf", config=False), "config.json is missing ('model.gguf' is a GGUF file"),
    "only TensorFlow": (instead("model.ckpt.index", config=False), "('model.ckpt.index' is a file of TensorFlow"),
    "only LoRA": (instead("lora.safetensors"), "('lora.safetensors' is not looked for under this name)"),
    # what is no file, or many
    "a crowd": (crowded, "use_magic must be absent, got true"),
    "folder": (changed(Path.mkdir), f"{WEIGHTS} is not a regular file"),
    "pipe": (changed(os.mkfifo), f"{WEIGHTS} is not a regular file"),
    "pipe as config": (changed(os.mkfifo, "config.json"), "config.json is not a regular file"),
    "device": (changed(lambda path: path.symlink_to("/dev/zero")), f"{WEIGHTS} is not a regular file"),
    "link to itself": (changed(lambda path: path.symlink_to(path)), f"{WEIGHTS} is not a regular file"),
    "nothing": (Path.mkdir, "config.json is missing"),
}


@pytest.fixture(scope="module")
def refusals(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[str, float, int, bool]]:
    """What one process says of each: (line, seconds of CPU, bytes more than before the first, whether it has torch)."""
    places = []
    for i, (name, (write, _)) in enumerate(CHECKPOINTS.items()):
        directory = tmp_path_factory.mktemp("checkpoints") / str(i)
        write(directory)
        places.append(directory / name.partition("/")[2])
    command = [sys.executable, "-c", READ]
    lines = "".join(f"{place}\n" for place in places)
    ran = subprocess.run(command, input=lines, capture_output=True, text=True, timeout=120)
    assert ran.returncode == 0, ran.stderr
    said = [json.loads(line) for line in ran.stdout.splitlines()]
    return {name: (line, s, size, torch) for name, (line, s, size, torch) in zip(CHECKPOINTS, said, strict=True)}


@pytest.mark.parametrize("name", CHECKPOINTS)
def test_it_is_refused_by_what_it_is(name: str, refusals: dict[str, tuple[str, float, int, bool]]) -> None:
    line, seconds, size_bytes, has_torch = refusals[name]

    assert CHECKPOINTS[name][1] in line
    assert "\n" not in line and len(line) < 400
    assert (seconds < MAX_SECONDS, size_bytes < MAX_BYTES, has_torch) == (True, True, False), (seconds, size_bytes)


def test_the_sound_directory_of_these_tests_is_sound(tmp_path: Path) -> None:
    assert SCHEDULER and CONFIG
    command = [sys.executable, "-c", READ]
    ran = subprocess.run(command, input=f"{write_model(tmp_path)}\n", capture_output=True, text=True, timeout=120)

    assert json.loads(ran.stdout)[0] == f"served as {tmp_path.name}"


@pytest.mark.parametrize("name", ["config.json", "scheduler_config.json"])
def test_even_a_hostile_option_is_named_in_one_short_line(tmp_path: Path, name: str) -> None:
    hostile = json.loads((write_model(tmp_path) / name).read_text()) | {"a\nb" * 1000: 1}
    (tmp_path / name).write_text(json.dumps(hostile))

    line = refusal(lambda: read_card(tmp_path))
    assert line.startswith(f"{name}: 'a\\nba") and len(line) < 300
