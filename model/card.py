"""What a model directory says of itself, read without torch: shape, T, schedule, prediction, digest.

A model directory is what diffusers saves for a DDPM: `config.json` (the net), `scheduler_config.json` (the schedule),
`model_index.json` (optional) and `diffusion_pytorch_model.safetensors`, flat or in `unet/` and `scheduler/`. Nothing
in it is executed, and every number in it is bounded here, before anything is allocated for it.
"""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, TypeAlias

from model.errors import ModelRefused
from model.schedule import BY_NAME, NoiseSchedule, Process, Variance

Json: TypeAlias = Mapping[str, Any]

WEIGHTS = "diffusion_pytorch_model.safetensors"
MAX_CONFIG_BYTES = 1 << 20
MAX_T = 10_000
MIN_ALPHA_BAR = 1e-30  # of the picture's amplitude must be left at T: float32 holds the inverse
# Schedulers of diffusers whose nets were trained in another process: their files hold no betas to read.
OTHER_PROCESSES = ("FlowMatch", "ScoreSde", "KarrasVe", "EDM", "VQDiffusion", "CMStochastic")
PLAIN, ATTENTION, RESNET = "plain", "attention", "resnet"
DOWN_BLOCKS = {"DownBlock2D": PLAIN, "AttnDownBlock2D": ATTENTION, "ResnetDownsampleBlock2D": RESNET}
UP_BLOCKS = {"UpBlock2D": PLAIN, "AttnUpBlock2D": ATTENTION, "ResnetUpsampleBlock2D": RESNET}


@dataclass(frozen=True, slots=True)
class Architecture:
    """The shape of a U-Net, in the vocabulary of diffusers' `UNet2DModel` (0.42)."""

    height: int
    width: int
    in_channels: int = 3
    out_channels: int = 3
    block_out_channels: tuple[int, ...] = (224, 448, 672, 896)
    down_block_types: tuple[str, ...] = ("DownBlock2D", "AttnDownBlock2D", "AttnDownBlock2D", "AttnDownBlock2D")
    up_block_types: tuple[str, ...] = ("AttnUpBlock2D", "AttnUpBlock2D", "AttnUpBlock2D", "UpBlock2D")
    mid_block_type: str | None = "UNetMidBlock2D"
    layers_per_block: int = 2
    mid_block_scale_factor: float = 1.0
    downsample_padding: int = 1
    downsample_type: str = "conv"
    upsample_type: str = "conv"
    attention_head_dim: int | None = 8
    norm_num_groups: int = 32
    attn_norm_num_groups: int | None = None
    norm_eps: float = 1e-5
    resnet_time_scale_shift: str = "default"
    add_attention: bool = True
    flip_sin_to_cos: bool = True
    freq_shift: float = 0.0
    time_embedding_dim: int | None = None

    @property
    def learned_variance(self) -> bool:
        """Whether the net has a second set of channels that says how much noise to add."""
        return self.out_channels == 2 * self.in_channels

    @property
    def shape(self) -> tuple[int, int, int]:
        """(C, H, W) of a picture."""
        return self.in_channels, self.height, self.width


# What an option must be for this U-Net to compute the same function. Anything else is refused by name.
_FIXED: dict[str, tuple[Any, ...]] = {
    "center_input_sample": (False, None),
    "time_embedding_type": ("positional",),
    "act_fn": ("silu", "swish"),
    "class_embed_type": (None,),
    "num_class_embeds": (None,),
    "mid_block_type": ("UNetMidBlock2D", None),
    "downsample_type": ("conv", "resnet"),
    "upsample_type": ("conv", "resnet"),
    "resnet_time_scale_shift": ("default", "scale_shift"),
    "add_attention": (True, False),
    "flip_sin_to_cos": (True, False),
}


def _whole(value: object) -> int | None:
    """An integer, which some configurations write as 32.0, or None."""
    if isinstance(value, float) and value.is_integer():
        return int(value)
    return value if isinstance(value, int) and not isinstance(value, bool) else None


