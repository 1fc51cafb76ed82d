"""The flags of a training, and what they make of it. torch is imported only to train, so that refusals come at once."""

import argparse
import math
import os
from pathlib import Path

from model.train.recipe import IMAGES, Recipe
from model.train.report import Report

AUTO = "auto"
CPU_BATCH = 16


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the flags of a training."""
    usual, add = Recipe(), parser.add_argument
    told = f"pictures to see ({IMAGES}; with --minutes no limit)"
    add("--images", dest="pictures", type=int, metavar="N", help=told)
    add(
        "--minutes", type=float, default=math.inf, metavar="M", help="minutes to train, in all runs together (no limit)"
    )
    told = f"pictures per update ({usual.batch}; on a CPU {CPU_BATCH}, for updates come slowly there)"
    add("--batch", type=int, metavar="N", help=told)
    add("--rate", type=float, default=usual.rate, metavar="X", help="peak learning rate (%(default)s)")
    told = "pictures for which the rate rises (those of 50 updates, but at most a thirtieth of the training)"
    add("--warm-up", type=int, metavar="N", help=told)
    told = f"decays of moving averages, of which the best is served ({' '.join(map(str, usual.emas))})"
    add("--ema", type=float, nargs="+", default=usual.emas, metavar="X", help=told)
    told = "share of pictures shown without their label, for guidance (%(default)s)"
    add("--label-dropout", type=float, default=usual.label_dropout, metavar="X", help=told)
    told = "0: every picture as often as any other; 1: every label as often as any other (%(default)s)"
    add("--balance", type=float, default=usual.balance, metavar="X", help=told)
    add("--flips", action="store_true", help="mirror half of the pictures, left to right")
    told = "move each picture by up to so many pixels, anew each time (%(default)s)"
    add("--crops", type=int, default=usual.crops, metavar="N", help=told)
    add("--start", type=Path, metavar="FILE", help="weights to begin with, where there is no checkpoint (random ones)")
    told = "numbers in the net; auto: bfloat16 where the processor computes in it, as when serving (%(default)s)"
    add("--dtype", choices=(AUTO, "float32", "bfloat16"), default=AUTO, help=told)
    add("--device", default=AUTO, help="cpu, cuda or cuda:N; auto: cuda where there is one (%(default)s)")


def device_of(wanted: str) -> str:
    """The device by its name in the flags."""
    import torch

    return ("cuda" if torch.cuda.is_available() else "cpu") if wanted == AUTO else wanted


def has_device(name: str) -> bool:
    """Whether tensors can be computed on a device of this name."""
    import torch

    try:
        return torch.device(name).type in ("cpu", "cuda") and bool(torch.zeros(1, device=name).item() == 0)
    except (RuntimeError, AssertionError):  # the latter: a PyTorch without CUDA
        return False


def uses_bfloat16(wanted: str, device: str) -> bool:
    """Whether the net computes in bfloat16: as asked, else where the device has instructions for it, as when served."""
    import torch

    from model.nets.cpu import supports

    if wanted != AUTO:
        return wanted == "bfloat16"
    if torch.device(device).type == "cuda":
        return bool(torch.cuda.is_bf16_supported(including_emulation=False))
    return supports(torch.bfloat16)


def recipe_of(args: argparse.Namespace, device: str = "cpu", autocast: bool = False) -> Recipe:
    """The recipe that the flags make. Raises ValueError."""
    timed = args.pictures is None and args.minutes < math.inf
    usual = CPU_BATCH if device == "cpu" else Recipe().batch
    return Recipe(
        images=None if timed else IMAGES if args.pictures is None else args.pictures,
        batch=usual if args.batch is None else args.batch,
        rate=args.rate,
        warm_up=args.warm_up,
        emas=tuple(args.ema),
        autocast=autocast,
        label_dropout=args.label_dropout,
        balance=args.balance,
        flips=args.flips,
        crops=args.crops,
        minutes=args.minutes,
    )


def run(path: Path, directory: Path, args: argparse.Namespace, report: Report | None = None) -> int:
    """Trains with these flags, alone or as one of the processes that torchrun has started. Returns the signal that
    ended it, or 0. Raises as `model.train.train.train` does."""
    recipe_of(args)  # raises ValueError before anything is loaded
    import torch
    from torch import distributed

    from model.train.train import train

    device = device_of(args.device)
    if "RANK" in os.environ:
        distributed.init_process_group()
        if device == "cuda":
            device = f"cuda:{os.environ['LOCAL_RANK']}"
    recipe = recipe_of(args, device, autocast=uses_bfloat16(args.dtype, device))
    try:
        return train(path, directory, recipe, device, args.start, report)
    except (MemoryError, RuntimeError) as error:  # torch.OutOfMemoryError is one; on a CPU torch raises none
        if not isinstance(error, MemoryError | torch.OutOfMemoryError) and "allocate memory" not in str(error):
            raise
        raise ValueError(f"memory ran out, with {recipe.batch} pictures per update (--batch)") from error
