"""`make gpu`: what a GPU can show, in stages, from a machine that has it for minutes and no network.

    python -m benchmarks.gpu --only facts smoke correctness speed     the first seven minutes
    python -m benchmarks.gpu --skip facts smoke correctness speed --minutes 6     and what follows
    python -m benchmarks.gpu --dry                                    the same on a CPU, with tiny nets

Every fact is a line of facts.jsonl in $OUT, else in build/gpu/, the moment it is known; beside it lie stages.log and
the weights that were trained. What the wheels in .gpu/ hold and this Python lacks is unpacked for as long as it runs.
"""

import argparse
import math
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from importlib.util import find_spec
from pathlib import Path
from typing import NoReturn

from benchmarks.gpu import kernels
from benchmarks.gpu.facts import Setting
from benchmarks.gpu.run import ROOT, Order, Stage, run

STAGES = [
    Stage("facts", 30, "benchmarks.gpu.machine:parts"),
    Stage("smoke", 80, "benchmarks.gpu.smoke:parts"),
    Stage("correctness", 130, "benchmarks.gpu.correctness:parts"),
    Stage("speed", 170, "benchmarks.gpu.speed:parts"),
    Stage("server", 100, "benchmarks.gpu.server:parts"),
    Stage("compiled", 600, "benchmarks.gpu.compiled:parts"),
    Stage("tiles", 120, "benchmarks.gpu.tiles:parts"),
    Stage("training", math.inf, "benchmarks.gpu.training:parts"),
]
MINUTES, DRY_MINUTES = 30.0, 4.0
DRY_LIMIT_S = 75.0  # of every stage: tiny nets, on a machine that may have other work
MOST_TRAINED = 3  # two files of each come back, beside facts and logs
WHEELS = ROOT / ".gpu"
DIGITS = (ROOT / "weights" / "digits", ROOT / "benchmarks" / "digits.npz")
ONE_THREAD = {"OMP_NUM_THREADS": "1", "DDPM_THREADS": "1"}  # two wait for each other where there is other work
HAS_GPU = "import sys, torch; sys.exit(not torch.cuda.is_available())"


class Parser(argparse.ArgumentParser):
    """Says what is wrong on one line."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: {message}\n")


def parser() -> Parser:
    """What may be asked for."""
    usage = Parser("benchmarks.gpu", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    usage.add_argument("--only", nargs="+", metavar="STAGE", default=[], help=", ".join(s.name for s in STAGES))
    usage.add_argument("--skip", nargs="+", metavar="STAGE", default=[], help="all stages but these")
    usage.add_argument("--minutes", type=float, help=f"all stages together (default: {MINUTES:g}; dry {DRY_MINUTES:g})")
    usage.add_argument("--commit", help="what is measured, where no git can tell (default: $DDPM_COMMIT)")
    usage.add_argument("--dry", action="store_true", help="on the CPU, with tiny nets")
    usage.add_argument(
        "--train",
        nargs=2,
        action="append",
        type=Path,
        metavar=("DIR", "PICTURES"),
        help="a model directory to train on, and with what (default: weights/digits benchmarks/digits.npz)",
    )
    return usage


def chosen(usage: Parser, only: list[str], skip: list[str], dry: bool) -> list[Stage]:
    """The stages that are wanted, in their order."""
    names = [stage.name for stage in STAGES]
    for name in [*only, *skip]:
        if name not in names:
            usage.error(f"there is no stage {name!r}, but {', '.join(names)}")
    wanted = [stage for stage in STAGES if stage.name in (only or names) and stage.name not in skip]
    if not wanted:
        usage.error("no stage is left to run")
    return [Stage(stage.name, DRY_LIMIT_S, stage.work) for stage in wanted] if dry else wanted


def trained(usage: Parser, given: list[list[Path]] | None, dry: bool) -> list[list[str]]:
    """Pairs of a model directory and pictures, in full."""
    pairs = given or ([] if dry else [list(DIGITS)])
    if len(pairs) > MOST_TRAINED or len({directory.resolve().name for directory, _ in pairs}) < len(pairs):
        usage.error(f"--train takes at most {MOST_TRAINED} directories, of different names")
    for directory, pictures in pairs:
        if not (directory / "config.json").is_file():
            usage.error(f"--train: {directory} is no model directory: it has no config.json")
        if not pictures.exists():
            usage.error(f"--train: there are no pictures at {pictures}")
    return [[str(path.resolve()) for path in pair] for pair in pairs]


def folder(usage: Parser) -> Path:
    """Where facts and logs go, made if it is not there."""
    out = Path(os.environ.get("OUT") or ROOT / "build" / "gpu")
    try:
        out.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=out):
            return out
    except OSError as error:
        usage.error(f"{out} cannot be written: {error.strerror}")


@contextmanager
def environment(dry: bool, commit: str | None) -> Iterator[dict[str, str]]:
    """That of the stages: with what the wheels bring, for as long as this lasts. Kernels that a GPU has had compiled
    are kept for the next run, in the system's folder for what is temporary."""
    environ = os.environ | ({"DDPM_COMMIT": commit} if commit else {}) | (ONE_THREAD if dry else {})
    paths = [str(ROOT), str(ROOT / "client"), *filter(None, [os.environ.get("PYTHONPATH")])]
    environ["PYTHONPATH"] = os.pathsep.join(paths)
    if not WHEELS.is_dir():
        yield environ
        return
    from benchmarks import unpack

    cache = Path(os.environ.get("TRITON_CACHE_DIR") or Path(tempfile.gettempdir()) / "ddpm-kernels")
    with unpack.environment(WHEELS, None if dry else cache) as brought:
        yield environ | dict(brought)


def begun(order: Order, stages: list[Stage]) -> AbstractContextManager[None]:
    """Kernels are compiled beside the stages that launch any, for as long as this lasts."""
    if not kernels.STAGES & {stage.name for stage in stages}:
        return nullcontext()
    now = time.time()
    beside = Setting(
        stage="facts",
        work="",
        out=str(order.out.resolve()),
        scratch="",
        dry=order.dry,
        began_s=now,
        until_s=now + 60 * order.minutes,
    )
    return kernels.compiling(beside, order.environ or os.environ)


def main() -> int:
    """Runs what is asked for. Returns the exit code."""
    usage = parser()
    args = usage.parse_args()
    minutes = args.minutes if args.minutes is not None else DRY_MINUTES if args.dry else MINUTES
    if not 0 < minutes < math.inf:
        usage.error(f"--minutes must be a positive number, got {minutes:g}")
    stages, train = chosen(usage, args.only, args.skip, args.dry), trained(usage, args.train, args.dry)
    if find_spec("torch") is None:
        usage.error("torch is not installed, and nothing here runs without")
    out = folder(usage)
    signal.signal(signal.SIGTERM, lambda number, _: sys.exit(128 + number))  # by way of what ends the stage
    if not args.dry and subprocess.run([sys.executable, "-c", HAS_GPU], stderr=subprocess.DEVNULL).returncode:
        usage.error("there is no GPU that torch can use (--dry runs the same on the CPU)")
    with environment(args.dry, args.commit) as environ:
        order = Order(out=out, minutes=minutes, dry=args.dry, train=train, environ=environ)
        with begun(order, stages):
            return int(not run(stages, order, lambda line: print(line, flush=True)))


if __name__ == "__main__":
    sys.exit(main())
