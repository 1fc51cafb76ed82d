"""Converts a state dict by the layout of the net in it. To add a layout, write its module and name it in `LAYOUTS`."""

import re
from collections.abc import Callable, Mapping
from dataclasses import replace
from importlib import import_module
from typing import Any, cast

import torch
from torch import Tensor

from model.checkpoint.weighing import averaged
from model.convert import foreign
from model.convert.flags import LAYOUTS
from model.convert.nets import Net, find, strangers, tables
from model.convert.protocol import OF_BETAS, Converted, Format, Options, refuse_unread
from model.errors import ModelRefused, reason

FORMATS = {name: cast(Format, import_module(f"model.convert.layouts.{at}")) for name, at in LAYOUTS.items()}


def _steps(left: Tensor) -> Tensor:
    """The variances of the steps after which so much of the picture's variance is left."""
    return 1 - left / torch.cat([left.new_ones(1), left[:-1]])


# Tables that tell the whole schedule, by the names that implementations of DDPM give them: the variances of steps.
SCHEDULES: dict[str, Callable[[Tensor], Tensor]] = {
    "betas": lambda betas: betas,
    **dict.fromkeys(("alphas_cumprod", "alphas_bar", "alpha_bar", "alpha_bars", "alpha_hat"), _steps),
    **dict.fromkeys(("sqrt_alphas_cumprod", "sqrt_alphas_bar"), lambda root: _steps(root**2)),
}
OF_A_SCHEDULE = re.compile(r"alpha|beta(?!\d)")


def convert(
    state: Mapping[str, Tensor], options: Options, name: str | None = None, part: str = "", where: str = "the file"
) -> Converted:
    """Converts the net in a state dict: the average, if there are several. Raises ModelRefused.

    name: of its layout, if it is not to be recognised. part: the net's prefix, if it is not to be chosen.
    where: the state dict's place, for what is told
    """
    net, notes = _chosen(state, name, part, where)
    beside = tables(state, net)
    betas = _betas(beside, options)
    options = options if betas is None else replace(options, timesteps=len(betas))
    known = FORMATS[net.layout]
    refuse_unread(options, known.READS, f"the layout {net.layout}")
    try:
        made = known.convert(net, options, beside)
    except KeyError as error:
        raise ModelRefused(f"{ascii(error.args[0])} is missing, which such a net has") from error
    except (ArithmeticError, IndexError, RuntimeError, ValueError) as error:
        raise ModelRefused(f"its tensors do not have the shapes of such a net: {reason(error)}") from error
    scheduler = made.scheduler if betas is None else made.scheduler | {"trained_betas": betas}
    source = "from the betas in the file" if betas is not None else _source(options)
    return replace(made, scheduler=scheduler, notes=(*notes, f"schedule: {_described(scheduler)}; {source}"))


def _chosen(state: Mapping[str, Tensor], name: str | None, part: str, where: str) -> tuple[Net, list[str]]:
    """The net to convert, and lines that say what was taken and what was left. Raises ModelRefused."""
    nets = find(state, {each: known.NAMES for each, known in FORMATS.items() if name in (None, each)})
    fitting = [net for net in nets if not part or f"{net.part}.".startswith(f"{part}.")]
    if not nets and name is not None:
        nets = fitting = [Net(name, "", dict(state))]
    if not nets:
        some = ", ".join(map(ascii, sorted(state)[:3]))
        if what := foreign.recognised(state):
            raise ModelRefused(f"{what}, cannot be converted (its tensors are named {some}, …)")
        raise ModelRefused(f"no known layout of a DDPM has tensors named {some}; there are {', '.join(FORMATS)}")
    if not fitting:
        raise ModelRefused(f"--part must be one of {', '.join(repr(net.part) for net in nets)}")
    net, others = fitting[0], [other.part for other in nets if other is not fitting[0]]
    if not part and (unknown := strangers(state, nets)):
        if what := foreign.recognised(state):
            raise ModelRefused(f"{what}; it cannot be converted")
        raise ModelRefused(
            f"besides a net ({ascii(net.part)}) {where} holds {', '.join(map(ascii, unknown[:5]))}, without which the "
            f"net may give no picture; --part {ascii(net.part)} takes the net alone"
        )
    notes = []
    if net.prefix:
        left = f"; left {', '.join(map(ascii, others))}" if others else ""
        kind = " (an average over training)" if averaged(net.prefix) else ""
        notes.append(f"net: took the tensors below {ascii(net.part)}{kind}{left}")
    return net, notes


def _betas(beside: Mapping[str, Tensor], options: Options) -> list[float] | None:
    """The schedule that lies beside the net in its file, if there is one. Raises ModelRefused."""
    told = [option for option in OF_BETAS if getattr(options, option) is not None]
    name = next((name for name in SCHEDULES if name in beside), None)
    if name is None:
        unknown = [name for name, table in beside.items() if OF_A_SCHEDULE.search(name) and table.numel() > 1]
        if unknown and not told:
            some = ", ".join(map(ascii, unknown[:5]))
            raise ModelRefused(
                f"the file holds a schedule as {some}, which is not read: give --schedule and --timesteps"
            )
        return None
    if told:
        raise ModelRefused(
            "the file holds its own schedule: --schedule, --timesteps, --scheduler and betas must not be given"
        )
    table = beside[name].double()
    if table.ndim != 1:
        raise ModelRefused(f"{name} must be one list of numbers, got {table.ndim} dimensions")
    betas: list[float] = SCHEDULES[name](table).tolist()
    return betas


def _source(options: Options) -> str:
    """Where a schedule comes from that is not in the checkpoint."""
    given = [f"--{name.replace('_', '-')}" for name in OF_BETAS if name != "scheduler" and getattr(options, name)]
    base = "assumed, as is usual for this layout"
    if options.scheduler is not None:
        base = f"from {'/'.join(options.scheduler.absolute().parts[-2:])}"
    return f"{base}, but for {', '.join(given)}" if given else base


def _described(scheduler: Mapping[str, Any]) -> str:
    """A `scheduler_config.json` in a few words."""
    words = [f"T = {scheduler.get('num_train_timesteps', 1000)}"]
    if scheduler.get("trained_betas") is not None:
        words.append("its own betas")
    else:
        low, high = scheduler.get("beta_start", 0.0001), scheduler.get("beta_end", 0.02)
        words.append(f"{scheduler.get('beta_schedule', 'linear')} from {low} to {high}")
    words += [f"{scheduler.get('prediction_type', 'epsilon')}", f"{scheduler.get('variance_type', 'fixed_small')}"]
    clipped = "clipped" if scheduler.get("clip_sample", True) else "not clipped"
    return ascii(", ".join([*words, "thresholded" if scheduler.get("thresholding") else clipped]))[1:-1]
