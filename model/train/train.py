"""Trains a model directory by the seed's loop: noise a picture to a random t in closed form, and learn to undo it.

The directory's `config.json` and `scheduler_config.json` say what net is trained on which process; so it can be served
as soon as there are weights. Its pictures are a folder of images, with a sub-folder for each label if the net is
conditional, or an .npz with an array `images`, and perhaps `labels`. Every minute, at first sooner, it gets a
checkpoint: the weights (the moving average that is best on held-out pictures), `training.safetensors`, from which the
same command goes on, a line of `training.jsonl`, and `samples.png`, pictures of always the same seeds; earlier ones are
in `samples/`. SIGINT and SIGTERM end it at a checkpoint. Under `torchrun --nproc-per-node N -m -- model.train ...`
the batch is shared by N processes, one per GPU or CPU core.
"""

import time
from collections import deque
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from model.checkpoint.scheduler import read_process
from model.checkpoint.shapes import count, shapes
from model.errors import printable
from model.nets.config import Architecture, architecture
from model.nets.lucidrains_config import LUCIDRAINS
from model.options import Options, read_json
from model.sampling.schedule import Process
from model.train.checkpoints import SHEET, Checkpoints
from model.train.data import Pictures, require_fit
from model.train.recipe import Recipe
from model.train.report import Lines, Report, Standing, duration
from model.train.source import Source, find, require_outside
from model.train.stop import Stop
from model.train.trainer import Trainer, place

__all__ = ["train", "trainable"]
EARLY_S, EVERY_S = (10, 30), 60  # after how long the first checkpoints are written, and all others
MEASURED = 10  # updates after which the speed is told
RECENT = 50  # updates whose mean loss is told


def trainable(directory: Path) -> tuple[Architecture, Process]:
    """The net to train, and its process. Raises ModelRefused if it would be served otherwise than trained."""
    config = Options("config.json", read_json(directory / "config.json"))
    if config.values.get("_class_name") == LUCIDRAINS:
        raise config.refuse("_class_name", "UNet2DModel or OpenAIUNet to be trained")
    arch = architecture(config.values)
    if arch.learned_variance:
        raise config.refuse("out_channels", f"in_channels ({arch.in_channels}) to be trained: no variance is learned")
    if arch.class_embed_type == "identity":
        raise config.refuse("class_embed_type", "null or timestep to be trained")
    scheduler = Options("scheduler_config.json", read_json(directory / "scheduler_config.json"))
    return arch, read_process(scheduler.values, {}, arch.learned_variance)


def train(
    path: Path, directory: Path, recipe: Recipe, device: str, start: Path | None = None, report: Report | None = None
) -> int:
    """Trains the weights of `directory` on the pictures in `path`, or goes on. Returns the signal that ended it, or 0.

    start: weights to begin with if there is no checkpoint, instead of random ones. Raises ModelRefused if the directory
    cannot be trained, ValueError if the pictures do not fit, OSError.
    """
    arch, process = trainable(directory)
    require_outside(directory, path)
    source, report, stop, (rank, _) = find(path), report or Lines(), Stop(), place()
    require_fit(source, arch)
    if not rank:
        report.say(_opening(directory, source, arch, recipe, device))
    pictures = Pictures(source, arch, recipe.balance, None if rank else report.reading)
    trainer = Trainer(arch, process, recipe, device)
    checkpoints = Checkpoints(trainer, process, directory, pictures.probes(), stop, source.names if arch.labels else ())
    if checkpoints.begin(start) and not rank:
        report.say(f"goes on after {trainer.seen:,} pictures")
    with stop.listening():
        Training(trainer, pictures, checkpoints, stop, report).run()
    return stop.signal


def _opening(directory: Path, source: Source, arch: Architecture, recipe: Recipe, device: str) -> str:
    """What is about to be done, in a line."""
    (channels, height, width), numbers = arch.shape, "bfloat16" if recipe.autocast else "float32"
    shape = f"{height} x {width} in {'grey' if channels == 1 else 'colour'}"
    pictures = f"{source.count:,} pictures{_labels(source, arch)}, {shape}"
    net = f"{count(shapes(arch)):,} parameters, on {_place(device)} in {numbers}"
    return printable(f"training {directory.name}: {pictures}; {net}")


