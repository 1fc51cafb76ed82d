"""Trains a model directory by the seed's loop: noise a picture to a random t in closed form, learn to name the noise.

    python -m model.train PICTURES weights/digits --images 640000

The directory holds the configurations; training adds the weights (the moving average that does best on held-out
pictures, which is what one serves), `training.jsonl`, and sheets of samples. If it was interrupted, the same command
goes on at the last checkpoint, `training.safetensors`; with `--minutes` it stops by itself, at a checkpoint. If there
is no checkpoint, `--start` names weights to begin with.
Under `torchrun --nproc-per-node N -m model.train ...` the batch is shared by N processes, one per GPU or CPU core.
"""

import json
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from model.checkpoint.card import WEIGHTS
from model.checkpoint.scheduler import read_process
from model.nets.config import Architecture, architecture
from model.nets.lucidrains_config import LUCIDRAINS
from model.options import Options, read_json
from model.sampling.schedule import Process
from model.train.data import Dataset, held_out, load_dataset
from model.train.sheet import sheet, write_png
from model.train.state import resume, save, start_from, write_weights
from model.train.trainer import Losses, Trainer

STATE = "training.safetensors"
SHEET, SHEETS = "samples.png", "samples"  # the latest sheet, and a folder of those before
CHECKPOINT_S = 60  # seconds between checkpoints
WATCHED = 1 / 20  # share of the time that may go into held-out losses, and into sheets
MORE = 1.1  # a sheet is kept when so many times as many pictures were seen as at the last
PROBES = 256  # held-out pictures whose loss is taken


def trainable(directory: Path) -> tuple[Architecture, Process]:
    """The net to train, and its process. Raises ModelRefused if it would be served otherwise than this loop trains it."""
    config = Options("config.json", read_json(directory / "config.json"))
    if config.values.get("_class_name") == LUCIDRAINS:
        raise config.refuse("_class_name", "UNet2DModel or OpenAIUNet to be trained")
    arch = architecture(config.values)
    if arch.learned_variance:
        raise config.refuse("out_channels", f"in_channels ({arch.in_channels}) to be trained: no variance is learned")
    if arch.class_embed_type == "identity":
        raise config.refuse("class_embed_type", "null or timestep to be trained")
    scheduler = Options("scheduler_config.json", read_json(directory / "scheduler_config.json"))
    scheduler.word("prediction_type", ("epsilon",), "epsilon")
    return arch, read_process(scheduler.values, {}, arch.learned_variance)


class Pictures:
    """The pictures of a training, split into those it sees and those it never sees."""

    def __init__(self, source: Path, arch: Architecture, balance: float) -> None:
        dataset = load_dataset(source, arch.shape)
        _require_labels(source.name, dataset, arch)
        if len(dataset.images) < 2:
            raise ValueError(f"{source.name} must hold at least two pictures: of each ten, one is held out")
        self.images = torch.from_numpy(dataset.images)
        self.labels = torch.from_numpy(dataset.labels) if dataset.labels is not None and arch.labels else None
        self.seen, self.unseen = held_out(len(self.images))
        self._weights: NDArray[np.float64] | None = None  # of the pictures that are seen; None: all alike
        if self.labels is not None and balance:
            counts = np.bincount(self.labels[self.seen])
            weights = counts[self.labels[self.seen]] ** -float(balance)
            self._weights = weights / weights.sum()

    def __len__(self) -> int:
        return len(self.images)

    def draw(self, step: int, batch: int) -> tuple[Tensor, Tensor | None]:
        """The batch of an update, always the same. -> [B, C, H, W] in [-1, 1], and its labels"""
        drawn = np.random.default_rng(step).choice(len(self.seen), batch, p=self._weights)
        return self._take(self.seen[drawn])

    def probes(self) -> tuple[Tensor, Tensor | None]:
        """Some of those never seen."""
        return self._take(self.unseen[:PROBES])

    def _take(self, chosen: NDArray[np.int64]) -> tuple[Tensor, Tensor | None]:
        pictures = self.images[chosen].float() / 127.5 - 1
        return pictures, None if self.labels is None else self.labels[chosen]