class _Options:
    """One configuration file, read option by option; every refusal names the file and the option."""

    def __init__(self, name: str, values: Json) -> None:
        self.name, self.values = name, values

    def refuse(self, option: str, allowed: str) -> ModelRefused:
        try:
            given = json.dumps(self.values.get(option))[:60]
        except RecursionError:
            given = "a deeply nested value"
        return ModelRefused(f"{self.name}: {option} must be {allowed}, got {given}")

    def integer(self, option: str, low: int, high: int, default: int | None) -> int:
        value = _whole(self.values.get(option, default))
        if value is None or not low <= value <= high:
            raise self.refuse(option, f"an integer in {low}..{high}")
        return value

    def optional(self, option: str, low: int, high: int, default: int | None = None) -> int | None:
        return None if self.values.get(option, default) is None else self.integer(option, low, high, default)

    def number(self, option: str, low: float, high: float, default: float) -> float:
        value = self.values.get(option, default)
        if isinstance(value, bool) or not isinstance(value, int | float) or not low <= value <= high:
            raise self.refuse(option, f"a number in {low}..{high}")
        return float(value)

    def boolean(self, option: str, default: bool) -> bool:
        value = self.values.get(option, default)
        if not isinstance(value, bool):
            raise self.refuse(option, "true or false")
        return value

    def word(self, option: str, allowed: tuple[Any, ...], default: Any) -> Any:
        value = self.values.get(option, default)
        if isinstance(value, list | dict) or not any(value == a and type(value) is type(a) for a in allowed):
            raise self.refuse(option, "one of " + ", ".join(json.dumps(a) for a in allowed))
        return value

    def items(self, option: str, default: tuple[Any, ...] | None, most: int) -> list[Any]:
        value = self.values.get(option, default)
        if not isinstance(value, list | tuple) or not 1 <= len(value) <= most:
            raise self.refuse(option, f"a list of 1..{most} items")
        return list(value)


def _block_types(options: _Options, option: str, known: Json, default: tuple[str, ...]) -> tuple[str, ...]:
    types = [t.removeprefix("UNetRes") if isinstance(t, str) else t for t in options.items(option, default, 8)]
    for block_type in types:
        if not isinstance(block_type, str) or block_type not in known:
            raise options.refuse(option, "a list of " + ", ".join(known))
    return tuple(types)


def _image_size(options: _Options, levels: int) -> tuple[int, int]:
    size = options.values.get("sample_size", options.values.get("image_size"))
    given = size if isinstance(size, list | tuple) else [size, size]
    step = 2 ** (levels - 1)
    sides = [side for side in map(_whole, given[:3]) if side is not None and step <= side <= 4096 and side % step == 0]
    if not len(given) == len(sides) == 2:
        raise options.refuse("sample_size", f"a multiple of {step} in {step}..4096, or [height, width] of such")
    return sides[0], sides[1]


def architecture(config: Json) -> Architecture:
    """The net that a `config.json` describes. Raises ModelRefused naming the option that is out of bounds."""
    options = _Options("config.json", config)
    for option, allowed in _FIXED.items():
        if option in config:
            options.word(option, allowed, None)
    default = Architecture(32, 32)
    channels = []
    for value in map(_whole, options.items("block_out_channels", default.block_out_channels, 8)):
        if value is None or not 1 <= value <= 8192:
            raise options.refuse("block_out_channels", "integers in 1..8192")
        channels.append(value)
    down = _block_types(options, "down_block_types", DOWN_BLOCKS, default.down_block_types)
    up = _block_types(options, "up_block_types", UP_BLOCKS, default.up_block_types)
    if not len(down) == len(up) == len(channels):
        raise options.refuse("down_block_types", f"as long as block_out_channels and up_block_types ({len(channels)})")
    height, width = _image_size(options, len(channels))
    in_channels = options.integer("in_channels", 1, 64, 3)
    arch = Architecture(
        height,
        width,
        in_channels,
        options.integer("out_channels", 1, 128, 3),
        tuple(channels),
        down,
        up,
        config.get("mid_block_type", "UNetMidBlock2D"),
        options.integer("layers_per_block", 1, 16, 2),
        options.number("mid_block_scale_factor", 1e-3, 1e3, 1.0),
        options.integer("downsample_padding", 0, 1, 1),
        config.get("downsample_type", "conv"),
        config.get("upsample_type", "conv"),
        options.optional("attention_head_dim", 1, 8192, 8),
        options.integer("norm_num_groups", 1, 8192, 32),
        options.optional("attn_norm_num_groups", 1, 8192),
        options.number("norm_eps", 1e-12, 1.0, 1e-5),
        config.get("resnet_time_scale_shift", "default"),
        config.get("add_attention", True),
        config.get("flip_sin_to_cos", True),
        options.number("freq_shift", -4.0, 4.0, 0.0),
        options.optional("time_embedding_dim", 1, 32768),
    )
    _check_consistency(options, arch)
    return arch