def _labels(source: Source, arch: Architecture) -> str:
    """Which labels the net learns of those that the pictures have, or why it learns none."""
    if source.stray is not None:
        return f" without labels ({source.stray.name} lies in no sub-folder)"
    if not source.names:
        return ""
    names = ", ".join(source.names[:3]) + (", …" if len(source.names) > 3 else "")
    unused = "" if arch.labels else ", which config.json has no num_class_embeds for"
    return f" with {len(source.names)} labels ({names}){unused}"


def _place(device: str) -> str:
    _, processes = place()
    shared = f"{processes} processes of " if processes > 1 else ""
    threads = torch.get_num_threads()
    return f"{device} ({shared}{threads} thread{'s' * (threads > 1)})" if device == "cpu" else device


@dataclass(slots=True)
class Training:
    """A training in progress."""

    trainer: Trainer
    pictures: Pictures
    checkpoints: Checkpoints
    stop: Stop
    report: Report
    _begun: float = field(init=False)
    _before: tuple[int, float] = field(init=False)  # pictures seen, and seconds, in earlier runs
    _updating_s: float = 0.0  # seconds of this run without those of checkpoints
    _updates: int = 0
    _recent: deque[float] = field(default_factory=lambda: deque(maxlen=RECENT))

    def __post_init__(self) -> None:
        self._begun, self._before = time.monotonic(), (self.trainer.seen, self.trainer.seconds)

    def run(self) -> None:
        """Updates until all is done or a signal comes; then writes a checkpoint."""
        trainer, next_s = self.trainer, self._next_checkpoint()
        ended = self._done()
        while not ended:
            self._update()
            ended = self.stop.agree(trainer) or self._done()
            if trainer.rank:
                continue
            standing = self._standing()
            if self._updates == MEASURED:
                self.report.say(self._measured(standing))
            self.report.update(standing)
            if ended or self._seconds() >= next_s:
                line = self.checkpoints.keep(standing.images_per_s, last=ended)
                next_s = self._next_checkpoint()
                if "held_out" in line:
                    self.report.say(_told(line))
        if not trainer.rank:
            self.report.say(self._ending())

    def _update(self) -> None:
        trainer, begun = self.trainer, time.monotonic()
        torch.manual_seed(trainer.step + 1)  # a resumed run sees the same pictures and noise as an uninterrupted one
        loss = trainer.update(*self.pictures.draw(trainer.step, trainer.recipe.batch))
        if not trainer.rank:
            self.checkpoints.losses.append(loss)
        self._recent.append(loss)
        self._updating_s += time.monotonic() - begun
        self._updates += 1
        trainer.seconds = self._before[1] + self._seconds()

    def _seconds(self) -> float:
        """Of this run."""
        return time.monotonic() - self._begun

    def _next_checkpoint(self) -> float:
        """When the next one is due, in seconds of this run."""
        now = self._seconds()
        return next((each for each in EARLY_S if each > now), now + EVERY_S)

    def _done(self) -> bool:
        return self.trainer.recipe.done(self.trainer.seen, self.trainer.seconds) >= 1

    def _standing(self) -> Standing:
        trainer, recipe = self.trainer, self.trainer.recipe
        seen = trainer.seen - self._before[0]  # in this run
        left_s = 60 * recipe.minutes - trainer.seconds
        if recipe.images is not None:
            left_s = min(left_s, (recipe.images - trainer.seen) / seen * self._seconds())
        return Standing(
            seen=trainer.seen,
            images=recipe.images,
            loss=sum(self._recent) / len(self._recent),
            images_per_s=seen / max(self._updating_s, 1e-9),
            left_s=max(0.0, left_s),
            done=recipe.done(trainer.seen, trainer.seconds),
        )

    def _measured(self, standing: Standing) -> str:
        left = duration(standing.left_s)
        left = f"{left} left" if standing.images is None else f"{standing.images:,} pictures in {left}"
        sheet = f"{self.checkpoints.directory.name}/{SHEET}"
        return (
            f"{standing.images_per_s:.1f} pictures per second: {left}; what it makes is in {sheet}"
            f" after {EARLY_S[0]} and {EARLY_S[1]} s, then every minute"
        )

    def _ending(self) -> str:
        seen = f"{self.trainer.seen:,} pictures"
        if self._done():
            return f"done after {seen}"
        return f"stopped after {seen}, at a checkpoint: the same command goes on from there"


def _told(line: dict[str, Any]) -> str:
    losses = ", ".join(f"{loss:.4f} at t = {level / 1000:g} T" for level, loss in line["held_out"].items())
    return f"checkpoint after {line['images']:,} pictures; held-out loss {losses} (average {line['ema']})"
