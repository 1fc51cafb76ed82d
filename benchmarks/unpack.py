"""Gives this Python what it lacks, from a folder of wheels: for a machine with torch and without a network.

    python -m benchmarks.unpack FOLDER SITE                unpacks the wheels that this Python lacks into SITE
    python -m benchmarks.unpack FOLDER --run ARGUMENTS     runs this Python with them, as `python ARGUMENTS`

What is there already stays as it is: its packages fit each other, and ours would not all fit them. Whatever is run so
leaves nothing behind: packages, compiled for this Python, and compiled kernels lie in a folder that is gone at the end.
"""

import json
import os
import signal
import subprocess
import sys
import tarfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from importlib import metadata
from importlib.util import find_spec
from pathlib import Path
from tempfile import TemporaryDirectory
from zipfile import ZipFile

ROOT = Path(__file__).parent.parent
KERNELS = "kernels.tar.xz"  # in the same folder: kernels that `benchmarks.warm_cache` has compiled


def _there() -> dict[str, str]:
    """The version of each package of this Python. The names are as the packages write them."""
    found = [(each.metadata["Name"], each.version) for each in metadata.distributions()]
    return {name: version for name, version in reversed(found) if name}  # of two the first is imported


def unpack(folder: Path, site: Path) -> list[str]:
    """-> the distributions that are in `site` now"""
    site.mkdir(parents=True, exist_ok=True)
    there = _there()
    if find_spec("packaging") is None:
        sys.path += map(str, folder.glob("packaging-*.whl"))  # a Python with nothing reads it from there
    if not any(folder.glob("*.whl")):
        return []
    from benchmarks.closure import lacking, named, required_by, wheels

    brought, has = wheels(folder), named(there)
    names = lacking(brought, lambda name: required_by(brought[name]) if name in brought else (), has)
    missing = [brought[name] for name in names if name in brought]
    for wheel in missing:
        with ZipFile(wheel) as archive:
            archive.extractall(site)
    return sorted(wheel.name.split("-")[0] for wheel in missing)


def unpack_kernels(archive: Path, cache: Path) -> int:
    """Puts compiled kernels where Triton looks for them, of which it wants to know their full paths. -> how many"""
    cache.mkdir(parents=True, exist_ok=True)
    if not archive.exists():
        return 0
    with tarfile.open(archive) as packed:
        packed.extractall(cache, filter="data")
    described = list(cache.glob("*/*.json"))
    for path in described:
        parts = {part.name: str(part) for part in path.parent.glob(f"{path.stem}.*")}
        (path.parent / f"__grp__{path.name}").write_text(json.dumps({"child_paths": parts}))
    return len(described)


def _compile(site: Path) -> None:
    """On all cores. A module that this Python cannot compile is one that it cannot import: whoever wants it is told."""
    command = [sys.executable, "-m", "compileall", "-qq", "-j", "0", str(site)]
    subprocess.run(command, env=os.environ | {"PYTHONPYCACHEPREFIX": ""}, stdout=subprocess.DEVNULL)


@contextmanager
def environment(folder: Path, kept: Path | None = None) -> Iterator[Mapping[str, str]]:
    """What to add to the environment of a process, so that it finds packages and kernels of this folder, and this tree.

    Relative paths in `PYTHONPATH` stay, behind ours. Nothing is written to the folder or to the tree. Modules that are
    compiled already, those that came with this Python, are read as they are.
    kept: where kernels go that shall be found the next time; if None, they are gone with the packages
    """
    with TemporaryDirectory(prefix="ddpm-") as scratch:
        site, cache = Path(scratch) / "site", kept or Path(scratch) / "triton"
        if unpack(folder, site):
            _compile(site)
        unpack_kernels(folder / KERNELS, cache)
        before = [path for path in (os.environ.get("PYTHONPATH"),) if path]
        yield {
            "PYTHONPATH": os.pathsep.join([str(site), str(ROOT), str(ROOT / "client"), *before]),
            "PYTHONPYCACHEPREFIX": "",
            "PYTHONDONTWRITEBYTECODE": "1",
            "TRITON_CACHE_DIR": str(cache),
        }


def run(folder: Path, arguments: list[str]) -> int:
    """Runs this Python with what it lacked, and passes on a request to end. -> the exit code"""
    with environment(folder) as variables:
        process = subprocess.Popen([sys.executable, *arguments], env=os.environ | dict(variables))
        signal.signal(signal.SIGTERM, lambda *_: process.terminate())
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # the terminal says it to both
        code = process.wait()
    return code if code >= 0 else 128 - code


def main(arguments: list[str]) -> int:
    """Unpacks, or runs something with what has been unpacked."""
    sys.dont_write_bytecode = True
    match arguments:
        case [folder, "--run", *words] if words:
            return run(Path(folder), words)
        case [folder, target] if target != "--run":
            print("unpacked:", *unpack(Path(folder), Path(target)))
            return 0
    print(__doc__, file=sys.stderr)
    return 2


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