def _check_consistency(options: _Options, arch: Architecture) -> None:
    """Options that are each fine, but not together."""
    channels, groups = arch.block_out_channels, arch.norm_num_groups
    if arch.out_channels not in (arch.in_channels, 2 * arch.in_channels):
        raise options.refuse("out_channels", f"in_channels or twice that ({arch.in_channels})")
    if channels[0] < 4 or channels[0] // 2 <= arch.freq_shift:
        raise options.refuse("block_out_channels", "at least 4 channels in the first level")
    norms = {*channels, *(a + b for a, b in zip(channels, channels[1:], strict=False)), *(2 * c for c in channels)}
    if any(width % groups for width in norms):
        raise options.refuse("norm_num_groups", "a divisor of every channel count")
    if arch.attn_norm_num_groups is not None and channels[-1] % arch.attn_norm_num_groups:
        raise options.refuse("attn_norm_num_groups", f"a divisor of {channels[-1]}")
    attended = [c for c, t in zip(channels, arch.down_block_types, strict=True) if DOWN_BLOCKS[t] == ATTENTION]
    attended += [c for c, t in zip(channels[::-1], arch.up_block_types, strict=True) if UP_BLOCKS[t] == ATTENTION]
    if arch.mid_block_type and arch.add_attention:
        attended.append(channels[-1])
    if arch.attention_head_dim is not None and any(c % arch.attention_head_dim for c in attended):
        raise options.refuse("attention_head_dim", "null or a divisor of the channels it attends to")


def noise_schedule(config: Json) -> NoiseSchedule:
    """The schedule that a `scheduler_config.json` describes. Raises ModelRefused naming the option."""
    options = _Options("scheduler_config.json", config)
    if str(config.get("_class_name")).startswith(OTHER_PROCESSES):
        raise options.refuse("_class_name", "a scheduler of DDPM's process")
    options.word("rescale_betas_zero_snr", (False, None), False)
    if config.get("trained_betas") is not None:
        betas = options.items("trained_betas", None, MAX_T)
        if any(isinstance(b, bool) or not isinstance(b, int | float) or not 0 < b < 1 for b in betas):
            raise ModelRefused("scheduler_config.json: trained_betas must be numbers between 0 and 1")
        return _usable(NoiseSchedule.of(betas), "trained_betas")
    T = options.integer("num_train_timesteps" if "num_train_timesteps" in config else "timesteps", 1, MAX_T, 1000)
    name = options.word("beta_schedule", tuple(BY_NAME), "linear")
    low = options.number("beta_start", 1e-12, 0.999, 1e-4)
    return _usable(BY_NAME[name](T, low, options.number("beta_end", low, 0.999, 0.02)), "beta_end")


def _usable(schedule: NoiseSchedule, option: str) -> NoiseSchedule:
    """The schedule, unless its numbers drown in rounding: plans divide by what is left of the picture."""
    falling = bool((schedule.alpha_bar[1:] < schedule.alpha_bar[:-1]).all())
    if not falling or schedule.alpha_bar[-1] < MIN_ALPHA_BAR:
        raise ModelRefused(
            f"scheduler_config.json: {option} must add noise in every step and leave a trace of the picture"
        )
    return schedule


def _no_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    values = dict(pairs)
    if len(values) != len(pairs):
        raise ValueError("a key occurs twice")
    return values


