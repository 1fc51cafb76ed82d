"""What a machine lacks of what our server, benchmarks and tests need: found in the packages' own metadata.

python -m benchmarks.closure                            the packages that have to be downloaded, a line each
python -m benchmarks.closure --wheels FROM --into TO    copies those wheels that the machine lacks
    --has FILE    what it has, as `pip list --format=freeze` says there (default: torch, Triton and what they need)
"""

import argparse
import shutil
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from email.parser import Parser
from importlib import metadata
from pathlib import Path
from typing import TypeAlias
from zipfile import ZipFile

from packaging.requirements import InvalidRequirement, Requirement
from packaging.utils import canonicalize_name
from packaging.version import InvalidVersion, Version

LIST = Path(__file__).parent / "gpu-requirements.txt"
THERE = ("torch", "triton")  # whatever is listed, with what they need
OPTIONAL = ("hf-xet",)  # required by huggingface_hub, which downloads without it
# The Python that it is for. Markers ask for these.
PYTHON = {
    "python_version": "3.12",
    "python_full_version": "3.12.0",
    "implementation_name": "cpython",
    "platform_python_implementation": "CPython",
    "sys_platform": "linux",
    "platform_system": "Linux",
    "platform_machine": "x86_64",
    "os_name": "posix",
}

Has: TypeAlias = Mapping[str, str | None]  # the version of each package that is there; None if any will do
Requires: TypeAlias = Callable[[str], Sequence[str]]  # what the metadata of a package requires, line by line


class Unresolved(Exception):
    """A package is required of which nothing is known, or what is there cannot be read."""


def satisfied(requirement: Requirement, has: Has) -> bool:
    """Whether what is there will do: in any version that lies in the range which is asked for.

    It need not be the version that we have pinned, since what is there fits each other, and ours would not all fit it.
    """
    name = canonicalize_name(requirement.name)
    version = has.get(name)
    return name in has and (version is None or requirement.specifier.contains(version, prereleases=True))


def applying(lines: Iterable[str], extras: Iterable[str] = ()) -> Iterator[Requirement]:
    """The requirements among these that this kind of machine has, with those of these extras."""
    for requirement in map(Requirement, lines):
        marker = requirement.marker
        if marker is None or any(marker.evaluate(PYTHON | {"extra": extra}) for extra in ("", *extras)):
            yield requirement


def lacking(names: Iterable[str], requires: Requires, has: Has) -> list[str]:
    """Those of the named packages, and of what they require in turn, that are not there."""
    brought: dict[str, set[str]] = {}  # with the extras that have been looked at
    open = [Requirement(name) for name in names]
    while open:
        requirement = open.pop()
        name = canonicalize_name(requirement.name)
        if satisfied(requirement, has) or (name in brought and requirement.extras <= brought[name]):
            continue
        brought.setdefault(name, set()).update(requirement.extras)
        open += applying(requires(name), brought[name])
    return sorted(brought)


def named(versions: Mapping[str, str]) -> dict[str, str | None]:
    """The same by their canonical names."""
    return {canonicalize_name(name): version for name, version in versions.items()}


def installed(name: str) -> Sequence[str]:
    """What the package of this name requires that is installed here."""
    try:
        return metadata.requires(name) or ()
    except metadata.PackageNotFoundError:
        raise Unresolved(f"{name} is required, and is not installed here") from None


def wheels(folder: Path) -> dict[str, Path]:
    """The wheels in a folder, by the canonical names of what they hold."""
    return {canonicalize_name(wheel.name.split("-")[0]): wheel for wheel in sorted(folder.glob("*.whl"))}


def required_by(wheel: Path) -> Sequence[str]:
    """What the metadata in a wheel requires."""
    with ZipFile(wheel) as archive:
        found = [name for name in archive.namelist() if name.count("/") == 1 and name.endswith(".dist-info/METADATA")]
        lines = [Parser().parsestr(archive.read(name).decode(), headersonly=True) for name in found]
    return [line for message in lines for line in message.get_all("Requires-Dist", [])]


def listed() -> list[str]:
    """The packages that are needed for their own sake."""
    return [line for line in LIST.read_text().splitlines() if line and not line.startswith("#")]


def present(freeze: str | None) -> dict[str, str | None]:
    """What a machine has: torch, Triton and what they need in any version, what need not be there, and these lines."""
    has: dict[str, str | None] = dict.fromkeys((*lacking(THERE, installed, {}), *OPTIONAL))
    for line in (freeze or "").splitlines():
        name, separator, version = line.strip().partition("==")
        if separator:  # others name a place instead of a version: what is there, nobody knows
            has[canonicalize_name(name)] = str(Version(version))
    return has


def pack(source: Path, target: Path, has: Has) -> list[str]:
    """Copies the wheels that are lacking from one folder to another. Raises Unresolved if there is one too few."""
    there = wheels(source)

    def requires(name: str) -> Sequence[str]:
        if name not in there:
            raise Unresolved(f"{name} is required, and {source} has no wheel of it")
        return required_by(there[name])

    names = lacking(listed(), requires, has)
    target.mkdir(parents=True, exist_ok=True)
    for name in names:
        shutil.copy(there[name], target)
    return names


def main() -> int:
    """Prints the names, or copies the wheels."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.closure", description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--wheels", type=Path)
    parser.add_argument("--into", type=Path)
    parser.add_argument("--has", type=Path)
    args = parser.parse_args()
    if (args.wheels is None) != (args.into is None):
        parser.error("--wheels and --into go together")
    try:
        has = present(args.has.read_text() if args.has else None)
        names = pack(args.wheels, args.into, has) if args.wheels else lacking(listed(), installed, has)
    except (Unresolved, OSError, UnicodeDecodeError, InvalidVersion, InvalidRequirement) as error:
        print(f"python -m benchmarks.closure: {error}", file=sys.stderr)
        return 2
    print(*names, sep="\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
