"""`make bench`: prints a table as it goes and writes JSON lines. On a GPU it is `benchmarks.gpu` that measures."""

import argparse
import math
from itertools import chain
from pathlib import Path

import torch

from benchmarks import engine, exactness, full, http, journal, loopback, streams
from benchmarks.measure import report
from server.devices import cores

DIGITS = Path(__file__).parent.parent / "weights" / "digits"


def main() -> None:
    """Runs every benchmark of this machine."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--compiled", action="store_true", help="beside torch.compile, too")
    parser.add_argument("--out", type=Path, default=Path("build/benchmarks.jsonl"), help="(default: %(default)s)")
    parser.add_argument("--minutes", type=float, default=math.inf, help="begin nothing after these (default: no end)")
    args = parser.parse_args()
    device = torch.device("cpu")
    torch.set_num_threads(cores())
    served = [] if args.compiled else [full, exactness, loopback, streams, journal, http]
    more = (each.measures(device, DIGITS) for each in served)
    report(chain(engine.measures(device, DIGITS, args.compiled), *more), args.out, args.minutes)


if __name__ == "__main__":
    main()
