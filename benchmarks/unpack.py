"""Unpacks those of the wheels in a folder that this Python lacks: `python -m benchmarks.unpack FOLDER SITE`.

What it has already stays as it is: its packages fit each other, and ours would not all fit them.
"""

import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from zipfile import ZipFile


def lacks(distribution: str) -> bool:
    """Whether no version of this is installed."""
    try:
        version(distribution)
    except PackageNotFoundError:
        return True
    return False


def unpack(folder: Path, site: Path) -> list[str]:
    """-> the distributions that are in `site` now"""
    wheels = {wheel.name.split("-")[0]: wheel for wheel in folder.glob("*.whl")}
    missing = sorted(name for name in wheels if lacks(name))
    site.mkdir(parents=True, exist_ok=True)
    for name in missing:
        with ZipFile(wheels[name]) as archive:
            archive.extractall(site)
    return missing


if __name__ == "__main__":
    print("unpacked:", *unpack(Path(sys.argv[1]), Path(sys.argv[2])))
