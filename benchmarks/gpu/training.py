"""Stage training: models that ship are trained on for the minutes that are left, and come back as safetensors.

Each is trained on in a copy. `NAME.safetensors` are its weights, `NAME.training.safetensors` is what else is needed to
go on: as `training.safetensors` beside those weights it is where the next run begins, else a directory's weights are.
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
from model.train.train import STATE, train
from model.train.trainer import Recipe, split

KEPT_S = 15.0  # of a model's time, for loading, held-out losses and checkpoints
SHARE = 0.9  # of the pictures that time would allow: the rate must come down to nothing before time is up
WARMING, TRIED = 8, 150  # updates until their pace is that of all, and updates from which it is taken
RECIPE = Recipe(batch=256, rate=5e-4, log_every=25_600, save_every=102_400)
DRY_RECIPE = Recipe(batch=8, rate=1e-3, warm_up=16, log_every=32, save_every=32)


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
        recipe, device = DRY_RECIPE if setting.dry else RECIPE, device_of(setting).type
        tried = log_of_a_try(pupil, copied(pupil, copy.with_name(f"{pupil.name}-tried")), recipe, device)
        yield from held_out(pupil.name, "before", tried[0])
        pace = float(tried[-1]["images_per_s"])
        copied(pupil, copy)
        left_s = max(1.0, until_s - time.monotonic())
        images = seen_before(copy) + (64 if setting.dry else round(SHARE * pace * left_s))
        recipe = replace(recipe, images=images, minutes=left_s / 60)
        train(pupil.pictures, copy, recipe, device, pupil.start)
        log = log_in(copy)
        yield from held_out(pupil.name, "after", log[-1])
        yield Fact(f"{pupil.name}: loss of the last updates", float(log[-1]["loss"]))
        yield Fact(f"{pupil.name}: pictures trained on", log[-1]["images"] - seen_before(pupil.directory), main=True)
        yield Fact(f"{pupil.name}: pace of training", float(log[-1]["images_per_s"]), "images/s", main=True)
    finally:
        if seen_before(copy) > seen_before(pupil.directory):  # else there is none but that which it began with
            out = Path(setting.out)
            split(copy / STATE, out / f"{pupil.name}.safetensors", out / f"{pupil.name}.training.safetensors")


def copied(pupil: Pupil, target: Path) -> Path:
    """A directory that can be trained on in its stead."""
    target.mkdir(parents=True)
    for name in ("config.json", "scheduler_config.json", WEIGHTS, STATE):
        if (pupil.directory / name).exists():
            shutil.copyfile(pupil.directory / name, target / name)
    return target


def seen_before(directory: Path) -> int:
    """Pictures that its checkpoint has seen, if there is one."""
    if not (directory / STATE).exists():
        return 0
    with safe_open(directory / STATE, "pt") as state:
        return int(state.metadata()["seen"])


def log_in(directory: Path) -> list[dict[str, Any]]:
    """What training has told of itself there; if it did not begin with random weights, of those it began with first."""
    return [json.loads(line) for line in (directory / "training.jsonl").read_text().splitlines()]


def log_of_a_try(pupil: Pupil, directory: Path, recipe: Recipe, device: str) -> list[dict[str, Any]]:
    """The log of a few updates of a copy that nobody needs, which is gone then."""
    seen = seen_before(directory)
    for updates in (2, 4) if recipe is DRY_RECIPE else (WARMING, WARMING + TRIED):  # the second goes on from the first
        few = replace(recipe, images=seen + updates * recipe.batch, log_every=10**9, save_every=10**9)
        train(pupil.pictures, directory, few, device, pupil.start)
    log = log_in(directory)
    shutil.rmtree(directory)
    return log


def held_out(name: str, when: str, line: dict[str, Any]) -> Iterator[Fact]:
    """The mean of held-out losses at all levels of noise, and each."""
    levels = line["held_out"]
    yield Fact(f"{name}: held-out loss {when}", float(np.mean(list(levels.values()))), more=levels, main=True)