def require_file(path: Path, hint: str = "") -> None:
    """Raises ModelRefused unless this is a regular file, or a link to one, as in the hub's cache.

    Opening a pipe would wait for ever, reading a device would never end.
    """
    if not path.is_file():
        there = path.exists() or path.is_symlink()
        raise ModelRefused(f"{path.name} is not a regular file" if there else f"{path.name} is missing{hint}")


def read_json(path: Path) -> dict[str, Any]:
    """A configuration file as a dict. Raises ModelRefused if it is missing, too large, or not a JSON object."""
    require_file(path)
    try:
        if path.stat().st_size > MAX_CONFIG_BYTES:
            raise ModelRefused(f"{path.name} is larger than {MAX_CONFIG_BYTES} bytes")
        values = json.loads(path.read_bytes(), object_pairs_hook=_no_duplicates)
    except OSError as error:
        raise ModelRefused(f"{path.name} could not be read: {type(error).__name__}") from error
    except (ValueError, RecursionError) as error:
        raise ModelRefused(f"{path.name} is not valid JSON: {type(error).__name__}") from error
    if not isinstance(values, dict):
        raise ModelRefused(f"{path.name} must be a JSON object")
    return values


@dataclass(frozen=True)
class ModelCard:
    """What is known of a model without loading it. Built by `read_card`."""

    name: str
    directory: Path
    weights: Path
    architecture: Architecture
    process: Process

    @cached_property
    def digest(self) -> str:
        """Content address of everything that decides a picture: weights and both configurations."""
        total = hashlib.sha256()
        for path in (self.weights, *_config_files(self.directory)):
            with path.open("rb") as file:
                total.update(hashlib.file_digest(file, "sha256").digest())
        return f"sha256:{total.hexdigest()}"

    @property
    def readme(self) -> str:
        """The model's own words, README.md, or nothing."""
        path = self.directory / "README.md"
        if not path.is_file() or not path.resolve().is_relative_to(self.directory.resolve()):
            return ""  # a link could lead to anything on this machine, and this text is shown
        with path.open("rb") as file:
            return file.read(MAX_CONFIG_BYTES).decode(errors="replace")


def _config_files(directory: Path) -> tuple[Path, Path]:
    """(config.json, scheduler_config.json), in the folders where this directory keeps them."""
    net, schedule = directory / "unet", directory / "scheduler"
    return (
        (net if net.is_dir() else directory) / "config.json",
        (schedule if schedule.is_dir() else directory) / "scheduler_config.json",
    )


def read_card(directory: Path, name: str | None = None) -> ModelCard:
    """What the model directory says of itself. Raises ModelRefused, in one line, if it is not a usable one."""
    if not directory.is_dir():
        raise ModelRefused(f"{directory.name} is not a directory")
    net_file, schedule_file = _config_files(directory)
    config, scheduler = read_json(net_file), read_json(schedule_file)
    arch, schedule = architecture(config), noise_schedule(scheduler)
    weights = net_file.parent / WEIGHTS
    require_file(weights, _found_instead(net_file.parent))

    index_file = directory / "model_index.json"
    index = _Options("model_index.json", read_json(index_file) if index_file.exists() else {})
    process = _process(_Options("scheduler_config.json", scheduler), index, schedule, arch.learned_variance)
    return ModelCard(name or directory.name, directory, weights, arch, process)


def _process(options: _Options, index: _Options, schedule: NoiseSchedule, learned: bool) -> Process:
    options.word("thresholding", (False, None), False)
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
        options.word("prediction_type", ("epsilon", "v_prediction", "sample"), "epsilon"),
        learned,
        variance,
        options.word("timestep_spacing", ("leading", "linspace", "trailing"), "leading"),
        options.boolean("clip_sample", True),
        options.number("clip_sample_range", 1e-3, 1e3, 1.0),
        index.integer("default_steps", 1, schedule.T, schedule.T),
    )


def _found_instead(folder: Path) -> str:
    pickles = sorted(p.name for p in folder.iterdir() if p.suffix in {".bin", ".pt", ".ckpt", ".pth", ".pkl"})
    return f" ({pickles[0]!r} is a pickle, which is never read; save the model as safetensors)" if pickles else ""
