"""The protocol of a foreign checkpoint's format: options in, a model directory out; and what all formats share."""

from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any, Protocol

from torch import Tensor

from model.checkpoint.scheduler import todays
from model.convert.nets import Net
from model.errors import ModelRefused
from model.options import read_json


@dataclass(frozen=True, slots=True, kw_only=True)
class Options:
    """Facts that are not in a state dict, from the flags of `ddpm convert`. None: the format's default, if it has one.

    A format without a default for an option that it needs calls `required`, which refuses by the flag's name.
    """

    image_size: int | None = None  # pixels of one side
    timesteps: int | None = None  # T
    schedule: str | None = None  # a name in model.sampling.schedule.BY_NAME
    beta_start: float | None = None
    beta_end: float | None = None
    prediction: str | None = None  # epsilon, v_prediction, sample
    variance: str | None = None  # fixed_small, fixed_large, learned_range
    clip: bool | None = None
    heads: int | None = None  # of attention
    head_channels: int | None = None  # of each head of attention
    new_attention_order: bool | None = None
    rescale_timesteps: bool | None = None
    config: Path | None = None  # a `config.json` of diffusers
    scheduler: Path | None = None  # a `scheduler_config.json`


@dataclass(frozen=True, slots=True)
class Converted:
    """A model directory that is not on disk yet."""

    config: dict[str, Any]  # config.json
    scheduler: dict[str, Any]  # scheduler_config.json
    tensors: dict[str, Tensor]  # by their names in config.json's net
    origin: str  # one line: whose layout this was, and what was assumed
    notes: tuple[str, ...] = ()  # one line each: what was taken and what was left, and where the schedule comes from
    default_steps: int | None = None  # of model_index.json
    presets: Mapping[str, Any] = field(default_factory=dict)  # the same, unchecked
    of_labels: Mapping[str, Any] = field(default_factory=dict)  # what model_index.json says of labels, unchecked


OF_BETAS = ("schedule", "timesteps", "beta_start", "beta_end", "scheduler")
# The options that `requested` reads, and so every layout.
OF_THE_SCHEDULER = frozenset({*OF_BETAS, "prediction", "variance", "clip"})


class Format(Protocol):
    """A layout of checkpoints: a module with these constants and this function."""

    NAMES: frozenset[str]  # of tensors that every such net has, and no other
    READS: frozenset[str]  # the options that it uses

    def convert(self, net: Net, options: Options, tables: Mapping[str, Tensor]) -> Converted:
        """The same net as a model directory. Raises ModelRefused, naming what cannot be converted.

        tables: the tensors beside the net in its file, such as those of its diffusion process. `betas` is read already
        """


def required(value: Any, flag: str, why: str) -> Any:
    """The option's value. Raises ModelRefused, naming its flag, if it was not given."""
    if value is None:
        raise ModelRefused(f"{flag} must be given: {why}")
    return value


def refuse_unread(options: Options, read: frozenset[str], what: str) -> None:
    """Raises ModelRefused, naming the flag, if an option was given that `what` would ignore."""
    for name in (each.name for each in fields(options)):
        if name not in read and getattr(options, name) is not None:
            raise ModelRefused(f"--{name.replace('_', '-')} must not be given: {what} has no use for it")


def requested(options: Options) -> dict[str, Any]:
    """The options of a scheduler that were given, under their names in `scheduler_config.json`."""
    given = {
        "num_train_timesteps": options.timesteps,
        "beta_schedule": options.schedule,
        "beta_start": options.beta_start,
        "beta_end": options.beta_end,
        "prediction_type": options.prediction,
        "variance_type": options.variance,
        "clip_sample": options.clip,
    }
    return {name: value for name, value in given.items() if value is not None}


def scheduler_config(options: Options, variance: str, schedule: str = "linear") -> dict[str, Any]:
    """A `scheduler_config.json`: the given options, else the given file, else Ho's numbers with this variance."""
    if options.scheduler is not None:
        given = todays_scheduler(read_json(options.scheduler))
        if any(getattr(options, name) is not None for name in ("schedule", "beta_start", "beta_end")):
            given["trained_betas"] = None  # which would take precedence over the given options
        return given | requested(options)
    usual = {
        "_class_name": "DDPMScheduler",
        "num_train_timesteps": 1000,
        "beta_schedule": schedule,
        "beta_start": 0.0001,
        "beta_end": 0.02,
        "trained_betas": None,
        "prediction_type": "epsilon",
        "variance_type": variance,
        "clip_sample": True,
    }
    return usual | requested(options)


def todays_scheduler(given: Mapping[str, Any]) -> dict[str, Any]:
    """A `scheduler_config.json` of any age under the names of today, so that today's diffusers reads the same.

    Raises ModelRefused.
    """
    kept = {name: value for name, value in todays(given).items() if name != "timestep_values"}
    if str(kept.get("_class_name")).startswith("Gaussian"):
        kept["_class_name"] = "DDPMScheduler"
    return kept


def with_scaled_betas(options: Options, T: int) -> Options:
    """The options with the betas with which a linear schedule adds the same noise for any T, unless they are given."""
    return replace(options, beta_start=options.beta_start or 0.1 / T, beta_end=options.beta_end or 20 / T)
