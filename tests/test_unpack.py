"""What a machine without a network is given along is only what it lacks, and nothing of it is left behind."""

import json
import os
import shutil
import subprocess
import sys
from importlib import metadata
from importlib.util import cache_from_source
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


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    """A tree in which nothing has been compiled, with one module beside those that unpack."""
    (tmp_path / "tree" / "benchmarks").mkdir(parents=True)
    for name in ("__init__", "closure", "unpack"):
        shutil.copy(ROOT / "benchmarks" / f"{name}.py", tmp_path / "tree" / "benchmarks")
    (tmp_path / "tree" / "of_the_tree.py").touch()
    return tmp_path / "tree"


def run_with(wheels: Path, tree: Path, *arguments: str, **variables: str) -> list[str]:
    """What this Python prints, run with these wheels from this tree."""
    command = [sys.executable, "-B", "-m", "benchmarks.unpack", str(wheels), "--run", *arguments]
    environ = {name: value for name, value in os.environ.items() if name != "PYTHONDONTWRITEBYTECODE"} | variables
    result = subprocess.run(command, cwd=tree, env=environ, capture_output=True, text=True)
    assert result.returncode == 3, result.stderr
    return result.stdout.split()


def test_what_runs_with_it_finds_it_compiled_and_leaves_nothing_behind(tmp_path: Path, tree: Path) -> None:
    (tmp_path / "wheels").mkdir()
    wheel(tmp_path / "wheels", "surely_not_installed")
    before = names(tmp_path)
    code = """
import sys, os, surely_not_installed as ours, of_the_tree
print(of_the_tree.__file__, ours.__cached__, os.path.exists(ours.__cached__))
sys.exit(3)
"""
    of_the_tree, compiled, was_there = run_with(tmp_path / "wheels", tree, "-c", code)

    assert (of_the_tree, was_there) == (str(tree / "of_the_tree.py"), "True")
    assert not Path(compiled).exists()
    assert names(tmp_path) == before


def test_the_client_of_the_tree_can_be_imported_without_being_installed(tmp_path: Path, tree: Path) -> None:
    (tree / "client" / "ddpm_client").mkdir(parents=True)
    (tree / "client" / "ddpm_client" / "__init__.py").touch()
    code = "import sys, ddpm_client; print(ddpm_client.__file__); sys.exit(3)"
    (imported,) = run_with(tmp_path / "none", tree, "-c", code, PYTHONPATH="")

    assert imported == str(tree / "client" / "ddpm_client" / "__init__.py")


def test_what_came_compiled_with_this_python_is_not_compiled_again(tmp_path: Path, tree: Path) -> None:
    code = "import sys, json; print(json.__cached__); sys.exit(3)"
    (compiled,) = run_with(tmp_path / "none", tree, "-c", code, PYTHONPYCACHEPREFIX=str(tmp_path / "elsewhere"))

    assert compiled == cache_from_source(json.__file__)
    assert not (tmp_path / "elsewhere").exists()


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


def test_kernels_that_shall_be_found_the_next_time_stay_and_are_unpacked_once(tmp_path: Path) -> None:
    there = tmp_path / "there" / "KEY"
    there.mkdir(parents=True)
    (there / "_add.json").write_text("{}")
    pack(tmp_path / "there", tmp_path / "kernels.tar.xz")
    with environment(tmp_path, tmp_path / "kept") as variables:
        assert Path(variables["TRITON_CACHE_DIR"]) == tmp_path / "kept"
        assert not list(Path(variables["PYTHONPATH"].split(os.pathsep)[0]).parent.rglob("*.json"))

    assert names(tmp_path / "kept") == ["KEY", "KEY/__grp___add.json", "KEY/_add.json"]


def test_without_kernels_there_is_an_empty_cache(tmp_path: Path) -> None:
    assert unpack_kernels(tmp_path / "none", tmp_path / "cache") == 0
    assert names(tmp_path / "cache") == []


@pytest.mark.parametrize("words", [[], ["folder"], ["folder", "--run"], ["a", "b", "c"]])
def test_what_it_does_not_understand_is_answered_with_what_it_does(words: list[str]) -> None:
    command = [sys.executable, "-m", "benchmarks.unpack", *words]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)

    assert (result.returncode, result.stdout) == (2, "")
    assert "unpacks the wheels that this Python lacks into SITE" in result.stderr
