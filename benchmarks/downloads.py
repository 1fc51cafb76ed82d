"""What the first `make serve` downloads: the sizes of the wheels that pip chooses, with PyTorch's two builds.

python -m benchmarks.downloads     takes two minutes, and a network, from which it reads metadata only
"""

import argparse
import json
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from urllib.parse import unquote, urlsplit
from urllib.request import Request, urlopen

from benchmarks.measure import ROOT, Measure, report

CPU_WHEELS = "https://download.pytorch.org/whl/cpu/torch/"
PIP = "-m pip install --quiet --dry-run --ignore-installed --report -".split()


def size_bytes(url: str) -> int:
    """The size of a file, which is not downloaded."""
    if url.startswith("file:"):
        return Path(unquote(urlsplit(url).path)).stat().st_size
    with urlopen(Request(url, method="HEAD"), timeout=60) as answer:
        return int(answer.headers["Content-Length"])


def wheels(*options: str) -> list[str]:
    """Where pip would get each package from that the server needs, but for our own."""
    command: list[str | Path] = [
        sys.executable,
        *PIP,
        "--constraint",
        ROOT / "constraints.txt",
        *options,
        ROOT / "client",
        ROOT,
    ]
    told = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    found = [each["download_info"] for each in json.loads(told)["install"]]
    return [each["url"] for each in found if "dir_info" not in each]


def measure(cpu_wheels: str) -> Iterator[Measure]:
    """The sizes of both. cpu_wheels: a folder or a page with PyTorch's build without CUDA"""
    for name, options in (("without CUDA", ("--find-links", cpu_wheels)), ("with CUDA", ())):
        urls = wheels(*options)
        yield Measure(f"the first make serve, {name}: {len(urls)} wheels", sum(map(size_bytes, urls)) / 1e9, "GB")


def main(arguments: Sequence[str] | None = None) -> None:
    """Prints and writes both."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--cpu-wheels", default=CPU_WHEELS, metavar="PLACE", help=f"default: {CPU_WHEELS}")
    parser.add_argument("--out", type=Path, default=ROOT / "build" / "downloads.jsonl", metavar="FILE")
    given = parser.parse_args(arguments)
    report(measure(given.cpu_wheels), given.out)


if __name__ == "__main__":
    main()
