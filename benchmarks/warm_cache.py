"""Compiles on any machine the Triton kernels that a GPU will run, so that none is compiled there.

    python -m benchmarks.warm_cache --out .gpu/kernels.tar.xz [--arch 90 89]

Each is compiled under the key that a launch on a GPU looks for: that depends on Triton and its compiler, on the source
of the kernel, and on what it is specialised on. What is kept of it is what Triton reads in order to run it: the binary,
its description and the C function that launches it. `benchmarks.unpack` puts them where Triton finds them.
"""

import argparse
import os
import platform
import subprocess
import sys
import tarfile
import time
from collections.abc import Sequence
from importlib import metadata
from pathlib import Path
from tempfile import TemporaryDirectory
from unittest.mock import patch

ARCHS = (90, 89)  # Hopper, Ada
PYTHON, TRITON = "3.12", "3.6.0"  # of the machines with a GPU: others look for other keys
KEPT = (".cubin", ".json", ".so")


def trouble() -> str | None:
    """Why this Python would compile what nobody looks for, or nothing at all."""
    there = {name: "no" for name in ("torch", "triton")}
    for name in there:
        try:
            there[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    version = platform.python_version()
    if version.startswith(f"{PYTHON}.") and there["triton"] == TRITON and there["torch"] != "no":
        return None
    return (
        f"that takes Python {PYTHON} with torch and Triton {TRITON}; "
        f"this is Python {version} with {there['torch']} torch and Triton {there['triton']}"
    )


def fill(cache: Path, archs: Sequence[int]) -> int:
    """Compiles everything into this folder. -> how many kernels"""
    from benchmarks.absent_gpu import compile_launchers
    from benchmarks.kernels_used import compiled, uses

    with patch.dict(os.environ, TRITON_CACHE_DIR=str(cache), TRITON_STORE_BINARY_ONLY="1"):
        kernels = [kernel for arch in archs for kernel in compiled(arch, uses())]
        try:
            compile_launchers(kernels)
        except (RuntimeError, OSError, subprocess.CalledProcessError) as error:
            print(
                f"kernels without what launches them, which takes a C compiler and Python.h: {error}", file=sys.stderr
            )
    return len(kernels)


def pack(cache: Path, out: Path) -> None:
    """What Triton reads of this cache, but for the lists of full paths, in one file."""
    with tarfile.open(out, "w:xz", preset=9) as archive:
        for path in sorted(cache.glob("*/*"), key=lambda path: (path.name, path)):  # like beside like
            if path.suffix in KEPT and not path.name.startswith("__grp__"):
                archive.add(path, str(path.relative_to(cache)))


def main() -> int:
    """Fills a cache, and packs it."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.warm_cache", description=__doc__)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--arch", type=int, nargs="+", default=ARCHS, help="(default: 90 89)")
    args = parser.parse_args()
    reason = trouble()
    if reason is not None:
        print(f"no kernels are compiled beforehand: {reason}", file=sys.stderr)
        return 2
    began = time.monotonic()
    with TemporaryDirectory() as scratch:
        count = fill(Path(scratch), args.arch)
        pack(Path(scratch), args.out)
    size, took = args.out.stat().st_size / 1e6, time.monotonic() - began
    print(f"{count} kernels for {', '.join(f'sm_{arch}' for arch in args.arch)}: {size:.1f} MB, {took:.0f} s")
    return 0


if __name__ == "__main__":
    sys.exit(main())
