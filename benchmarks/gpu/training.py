"""Stage training: models that ship are trained on for the minutes that are left, and come back as safetensors.

Each is trained on in a copy. `NAME.safetensors` are its weights, with which a training can begin (`--start`);
`NAME.training.safetensors` is the whole state, from which it goes on: as `training.safetensors` in a model directory it
is where the next run begins, else the directory's weights are.
"""

import json
import shutil
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import safe_open

from benchmarks.gpu.facts import Fact, Setting
from benchmarks.gpu.stage import Part
from benchmarks.gpu.worlds import device_of, tiny
from model.checkpoint.card import WEIGHTS
from model.train.checkpoints import LOG, Checkpoints
from model.train.data import Pictures
from model.train.flags import uses_bfloat16
from model.train.recipe import STATE, Recipe
from model.train.source import find
from model.train.stop import Stop
from model.train.train import train, trainable
from model.train.trainer import Trainer

KEPT_S = 15.0  # of a model's time, for loading, held-out losses and checkpoints
SHARE = 0.9  # of the pictures that time would allow: the rate must come down to nothing before time is up
WARMING, TRIED = 8, 150  # updates until their pace is that of all, and updates from which it is taken
RECIPE = Recipe(batch=256, rate=5e-4, warm_up=20_000, emas=(0.9995,))
OWN: dict[str, dict[str, Any]] = {"digits": {"label_dropout": 0.15}, "emoji": {"balance": 0.8}}  # as their cards tell
DRY_RECIPE = Recipe(batch=8, rate=1e-3, warm_up=16, emas=(0.999,))


@dataclass(frozen=True, slots=True)
class Pupil:
    """A model to be trained on, and by what."""

    name: str
    directory: Path
    pictures: Path

    @property
    def start(self) -> Path | None:
        """Its weights, if it has any."""
        weights = self.directory / WEIGHTS
        return weights if weights.exists() else None


def parts(setting: Setting) -> list[Part]:
    """They share the time equally."""
    pupils = [Pupil(Path(directory).name, Path(directory), Path(source)) for directory, source in setting.train]
    if setting.dry and not pupils:
        pupils = [Pupil("tiny", tiny(setting), noise(setting))]
    return [partial(trained_on, setting, pupil, len(pupils) - i) for i, pupil in enumerate(pupils)]


def noise(setting: Setting) -> Path:
    """Pictures of nothing."""
    made = Path(setting.scratch) / "noise.npz"
    np.savez(made, images=np.random.default_rng(0).integers(0, 256, (40, 8, 8, 3), np.uint8))
    return made


def trained_on(setting: Setting, pupil: Pupil, sharers: int) -> Iterator[Fact]:
    """Trains a model for its share of the time that is left. Whatever ends it, its last checkpoint comes back."""
    until_s = time.monotonic() + setting.left_s / sharers - KEPT_S
    copy = Path(setting.scratch) / "training" / pupil.name
    try:
        device = device_of(setting).type
        recipe = replace(DRY_RECIPE if setting.dry else RECIPE, autocast=uses_bfloat16("auto", device))
        recipe = replace(recipe, **OWN.get(pupil.name, {}))
        yield from held_out(pupil.name, "before", line_before(pupil, recipe, device))
        pace = pace_of_a_try(pupil, copied(pupil, copy.with_name(f"{pupil.name}-tried")), recipe, device)
        copied(pupil, copy)
        left_s = max(1.0, until_s - time.monotonic())
        images = seen_before(copy) + (64 if setting.dry else round(SHARE * pace * left_s))
        recipe = replace(recipe, images=images, minutes=(seconds_before(copy) + left_s) / 60)
        train(pupil.pictures, copy, recipe, device, pupil.start)
        log = log_in(copy)
        yield from held_out(pupil.name, "after", log[-1])
        yield Fact(f"{pupil.name}: loss of the last updates", float(log[-1]["loss"]))
        yield Fact(f"{pupil.name}: pictures trained on", log[-1]["images"] - seen_before(pupil.directory), main=True)
        yield Fact(f"{pupil.name}: pace of training", float(log[-1]["images_per_s"]), "images/s", main=True)
    finally:
        if seen_before(copy) > seen_before(pupil.directory):  # else there is none but that which it began with
            out = Path(setting.out)
            shutil.copyfile(copy / WEIGHTS, out / f"{pupil.name}.safetensors")
            shutil.copyfile(copy / STATE, out / f"{pupil.name}.training.safetensors")


def copied(pupil: Pupil, target: Path) -> Path:
    """A directory that can be trained on in its stead."""
    target.mkdir(parents=True)
    for name in ("config.json", "scheduler_config.json", WEIGHTS, STATE):
        if (pupil.directory / name).exists():
            shutil.copyfile(pupil.directory / name, target / name)
    return target


def seen_before(directory: Path) -> int:
    """Pictures that its checkpoint has seen, if there is one."""
    return int(_metadata(directory).get("seen", 0))


def seconds_before(directory: Path) -> float:
    """Seconds that its checkpoint was trained for, if there is one."""
    return float(_metadata(directory).get("seconds", 0))


def _metadata(directory: Path) -> dict[str, str]:
    if not (directory / STATE).exists():
        return {}
    with safe_open(directory / STATE, "pt") as state:
        return dict(state.metadata())


def log_in(directory: Path) -> list[dict[str, Any]]:
    """What training has told of itself there."""
    return [json.loads(line) for line in (directory / LOG).read_text().splitlines()]


def line_before(pupil: Pupil, recipe: Recipe, device: str) -> dict[str, Any]:
    """What the log would tell of a model's held-out losses before it is trained on."""
    arch, process = trainable(pupil.directory)
    source, trainer = find(pupil.pictures), Trainer(arch, process, recipe, device)
    probes, names = Pictures(source, arch).probes(), source.names if arch.labels else ()
    checkpoints = Checkpoints(trainer, process, pupil.directory, probes, Stop(), names)
    checkpoints.begin(pupil.start)
    return checkpoints.held_out()


def pace_of_a_try(pupil: Pupil, directory: Path, recipe: Recipe, device: str) -> float:
    """Pictures per second in a few updates of a copy that nobody needs, which is gone then."""
    seen = seen_before(directory)
    for updates in (2, 4) if recipe.batch == DRY_RECIPE.batch else (WARMING, WARMING + TRIED):
        # The second goes on from the first.
        train(pupil.pictures, directory, replace(recipe, images=seen + updates * recipe.batch), device, pupil.start)
    pace = float(log_in(directory)[-1]["images_per_s"])
    shutil.rmtree(directory)
    return pace


def held_out(name: str, when: str, line: dict[str, Any]) -> Iterator[Fact]:
    """The mean of held-out losses at all levels of noise, and each."""
    levels = line["held_out"]
    yield Fact(f"{name}: held-out loss {when}", float(np.mean(list(levels.values()))), more=levels, main=True)
