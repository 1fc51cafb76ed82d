"""What a training leaves in its directory: its state, the weights to serve, a log, sheets of samples."""

import json
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from model.checkpoint.card import WEIGHTS
from model.sampling.schedule import Process
from model.train.sheet import forwards, sheet, write_png
from model.train.state import resume, save, start_from, write_weights
from model.train.stop import Stop
from model.train.trainer import PROBE_T, Losses, Trainer

STATE, LOG = "training.safetensors", "training.jsonl"
SHEET, SHEETS = "samples.png", "samples"  # the latest sheet, and a folder of those before
MORE = 1.1  # a sheet is kept there when so many times as many pictures were seen as at the last
FREE_S, WATCHED = 15, 1 / 20  # seconds, and share of the time, that held-out losses may take, and sheets
COST = 3  # of an update, in forward passes
T = TypeVar("T")


@dataclass(slots=True)
class Checkpoints:
    """Writes the files of a training. Those that are served or resumed from are replaced atomically."""

    trainer: Trainer
    process: Process
    directory: Path
    probes: tuple[Tensor, Tensor | None]  # pictures that are never trained on, and their labels
    stop: Stop
    clock: Callable[[], float] = time.monotonic
    best: float = field(init=False)  # the moving average to serve
    losses: list[float] = field(default_factory=list)  # since the last line of the log
    _begun: float = field(init=False)
    _kept: int = 0  # pictures seen at the last sheet that was kept
    _last_s: dict[str, float] = field(default_factory=dict)  # how long each kind of look took
    _spent_s: dict[str, float] = field(default_factory=dict)  # by all looks of a kind

    def __post_init__(self) -> None:
        self.best, self._begun = self.trainer.recipe.emas[0], self.clock()

    def begin(self, start: Path | None) -> bool:
        """Goes on at the checkpoint, if there is one, else begins with the weights in `start`. Returns whether."""
        if (self.directory / STATE).is_file():
            self.best = resume(self.trainer, self.directory / STATE) or self.best
            self._kept = self.trainer.seen
            return True
        if start is not None:
            start_from(self.trainer, start)
        return False

    def keep(self, images_per_s: float, last: bool = False) -> dict[str, Any]:
        """Writes a checkpoint: the state, the weights, a line of the log, a sheet. Returns the line.

        last: takes the held-out loss and a sheet whatever time they need. After a signal it takes neither.
        """
        trainer, speed = self.trainer, COST * images_per_s
        line: dict[str, Any] = {"images": trainer.seen, "seconds": round(trainer.seconds, 1)}
        if self.losses:
            line |= {"loss": round(sum(self.losses) / len(self.losses), 5), "images_per_s": round(images_per_s, 1)}
        cost = len(self.probes[0]) * len(PROBE_T) * len(trainer.averages) / speed
        line |= self._look("held out", cost, last, self.held_out) or {}
        save(trainer, self.directory / STATE, self.best)
        write_weights(trainer.averages[self.best], self.directory / WEIGHTS)
        with (self.directory / LOG).open("a") as file:
            file.write(json.dumps(line) + "\n")
        self.losses = []
        first = not (self.directory / SHEET).exists()
        made = self._look("sheet", forwards() / speed, last or first, self._sheet)
        if made is not None:
            self._write_sheet(made)
        return line

    def _look(self, kind: str, expected_s: float, always: bool, look: Callable[[], T]) -> T | None:
        """What a look at the net shows; nothing if looks of this kind would take more than their share of the time."""
        begun, spent_s = self.clock(), self._spent_s.get(kind, 0.0)
        allowed_s = FREE_S + WATCHED * (begun - self._begun)
        if not always and spent_s + self._last_s.get(kind, expected_s) > allowed_s:
            return None
        seen = self.stop.interruptible(look)
        self._last_s[kind] = self.clock() - begun
        self._spent_s[kind] = spent_s + self._last_s[kind]
        return seen

    def held_out(self) -> dict[str, Any]:
        """The loss on held-out pictures by the moving average that is best on them, which is served from now on."""
        device = self.trainer.device
        pictures, labels = self.probes
        losses = self.trainer.held_out_losses(pictures.to(device), None if labels is None else labels.to(device))
        means = {ema: sum(each.values()) / len(each) for ema, each in losses.items()}
        self.best = min(means, key=means.__getitem__)
        found: Losses = losses[self.best]
        return {"held_out": found, "ema": self.best, "emas": {ema: round(mean, 5) for ema, mean in means.items()}}

    def _sheet(self) -> NDArray[np.uint8]:
        return sheet(self.trainer, self.process, self.best)

    def _write_sheet(self, made: NDArray[np.uint8]) -> None:
        write_png(made, self.directory / SHEET)
        if self.trainer.seen >= MORE * self._kept:
            folder = self.directory / SHEETS
            folder.mkdir(exist_ok=True)
            write_png(made, folder / f"{self.trainer.seen:09}.png")
            self._kept = self.trainer.seen
