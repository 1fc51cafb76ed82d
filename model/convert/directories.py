"""A directory that any version of diffusers saved: with pickled weights, or with names that are no longer used."""

from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import Tensor

from model.checkpoint.card import config_files
from model.checkpoint.header import modern
from model.convert import ports
from model.convert.protocol import OF_THE_SCHEDULER, Converted, Options, refuse_unread, requested, scheduler_config
from model.convert.sources import read_state
from model.errors import ModelRefused
from model.nets.config import RENAMED, with_todays_names
from model.options import read_json, whole

READS = OF_THE_SCHEDULER | {"image_size"}
NAMES = ("diffusion_pytorch_model", "diffusion_model", "pytorch_model")
KINDS = (".safetensors", ".bin", ".fp16.safetensors", ".fp16.bin", ".pt")
MAX_SHARDS = 256


def convert(directory: Path, options: Options) -> tuple[Converted, Path]:
    """The model directory, and the file that its weights were read from. Raises ModelRefused."""
    refuse_unread(options, READS, "a directory of diffusers")
    net_file, schedule_file = config_files(directory)
    config = read_json(net_file)
    weights = _weights_file(net_file.parent)
    state, _, _ = read_state(weights)
    given = read_json(schedule_file) if schedule_file.exists() else {}
    if "ch_mult" in config:  # the very first layout: that of pesser's port
        size = options.image_size or whole(config.get("resolution"))
        made = ports.convert(state, replace(options, image_size=size))
    else:
        made = Converted(_config(config, options), scheduler_config(options, "fixed_small"), _tensors(state), "")
    return replace(made, scheduler=_scheduler(given, made.scheduler, options), origin=_origin(given)), weights


def _weights_file(folder: Path) -> Path:
    for kind in KINDS:
        for name in NAMES:
            if (folder / f"{name}{kind}").is_file():
                return folder / f"{name}{kind}"
    if any(folder.glob("*.index.json")):
        raise ModelRefused("pickled weights in several files are not read; save them as one, or as safetensors")
    raise ModelRefused(f"{NAMES[0]}.bin is missing")


def _config(config: dict[str, Any], options: Options) -> dict[str, Any]:
    todays = dict(with_todays_names(config)) | {"_class_name": "UNet2DModel"}
    if options.image_size is not None:
        todays["sample_size"] = options.image_size
    return {name: value for name, value in todays.items() if name not in RENAMED and name != "_module"}


def _tensors(state: dict[str, Tensor]) -> dict[str, Tensor]:
    # the resampling layers of 2022 had their convolution under two names
    twice = [key for key in state if ".op." in key and key.replace(".op.", ".conv.") in state]
    named = {modern(key): tensor for key, tensor in state.items() if key not in twice}
    if len(named) != len(state) - len(twice):
        raise ModelRefused("weights are there under both their old and their new names")
    return named


def _scheduler(given: dict[str, Any], usual: dict[str, Any], options: Options) -> dict[str, Any]:
    """The directory's own configuration, with the given options in place of its values."""
    if not given:
        return usual
    T = {"num_train_timesteps": given["timesteps"]} if "timesteps" in given else {}
    kept = {name: value for name, value in given.items() if name not in ("timesteps", "timestep_values")}
    if str(kept.get("_class_name")).startswith("Gaussian"):
        kept["_class_name"] = "DDPMScheduler"
    if any(value is not None for value in (options.schedule, options.beta_start, options.beta_end)):
        kept["trained_betas"] = None  # which would take precedence over the given options
    return T | kept | requested(options)


def _origin(given: dict[str, Any]) -> str:
    return "Saved by diffusers" + ("" if given else ", without a schedule: the usual one, or what was asked for")
