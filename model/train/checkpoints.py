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
from model.train.recipe import SHEETS, STATE
from model.train.sheet import forwards_of, rows_in, sheet, write_png
from model.train.state import resume, save, start_from, write_weights
from model.train.stop import Stop
from model.train.trainer import PROBE_T, Losses, Trainer

LOG = "training.jsonl"
SHEET = "samples.png"  # the latest; those before are in SHEETS
MORE = 1.1  # a sheet is kept there when so many times as many pictures were seen as at the last
FREE_S = 15  # seconds that looks of a kind may take beside their share of the time
SHEET_S = 5  # that a sheet takes at most; if the net is slow, it has fewer rows
COST = 3  # of an update, in forward passes
T = TypeVar("T")


@dataclass(slots=True)
class Budget:
    """The time for looks at the net of one kind."""

    share: float  # of the time that the training has taken
    spent_s: float = 0.0
    last_s: float | None = None  # what the last one took

    def allows(self, expected_s: float, elapsed_s: float) -> bool:
        """Whether there is time for another. expected_s: what the first will take"""
        next_s = expected_s if self.last_s is None else self.last_s
        return self.spent_s + next_s <= FREE_S + self.share * elapsed_s

    def pay(self, seconds: float) -> None:
        """Counts one that took so long."""
        self.spent_s, self.last_s = self.spent_s + seconds, seconds


@dataclass(slots=True)
class Checkpoints:
    """Writes the files of a training. Those that are served or resumed from are replaced atomically."""

    trainer: Trainer
    process: Process
    directory: Path
    probes: tuple[Tensor, Tensor | None]  # pictures that are never trained on, and their labels
    stop: Stop
    names: tuple[str, ...] = ()  # of the labels that the net learns
    clock: Callable[[], float] = time.monotonic
    best: float = field(init=False)  # the moving average to serve
    losses: list[float] = field(default_factory=list)  # since the last line of the log
    _begun: float = field(init=False)
    _kept: int = 0  # pictures seen at the last sheet that was kept
    _rows: int = 0  # of the sheets of this run
    _for_losses: Budget = field(default_factory=lambda: Budget(1 / 20))
    _for_sheets: Budget = field(default_factory=lambda: Budget(1 / 10))

    def __post_init__(self) -> None:
        self.best, self._begun = self.trainer.recipe.emas[0], self.clock()

    def begin(self, start: Path | None) -> bool:
        """Goes on at the checkpoint, if there is one, else begins with the weights in `start`. Returns whether."""
        if (self.directory / STATE).is_file():
            self.best = resume(self.trainer, self.directory / STATE, self.names) or self.best
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
        if early := not last and not (self.directory / SHEET).exists():  # whoever has just begun wants to see something
            self._save()
            self._make_sheet(speed, always=True)
        cost = len(self.probes[0]) * len(PROBE_T) * len(trainer.averages) / speed
        line |= self._look(self._for_losses, cost, last, self.held_out) or {}
        self._save()
        with (self.directory / LOG).open("a") as file:
            file.write(json.dumps(line) + "\n")
        self.losses = []
        if not early:
            self._make_sheet(speed, always=last)
        return line

    def _save(self) -> None:
        save(self.trainer, self.directory / STATE, self.best, self.names)
        write_weights(self.trainer.averages[self.best], self.directory / WEIGHTS)

    def _make_sheet(self, speed: float, always: bool) -> None:
        self._rows = self._rows or rows_in(SHEET_S * speed)
        made = self._look(self._for_sheets, forwards_of(self._rows) / speed, always, self._sheet)
        if made is not None:
            self._write_sheet(made)

    def _look(self, budget: Budget, expected_s: float, always: bool, look: Callable[[], T]) -> T | None:
        """What a look at the net shows; nothing if there is no time for it."""
        begun = self.clock()
        if not always and not budget.allows(expected_s, begun - self._begun):
            return None
        seen = self.stop.interruptible(look)
        budget.pay(self.clock() - begun)
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
        return sheet(self.trainer, self.process, self.best, self._rows)

    def _write_sheet(self, made: NDArray[np.uint8]) -> None:
        write_png(made, self.directory / SHEET)
        if self.trainer.seen >= MORE * self._kept:
            folder = self.directory / SHEETS
            folder.mkdir(exist_ok=True)
            write_png(made, folder / f"{self.trainer.seen:09}.png")
            self._kept = self.trainer.seen
