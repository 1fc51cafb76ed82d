"""The loop of a training: updates, a report, checkpoints by time, and an end at a checkpoint however it comes."""

import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any, Protocol

import torch
from torch import distributed

from model.train.recipe import Recipe
from model.train.train import CHECKPOINT_S, Pictures, Training, trainable
from model.train.trainer import Trainer

MEASURED = 10  # updates after which the speed is told
LINE_S = 10  # seconds between two lines


class Report(Protocol):
    """Tells whoever watches how a training goes."""

    def say(self, line: str) -> None:
        """Something to be read."""

    def update(self, seen: int, images: int, loss: float, images_per_s: float) -> None:
        """After each update: pictures seen, of so many."""


class Lines:
    """A report of lines: one every ten seconds."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock, self._next = clock, clock() + LINE_S

    def say(self, line: str) -> None:
        """See `Report`."""
        print(line, flush=True)

    def update(self, seen: int, images: int, loss: float, images_per_s: float) -> None:
        """See `Report`."""
        if self._clock() >= self._next:
            self._next = self._clock() + LINE_S
            rest = duration((images - seen) / images_per_s)
            self.say(f"{seen} of {images} pictures, loss {loss:.4f}, {images_per_s:.1f} pictures/s, {rest} left")


def duration(seconds: float) -> str:
    """45 s, 12 min, 3 h 05 min."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 90 else f"{minutes // 60} h {minutes % 60:02} min"


class Stop:
    """Whether the training is to end at the next update: after SIGINT, SIGTERM or the minutes of the recipe."""

    def __init__(self, trainer: Trainer, seconds: float) -> None:
        self.trainer, self.signal = trainer, 0
        self._at = time.monotonic() + seconds

    @contextmanager
    def listening(self) -> Iterator[None]:
        """Within it the two signals are noted; a second one interrupts at once."""

        def note(number: int, _: FrameType | None) -> None:
            if self.signal:
                raise KeyboardInterrupt
            self.signal = number

        before = {each: signal.signal(each, note) for each in (signal.SIGINT, signal.SIGTERM)}
        try:
            yield
        finally:
            for each, handler in before.items():
                signal.signal(each, handler)

    def wanted(self) -> bool:
        """Whether any process that shares the batch is to end."""
        wanted = bool(self.signal) or time.monotonic() > self._at
        if self.trainer.world == 1:
            return wanted
        anywhere = torch.tensor(float(wanted), device=self.trainer.device)
        distributed.all_reduce(anywhere, distributed.ReduceOp.MAX)
        return bool(anywhere)


def train(
    source: Path, directory: Path, recipe: Recipe, device: str, start: Path | None = None, report: Report | None = None
) -> int:
    """Trains the weights of `directory` on the pictures in `source`, or goes on. Returns the signal that ended it, or 0.

    start: weights to begin with if there is no checkpoint, instead of random ones. Raises ModelRefused if the directory
    cannot be trained, ValueError if the pictures do not fit.
    """
    arch, process = trainable(directory)
    pictures, report = Pictures(source, arch, recipe.balance), report or Lines()
    trainer = Trainer(arch, process.schedule, recipe, device)
    training = Training(trainer, process, directory, pictures.probes())
    if not training.begin(start) and not trainer.rank:
        report.say(_opening(training, pictures))
    elif not trainer.rank:
        report.say(f"{_opening(training, pictures)}; goes on after {trainer.seen} pictures")
    stop = Stop(trainer, 60 * recipe.minutes)
    with stop.listening():
        _updates(training, pictures, stop, report)
    return stop.signal


def _opening(training: Training, pictures: Pictures) -> str:
    trainer, shape = training.trainer, training.trainer.arch.shape
    labels = f" with {trainer.arch.labels - 1} labels" if trainer.arch.labels else ""
    numbers, count = (
        "bfloat16" if trainer.recipe.autocast else "float32",
        sum(p.numel() for _, p in trainer.parameters()),
    )
    size = f"{shape[2]} x {shape[1]} in {'grey' if shape[0] == 1 else 'colour'}"
    return (
        f"training {training.directory.name}: {len(pictures)} pictures{labels}, {size}; {count:,} parameters, on "
        f"{trainer.device} in {numbers}, {trainer.world} x {torch.get_num_threads()} threads"
    )


def _updates(training: Training, pictures: Pictures, stop: Stop, report: Report) -> None:
    """Updates until all pictures have been seen, or it is to stop."""
    trainer = training.trainer
    images, begun, first = trainer.recipe.images, time.monotonic(), trainer.seen
    next_checkpoint, updates, ended = begun + CHECKPOINT_S, 0, trainer.seen >= images
    while not ended:
        torch.manual_seed(trainer.step + 1)  # a resumed run sees the same pictures and noise as an uninterrupted one
        training.losses.append(trainer.update(*pictures.draw(trainer.step, trainer.recipe.batch)))
        ended, updates = trainer.seen >= images or stop.wanted(), updates + 1
        if trainer.rank:
            continue
        speed = (trainer.seen - first) / (time.monotonic() - begun)
        if updates == MEASURED:
            rest = duration((images - trainer.seen) / speed)
            report.say(
                f"{speed:.1f} pictures per second: {images} pictures in {rest}; each minute a checkpoint and samples"
            )
        report.update(trainer.seen, images, sum(training.losses[-50:]) / len(training.losses[-50:]), speed)
        if ended or time.monotonic() >= next_checkpoint:
            line = training.keep(speed, last=ended)
            next_checkpoint = time.monotonic() + CHECKPOINT_S
            if "held_out" in line:
                report.say(_told(line))
    if not trainer.rank:
        report.say(f"stopped after {trainer.seen} pictures, at a checkpoint" if trainer.seen < images else "done")


def _told(line: dict[str, Any]) -> str:
    losses = ", ".join(f"{loss:.4f} at t = {level / 1000:g} T" for level, loss in line["held_out"].items())
    return f"checkpoint after {line['images']} pictures; held-out loss {losses} (average {line['ema']})"
