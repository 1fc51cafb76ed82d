"""`make bench`: prints a table as it goes and writes JSON lines. `make gpu`: the same on a GPU."""

import argparse
import math
from itertools import chain
from pathlib import Path

import torch

from benchmarks import engine, exactness, http, journal, loopback, streams
from benchmarks.measure import report
from server.devices import cores

DIGITS = Path(__file__).parent.parent / "weights" / "digits"


def main() -> None:
    """Runs every benchmark of this machine."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--gpu", action="store_true", help="on the first GPU (default: on the CPU)")
    parser.add_argument("--compiled", action="store_true", help="beside torch.compile, too")
    parser.add_argument("--out", type=Path, default=Path("build/benchmarks.jsonl"), help="(default: %(default)s)")
    parser.add_argument("--minutes", type=float, default=math.inf, help="begin nothing after these (default: no end)")
    args = parser.parse_args()
    device = torch.device("cuda" if args.gpu else "cpu")
    torch.set_num_threads(cores())
    served = [] if args.compiled else [exactness, loopback, streams]
    if device.type == "cpu" and served:
        served += [journal, http]
    more = (each.measures(device, DIGITS) for each in served)  # `http` takes longer than `make gpu` may
    report(chain(engine.measures(device, DIGITS, args.compiled), *more), args.out, args.minutes)


if __name__ == "__main__":
    main()
