"""A model directory's card, read without torch: the net's shape, T, schedule, prediction, digest.

A model directory is one that diffusers saves for a DDPM: `config.json` (the net), `scheduler_config.json` (the
schedule), `model_index.json` (optional) and `diffusion_pytorch_model.safetensors`, flat or in `unet/` and `scheduler/`.
Nothing in it is executed, and every number in it is checked against bounds here, before memory is allocated for it.
"""

import hashlib
import re
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import get_args

from model.digests import file_digest
from model.errors import ModelRefused
from model.nets.config import architecture
from model.nets.lucidrains_config import LUCIDRAINS, AnyArchitecture, lucidrains_architecture
from model.options import MAX_CONFIG_BYTES, Json, Options, read_json, require_file
from model.sampling.schedule import BY_NAME, NoiseSchedule, Prediction, Process, Spacing, Variance

WEIGHTS = "diffusion_pytorch_model.safetensors"
# The names that are tried, in this order: one file, several with an index, the same in half precision.
INDEX = f"{WEIGHTS}.index.json"
VARIANTS = ("fp16", "bf16")
SHARD = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._-]{0,127}\.safetensors")
MAX_SHARDS = 256
MAX_T = 10_000
MIN_ALPHA_BAR = 1e-30  # the least amplitude of the picture at T: float32 must hold its inverse
# A file with none of these options is read only if its class has Ho's numbers as defaults.
BETAS = ("beta_schedule", "beta_start", "trained_betas")
HOS_BY_DEFAULT = ("DDPMScheduler", "DDIMScheduler", "GaussianDDPMScheduler")


def noise_schedule(config: Json) -> NoiseSchedule:
    """The schedule that a `scheduler_config.json` describes. Raises ModelRefused naming the option."""
    options = Options("scheduler_config.json", config)
    if all(config.get(option) is None for option in BETAS) and config.get("_class_name") not in HOS_BY_DEFAULT:
        raise options.refuse("_class_name", f"one of {', '.join(HOS_BY_DEFAULT)} unless {' or '.join(BETAS)} is given")
    options.word("rescale_betas_zero_snr", (False, None), False)
    options.word("use_flow_sigmas", (False, None), False)
    if config.get("trained_betas") is not None:
        betas = options.items("trained_betas", None, MAX_T)
        if any(isinstance(b, bool) or not isinstance(b, int | float) or not 0 < b < 1 for b in betas):
            raise ModelRefused("scheduler_config.json: trained_betas must be numbers between 0 and 1")
        T = options.integer("num_train_timesteps", 1, MAX_T, len(betas))
        if len(betas) != T:
            wanted = f"trained_betas must be as many as num_train_timesteps ({T}), got {len(betas)}"
            raise ModelRefused(f"scheduler_config.json: {wanted}")
        return _usable(NoiseSchedule.of(betas), "trained_betas")
    T = options.integer("num_train_timesteps" if "num_train_timesteps" in config else "timesteps", 1, MAX_T, 1000)
    name = options.word("beta_schedule", tuple(BY_NAME), "linear")
    low = options.number("beta_start", 1e-12, 0.999, 1e-4)
    return _usable(BY_NAME[name](T, low, options.number("beta_end", low, 0.999, 0.02)), "beta_end")


def _usable(schedule: NoiseSchedule, option: str) -> NoiseSchedule:
    """The schedule. Raises ModelRefused if rounding would ruin plans, which divide by the picture's amplitude."""
    falling = bool((schedule.alpha_bar[1:] < schedule.alpha_bar[:-1]).all())
    if not falling or schedule.alpha_bar[-1] < MIN_ALPHA_BAR:
        raise ModelRefused(
            f"scheduler_config.json: {option} must add noise in every step and leave a trace of the picture"
        )
    return schedule


@dataclass(frozen=True, slots=True)
class Source:
    """A model's origin on a hub."""

    id: str
    revision: str  # hash of the commit


@dataclass(frozen=True, kw_only=True)
class ModelCard:
    """Everything known of a model without loading it. Built by `read_card`."""

    name: str
    directory: Path
    weights: Path  # the safetensors file, or the index of several
    architecture: AnyArchitecture
    process: Process
    shards: tuple[Path, ...] = ()  # the files of an index, ordered by name
    source: Source | None = None  # None: a directory of this machine

    @cached_property
    def shape(self) -> tuple[int, int, int]:
        """(C, H, W) of a picture."""
        return self.architecture.shape

    @property
    def weight_files(self) -> tuple[Path, ...]:
        """All files that hold weights."""
        return self.shards or (self.weights,)

    @cached_property
    def digest(self) -> str:
        """Content address of everything that determines a picture: weights and both configurations. Raises OSError."""
        files = (*self.weight_files, *config_files(self.directory))
        digests = b"".join(bytes.fromhex(file_digest(path)) for path in files)
        return f"sha256:{hashlib.sha256(digests).hexdigest()}"

    @property
    def readme(self) -> str:
        """The text of README.md, or nothing."""
        path = self.directory / "README.md"
        # in a hub's cache, snapshots/<revision>/ consists of links to blobs/ beside it
        home = self.directory if self.source is None else self.directory.parents[1]
        if not path.is_file() or not path.resolve().is_relative_to(home.resolve()):
            return ""  # a link could lead to any file of this machine, and the text is shown
        with path.open("rb") as file:
            return file.read(MAX_CONFIG_BYTES).decode(errors="replace")


