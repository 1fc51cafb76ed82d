"""Small trainings: a tiny net, forty pictures of noise, a few updates."""

import json
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import safe_open

from model.checkpoint.card import WEIGHTS
from model.train.checkpoints import LOG
from model.train.data import Uint8Array
from model.train.recipe import STATE, Recipe
from model.train.report import Standing
from model.train.trainer import Trainer
from tests.model.convert.directories import write_model
from tests.model.tiny import ARCHITECTURE, PROCESS

RECIPE = Recipe(images=32, batch=8, warm_up=8, emas=(0.9,))


def random(*shape: int) -> Uint8Array:
    return np.random.default_rng(0).integers(0, 256, shape, np.uint8)


def untrained(directory: Path, config: dict[str, Any] | None = None, scheduler: dict[str, Any] | None = None) -> Path:
    """A directory with configurations and no weights, and pictures to fit it in `pictures.npz`, with two labels."""
    (write_model(directory, config, scheduler) / WEIGHTS).unlink()
    np.savez(directory / "pictures.npz", images=random(40, 8, 8), labels=np.arange(40) % 2)
    return directory


def trainer(**recipe: Any) -> Trainer:
    """A trainer of the tiny net."""
    return Trainer(ARCHITECTURE, PROCESS, Recipe(**recipe), "cpu")


def log_of(directory: Path) -> list[dict[str, Any]]:
    """What a training has told of itself in its directory."""
    return [json.loads(line) for line in (directory / LOG).read_text().splitlines()]


def metadata_of(directory: Path) -> dict[str, str]:
    """What a state says of itself."""
    with safe_open(directory / STATE, "pt") as state:
        return dict(state.metadata())


class Told:
    """A report that keeps what it is told."""

    def __init__(self) -> None:
        self.lines: list[str] = []
        self.standings: list[Standing] = []

    def say(self, line: str) -> None:
        self.lines.append(line)

    def reading(self, done: int, count: int) -> None:
        pass

    def update(self, standing: Standing) -> None:
        self.standings.append(standing)
