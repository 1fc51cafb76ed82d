"""What the formats of foreign checkpoints have in common: what they are told, and what they give."""

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any, Protocol

from torch import Tensor

from model.errors import ModelRefused


@dataclass(frozen=True, slots=True)
class Options:
    """What a state dict cannot tell, as `ddpm convert` is told by its flags. None: the format's default, if it has one.

    A format that has no default for what it needs calls `required`, which refuses by the flag's name.
    """

    image_size: int | None = None  # pixels of one side
    timesteps: int | None = None  # T
    schedule: str | None = None  # a name in model.schedule.BY_NAME
    beta_start: float | None = None
    beta_end: float | None = None
    prediction: str | None = None  # epsilon, v_prediction, sample
    variance: str | None = None  # fixed_small, fixed_large, learned_range
    clip: bool | None = None
    heads: int | None = None  # of attention
    head_channels: int | None = None  # of each head of attention
    new_attention_order: bool | None = None
    rescale_timesteps: bool | None = None


@dataclass(frozen=True, slots=True)
class Converted:
    """A model directory that is not on disk yet."""

    config: dict[str, Any]  # config.json
    scheduler: dict[str, Any]  # scheduler_config.json
    tensors: dict[str, Tensor]  # in the names that config.json's net has for them
    origin: str  # one line: whose layout this was, and what was taken to be so


# What `asked` reads, and so every format.
OF_THE_SCHEDULER = frozenset({"timesteps", "schedule", "beta_start", "beta_end", "prediction", "variance", "clip"})


class Format(Protocol):
    """A layout that checkpoints come in: a module with this constant and these two functions."""

    READS: frozenset[str]  # the options that it has a use for

    def recognises(self, state: Mapping[str, Tensor]) -> bool:
        """Whether these are the tensors of such a checkpoint, by their names."""

    def convert(self, state: Mapping[str, Tensor], options: Options) -> Converted:
        """The same net in a model directory. Raises ModelRefused, naming what cannot be converted."""


def required(value: Any, flag: str, why: str) -> Any:
    """The option. Raises ModelRefused, naming its flag, if it was not given."""
    if value is None:
        raise ModelRefused(f"{flag} must be given: {why}")
    return value


def refuse_unread(options: Options, read: frozenset[str], what: str) -> None:
    """Raises ModelRefused, naming the flag, if something is told that `what` would pass over in silence."""
    for name in (field.name for field in fields(options)):
        if name not in read and getattr(options, name) is not None:
            raise ModelRefused(f"--{name.replace('_', '-')} must not be given: {what} has no use for it")


def asked(options: Options) -> dict[str, Any]:
    """What was asked for, in the words of `scheduler_config.json`."""
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
    """A `scheduler_config.json`: what was asked for, else Ho's numbers with this variance and schedule."""
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
    return usual | asked(options)
