"""Train a model directory by the seed's loop: noise a picture to a random t in closed form, learn to name the noise.

    python -m model.train PICTURES weights/digits --images 640000

The directory holds the configurations; this fills in the weights (their moving average, which is what one serves) and
`training.jsonl`. Stopped at any point, the same command goes on from the last checkpoint, `training.safetensors`; with
`--minutes` it stops by itself, at one. Where there is no checkpoint, `--start` names weights to begin with.
Under `torchrun --nproc-per-node N -m model.train ...` the batch is shared by N processes, one per GPU or CPU core.
"""

import argparse
import json
import os
import time
from pathlib import Path

import numpy as np
import torch
from torch import distributed

from model.checkpoint.card import WEIGHTS, read_process
from model.nets.config import Architecture, architecture
from model.nets.lucidrains_config import LUCIDRAINS
from model.options import Options, read_json
from model.train.data import held_out, load_images
from model.train.trainer import Recipe, Trainer, write_weights

STATE = "training.safetensors"


def _trainable(directory: Path) -> Architecture:
    """The net to train. Raises ModelRefused if what this loop teaches is not what would be asked of it."""
    config = Options("config.json", read_json(directory / "config.json"))
    if config.values.get("_class_name") == LUCIDRAINS:
        raise config.refuse("_class_name", "UNet2DModel or OpenAIUNet to be trained")
    arch = architecture(config.values)
    if arch.learned_variance:
        raise config.refuse("out_channels", f"in_channels ({arch.in_channels}) to be trained: no variance is learned")
    scheduler = Options("scheduler_config.json", read_json(directory / "scheduler_config.json"))
    scheduler.word("prediction_type", ("epsilon",), "epsilon")
    return arch


def train(source: Path, directory: Path, recipe: Recipe, device: str, start: Path | None = None) -> None:
    """Fill `directory` with weights trained on `source`. Resumes; prints and logs progress. start: weights to begin
    with where there is no checkpoint, instead of random ones"""
    arch = _trainable(directory)
    schedule = read_process(read_json(directory / "scheduler_config.json"), {}, arch.learned_variance).schedule
    pictures = torch.from_numpy(load_images(source, arch.shape))
    if len(pictures) < 2:
        raise ValueError(f"{source.name} must hold at least two pictures: of each ten, one is held out")
    train_on, test_on = (torch.from_numpy(part) for part in held_out(len(pictures)))
    probe = pictures[test_on[:256]].to(device).float() / 127.5 - 1
    trainer, log = Trainer(arch, schedule, recipe, device), list[str]()
    if (directory / STATE).is_file():
        trainer.resume(directory / STATE, directory / WEIGHTS)
    elif start is not None:
        trainer.start_from(start)
    if ((directory / STATE).is_file() or start is not None) and not trainer.rank:
        log.append(json.dumps({"images": trainer.seen, "held_out": trainer.held_out_loss(probe)}))
        print(log[-1], "to begin with", flush=True)
    started, first, since_log, ended = time.monotonic(), trainer.seen, list[float](), trainer.seen >= recipe.images
    while not ended:
        torch.manual_seed(trainer.step + 1)  # a resumed run sees the same pictures and noise as one in one piece
        drawn = np.random.default_rng(trainer.step).integers(len(train_on), size=recipe.batch)
        chosen = pictures[train_on[torch.from_numpy(drawn)]]
        since_log.append(trainer.update(chosen.float() / 127.5 - 1))
        ended = trainer.seen >= recipe.images or trainer.time_is_up(time.monotonic() - started)
        if trainer.rank:
            continue
        if trainer.step % max(1, recipe.log_every // recipe.batch) == 0 or ended:
            rate = (trainer.seen - first) / (time.monotonic() - started)
            line = {
                "images": trainer.seen,
                "loss": round(sum(since_log) / len(since_log), 5),
                "held_out": trainer.held_out_loss(probe),
                "images_per_s": round(rate, 1),
            }
            since_log = []
            log.append(json.dumps(line))
            print(log[-1], f"{(recipe.images - trainer.seen) / rate / 60:.0f} min left", flush=True)
        if trainer.step % max(1, recipe.save_every // recipe.batch) == 0 or ended:
            _keep(trainer, directory, log)
            log = []


def _keep(trainer: Trainer, directory: Path, log: list[str]) -> None:
    """Writes the checkpoint, the weights that it gives so far, and what is new in the log."""
    trainer.save(directory / STATE)
    write_weights(trainer.average, directory / WEIGHTS)
    with (directory / "training.jsonl").open("a") as file:
        file.writelines(line + "\n" for line in log)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """How to train, as flags."""
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


def run(source: Path, directory: Path, args: argparse.Namespace) -> None:
    """Trains as those flags say, alone or as one of the processes that torchrun has started."""
    device = args.device
    if "RANK" in os.environ:
        distributed.init_process_group()
        if device == "cuda":
            device = f"cuda:{os.environ['LOCAL_RANK']}"
    recipe = Recipe(args.pictures, args.batch, args.rate, autocast=not args.float32, minutes=args.minutes)
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
