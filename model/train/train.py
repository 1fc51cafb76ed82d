"""Trains a model directory by the seed's loop: noise a picture to a random t in closed form, learn to name the noise.

    python -m model.train PICTURES weights/digits --images 640000

The directory holds the configurations; training adds the weights (their moving average, which is what one serves) and
`training.jsonl`. If it was interrupted, the same command resumes at the last checkpoint, `training.safetensors`; with
`--minutes` it stops by itself, at a checkpoint. If there is no checkpoint, `--start` names weights to begin with.
Under `torchrun --nproc-per-node N -m model.train ...` the batch is shared by N processes, one per GPU or CPU core.
"""

import argparse
import json
import os
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, distributed

from model.checkpoint.card import WEIGHTS
from model.checkpoint.scheduler import read_process
from model.nets.config import Architecture, architecture
from model.nets.lucidrains_config import LUCIDRAINS
from model.options import Options, read_json
from model.train.data import held_out, load_images
from model.train.trainer import Recipe, Trainer, write_weights

STATE = "training.safetensors"


def _trainable(directory: Path) -> Architecture:
    """The net to train. Raises ModelRefused if it would be served otherwise than this loop trains it."""
    config = Options("config.json", read_json(directory / "config.json"))
    if config.values.get("_class_name") == LUCIDRAINS:
        raise config.refuse("_class_name", "UNet2DModel or OpenAIUNet to be trained")
    arch = architecture(config.values)
    if arch.learned_variance:
        raise config.refuse("out_channels", f"in_channels ({arch.in_channels}) to be trained: no variance is learned")
    scheduler = Options("scheduler_config.json", read_json(directory / "scheduler_config.json"))
    scheduler.word("prediction_type", ("epsilon",), "epsilon")
    return arch


@dataclass(slots=True)
class _Progress:
    """A training in progress: its trainer, and the log lines that no checkpoint has yet."""

    trainer: Trainer
    directory: Path
    probe: Tensor  # [n, C, H, W] pictures that are never trained on
    lines: list[str] = field(default_factory=list)
    losses: list[float] = field(default_factory=list)  # since the last line

    def begin(self, start: Path | None) -> None:
        """Resumes at the checkpoint, if there is one, or begins with the weights in `start`."""
        resumes = (self.directory / STATE).is_file()
        if resumes:
            self.trainer.resume(self.directory / STATE, self.directory / WEIGHTS)
        elif start is not None:
            self.trainer.start_from(start)
        if (resumes or start is not None) and not self.trainer.rank:
            self._log({"held_out": self.trainer.held_out_loss(self.probe)}, "to begin with")

    def log(self, images_per_s: float) -> None:
        """Logs the losses since the last line."""
        trainer, loss = self.trainer, round(sum(self.losses) / len(self.losses), 5)
        line = {"loss": loss, "held_out": trainer.held_out_loss(self.probe), "images_per_s": round(images_per_s, 1)}
        self._log(line, f"{(trainer.recipe.images - trainer.seen) / images_per_s / 60:.0f} min left")
        self.losses = []

    def _log(self, line: dict[str, Any], words: str) -> None:
        self.lines.append(json.dumps({"images": self.trainer.seen} | line))
        print(self.lines[-1], words, flush=True)

    def keep(self) -> None:
        """Writes the checkpoint, the weights in it, and the lines of the log."""
        self.trainer.save(self.directory / STATE)
        write_weights(self.trainer.average, self.directory / WEIGHTS)
        with (self.directory / "training.jsonl").open("a") as file:
            file.writelines(line + "\n" for line in self.lines)
        self.lines = []


def train(source: Path, directory: Path, recipe: Recipe, device: str, start: Path | None = None) -> None:
    """Trains the weights of `directory` on the pictures in `source`, or resumes; prints and logs its progress.

    start: weights to begin with if there is no checkpoint, instead of random ones. Raises ModelRefused if the directory
    cannot be trained, ValueError if the pictures do not fit.
    """
    arch = _trainable(directory)
    schedule = read_process(read_json(directory / "scheduler_config.json"), {}, arch.learned_variance).schedule
    pictures = torch.from_numpy(load_images(source, arch.shape))
    if len(pictures) < 2:
        raise ValueError(f"{source.name} must hold at least two pictures: of each ten, one is held out")
    train_on, test_on = (torch.from_numpy(part) for part in held_out(len(pictures)))
    trainer = Trainer(arch, schedule, recipe, device)
    progress = _Progress(trainer, directory, pictures[test_on[:256]].to(device).float() / 127.5 - 1)
    progress.begin(start)
    started, first, ended = time.monotonic(), trainer.seen, trainer.seen >= recipe.images
    while not ended:
        torch.manual_seed(trainer.step + 1)  # a resumed run sees the same pictures and noise as an uninterrupted one
        drawn = np.random.default_rng(trainer.step).integers(len(train_on), size=recipe.batch)
        chosen = pictures[train_on[torch.from_numpy(drawn)]]
        progress.losses.append(trainer.update(chosen.float() / 127.5 - 1))
        ended = trainer.seen >= recipe.images or trainer.time_is_up(time.monotonic() - started)
        if trainer.rank:
            continue
        if trainer.step % max(1, recipe.log_every // recipe.batch) == 0 or ended:
            progress.log((trainer.seen - first) / (time.monotonic() - started))
        if trainer.step % max(1, recipe.save_every // recipe.batch) == 0 or ended:
            progress.keep()


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the flags of a training."""
    usual = Recipe()
    parser.add_argument(
        "--images", dest="pictures", type=int, default=usual.images, help="pictures to see (%(default)s)"
    )
    parser.add_argument("--batch", type=int, default=usual.batch, help="pictures per update (%(default)s)")
    parser.add_argument("--rate", type=float, default=usual.rate, help="peak learning rate (%(default)s)")
    parser.add_argument("--minutes", type=float, default=usual.minutes, help="stop after so many (default: never)")
    parser.add_argument("--start", type=Path, metavar="WEIGHTS", help="weights to begin with, where no checkpoint is")
    parser.add_argument("--float32", action="store_true", help="no bfloat16 autocast")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="(%(default)s)")


def has_device(name: str) -> bool:
    """Whether tensors can be computed on a device of this name."""
    try:
        return torch.device(name).type in ("cpu", "cuda") and bool(torch.zeros(1, device=name).item() == 0)
    except (RuntimeError, AssertionError):  # the latter: a PyTorch without CUDA
        return False


def run(source: Path, directory: Path, args: argparse.Namespace) -> None:
    """Trains with these flags, alone or as one of the processes that torchrun has started."""
    device = args.device
    if "RANK" in os.environ:
        distributed.init_process_group()
        if device == "cuda":
            device = f"cuda:{os.environ['LOCAL_RANK']}"
    recipe = Recipe(
        images=args.pictures, batch=args.batch, rate=args.rate, autocast=not args.float32, minutes=args.minutes
    )
    train(source, directory, recipe, device, args.start)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", type=Path, help="a folder of images, or an .npz with an array `images`")
    parser.add_argument("directory", type=Path, help="a model directory: config.json and scheduler_config.json")
    add_arguments(parser)
    args = parser.parse_args()
    run(args.source, args.directory, args)


if __name__ == "__main__":
    main()
