"""The flags of a training, and what they make of it."""

import argparse
import math
import os
from pathlib import Path

import torch
from torch import distributed

from model.nets.cpu import supports
from model.train.loop import Report, train
from model.train.recipe import Recipe


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the flags of a training."""
    usual = Recipe()
    parser.add_argument(
        "--images", dest="pictures", type=int, default=usual.images, help="pictures to see (%(default)s)"
    )
    parser.add_argument("--batch", type=int, default=usual.batch, help="pictures per update (%(default)s)")
    parser.add_argument("--rate", type=float, default=usual.rate, help="peak learning rate (%(default)s)")
    parser.add_argument(
        "--minutes", type=float, default=math.inf, help="stop after so many, at a checkpoint (default: never)"
    )
    emas = " ".join(map(str, usual.emas))
    parser.add_argument(
        "--ema", type=float, nargs="+", default=usual.emas, help=f"decays of the moving averages ({emas})"
    )
    parser.add_argument(
        "--label-dropout", type=float, default=usual.label_dropout, help="share of pictures without label (%(default)s)"
    )
    parser.add_argument(
        "--balance",
        type=float,
        default=0.0,
        help="0: every picture as often as any other; 1: every label (%(default)s)",
    )
    parser.add_argument("--flips", action="store_true", help="mirror half of the pictures")
    parser.add_argument(
        "--crops", type=int, default=0, metavar="PIXELS", help="move each picture by up to so many (%(default)s)"
    )
    parser.add_argument("--start", type=Path, metavar="WEIGHTS", help="weights to begin with, where no checkpoint is")
    parser.add_argument(
        "--dtype",
        choices=("auto", "float32", "bfloat16"),
        default="auto",
        help="numbers in the net; auto: bfloat16 where the device computes in it",
    )
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="(%(default)s)")


def has_device(name: str) -> bool:
    """Whether tensors can be computed on a device of this name."""
    try:
        return torch.device(name).type in ("cpu", "cuda") and bool(torch.zeros(1, device=name).item() == 0)
    except (RuntimeError, AssertionError):  # the latter: a PyTorch without CUDA
        return False


def uses_bfloat16(wanted: str, device: str) -> bool:
    """Whether the net computes in bfloat16: as asked, or where the device has instructions for it, as when it is served."""
    if wanted != "auto":
        return wanted == "bfloat16"
    if torch.device(device).type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    return supports(torch.bfloat16)


def run(source: Path, directory: Path, args: argparse.Namespace, report: Report | None = None) -> int:
    """Trains with these flags, alone or as one of the processes that torchrun has started. Returns the signal that ended
    it, or 0."""
    device = args.device
    if "RANK" in os.environ:
        distributed.init_process_group()
        if device == "cuda":
            device = f"cuda:{os.environ['LOCAL_RANK']}"
    recipe = Recipe(
        images=args.pictures,
        batch=args.batch,
        rate=args.rate,
        emas=tuple(args.ema),
        autocast=uses_bfloat16(args.dtype, device),
        label_dropout=args.label_dropout,
        balance=args.balance,
        flips=args.flips,
        crops=args.crops,
        minutes=args.minutes,
    )
    return train(source, directory, recipe, device, args.start, report)
