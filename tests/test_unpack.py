"""What a machine without a network is given along is only what it lacks, and nothing of it is left behind."""

import json
import os
import subprocess
import sys
from importlib import metadata
from pathlib import Path
from zipfile import ZipFile

import pytest

from benchmarks.unpack import environment, unpack, unpack_kernels
from benchmarks.warm_cache import pack

ROOT = Path(__file__).parent.parent


def wheel(folder: Path, name: str, *requires: str) -> None:
    """A wheel of one empty module."""
    lines = [f"Name: {name}", *(f"Requires-Dist: {line}" for line in requires)]
    with ZipFile(folder / f"{name}-9.9-py3-none-any.whl", "w") as archive:
        archive.writestr(f"{name}/__init__.py", "")
        archive.writestr(f"{name}-9.9.dist-info/METADATA", "\n".join(lines))


def names(folder: Path) -> list[str]:
    """What lies in a folder, at any depth."""
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*"))


def test_a_wheel_of_what_is_installed_stays_packed(tmp_path: Path) -> None:
    for name in ("pytest", "prometheus_client", "surely_not_installed"):
        wheel(tmp_path, name)

    assert unpack(tmp_path, tmp_path / "site") == ["surely_not_installed"]
    assert names(tmp_path / "site") == [
        "surely_not_installed",
        "surely_not_installed-9.9.dist-info",
        "surely_not_installed-9.9.dist-info/METADATA",
        "surely_not_installed/__init__.py",
    ]


def test_a_wheel_of_what_is_installed_in_a_version_that_will_not_do_is_unpacked(tmp_path: Path) -> None:
    wheel(tmp_path, "surely_not_installed", "pytest > 9.8", "prometheus-client > 0.0.1", "not-even-a-wheel")
    wheel(tmp_path, "pytest")
    wheel(tmp_path, "prometheus_client")

    assert unpack(tmp_path, tmp_path / "site") == ["pytest", "surely_not_installed"]


def test_without_wheels_there_is_an_empty_folder(tmp_path: Path) -> None:
    assert unpack(tmp_path / "none", tmp_path / "site") == []
    assert (tmp_path / "site").is_dir()


def test_a_python_with_nothing_reads_what_it_needs_for_it_from_the_wheels(tmp_path: Path) -> None:
    files = metadata.files("packaging") or []
    with ZipFile(tmp_path / "packaging-26.3-py3-none-any.whl", "w") as archive:
        for file in files:
            if not file.name.endswith(".pyc"):
                archive.write(file.locate(), str(file))
    wheel(tmp_path, "pytest", "packaging >= 20")
    command = [sys.executable, "-S", "-B", "-m", "benchmarks.unpack", str(tmp_path), str(tmp_path / "site")]
    bare = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    result = subprocess.run(command, cwd=ROOT, env=bare, capture_output=True, text=True)

    assert (result.returncode, result.stdout) == (0, "unpacked: packaging pytest\n"), result.stderr


def test_what_runs_with_it_finds_it_and_leaves_nothing_behind(tmp_path: Path) -> None:
    wheel(tmp_path, "surely_not_installed")
    before = names(tmp_path)
    code = "import sys, surely_not_installed as s, server.errors as e; print(s.__cached__, e.__cached__); sys.exit(3)"
    command = [sys.executable, "-m", "benchmarks.unpack", str(tmp_path), "--run", "-c", code]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)

    assert result.returncode == 3, result.stderr
    compiled = [Path(path) for path in result.stdout.split()]
    assert len(compiled) == 2
    assert [path for path in compiled if path.exists() or path.is_relative_to(ROOT)] == []
    assert names(tmp_path) == before


def test_kernels_go_to_a_cache_that_knows_its_own_place(tmp_path: Path) -> None:
    there = tmp_path / "there" / "KEY"
    there.mkdir(parents=True)
    for name in ("_add.json", "_add.cubin", "_add.ptx", "__grp___add.json", "launcher.so"):
        (there / name).write_text("{}")
    pack(tmp_path / "there", tmp_path / "kernels.tar.xz")
    with environment(tmp_path) as variables:
        here = Path(variables["TRITON_CACHE_DIR"])
        group = json.loads((here / "KEY" / "__grp___add.json").read_text())

        assert names(here) == [
            "KEY",
            *(f"KEY/{name}" for name in ("__grp___add.json", "_add.cubin", "_add.json", "launcher.so")),
        ]
        assert group == {"child_paths": {name: str(here / "KEY" / name) for name in ("_add.cubin", "_add.json")}}
    assert not here.exists()


def test_without_kernels_there_is_an_empty_cache(tmp_path: Path) -> None:
    assert unpack_kernels(tmp_path / "none", tmp_path / "cache") == 0
    assert names(tmp_path / "cache") == []


@pytest.mark.parametrize("words", [[], ["folder"], ["folder", "--run"], ["a", "b", "c"]])
def test_what_it_does_not_understand_is_answered_with_what_it_does(words: list[str]) -> None:
    command = [sys.executable, "-m", "benchmarks.unpack", *words]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)

    assert (result.returncode, result.stdout) == (2, "")
    assert "unpacks the wheels that this Python lacks into SITE" in result.stderr