def _require_labels(name: str, dataset: Dataset, arch: Architecture) -> None:
    """Raises ValueError unless the pictures have the labels that the net is to learn."""
    if arch.labels and dataset.labels is None:
        raise ValueError(f"{name} has no labels (sub-folders, or an array `labels`), which this net is to learn")
    if arch.labels and len(dataset.names) + 1 != arch.labels:
        raise ValueError(
            f"{name} has {len(dataset.names)} labels: config.json must have num_class_embeds {len(dataset.names) + 1}"
            f" (these and the null label), not {arch.labels}"
        )


@dataclass(slots=True)
class Training:
    """A training in progress: its trainer, and the files it writes."""

    trainer: Trainer
    process: Process
    directory: Path
    probes: tuple[Tensor, Tensor | None]  # pictures that are never trained on, and their labels
    clock: Callable[[], float] = time.monotonic
    best: float = field(init=False)  # the moving average to serve
    losses: list[float] = field(default_factory=list)  # since the last line of the log
    _kept: int = 0  # pictures seen at the last sheet that was kept
    _free: dict[str, float] = field(default_factory=dict)  # when each kind of look may be taken again

    def __post_init__(self) -> None:
        self.best = self.trainer.recipe.emas[0]

    def begin(self, start: Path | None) -> bool:
        """Goes on at the checkpoint, if there is one, or begins with the weights in `start`. Returns whether it goes on."""
        resumes = (self.directory / STATE).is_file()
        if resumes:
            resume(self.trainer, self.directory / STATE)
        elif start is not None:
            start_from(self.trainer, start)
        return resumes

    def keep(self, images_per_s: float, last: bool = False) -> dict[str, Any]:
        """Writes a checkpoint: the state, the weights to serve, a line of the log, a sheet. Returns the line.

        last: takes the held-out loss and a sheet even if they would take much of the time
        """
        line: dict[str, Any] = {"images": self.trainer.seen}
        if self.losses:
            line |= {"loss": round(sum(self.losses) / len(self.losses), 5), "images_per_s": round(images_per_s, 1)}
        line |= self._now_and_then("held out", self._held_out, last) or {}
        save(self.trainer, self.directory / STATE)
        write_weights(self.trainer.averages[self.best], self.directory / WEIGHTS)
        with (self.directory / "training.jsonl").open("a") as file:
            file.write(json.dumps(line) + "\n")
        self._now_and_then("sheet", self._sheet, last)
        self.losses = []
        return line

    def _now_and_then(self, kind: str, look: Callable[[], Any], last: bool) -> Any:
        """Takes a look at the net, unless looks of this kind would take more than their share of the time."""
        begun = self.clock()
        if begun < self._free.get(kind, 0) and not last:
            return None
        seen = look()
        self._free[kind] = begun + (self.clock() - begun) / WATCHED
        return seen

    def _held_out(self) -> dict[str, Any]:
        pictures, labels = (None if each is None else each.to(self.trainer.device) for each in self.probes)
        assert pictures is not None
        losses = self.trainer.held_out_losses(pictures, labels)
        means = {ema: sum(each.values()) / len(each) for ema, each in losses.items()}
        self.best = min(means, key=means.__getitem__)
        found: Losses = losses[self.best]
        return {"held_out": found, "ema": self.best, "emas": {ema: round(mean, 5) for ema, mean in means.items()}}

    def _sheet(self) -> None:
        made, folder = sheet(self.trainer, self.process, self.best), self.directory / SHEETS
        write_png(made, self.directory / SHEET)
        if self.trainer.seen >= MORE * self._kept:
            folder.mkdir(exist_ok=True)
            write_png(made, folder / f"{self.trainer.seen:09}.png")
            self._kept = self.trainer.seen