def config_files(directory: Path) -> tuple[Path, Path]:
    """The paths of config.json and scheduler_config.json in this directory."""
    net, schedule = directory / "unet", directory / "scheduler"
    return (
        (net if net.is_dir() else directory) / "config.json",
        (schedule if schedule.is_dir() else directory) / "scheduler_config.json",
    )


def read_card(directory: Path, name: str | None = None) -> ModelCard:
    """The card of a model directory. Raises ModelRefused, in one line, if the directory is not usable."""
    if not directory.is_dir():
        raise ModelRefused(f"{directory.name} is not a directory")
    net_file, schedule_file = config_files(directory)
    config, scheduler = read_json(net_file), read_json(schedule_file)
    arch = lucidrains_architecture(config) if config.get("_class_name") == LUCIDRAINS else architecture(config)
    weights, index_file = _weights(net_file.parent), directory / "model_index.json"
    process = read_process(scheduler, read_json(index_file) if index_file.exists() else {}, arch.learned_variance)
    shards = _shards(weights) if weights.suffix == ".json" else ()
    return ModelCard(
        name=name or directory.name,
        directory=directory,
        weights=weights,
        architecture=arch,
        process=process,
        shards=shards,
    )


def read_process(scheduler: Json, index: Json, learned: bool) -> Process:
    """The process that `scheduler_config.json` and `model_index.json` describe. Raises ModelRefused naming the option.

    learned: whether the net has learned a variance
    """
    schedule, options = noise_schedule(scheduler), Options("scheduler_config.json", scheduler)
    options.word("thresholding", (False, None), False)
    spacing = options.word("timestep_spacing", get_args(Spacing), "leading")
    if spacing == "leading":  # the only spacing that an offset shifts
        options.word("steps_offset", (0, None), 0)
    if str(scheduler.get("_class_name")).startswith("DDIM"):  # other schedulers do not read it
        options.word("set_alpha_to_one", (True, None), True)
    known: dict[str | None, Variance] = {
        None: "small",
        "fixed_small": "small",
        "fixed_small_log": "small",
        "fixed_large": "large",
        "learned_range": "learned",
    }
    variance = known[options.word("variance_type", tuple(known), "fixed_small")]
    if learned != (variance == "learned"):
        raise options.refuse("variance_type", "learned_range if and only if the net has twice as many channels out")
    return Process(
        schedule,
        options.word("prediction_type", get_args(Prediction), "epsilon"),
        learned_variance=learned,
        variance=variance,
        spacing=spacing,
        clip=options.boolean("clip_sample", True),
        clip_range=options.number("clip_sample_range", 1e-3, 1e3, 1.0),
        default_steps=Options("model_index.json", index).integer("default_steps", 1, schedule.T, schedule.T),
    )


def weights_names() -> list[str]:
    """The names that a folder's weights may have. The first that exists is taken."""
    stem, suffix = WEIGHTS.split(".")
    halves = [[f"{stem}.{variant}.{suffix}", f"{WEIGHTS}.index.{variant}.json"] for variant in VARIANTS]
    return sum(halves, [WEIGHTS, INDEX])


def _weights(folder: Path) -> Path:
    """The path of the weights in this folder, or of their index. Raises ModelRefused."""
    paths = [folder / name for name in weights_names()]
    found = next((path for path in paths if path.exists() or path.is_symlink()), paths[0])
    require_file(found, _found_instead(folder))
    return found


def shard_names(index: Json, name: str) -> tuple[str, ...]:
    """The files that an index names. Raises ModelRefused if one of them may lie elsewhere than beside it."""
    named = index.get("weight_map")
    if not isinstance(named, dict) or not named or not all(isinstance(file, str) for file in named.values()):
        raise ModelRefused(f"{name}: weight_map must say of every tensor in which file it is")
    files = tuple(sorted(set(named.values())))
    if len(files) > MAX_SHARDS or not all(map(SHARD.fullmatch, files)):
        raise ModelRefused(f"{name}: weight_map must name at most {MAX_SHARDS} safetensors files beside it")
    return files


def _shards(index: Path) -> tuple[Path, ...]:
    files = tuple(index.parent / file for file in shard_names(read_json(index), index.name))
    for file in files:
        require_file(file)
    return files


def _found_instead(folder: Path) -> str:
    pickles = sorted(p.name for p in folder.iterdir() if p.suffix in {".bin", ".pt", ".ckpt", ".pth", ".pkl"})
    return (
        f" ({pickles[0]!r} is a pickle, which is never read; `ddpm convert` makes safetensors of it)" if pickles else ""
    )
