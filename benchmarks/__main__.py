"""`make bench`: prints a table as it goes and writes JSON lines. On a GPU it is `benchmarks.gpu` that measures."""

import argparse
import math
from collections.abc import Callable, Iterator
from functools import partial
from itertools import chain
from pathlib import Path

import torch

from benchmarks import busy, engine, exactness, full, http, journal, loopback, start, streams
from benchmarks.measure import Measure, report
from benchmarks.models import LARGEST
from server.worker.cpus import cores

DIGITS = Path(__file__).parent / "digits"
NETS = {"digits": "digits", "cifar10": "CIFAR-10 configuration", "large": LARGEST}
SERVER = {
    "busy": busy,
    "full": full,
    "exactness": exactness,
    "loopback": loopback,
    "streams": streams,
    "journal": journal,
    "start": start,
    "http": http,
}


def main() -> None:
    """Runs every benchmark of this machine, or those that are named."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", nargs="+", choices=[*NETS, *SERVER], metavar="PART", help=", ".join([*NETS, *SERVER]))
    parser.add_argument("--compiled", action="store_true", help="the nets alone, beside torch.compile, too")
    parser.add_argument("--out", type=Path, default=Path("build/benchmarks.jsonl"), help="(default: %(default)s)")
    parser.add_argument("--minutes", type=float, default=math.inf, help="begin nothing after these (default: no end)")
    args = parser.parse_args()
    device = torch.device("cpu")
    torch.set_num_threads(cores())
    parts: dict[str, Callable[[], Iterator[Measure]]] = {
        part: partial(engine.measures, device, DIGITS, name, args.compiled) for part, name in NETS.items()
    }
    if not args.compiled:
        parts |= {part: partial(module.measures, device, DIGITS) for part, module in SERVER.items()}
    wanted = [part for part in parts if part in (args.only or parts)]
    report(chain.from_iterable(parts[part]() for part in wanted), args.out, args.minutes)


if __name__ == "__main__":
    main()
